"""Estimate memory, disk and time of pruning a checkpoint from its configuration and the headers of its files.

What a phase takes, its own file says; this one adds up, and measures the rates of this machine.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from leanstep._files import free_bytes
from leanstep._memory import free_memory
from leanstep.pruning.compress.menu import ends_of
from leanstep.pruning.cost import Bytes, Cost, Plan, Rates, Shapes, Workload
from leanstep.pruning.folder.files import DTYPES, Checkpoint, most_common_dtype, written_bytes
from leanstep.pruning.folder.loading import LONGEST, empty_model_of, load_cost, position_count
from leanstep.pruning.folder.recovery import recovery_bytes, recovery_seconds, space_beside
from leanstep.pruning.measure.joint import INPUTS, with_cached_inputs
from leanstep.pruning.measure.metrics import kl_divergence
from leanstep.pruning.measure.products import product_dtype
from leanstep.pruning.planner import phase_costs
from leanstep.pruning.score.scores import layer_pruner
from leanstep.pruning.score.targets import dense_note, prunable_names
from leanstep.pruning.training.recovery import Recovery

# about the data and minutes of docs/measured/pruning-smollm2.md: samples, those for curves, tokens, minutes
QUICK = (16, 4, 256, 2.0)


@dataclass(frozen=True)
class Estimate:
    """What pruning a checkpoint takes.

    Attributes:
        parameters: of the model; pruned: of the matrices to prune; matrices: their number.
        memory: bytes by use; they add up to the peak of one process.
        processes: that take this memory.
        disk: bytes by use.
        seconds: by use, at the measured rates of this machine as it is loaded now; empty for another device.
        free_memory, free_disk: bytes; None if the system does not report them.
        reads: bytes of weights read from the disk, if the model is larger than the free memory.
        device_memory: bytes by use on a device other than the CPU.
        free_device: bytes; None for the CPU, and for a device that is not here.
        recovery: bytes by use of recovery after pruning, on the device, with the dense model as teacher unless the
            settings have ``distill=False``.
        asked_to_distill: ``distill`` of these settings.
        not_counted: what the run takes besides, in words.
        left_dense: a sentence on weights that are bare parameters, which are not pruned; "" where they are few.
        quick: seconds with no more than the data and minutes of :data:`QUICK`, and of recovery as asked for; None for
            another device.
    """

    parameters: int
    pruned: int
    matrices: int
    memory: dict[str, int]
    disk: dict[str, int]
    seconds: dict[str, float]
    free_memory: int | None
    free_disk: int
    reads: int
    processes: int = 1
    device_memory: dict[str, int] = field(default_factory=dict)
    free_device: int | None = None
    recovery: dict[str, int] = field(default_factory=dict)
    asked_to_distill: bool | None = None
    not_counted: list[str] = field(default_factory=list)
    left_dense: str = ""
    quick: float | None = None

    def problems(self) -> list[str]:
        """Sentences about what does not fit."""
        problems = []
        memory, disk = self.processes * sum(self.memory.values()), sum(self.disk.values())
        if self.free_memory is not None and memory > self.free_memory:
            problems.append(
                f"it takes {memory / 1e9:.2f} GB of memory and {self.free_memory / 1e9:.2f} GB are free: fewer or "
                f"shorter samples, a smaller batch size, {'fewer processes, ' if self.processes > 1 else ''}or "
                "activations on disk take less"
            )
        on_device = sum(self.device_memory.values())
        if self.free_device is not None and on_device > self.free_device:
            problems.append(
                f"it takes {on_device / 1e9:.2f} GB on the device and {self.free_device / 1e9:.2f} GB are free there: "
                "fewer or shorter samples, a smaller batch size, or activations on disk take less"
            )
        recovering, free = sum(self.recovery.values()), self._free_for_recovery()
        if not self.distills:
            recovering -= self.recovery.get("dense model", 0)
        if free is not None and recovering > free:
            problems.append(
                f"recovery takes {recovering / 1e9:.2f} GB of memory and {free / 1e9:.2f} GB are free: shorter "
                "samples and fewer in a step take less; or prune without it, and recover the folder (resume) on a "
                "larger machine"
            )
        if disk > self.free_disk:
            problems.append(
                f"it takes {disk / 1e9:.2f} GB and the disk has {self.free_disk / 1e9:.2f} GB free; make room, or name "
                "a folder on another disk"
            )
        return problems

    @property
    def distills(self) -> bool | None:
        """Whether recovery learns the dense model's outputs, not the next tokens; None if its memory is not known."""
        free = self._free_for_recovery()
        if not self.recovery:
            return None
        if self.asked_to_distill is not None or free is None:
            return self.asked_to_distill is not False
        # as the run decides, which has the libraries in memory
        return sum(self.recovery.values()) - self.recovery.get("libraries", 0) <= free

    def _free_for_recovery(self) -> int | None:
        return self.free_device if self.device_memory else self.free_memory


def estimate_pruning(
    checkpoint: Checkpoint,
    out: str | Path,
    workload: Workload,
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    recovery: Recovery | None = None,
) -> Estimate:
    """Estimate what :func:`leanstep.pruning.prune_checkpoint` takes. Reads no weight; for the memory of recovery, the
    model runs once without values.

    Times follow from the operations, and from rates that are measured for about a second: of a product, a ranking, a
    call, a comparison of outputs, copies and hashes. They are those of this machine as it is loaded at that moment.
    Memory counts what the code holds at the same time; tests compare it with measured peaks.

    Args:
        checkpoint: opened by :func:`open_checkpoint`.
        out: the folder to create; its disk is looked at.
        workload: data and settings.
        include, exclude: see :func:`leanstep.pruning.find_targets`.
        recovery: settings of recovery, which writes its state and the folder a second time.

    Raises:
        ValueError: for a configuration that transformers cannot open, sequences beyond its positions, or nothing to
            prune.
    """
    dtype = DTYPES[most_common_dtype(checkpoint)]
    model = empty_model_of(checkpoint, dtype)
    names = prunable_names(model, include=include, exclude=exclude)
    if workload.config.menu is not None and include is None:  # the embedding and the head are rounded, too
        names += [end.parameter for end in ends_of(model, {*names}, exclude)]
    shapes = Shapes.of(checkpoint, model, names, _tokens(checkpoint, model, workload.tokens))
    plan = Plan(shapes, workload, measured_rates(product_dtype(dtype, workload.config.products), workload))
    loading, costs = load_cost(plan), phase_costs(plan)
    start = {"start and imports": time.time() - psutil.Process().create_time()}
    seconds, quick = (start | seconds_by_use(one) for one in (plan, _quick(plan)))
    free, free_device = free_memory("cpu"), None
    if not plan.on_cpu and torch.cuda.is_available():
        free_device = free_memory(workload.device)
    beside = 0 if recovery is None else space_beside(checkpoint, recovery)
    disk = written_bytes(checkpoint, workload.processes, beside)
    disk |= {use: size * workload.processes for use, size in _largest_phase(c.disk for c in costs.values()).items()}
    room = free_device if not plan.on_cpu else None if free is None else free // workload.processes
    libraries = {"libraries": psutil.Process().memory_info().rss}
    memory, device_memory = _memory_by_use(plan, libraries | dict(loading.memory), list(costs.values()), room)
    recovering, unknown = dict[str, int](), ""
    if recovery is not None:
        seconds["recovery"] = recovery_seconds(plan, recovery)
        recovering, unknown = recovery_bytes(
            checkpoint, names, recovery, samples=workload.samples, tokens=shapes.tokens
        )
        recovering = libraries | recovering if recovering and plan.on_cpu else recovering
    fits = free is None or shapes.size + sum(memory.values()) <= free
    return Estimate(
        parameters=shapes.parameters,
        pruned=shapes.pruned,
        matrices=len(shapes.matrices),
        memory=memory,
        disk=disk,
        seconds=seconds if plan.on_cpu else {},
        free_memory=free,
        free_disk=free_bytes(Path(out).expanduser().absolute().parent),
        reads=0 if fits else int(sum(cost.passes for cost in costs.values()) * shapes.size),
        processes=workload.processes,
        device_memory=device_memory,
        free_device=free_device,
        recovery=recovering,
        asked_to_distill=None if recovery is None else recovery.distill,
        not_counted=[unknown] if unknown else [],
        left_dense="" if include is not None else dense_note(model),
        quick=sum(quick.values()) + seconds.get("recovery", 0.0) if plan.on_cpu else None,
    )


def seconds_by_use(plan: Plan) -> dict[str, float]:
    """Seconds of all phases, without recovery."""
    costs = (load_cost(plan), *phase_costs(plan).values())
    return {use: seconds for cost in costs for use, seconds in cost.seconds.items()}


def _quick(plan: Plan) -> Plan:
    samples, curve_samples, tokens, minutes = QUICK
    of, shapes = plan.workload, replace(plan.shapes, tokens=min(plan.shapes.tokens, tokens))
    config = replace(of.config, minutes=min(of.config.minutes, minutes))
    samples, curve_samples = min(of.samples, samples), min(of.curve_samples, curve_samples)
    workload = replace(of, config=config, samples=samples, curve_samples=curve_samples)
    return replace(plan, shapes=shapes, workload=workload)


def _memory_by_use(
    plan: Plan, loaded: Bytes, costs: Sequence[Cost], free: int | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes in the host's memory, and in that of another device, where ``free`` are free for what computes."""
    host, device = dict(loaded), dict[str, int]()
    if plan.in_files:
        files = _largest_phase(cost.disk for cost in costs)
        host["mapped activations"] = min(plan.workload.resident, sum(files.values()))
    if not plan.on_cpu:
        host["pinned, two blocks"] = device["two blocks"] = 2 * plan.shapes.moved
    uses = host if plan.on_cpu else device
    for cost in costs:
        uses |= {use: max(size, uses.get(use, 0)) for use, size in cost.working.items()}
    left = None if free is None else free - sum(uses.values())
    phases = (with_cached_inputs(cost, left) if INPUTS in cost.memory else cost for cost in costs)
    uses |= _largest_phase(cost.memory for cost in phases)
    host, device = ({use: size for use, size in memory.items() if size} for memory in (host, device))
    return host, device


def largest_files(plan: Plan) -> int:
    """Most bytes that one process has in files at one time, besides the model's."""
    return sum(_largest_phase(cost.disk for cost in phase_costs(plan).values()).values())


def _largest_phase(phases: Iterable[Bytes]) -> dict[str, int]:
    """Bytes by use in the phase that takes most."""
    largest = max(phases, key=lambda uses: sum(uses.values()))
    return {use: size for use, size in largest.items() if size or use == "activations before a block"}


def _tokens(checkpoint: Checkpoint, model: nn.Module, asked: int | None) -> int:
    """Tokens of a sequence, by default as many as a run takes, or patches of an image; 1 for what has neither."""
    config, positions = getattr(model, "config", None), position_count(checkpoint.config, checkpoint.folder)
    if asked is not None:
        if asked > (positions or asked):
            raise ValueError(f"a sequence has at most the model's {positions} positions, got {asked} tokens")
        return asked
    patches = patch_count(config)
    is_text = config is not None and getattr(config.get_text_config(), "vocab_size", None) is not None
    if positions is None and (patches or not is_text):
        return max(patches, 1)
    return min(positions or LONGEST, LONGEST)


def patch_count(config: Any) -> int:
    """Tokens of an image; 0 for a model without patches."""
    image, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    return (image // patch) ** 2 + 1 if isinstance(image, int) and isinstance(patch, int) and patch else 0


def measured_rates(dtype: torch.dtype, workload: Workload) -> Rates:
    """Measure for about a second, with the threads of one of several processes."""
    threads = torch.get_num_threads()
    if workload.processes > 1 and "OMP_NUM_THREADS" not in os.environ:  # as they are started
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workload.processes))
    try:
        return _measured_rates(dtype)
    finally:
        torch.set_num_threads(threads)


def _measured_rates(dtype: torch.dtype) -> Rates:
    left, right = torch.randn(256, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    weight, small = torch.randn(512, 512), torch.randn(16, 16)
    logits, raw = torch.randn(32, 8192), torch.randint(0, 255, (2**22,), dtype=torch.uint8)
    copy = torch.empty_like(raw)
    prune = lambda: layer_pruner(weight, "magnitude", scope="row").prune(weight.numel() // 2)  # noqa: E731
    compare = lambda: kl_divergence(logits.log_softmax(-1), logits.log_softmax(-1))  # noqa: E731
    return Rates(
        seconds_of(lambda: left @ right) / (2 * 256 * 1024 * 1024),
        seconds_of(prune) / weight.numel(),
        seconds_of(lambda: small + small),
        seconds_of(compare) / logits.numel(),
        seconds_of(lambda: copy.copy_(raw)) / raw.nbytes,
        seconds_of(lambda: hashlib.sha256(raw.numpy().data)) / raw.nbytes,
    )


def seconds_of(function: Callable[[], object], seconds: float = 0.15) -> float:
    """Mean seconds of a call, after one that is not counted."""
    function()
    begin, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        function()
        calls += 1
    return spent / calls
