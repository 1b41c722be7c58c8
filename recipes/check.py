"""``leanstep check``: everything that can be known about a run before it starts, and what would stop it.

Nothing of the model's size is allocated. A section that cannot be worked out is a problem, and the others still run.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanstep.recipes.checkpoint import find_checkpoints
from leanstep.recipes.config import RunConfig, accumulation_steps, targets_note
from leanstep.recipes.folder import RunFolder, is_held
from leanstep.recipes.hub import check_hub, from_hub, offline, offline_recipes, unreachable
from leanstep.recipes.loader import dump
from leanstep.recipes.tokenizer import trained_size
from leanstep.recipes.vocabulary import vocabulary_size

__all__ = ["Section", "check", "disk_need", "inspect", "routing_rows"]

LOAD_LIMIT = 64 * 2**20  # local text up to this size is tokenised to count its tokens; the run finds it in the cache
GIB, MIB = 2**30, 2**20


@dataclass
class Section:
    """One part of the report: lines to print, and problems, each of which makes the check fail."""

    title: str
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        """Add a line with a name in front."""
        self.lines.append(f"{name:<15} {text}")


@dataclass
class _Facts:
    """What one section finds out and a later one needs."""

    vocabulary: int = 0
    train_sequences: int | None = None
    offline: bool = False
    device: str = "cpu"
    memory: Any = None


def check(config: RunConfig, *, world_size: int = 1) -> int:
    """Print the report of :func:`inspect`. Returns 0, or 1 when there are problems, which are listed at the end."""
    sections = []
    for section in _sections(config, world_size):
        sections.append(section)
        if section.lines:
            print("\n".join([f"\n{section.title}", *(f"  {line}" for line in section.lines)]), flush=True)
    problems = [f"{section.title.lower()}: {problem}" for section in sections for problem in section.problems]
    if problems:
        print(f"\n{len(problems)} problem{'s' if len(problems) > 1 else ''}")
        print("\n".join(f"  - {problem}" for problem in problems))
        return 1
    print("\nready to train")
    return 0


def inspect(config: RunConfig, *, world_size: int = 1) -> list[Section]:
    """Work out every section of the report, from the recipe and the device to what is in the output folder."""
    return list(_sections(config, world_size))


def _sections(config: RunConfig, world_size: int) -> Iterator[Section]:
    facts = _Facts()
    parts: list[tuple[str, Callable[[Section], None]]] = [
        ("Recipe", lambda section: section.lines.extend(dump(config).splitlines())),
        ("Device", lambda section: _device(config, world_size, section, facts)),
        ("Trackers", lambda section: _trackers(config, section)),
        ("Network", lambda section: _network(config, section, facts)),
        ("Data", lambda section: _data(config, section, facts)),
        ("Length", lambda section: _length(config, world_size, section, facts)),
        ("Parameter groups", lambda section: _groups(config, section, facts)),
        ("Memory", lambda section: _memory(config, world_size, section, facts)),
        ("Disk", lambda section: _disk(config, world_size, section, facts)),
        ("Output", lambda section: _output(config, section)),
    ]
    for title, work in parts:
        section = Section(title)
        try:
            with offline() if facts.offline else nullcontext():
                work(section)
        except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
            section.problems.append(str(error))
        yield section


def _network(config: RunConfig, section: Section, facts: _Facts) -> None:
    """What comes from the hub, and whether it can come: asked once, so that nothing later waits for an answer."""
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
    """Whether a tokenizer or a model is in the hub's cache; of datasets that is not known before they are opened."""
    from huggingface_hub import try_to_load_from_cache

    files = {"data.tokenizer": ("tokenizer.json", "tokenizer_config.json"), "model.init_from": ("config.json",)}
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files.get(key, ()))


def _device(config: RunConfig, world_size: int, section: Section, facts: _Facts) -> None:
    """The device asked for is there, and does what precision and sharding ask of it."""
    import torch

    from leanstep.recipes.build import wants_cpu

    cpu = wants_cpu(config.device)
    facts.device = "cpu" if cpu else str(torch.accelerator.current_accelerator())
    section.add("device", f"{facts.device} (asked for: {config.device})")
    section.add("precision", config.precision)
    section.add("processes", f"{world_size}, {config.distributed.strategy}" if world_size > 1 else "1")
    if cpu and config.precision == "fp16":
        section.problems.append("precision fp16 needs a GPU; take precision=bf16 or precision=fp32")
    if cpu and config.distributed.strategy == "fsdp2":
        section.problems.append("distributed.strategy fsdp2 needs GPUs; take distributed.strategy=ddp")
    if not cpu and world_size > torch.accelerator.device_count():
        section.problems.append(
            f"{world_size} processes need as many devices, there are {torch.accelerator.device_count()}"
        )


def _trackers(config: RunConfig, section: Section) -> None:
    """Trackers asked for are installed; Accelerate would only warn."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    section.add("always", "log.jsonl, report.html")
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    known = sorted(str(getattr(name, "value", name)) for name in LOGGER_TYPE_TO_CLASS)
    for name in config.log.trackers:
        section.add(name, "installed" if name in available else "missing")
        if name not in known:
            section.problems.append(f"{name!r} is not a tracker of Accelerate, which has {', '.join(known)}")
        elif name not in available:
            section.problems.append(f"{name} is not installed: pip install {name}, or take log.trackers=[]")


def _data(config: RunConfig, section: Section, facts: _Facts) -> None:
    """The text is there and is text, the tokenizer opens, and its vocabulary fits the model."""
    data = config.data
    unknown = (
        facts.offline and "data.tokenizer" in from_hub(config) and not _is_cached("data.tokenizer", data.tokenizer)
    )
    if unknown:
        section.add("tokenizer", f"{data.tokenizer}, not in the hub's cache: its vocabulary is not known")
    else:
        facts.vocabulary = _vocabulary(config)
        at_most = "" if trained_size(data.tokenizer) is None else "at most "
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
        from leanstep.recipes.sources import open_corpus, open_stream

        if data.streaming:
            open_stream(data)
        else:
            open_corpus(data)
        section.add("source", f"{data.source} {data.path}, read as text; its tokens are not counted here")
        return
    from leanstep.recipes.data import load_data

    loaded = load_data(data, seed=config.seed, rank=0, world_size=1)
    for name, fact in loaded.facts.items():
        if name != "tokenizer":
            section.add(name, fact)
    facts.train_sequences = len(loaded.train)
    size = vocabulary_size(loaded.tokenizer)
    if size < facts.vocabulary:
        section.add("trained to", f"{size:,} tokens: the text gives no more")
        facts.vocabulary = size


def _vocabulary(config: RunConfig) -> int:
    """Number of ids that text can turn into, which the model must have."""
    from leanstep.recipes.tokenizer import open_tokenizer

    size = trained_size(config.data.tokenizer)
    return size if size is not None else vocabulary_size(open_tokenizer(config.data.tokenizer))


def _text_size(config: RunConfig) -> int:
    """Bytes of the local text on disk; the sample text is small."""
    if config.data.source == "sotu" or not config.data.path:
        return 0
    from leanstep.recipes.sources import find_files

    return sum(file.stat().st_size for file in find_files(config.data.path, config.data.source))


def _length(config: RunConfig, world_size: int, section: Section, facts: _Facts) -> None:
    """Steps, tokens and passes over the text."""
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


def _groups(config: RunConfig, section: Section, facts: _Facts) -> None:
    """Which parameters the optimizer treats how."""
    from leanstep.recipes.build import build_optimizer
    from leanstep.recipes.memory import meta_model

    vocabulary = facts.vocabulary or config.model.config.get("vocab_size")
    if not vocabulary:
        section.add("unknown", "the tokenizer, which decides the model's vocabulary, did not open")
        return
    optimizer = build_optimizer(config.optimizer, meta_model(config, vocabulary))
    section.lines.extend(_table(routing_rows(optimizer)))


def routing_rows(optimizer: Any) -> list[tuple[str, ...]]:
    """A header and one row for each parameter group: name, algorithm, tensors, elements, rate, decay, an example."""
    rows: list[tuple[str, ...]] = [("group", "algorithm", "tensors", "elements", "lr", "decay", "first")]
    for index, group in enumerate(optimizer.param_groups):
        parameters, names = group["params"], group.get("param_names", [])
        rows.append(
            (
                str(group.get("name", index)),
                str(group.get("algorithm", type(optimizer).__name__)),
                str(len(parameters)),
                f"{sum(parameter.numel() for parameter in parameters):,}",
                f"{float(group['lr']):g}",
                f"{group.get('weight_decay', 0):g}",
                names[0] if names else "",
            )
        )
    return rows


def _memory(config: RunConfig, world_size: int, section: Section, facts: _Facts) -> None:
    """Bytes of one process, and whether they fit the device."""
    from leanstep.recipes.memory import estimate

    vocabulary = facts.vocabulary or config.model.config.get("vocab_size")
    if not vocabulary:
        section.add("unknown", "the tokenizer, which decides the model's vocabulary, did not open")
        return
    facts.memory = estimate(config, vocabulary, world_size=world_size, device=facts.device)
    section.lines.extend(_table([(name, _size(size)) for name, size in facts.memory.rows()]))
    free = _free_memory(facts.device)
    if free is None:
        return
    # processes on a CPU share its memory, devices do not
    need = facts.memory.peak * (world_size if facts.device == "cpu" else 1)
    section.add("free now", f"{_size(free)} on {facts.device}")
    if need > free:
        half = max(1, config.batch.micro_batch_size // 2)
        ways = [f"batch.micro_batch_size={half} (same maths)", "activation_checkpointing=true", "precision=bf16-pure"]
        section.problems.append(
            f"{_size(need)} do not fit the {_size(free)} that are free on {facts.device}; in this order: "
            + ", ".join(ways)
        )


def _free_memory(device: str) -> int | None:
    """Free bytes of the device; None where the system does not tell."""
    if device == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        return sizes[0] if sizes else None
    import torch

    return torch.cuda.mem_get_info()[0] if device.startswith("cuda") else None


def disk_need(config: RunConfig, memory: Any, world_size: int = 1) -> tuple[int, int]:
    """Bytes of one checkpoint, and of a run at its fullest: those kept, the best, one being written, final model.

    ``memory`` is that of one process: sharded, each of the ``world_size`` processes writes the part that it holds.
    """
    shards = world_size if config.distributed.strategy == "fsdp2" else 1
    checkpoint = shards * (memory.weights + memory.optimizer_state)
    kept = config.checkpoint.keep_last + 1 + int(config.checkpoint.keep_best)
    return checkpoint, kept * checkpoint + shards * memory.weights


def _disk(config: RunConfig, world_size: int, section: Section, facts: _Facts) -> None:
    """Room for the checkpoints where the run will write."""
    place = Path(config.out).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    section.add("free", f"{_size(free)} in {place}")
    if not os.access(place, os.W_OK):
        section.problems.append(f"{place} cannot be written to; choose another with out=FOLDER")
    if facts.memory is None:
        section.add("checkpoints", "unknown: the memory of the run is not known")
        return
    one, need = disk_need(config, facts.memory, world_size)
    section.add("checkpoint", f"{_size(one)}, {config.checkpoint.keep_last} kept and one being written")
    section.add("needed", f"{_size(need)} with the final model")
    if need > free:
        section.problems.append(
            f"the run needs {_size(need)}, {place} has {_size(free)}; lower checkpoint.keep_last "
            "or choose another disk with out=FOLDER"
        )


def _output(config: RunConfig, section: Section) -> None:
    """Whether the output folder is free, or holds a run that would be continued."""
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
    """How far the run in a folder came, and what ``train`` would do with it."""
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


def _size(size: int) -> str:
    """Bytes in MiB or GiB with as many digits as matter."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows in columns as wide as their widest cell; columns of numbers to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [all(cell[:1].isdigit() for cell in column[1:]) and len(column) > 1 for column in zip(*rows, strict=True)]
    align = [str.rjust if right else str.ljust for right in numeric]
    padded = ([put(cell, width) for put, cell, width in zip(align, row, widths, strict=True)] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]
