"""Estimate memory, disk and time of pruning a checkpoint from its configuration and the headers of its files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from leanstep._files import free_bytes
from leanstep._memory import free_memory
from leanstep.pruning.config import PruneConfig
from leanstep.pruning.folder.duration import Duration, Rates, Sizes
from leanstep.pruning.folder.files import DTYPES, EXPERT_COPIES, Checkpoint, fused_bytes, most_common_dtype
from leanstep.pruning.folder.loading import LONGEST, empty_model_of, position_count
from leanstep.pruning.folder.recovery import recovery_bytes, space_beside
from leanstep.pruning.folder.search_size import (
    GRADIENTS,
    SearchSize,
    files_of_all_matrices,
    pruner_bytes,
    statistics_bytes,
)
from leanstep.pruning.folder.stored_size import Sequences, StoredSizes, largest_phase, patch_count, with_more
from leanstep.pruning.folder.workload import Shapes, Workload
from leanstep.pruning.measure.fisher.second_order import FisherCost
from leanstep.pruning.measure.products import product_dtype
from leanstep.pruning.score.base import NEEDS, has_statistics
from leanstep.pruning.score.targets import dense_note, prunable_names
from leanstep.pruning.training.recovery import Recovery

# bytes for each weight of a matrix while it is ranked or updated, besides the matrix itself: fp32 copies, scores,
# sorted scores, an order in int64 with the workspace of the sort, and a mask
_PRUNER_BYTES = 40


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
    dtype = most_common_dtype(checkpoint)
    model = empty_model_of(checkpoint, DTYPES[dtype])
    names = prunable_names(model, include=include, exclude=exclude)
    positions = position_count(checkpoint.config, checkpoint.folder)
    tokens = workload.tokens
    if tokens is None:
        tokens = _longest(model, positions)
    elif tokens > (positions or tokens):
        raise ValueError(f"a sequence has at most the model's {positions} positions, got {tokens} tokens")
    shapes = Shapes.of(checkpoint, model, names, tokens)
    fisher = FisherCost.of(shapes, workload)
    sizes = Sizes(shapes.matrices, len(shapes.blocks), shapes.active, shapes.outputs, tokens, checkpoint.size, fisher)
    rates = Rates.measured(product_dtype(DTYPES[dtype], workload.config.products), workload.processes)
    duration = Duration(sizes, workload, rates)
    seconds, passes, config = duration.seconds(), duration.passes, workload.config
    recovering, unknown = dict[str, int](), ""
    if recovery is not None:
        seconds["recovery"] = duration.recovery(recovery)
        recovering, unknown = recovery_bytes(checkpoint, names, recovery, samples=workload.samples, tokens=tokens)
    search = SearchSize.of(shapes, workload, workload.refine_samples) if workload.refine_samples else None
    computing = {
        "activations of a batch": _batch_bytes(shapes, workload),
        "statistics of a block": _statistics_bytes(shapes, workload),
        "pruner of a matrix": _pruner_bytes(shapes, workload),
    }
    by_fisher = duration.curves in ("fisher", "anchored")
    if by_fisher:
        computing["activations of a batch"] = max(computing["activations of a batch"], fisher.graph)
    if search is not None:
        computing["activations of a batch"] = max(computing["activations of a batch"], search.graph)
    memory = {
        "libraries": psutil.Process().memory_info().rss,
        "weights": min(workload.resident + _block_bytes(shapes), checkpoint.size),
        "experts, fused": shapes.fused_bytes,
    }
    is_cpu = workload.device == "cpu"
    if recovering and is_cpu:
        recovering = {"libraries": memory["libraries"]} | recovering
    on_device = memory if is_cpu else {"two blocks": 2 * shapes.moved}
    if not is_cpu:
        memory["pinned, two blocks"] = 2 * shapes.moved
    on_device |= computing
    later = 0 if recovery is None else space_beside(checkpoint, recovery)
    copies = checkpoint.size * (workload.processes - 1)
    disk = {"output": checkpoint.size}
    if experts := EXPERT_COPIES * fused_bytes(checkpoint) * workload.processes:
        disk["experts, fused"] = experts
    if largest := max(copies, later):  # the copies are gone when recovery begins
        disk["recovery" if later == largest else "copies of the other processes"] = largest
    stored = _stored_by_phase(shapes, workload)
    in_files = workload.activations == "disk"
    if in_files:
        stored = with_more(stored, files_of_all_matrices(shapes, config, workload.samples, searches=search is not None))
        activations = largest_phase(stored.values())
        disk |= {use: size * workload.processes for use, size in activations.items()}
        memory["mapped activations"] = min(workload.resident, sum(activations.values()))
    held = {phase: {} if in_files else uses for phase, uses in stored.items()}
    if config.inputs == "dense" and not in_files:
        held["comparison"]["pruned matrices"] = shapes.itemsize * shapes.pruned
    if config.corrects:
        held["correction"] = {**held["curves"], **({} if in_files else _of_all_pruners(shapes, workload))}
        if by_fisher:
            # passes of whole batches, in place of an eighth of the samples
            gradients = SearchSize.of(shapes, workload, 8 * workload.curve_samples)
            computing["activations of a batch"] = max(computing["activations of a batch"], gradients.graph)
            held["correction"] |= _of_slopes(shapes) if in_files else {"gradients of all matrices": gradients.gradients}
            held["correction"] |= {"x and g of Fisher curves": fisher.collected}
            if not is_cpu:  # gradients need all weights there
                held["correction"]["all weights"] = checkpoint.size
    if by_fisher:
        held["curves"] = {**held["curves"], "x and g of Fisher curves": fisher.collected}
    free, free_device = free_memory("cpu"), None
    if not is_cpu and torch.cuda.is_available():
        free_device = free_memory(workload.device)
    if search is not None:
        before = sum(on_device.values()) + sum(held["search"].values()) + search.pruners
        room = free_device if not is_cpu else None if free is None else free // workload.processes
        search = search.within(None if in_files or room is None else room - before)
        held["search"] |= _of_slopes(shapes) if in_files else search.uses
        if not is_cpu:  # gradients need all weights there
            held["search"]["all weights"] = checkpoint.size
    on_device |= largest_phase(held.values())
    fits = free is None or checkpoint.size + sum(memory.values()) <= free
    return Estimate(
        shapes.parameters,
        shapes.pruned,
        len(shapes.matrices),
        {use: size for use, size in memory.items() if size},
        disk,
        seconds if is_cpu else {},
        free,
        free_bytes(Path(out).expanduser().absolute().parent),
        0 if fits else int(passes * checkpoint.size),
        workload.processes,
        {} if is_cpu else {use: size for use, size in on_device.items() if size},
        free_device,
        recovering,
        None if recovery is None else recovery.distill,
        [unknown] if unknown else [],
        "" if include is not None else dense_note(model),
    )


def _longest(model: nn.Module, positions: int | None) -> int:
    """Tokens of a sequence whose length nobody asked for, or patches of an image; 1 for what has neither."""
    config = getattr(model, "config", None)
    patches = patch_count(config)
    if positions is None and (patches or not _is_of_text(config)):
        return max(patches, 1)
    return min(positions or LONGEST, LONGEST)


def _is_of_text(config: Any) -> bool:
    return config is not None and getattr(config.get_text_config(), "vocab_size", None) is not None


def files_of_search(
    checkpoint: Checkpoint, model: nn.Module, names: list[str], config: PruneConfig
) -> dict[str, dict[str, int]]:
    """:func:`files_of_all_matrices` of the parameters ``names``."""
    shapes = Shapes.of(checkpoint, model, names)
    return files_of_all_matrices(shapes, config, GRADIENTS, searches=config.refine is not None)


def _stored_by_phase(shapes: Shapes, workload: Workload) -> dict[str, dict[str, int]]:
    outputs = min(shapes.outputs, 512 * 3) if workload.config.metric == "kl_topk" else shapes.outputs
    sequences = Sequences(
        workload.samples if has_statistics(workload.config.allocation, *workload.config.scores) else 0,
        workload.curve_samples if workload.config.plans else 0,
        workload.held_out,
        workload.refine_samples,
    )
    stored = StoredSizes(shapes.width, outputs, len(shapes.blocks), shapes.itemsize)
    return stored.by_phase(sequences, shapes.tokens, in_files=workload.activations == "disk")


def _of_slopes(shapes: Shapes) -> dict[str, int]:
    """Where sums of gradients are in files: that of the largest matrix, and fp32 copies of it, of dW and W."""
    return {"gradient of a matrix": 16 * max(rows * columns for rows, columns in shapes.matrices)}


def _of_all_pruners(shapes: Shapes, workload: Workload) -> dict[str, int]:
    """Of a correction of curves, which has the statistics of all matrices while it makes their pruners."""
    config, samples = workload.config, workload.samples
    ranked = config.pattern == "unstructured"
    pruners = (
        pruner_bytes(matrix, config.planning_score, shapes.itemsize, samples=samples, ranked=ranked)
        for matrix in shapes.matrices
    )
    statistics = sum(statistics_bytes(matrix, config.scores, samples) for matrix in shapes.matrices)
    return {"pruners of all matrices": sum(pruners), "statistics of all matrices": statistics}


def _block_bytes(shapes: Shapes) -> int:
    return max(sum(rows * columns for rows, columns in block) for block in shapes.blocks) * shapes.itemsize


def _batch_bytes(shapes: Shapes, workload: Workload) -> int:
    """Largest of a block's activations and the logits of one batch."""
    largest_in, largest_out = (max(matrix[side] for matrix in shapes.matrices) for side in (1, 0))
    samples = min(workload.config.batch_size, max(workload.samples, workload.held_out))
    block = samples * shapes.tokens * ((4 * shapes.width + 3 * largest_out) * shapes.itemsize + 8 * largest_in)
    compared = min(workload.config.batch_size, max(workload.curve_samples, workload.held_out))
    # the logits of a batch, and in fp32 those of one sample and their logarithms
    logits = shapes.tokens * shapes.outputs * (max(compared, 1) * shapes.itemsize + 12)
    return max(block, logits)


def _statistics_bytes(shapes: Shapes, workload: Workload) -> int:
    outliers = 0
    if workload.config.allocation == "owl":  # Wanda's sums of all matrices, and scores and pruners of a block
        outliers = sum(8 * columns for _, columns in shapes.matrices)
        outliers += _block_bytes(shapes) // shapes.itemsize * (4 + shapes.itemsize)
    scores, samples = workload.config.scores, workload.samples
    by_block = (sum(statistics_bytes(matrix, scores, samples) for matrix in block) for block in shapes.blocks)
    return max(outliers, *by_block)


def _pruner_bytes(shapes: Shapes, workload: Workload) -> int:
    """Of the largest matrix while it is ranked or updated, and what is held of the matrices that change together."""
    factor = 20 if any("gram" in NEEDS[score] for score in workload.config.scores) else 0
    largest = max(
        rows * columns * (_PRUNER_BYTES + shapes.itemsize) + factor * columns**2 for rows, columns in shapes.matrices
    )
    if workload.config.method != "dp" or workload.config.granularity != "block":
        return largest
    # copies before and after, and ranks; Cholesky factors
    held = max(
        sum(rows * columns * (2 * shapes.itemsize + 2) + factor // 5 * columns**2 for rows, columns in block)
        for block in shapes.blocks
    )
    return largest + held
