"""Estimate memory, disk and time of pruning a checkpoint from its configuration and the headers of its files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from leanstep._files import free_bytes
from leanstep._mapped import RESIDENT
from leanstep._memory import free_memory
from leanstep.pruning.choices import fixed_pattern
from leanstep.pruning.folder.duration import Duration, Rates, Sizes
from leanstep.pruning.folder.estimate_result import Estimate
from leanstep.pruning.folder.files import DTYPES, EXPERT_COPIES, ITEM_BYTES, Checkpoint, fused_bytes, most_common_dtype
from leanstep.pruning.folder.fisher_size import FisherSize
from leanstep.pruning.folder.loading import LONGEST, empty_model_of, position_count
from leanstep.pruning.folder.recovery import space_beside
from leanstep.pruning.folder.recovery_size import recovery_bytes
from leanstep.pruning.folder.search_size import (
    GRADIENTS,
    SearchSize,
    files_of_all_matrices,
    pruner_bytes,
    statistics_bytes,
)
from leanstep.pruning.folder.stored_size import Sequences, StoredSizes, largest_phase, patch_count, with_more
from leanstep.pruning.measure.blocks import candidate_blocks
from leanstep.pruning.measure.products import product_dtype
from leanstep.pruning.recovery import Recovery
from leanstep.pruning.score.base import NEEDS, has_statistics
from leanstep.pruning.score.targets import block_numbers, dense_note, prunable_names

# bytes for each weight of a matrix while it is ranked or updated, besides the matrix itself: fp32 copies, scores,
# sorted scores, an order in int64 with the workspace of the sort, and a mask
_PRUNER_BYTES = 40
# allocations for which distortions of single changes, or of candidates, are measured on the data for curves
MEASURED = ("dp", "atp")


@dataclass(frozen=True)
class Workload:
    """Calibration data and settings that decide what pruning takes.

    Attributes:
        samples, curve_samples, held_out: numbers of sequences (or images).
        tokens: of a sequence; None: the model's positions, at most 2048, or the patches of an image. The tokenizer's
            limit is not looked at.
        batch_size: samples per pass.
        allocation, score, curve_score, metric, curves, minutes, granularity: as for :func:`leanstep.pruning.prune`.
        sparsity, products, pattern, correction, inputs: as for :func:`leanstep.pruning.prune`.
        levels: number of levels of a curve; None: those of the default grid.
        activations, resident: as for :func:`leanstep.pruning.prune_checkpoint`.
        refine_samples: sequences that judge exchanges; 0: no search.
        refine_minutes, refine_evaluations: limits of the search.
        processes: that share the work.
        device: that computes. Of another one than the CPU, the memory is estimated and not the time.

    Raises:
        ValueError: for numbers of samples or tokens that no run takes.
    """

    samples: int = 128
    curve_samples: int = 16
    held_out: int = 8
    tokens: int | None = None
    batch_size: int = 8
    allocation: str = "dp"
    score: str = "wanda"
    curve_score: str | None = None
    metric: str | None = None
    curves: str | None = None
    minutes: float = 30.0
    levels: int | None = None
    granularity: str = "matrix"
    sparsity: float = 0.5
    activations: str = "memory"
    resident: int = RESIDENT
    refine_samples: int = 0
    processes: int = 1
    device: str = "cpu"
    products: str = "auto"
    pattern: str = "unstructured"
    correction: str = "none"
    inputs: str = "pruned"
    refine_minutes: float | None = None
    refine_evaluations: int | None = None

    def __post_init__(self) -> None:
        counts = (self.samples, self.curve_samples, self.held_out)
        if self.batch_size < 1 or min(counts) < 0:
            raise ValueError(
                "expected samples, curve_samples and held_out of at least 0 and batch_size of at least 1, got "
                f"{', '.join(map(str, (*counts, self.batch_size)))}"
            )
        if self.tokens is not None and self.tokens < 2:
            raise ValueError(f"expected at least 2 tokens in a sequence, got {self.tokens}")

    @property
    def of_curves(self) -> str:
        """The score of the curves, of the slopes of ATP, and of the search."""
        return self.curve_score or self.score

    @property
    def scores(self) -> tuple[str, ...]:
        """Those whose statistics are collected."""
        return (self.score, self.of_curves) if self.method in ("dp", "atp") else (self.score,)

    @property
    def method(self) -> str:
        """The allocation; uniform for a fixed pattern, which leaves nothing to allocate."""
        return self.allocation if fixed_pattern(self.pattern) is None else "uniform"


@dataclass(frozen=True)
class _Shapes:
    """Matrices [out, in] of a model by name, with their blocks, and its sizes."""

    matrices: list[tuple[int, int]]
    blocks: list[list[tuple[int, int]]]
    parameters: int
    # used for one token: of experts, those that it is routed to
    active: int
    width: int
    outputs: int
    fused_bytes: int
    # bytes of the largest block that is copied to a device
    moved: int
    # one output for each sample, as of a classifier
    one_output: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: nn.Module, itemsize: int, names: Iterable[str]) -> _Shapes:
        parameters = dict(model.named_parameters())
        numbers = block_numbers(list(names))
        blocks: dict[Any, list[tuple[int, int]]] = {}
        for name in names:
            shape = parameters[name].shape
            fused = len(shape) == 3 and "expert" in name
            count, rows = (shape[0], shape[1]) if fused else (1, shape[0])
            matrix = (rows, math.prod(shape) // (count * rows))
            blocks.setdefault(numbers.get(name, name), []).extend([matrix] * count)
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if config is not None else None
        experts = sum(p.numel() for name, p in parameters.items() if ".experts." in name)
        total, routed = (
            next((value for key in keys if (value := getattr(text, key, None))), 1)
            for keys in (("num_local_experts", "num_experts", "n_routed_experts"), ("num_experts_per_tok", "top_k"))
        )
        numel = sum(parameter.numel() for parameter in parameters.values())
        largest = max(max(matrix) for block in blocks.values() for matrix in block)
        embeddings = getattr(model, "get_output_embeddings", lambda: None)()
        return cls(
            [matrix for block in blocks.values() for matrix in block],
            list(blocks.values()),
            numel,
            int(numel - experts * (1 - min(1.0, routed / total))),
            getattr(text, "hidden_size", None) or largest,
            embeddings.weight.shape[0] if embeddings is not None else getattr(config, "num_labels", largest),
            # the parts, joined in memory, then copied to a mapped file
            3
            * itemsize
            * max((p.numel() for name, p in parameters.items() if _is_joined(name, checkpoint)), default=0),
            max((sum(p.numel() for p in b.parameters()) for _, b in candidate_blocks(model)), default=0) * itemsize,
            re.search(r"For(Sequence|Image|Audio|Video)Classification", type(model).__name__) is not None,
        )


def _is_joined(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a parameter of experts is made of several tensors of the files."""
    return ".experts." in name and name not in checkpoint.names


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
    shapes = _Shapes.of(checkpoint, model, ITEM_BYTES[dtype], names)
    positions = position_count(checkpoint.config, checkpoint.folder)
    tokens = workload.tokens
    if tokens is None:
        tokens = _longest(model, positions)
    elif tokens > (positions or tokens):
        raise ValueError(f"a sequence has at most the model's {positions} positions, got {tokens} tokens")
    fisher = FisherSize.of(
        shapes.blocks,
        samples=workload.curve_samples,
        tokens=tokens,
        width=shapes.width,
        outputs=shapes.outputs,
        itemsize=ITEM_BYTES[dtype],
        one_output=shapes.one_output,
        recomputed=workload.device == "cpu" and not shapes.one_output,
    )
    itemsize = ITEM_BYTES[dtype]
    sizes = Sizes(shapes.matrices, len(shapes.blocks), shapes.active, shapes.outputs, tokens, checkpoint.size, fisher)
    rates = Rates.measured(product_dtype(DTYPES[dtype], workload.products), workload.processes)
    duration = Duration(sizes, workload, rates)
    seconds, passes = duration.seconds(), duration.passes
    recovering, unknown = dict[str, int](), ""
    if recovery is not None:
        seconds["recovery"] = duration.recovery(recovery)
        recovering, unknown = recovery_bytes(checkpoint, names, recovery, samples=workload.samples, tokens=tokens)
    judging = workload.refine_samples
    search = _search(shapes, workload, tokens, itemsize, judging) if judging else None
    computing = {
        "activations of a batch": _batch_bytes(shapes, workload, tokens, itemsize),
        "statistics of a block": _statistics_bytes(shapes, workload, itemsize),
        "pruner of a matrix": _pruner_bytes(shapes, workload, itemsize),
    }
    by_fisher = duration.curves in ("fisher", "anchored")
    if by_fisher:
        computing["activations of a batch"] = max(computing["activations of a batch"], fisher.graph)
    if search is not None:
        computing["activations of a batch"] = max(computing["activations of a batch"], search.graph)
    memory = {
        "libraries": psutil.Process().memory_info().rss,
        "weights": min(workload.resident + _block_bytes(shapes, itemsize), checkpoint.size),
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
    stored = _stored_by_phase(shapes, workload, tokens, itemsize)
    in_files = workload.activations == "disk"
    corrects = workload.method == "dp" and workload.correction != "none"
    if in_files:
        stored = with_more(
            stored,
            files_of_all_matrices(
                shapes.matrices,
                workload.of_curves,
                itemsize,
                samples=workload.samples,
                searches=search is not None,
                corrects=corrects,
                dense_inputs=workload.inputs == "dense",
            ),
        )
        activations = largest_phase(stored.values())
        disk |= {use: size * workload.processes for use, size in activations.items()}
        memory["mapped activations"] = min(workload.resident, sum(activations.values()))
    held = {phase: {} if in_files else uses for phase, uses in stored.items()}
    if workload.inputs == "dense" and not in_files:
        held["comparison"]["pruned matrices"] = itemsize * sum(rows * columns for rows, columns in shapes.matrices)
    if corrects:
        held["correction"] = {**held["curves"], **({} if in_files else _of_all_pruners(shapes, workload, itemsize))}
        if by_fisher:
            # passes of whole batches, in place of an eighth of the samples
            gradients = _search(shapes, workload, tokens, itemsize, 8 * workload.curve_samples)
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
        sum(rows * columns for rows, columns in shapes.matrices),
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
    checkpoint: Checkpoint, model: nn.Module, names: Iterable[str], settings: Mapping[str, Any], *, searches: bool
) -> dict[str, dict[str, int]]:
    """:func:`files_of_all_matrices` of the parameters ``names`` for the settings of :func:`leanstep.pruning.prune`."""
    itemsize = ITEM_BYTES[most_common_dtype(checkpoint)]
    named = {key: value for key, value in settings.items() if key in ("allocation", "score", "curve_score", "pattern")}
    workload = Workload(**named)
    return files_of_all_matrices(
        _Shapes.of(checkpoint, model, itemsize, list(names)).matrices,
        workload.of_curves,
        itemsize,
        samples=GRADIENTS,
        searches=searches,
        corrects=workload.method == "dp" and settings.get("correction", "none") != "none",
        dense_inputs=settings.get("inputs") == "dense",
    )


def _stored_by_phase(shapes: _Shapes, workload: Workload, tokens: int, itemsize: int) -> dict[str, dict[str, int]]:
    """Bytes of cached activations and dense outputs, in memory or on disk."""
    outputs = min(shapes.outputs, 512 * 3) if workload.metric == "kl_topk" else shapes.outputs
    sequences = Sequences(
        workload.samples if has_statistics(workload.allocation, *workload.scores) else 0,
        workload.curve_samples if workload.method in MEASURED else 0,
        workload.held_out,
        workload.refine_samples,
    )
    stored = StoredSizes(shapes.width, outputs, len(shapes.blocks), itemsize)
    return stored.by_phase(sequences, tokens, in_files=workload.activations == "disk")


def _search(shapes: _Shapes, workload: Workload, tokens: int, itemsize: int, judging: int) -> SearchSize:
    return SearchSize.of(
        shapes.blocks,
        score=workload.of_curves,
        metric=workload.metric,
        judging=judging,
        samples=workload.samples,
        batch_size=workload.batch_size,
        tokens=tokens,
        width=shapes.width,
        outputs=shapes.outputs,
        itemsize=itemsize,
        ranked=workload.pattern == "unstructured",
        processes=workload.processes,
    )


def _of_slopes(shapes: _Shapes) -> dict[str, int]:
    """Where sums of gradients are in files: that of the largest matrix, and fp32 copies of it, of dW and W."""
    return {"gradient of a matrix": 16 * max(rows * columns for rows, columns in shapes.matrices)}


def _of_all_pruners(shapes: _Shapes, workload: Workload, itemsize: int) -> dict[str, int]:
    """Of a correction of curves, which has the statistics of all matrices while it makes their pruners."""
    ranked = workload.pattern == "unstructured"
    pruners = (
        pruner_bytes(m, workload.of_curves, itemsize, samples=workload.samples, ranked=ranked) for m in shapes.matrices
    )
    statistics = sum(statistics_bytes(matrix, workload.scores, workload.samples) for matrix in shapes.matrices)
    return {"pruners of all matrices": sum(pruners), "statistics of all matrices": statistics}


def _block_bytes(shapes: _Shapes, itemsize: int) -> int:
    return max(sum(rows * columns for rows, columns in block) for block in shapes.blocks) * itemsize


def _batch_bytes(shapes: _Shapes, workload: Workload, tokens: int, itemsize: int) -> int:
    """Largest of a block's activations and the logits of one batch."""
    largest_in, largest_out = (max(matrix[side] for matrix in shapes.matrices) for side in (1, 0))
    samples = min(workload.batch_size, max(workload.samples, workload.held_out))
    block = samples * tokens * ((4 * shapes.width + 3 * largest_out) * itemsize + 8 * largest_in)
    compared = min(workload.batch_size, max(workload.curve_samples, workload.held_out))
    # the logits of a batch, and in fp32 those of one sample and their logarithms
    logits = tokens * shapes.outputs * (max(compared, 1) * itemsize + 12)
    return max(block, logits)


def _statistics_bytes(shapes: _Shapes, workload: Workload, itemsize: int) -> int:
    outliers = 0
    if workload.allocation == "owl":  # Wanda's sums of all matrices, and scores and pruners of a block
        outliers = sum(8 * columns for _, columns in shapes.matrices)
        outliers += max(sum(rows * columns for rows, columns in block) for block in shapes.blocks) * (4 + itemsize)
    by_block = (sum(statistics_bytes(m, workload.scores, workload.samples) for m in block) for block in shapes.blocks)
    return max(outliers, *by_block)


def _pruner_bytes(shapes: _Shapes, workload: Workload, itemsize: int) -> int:
    """Of the largest matrix while it is ranked or updated, and what is held of the matrices that change together."""
    factor = 20 if any("gram" in NEEDS[score] for score in workload.scores) else 0
    largest = max(
        rows * columns * (_PRUNER_BYTES + itemsize) + factor * columns**2 for rows, columns in shapes.matrices
    )
    if workload.method != "dp" or workload.granularity != "block":
        return largest
    # copies before and after, and ranks; Cholesky factors
    held = max(
        sum(rows * columns * (2 * itemsize + 2) + factor // 5 * columns**2 for rows, columns in block)
        for block in shapes.blocks
    )
    return largest + held
