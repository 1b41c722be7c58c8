"""``leanstep check``: report the needs of a run and what would stop it, before it starts.

Allocates nothing of the model's size. An error in one section becomes a problem, and the other sections still run.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from leanstep.recipes.check.sections import (
    Facts,
    Section,
    disk,
    initial,
    length,
    memory,
    network,
    output,
    table,
    text,
)
from leanstep.recipes.config.loader import dump
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.data.hub import offline


def check(config: RunConfig, *, world_size: int = 1) -> int:
    """Print the report of :func:`inspect`, problems last. Returns 1 if there are any, else 0."""
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
    """Return every section of the report."""
    return list(_sections(config, world_size))


def _sections(config: RunConfig, world_size: int) -> Iterator[Section]:
    facts = Facts()
    titled: list[tuple[str, Callable[[Section], None]]] = [
        ("Recipe", lambda section: section.lines.extend(dump(config).splitlines())),
        ("Device", lambda section: _device(config, world_size, section, facts)),
        ("Trackers", lambda section: _trackers(config, section)),
        ("Network", lambda section: network(config, section, facts)),
        ("Initial model", lambda section: initial(config, section)),
        ("Data", lambda section: text(config, section, facts)),
        ("Length", lambda section: length(config, world_size, section, facts)),
        ("Parameter groups", lambda section: _groups(config, section, facts)),
        ("Sparsity", lambda section: _sparsity(config, section, facts)),
        ("Pruning", lambda section: _pruning(config, section, facts)),
        ("Memory", lambda section: memory(config, world_size, section, facts)),
        ("Disk", lambda section: disk(config, world_size, section, facts)),
        ("Output", lambda section: output(config, section)),
    ]
    for title, work in titled:
        section = Section(title)
        try:
            with offline() if facts.offline else nullcontext():
                work(section)
        except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
            section.problems.append(str(error))
        yield section


def _device(config: RunConfig, world_size: int, section: Section, facts: Facts) -> None:
    """Check that the device exists and supports the requested precision and sharding."""
    import torch

    from leanstep.recipes.training.build import wants_cpu

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
    """Check that the trackers are installed; Accelerate would only warn."""
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


def _groups(config: RunConfig, section: Section, facts: Facts) -> None:
    """List the parameter groups of the optimizer and their options."""
    from leanstep.recipes.check.memory import meta_model
    from leanstep.recipes.training.build import build_optimizer

    vocabulary = facts.vocabulary or config.model.config.get("vocab_size")
    if not vocabulary:
        section.add("unknown", "the tokenizer, which decides the model's vocabulary, did not open")
        return
    optimizer = build_optimizer(config.optimizer, meta_model(config, vocabulary))
    section.lines.extend(table(routing_rows(optimizer)))


def _sparsity(config: RunConfig, section: Section, facts: Facts) -> None:
    """List the layers that become N:M sparse, the schedule, and the operations in theory and on hardware."""
    if not config.sparsity.patterns:
        return
    from leanstep.recipes.check.memory import meta_model
    from leanstep.recipes.methods.sparse import plan, run_operations, schedule_of
    from leanstep.recipes.training.build import flops_per_token

    vocabulary = facts.vocabulary or config.model.config.get("vocab_size")
    if not vocabulary:
        section.add("unknown", "the tokenizer, which decides the model's vocabulary, did not open")
        return
    model = meta_model(config, vocabulary)
    layers, schedule = plan(config, model), schedule_of(config)
    section.add("method", config.sparsity.method)
    section.add(
        "phases",
        f"{schedule.dense_steps:,} steps dense, {schedule.span:,} on the way, {schedule.finetune_steps:,} at the end",
    )
    operations = run_operations(config, layers, flops_per_token(model, config.data.seq_len))
    theoretical, hardware = operations.fractions()
    section.add("operations", f"{theoretical:.3f} of dense in theory, {hardware:.3f} where hardware multiplies 2:4")
    rows: list[tuple[str, ...]] = [("pattern", "layers", "weights", "way", "first")]
    for target in dict.fromkeys(layer.target for layer in layers):
        same = [layer for layer in layers if layer.target == target]
        count = sum(layer.weight.numel() for layer in same)
        patterns = " ".join(map(str, schedule.frames(target)))
        rows.append((str(target), str(len(same)), f"{count:,}", patterns, same[0].name))
    section.lines.extend(table(rows))


def _pruning(config: RunConfig, section: Section, facts: Facts) -> None:
    """Count the zeros of the initial model that the run keeps."""
    from leanstep.recipes.check.memory import meta_model
    from leanstep.recipes.methods.pruned import masked_names, pruned_start_warning, zeros_of

    if not config.pruning.keep_masks:
        if warning := pruned_start_warning(config):
            section.add("note", warning)
        return
    names = masked_names(config, meta_model(config, facts.vocabulary or 0))
    folder = Path(str(config.model.init_from))
    counts = zeros_of(folder, names)
    if not counts:
        section.add("zeros", f"not counted: no safetensors file in {folder} has these matrices under their names")
        return
    pruned = {name: count for name, count in counts.items() if count[0]}
    if not pruned:
        section.problems.append(
            f"no matrix of {folder} has a zero to keep; prune it first (leanstep prune), or take "
            "pruning.keep_masks=false"
        )
        return
    zeros, total = (sum(column) for column in zip(*pruned.values(), strict=True))
    section.add("zeros", f"{zeros / total:.2%} of {len(pruned)} matrices, {zeros:,} weights, which stay zero")
    if config.lora.target_modules:
        section.add("adapters", "their product is masked where the base is zero, and the merged model keeps its zeros")


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
