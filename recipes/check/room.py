"""``leanstep check``: memory of the device, room on the disk, state of the output folder."""

import os
import shutil
from pathlib import Path

from leanstep._memory import free_memory
from leanstep.recipes.check.sections import Facts, Section, size_text, table
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.training.checkpoint import disk_need, find_checkpoints
from leanstep.recipes.training.folder import RunFolder, is_held


def memory(config: RunConfig, world_size: int, section: Section, facts: Facts) -> None:
    """Estimate the memory of one process and compare it with what is free."""
    from leanstep.recipes.check.memory import estimate
    from leanstep.recipes.training.failures import lighter_state

    vocabulary = facts.vocabulary or config.model.config.get("vocab_size")
    if not vocabulary:
        section.add("unknown", "the tokenizer, which decides the model's vocabulary, did not open")
        return
    facts.memory = estimate(config, vocabulary, world_size=world_size, device=facts.device)
    section.lines.extend(table([(name, size_text(size)) for name, size in facts.memory.rows()]))
    free = free_memory(facts.device)
    if free is None:
        return
    # processes on a CPU share its memory, devices do not
    need = facts.memory.peak * (world_size if facts.device == "cpu" else 1)
    section.add("free now", f"{size_text(free)} on {facts.device}")
    if need > free:
        half = max(1, config.batch.micro_batch_size // 2)
        ways = [f"batch.micro_batch_size={half} (same maths)", "activation_checkpointing=true", "precision=bf16-pure"]
        state = [f"{setting} ({why})" for setting, why in lighter_state(config)]
        if state:
            # what the state alone does not leave room for, smaller batches will not win back
            ways = [*state, *ways] if facts.memory.optimizer_state > free // 2 else [*ways, *state]
        section.problems.append(
            f"{size_text(need)} do not fit the {size_text(free)} that are free on {facts.device}; in this order: "
            + ", ".join(ways)
        )


def disk(config: RunConfig, world_size: int, section: Section, facts: Facts) -> None:
    """Compare the size of the checkpoints with the free disk."""
    folder = Path(config.out).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    section.add("free", f"{size_text(free)} in {folder}")
    if not os.access(folder, os.W_OK):
        section.problems.append(f"{folder} cannot be written to; choose another with out=FOLDER")
    if facts.memory is None:
        section.add("checkpoints", "unknown: the memory of the run is not known")
        return
    checkpoint, need = disk_need(config, facts.memory, world_size)
    section.add("checkpoint", f"{size_text(checkpoint)}, {config.checkpoint.keep_last} kept and one being written")
    section.add("needed", f"{size_text(need)} with the final model")
    if need > free:
        section.problems.append(
            f"the run needs {size_text(need)}, {folder} has {size_text(free)}; lower checkpoint.keep_last "
            "or choose another disk with out=FOLDER"
        )


def output(config: RunConfig, section: Section) -> None:
    """Say whether the output folder is free or holds a run, and what ``train`` would do with it."""
    out = Path(config.out)
    section.add("folder", str(out))
    if out.exists() and not out.is_dir():
        section.problems.append(f"{out} is a file; choose another with out=FOLDER")
        return
    if is_held(out):
        section.problems.append(f"another process is training in {out}; wait for it, or choose out=ANOTHER_FOLDER")
        return
    folder = RunFolder(out)
    if folder.is_empty():
        section.add("found", "no run: a new one begins")
        return
    if not (out / "config.yaml").is_file() and not (out / "checkpoints").is_dir():
        section.problems.append(f"{out} is not empty and holds no run; choose another with out=FOLDER")
        return
    section.add("found", _describe_run(folder))
    if config.checkpoint.resume == "never":
        section.problems.append(f"{out} already holds a run and checkpoint.resume is never; choose out=ANOTHER_FOLDER")


def _describe_run(folder: RunFolder) -> str:
    """Describe the state of the run in a folder, and what ``train`` would do with it."""
    status = folder.read_status()
    word, step = status.get("status", "a run without status.json"), status.get("step", "?")
    if word == "done":
        return f"a run that is done (step {step}): `train` leaves it as it is"
    if word == "running":
        word = "crashed: status.json says that it is running, but no process holds the folder"
    saved = find_checkpoints(folder.checkpoints)
    if not saved:
        return f"a run at step {step} ({word}) without a complete checkpoint: `train` begins it again at step 0"
    return f"a run at step {step} ({word}): `train` continues from its newest complete checkpoint, {saved[-1].name}"
