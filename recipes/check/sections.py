"""Sections of ``leanstep check``: network, initial model, text, length, memory, disk and output folder."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanstep._memory import free_memory
from leanstep.recipes.config.schema import RunConfig, accumulation_steps, targets_note
from leanstep.recipes.data.hub import check_hub, from_hub, is_folder_name, offline, offline_recipes, unreachable
from leanstep.recipes.data.tokens import open_tokenizer, trained_size, vocabulary_size
from leanstep.recipes.training.checkpoint import disk_need, find_checkpoints
from leanstep.recipes.training.folder import RunFolder, is_held

LOAD_LIMIT = 64 * 2**20  # tokenise local text up to this size to count its tokens; the run reuses the cache
GIB, MIB = 2**30, 2**20


@dataclass
class Section:
    """One section of the report: lines to print, and problems. Any problem makes the check fail."""

    title: str
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        """Add a line with a name in front."""
        self.lines.append(f"{name:<15} {text}")


@dataclass
class Facts:
    """Results that later sections use."""

    vocabulary: int = 0
    train_sequences: int | None = None
    offline: bool = False
    device: str = "cpu"
    memory: Any = None


def size_text(size: int) -> str:
    """Format bytes as MiB or GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Format rows as aligned columns; columns of numbers are flush right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [all(cell[:1].isdigit() for cell in column[1:]) and len(column) > 1 for column in zip(*rows, strict=True)]
    align = [str.rjust if right else str.ljust for right in numeric]
    padded = ([put(cell, width) for put, cell, width in zip(align, row, widths, strict=True)] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]


def network(config: RunConfig, section: Section, facts: Facts) -> None:
    """List what the run downloads from the hub. Asks once whether the hub answers; later sections reuse the answer."""
    base = config.model.init_from
    if base and is_folder_name(base) and not Path(base).expanduser().exists():
        section.problems.append(f"model.init_from: the folder '{base}' does not exist; train what writes it first")
    wanted = from_hub(config)
    if not wanted:
        return
    section.add("from the hub", ", ".join(f"{name} ({key})" for key, name in wanted.items()))
    reason = unreachable()
    if reason is None:
        section.add("hub", "can be reached")
        return
    facts.offline = True
    with offline():
        missing = {key: name for key, name in wanted.items() if not _is_cached(key, name)}
    section.add("hub", f"cannot be reached ({reason})")
    section.add("offline recipes", ", ".join(offline_recipes()))
    if missing:
        names = ", ".join(f"{name} ({key})" for key, name in missing.items())
        section.problems.append(
            f"needs the network: {names}; offline recipes: {', '.join(offline_recipes())}; or copy the data here and "
            "set data.source, data.path and data.tokenizer"
        )


def _is_cached(key: str, name: str) -> bool:
    """Whether a tokenizer or model is in the hub's cache. False for datasets, which must be opened to know."""
    from huggingface_hub import try_to_load_from_cache

    files = {"data.tokenizer": ("tokenizer.json", "tokenizer_config.json"), "model.init_from": ("config.json",)}
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files.get(key, ()))


def initial(config: RunConfig, section: Section) -> None:
    """Check that the files of ``model.init_from`` hold every weight of the model, in its shape; no weight is read."""
    source = config.model.init_from
    if not source:
        return
    from leanstep.pruning.folder.loading import check_weights
    from leanstep.recipes.training.build import initial_problem

    section.add("from", source)
    if not Path(source).expanduser().is_dir():
        section.add("weights", "not compared: they are not in a folder here")
        return
    try:
        check_weights(source, new_heads=config.model.new_heads)
    except ValueError as error:
        raise ValueError(initial_problem(error)) from error
    drawn = f", but for {', '.join(config.model.new_heads)}, drawn anew" if config.model.new_heads else ""
    section.add("weights", f"fit its config.json{drawn}")


def text(config: RunConfig, section: Section, facts: Facts) -> None:
    """Check that the text is readable, the tokenizer opens and its vocabulary fits the model."""
    data = config.data
    unknown = (
        facts.offline and "data.tokenizer" in from_hub(config) and not _is_cached("data.tokenizer", data.tokenizer)
    )
    if unknown:
        section.add("tokenizer", f"{data.tokenizer}, not in the hub's cache: its vocabulary is not known")
    else:
        size = trained_size(data.tokenizer)
        facts.vocabulary = size if size is not None else vocabulary_size(open_tokenizer(data.tokenizer))
        at_most = "" if size is None else "at most "
        section.add("tokenizer", f"{data.tokenizer}, {at_most}{facts.vocabulary:,} tokens")
    wanted = config.model.config.get("vocab_size")
    if wanted is not None:
        section.add("model", f"vocabulary of {wanted:,}")
    if wanted is not None and facts.vocabulary > wanted:
        section.problems.append(
            f"the tokenizer {data.tokenizer} produces {facts.vocabulary:,} tokens, model.config.vocab_size is "
            f"{wanted:,}; raise it, or leave it out to take the tokenizer's"
        )
    if data.source == "hf":
        if facts.offline:
            section.add("source", f"hub dataset {data.name}, not looked for")
            return
        check_hub(data.name or "")
        section.add("source", f"hub dataset {data.name} is there")
        return
    if data.streaming or unknown or _text_size(config) > LOAD_LIMIT:
        from leanstep.recipes.data.sources import open_corpus, open_stream

        if data.streaming:
            open_stream(data)
        else:
            open_corpus(data)
        section.add("source", f"{data.source} {data.path}, read as text; its tokens are not counted here")
        return
    from leanstep.recipes.data.sequences import load_data

    loaded = load_data(data, seed=config.seed, rank=0, world_size=1)
    for name, fact in loaded.facts.items():
        if name != "tokenizer":
            section.add(name, fact)
    facts.train_sequences = len(loaded.train)
    size = vocabulary_size(loaded.tokenizer)
    if size < facts.vocabulary:
        section.add("trained to", f"{size:,} tokens: the text gives no more")
        facts.vocabulary = size


def _text_size(config: RunConfig) -> int:
    """Bytes of the local text on disk; 0 for the sample text, which is small."""
    if config.data.source == "sotu" or not config.data.path:
        return 0
    from leanstep.recipes.data.sources import find_files

    return sum(file.stat().st_size for file in find_files(config.data.path, config.data.source))


def length(config: RunConfig, world_size: int, section: Section, facts: Facts) -> None:
    """Count steps, tokens and epochs."""
    batch, seq_len = config.batch, config.data.seq_len
    accumulation = accumulation_steps(config, world_size)
    sequences = batch.tokens_per_step // seq_len
    section.add("steps", f"{config.steps:,}")
    section.add("tokens", f"{config.steps * batch.tokens_per_step:,} ({batch.tokens_per_step:,} a step)")
    section.add(
        "one step",
        f"{sequences} sequences of {seq_len}: {world_size} process{'es' if world_size > 1 else ''} x {accumulation} "
        f"passes x {batch.micro_batch_size} sequences",
    )
    section.add("targets", targets_note(seq_len))
    if facts.train_sequences is None:
        section.add("epochs", "unknown: the text has not been counted")
        return
    section.add("epochs", f"{config.steps * sequences / facts.train_sequences:.2f}")
    if facts.train_sequences < sequences:
        section.problems.append(
            f"one step takes {sequences} sequences, the text has {facts.train_sequences}; lower batch.tokens_per_step "
            "or give more text"
        )


def memory(config: RunConfig, world_size: int, section: Section, facts: Facts) -> None:
    """Estimate the memory of one process and compare it with the free memory."""
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
        hints = [f"batch.micro_batch_size={half} (same maths)", "activation_checkpointing=true", "precision=bf16-pure"]
        state = [f"{setting} ({why})" for setting, why in lighter_state(config)]
        if state:
            # smaller batches do not help when the optimizer state alone fills the memory
            hints = [*state, *hints] if facts.memory.optimizer_state > free // 2 else [*hints, *state]
        section.problems.append(
            f"{size_text(need)} do not fit the {size_text(free)} that are free on {facts.device}; in this order: "
            + ", ".join(hints)
        )


def disk(config: RunConfig, world_size: int, section: Section, facts: Facts) -> None:
    """Compare the size of the checkpoints with the free disk space."""
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
    """State whether the output folder is free or holds a run, and what ``train`` would do with it."""
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
