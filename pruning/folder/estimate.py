"""Estimate memory, disk and time of pruning a checkpoint from its configuration and the headers of its files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from leanstep._files import free_bytes
from leanstep._mapped import RESIDENT
from leanstep._memory import free_memory
from leanstep.pruning.folder.duration import Duration, Rates, Sizes
from leanstep.pruning.folder.files import DTYPES, EXPERT_COPIES, ITEM_BYTES, Checkpoint, fused_bytes, most_common_dtype
from leanstep.pruning.folder.fisher_size import FisherSize
from leanstep.pruning.folder.loading import empty_model_of, position_count
from leanstep.pruning.folder.recovery import space_beside
from leanstep.pruning.measure.activation_cache import find_stages
from leanstep.pruning.measure.batches import as_batches
from leanstep.pruning.measure.blocks import candidate_blocks
from leanstep.pruning.measure.metrics import check_runs, values_of
from leanstep.pruning.measure.products import product_dtype
from leanstep.pruning.recovery import Recovery
from leanstep.pruning.score.base import NEEDS, has_statistics
from leanstep.pruning.score.targets import block_numbers, prunable_names

# bytes for each weight of a matrix while it is ranked or updated, besides the matrix itself: fp32 copies, scores,
# sorted scores, an order in int64 with the workspace of the sort, and a mask
_PRUNER_BYTES = 40
# samples whose gradients score="mfac" collects
_GRADIENTS = 128
# allocations for which distortions of single changes, or of candidates, are measured on the data for curves
MEASURED = ("dp", "atp")


@dataclass(frozen=True)
class Workload:
    """Calibration data and settings that decide what pruning takes.

    Attributes:
        samples, curve_samples, held_out: numbers of sequences (or images).
        tokens: of a sequence; None: the model's positions, at most 2048.
        batch_size: samples per pass.
        allocation, score, metric, curves, minutes, granularity, sparsity, products: as for
            :func:`leanstep.pruning.prune`.
        levels: number of levels of a curve; None: those of the default grid.
        activations, resident: as for :func:`leanstep.pruning.prune_checkpoint`.
        refine_samples: sequences that judge exchanges; 0: no search.
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

    def __post_init__(self) -> None:
        counts = (self.samples, self.curve_samples, self.held_out)
        if self.batch_size < 1 or min(counts) < 0:
            raise ValueError(
                "expected samples, curve_samples and held_out of at least 0 and batch_size of at least 1, got "
                f"{', '.join(map(str, (*counts, self.batch_size)))}"
            )
        if self.tokens is not None and self.tokens < 2:
            raise ValueError(f"expected at least 2 tokens in a sequence, got {self.tokens}")


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
        if disk > self.free_disk:
            problems.append(
                f"it takes {disk / 1e9:.2f} GB and the disk has {self.free_disk / 1e9:.2f} GB free; make room, or name "
                "a folder on another disk"
            )
        return problems


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
            # joined in memory, then copied to a mapped file
            2
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
    """Estimate what :func:`leanstep.pruning.prune_checkpoint` takes. Reads no weight and runs no part of the model.

    Times follow from the operations, and from rates that are measured for about a second: of a product, a ranking, a
    call, a comparison of outputs, copies and hashes. They are those of this machine as it is loaded at that moment.
    Memory counts what the code holds at the same time; tests compare it with measured peaks.

    Args:
        checkpoint: opened by :func:`open_checkpoint`.
        out: the folder to create; its disk is looked at.
        workload: data and settings.
        include, exclude: see :func:`leanstep.pruning.find_targets`.
        recovery: settings of recovery, which writes its state and the folder a second time. Its memory and time are
            not in the estimate.

    Raises:
        ValueError: for a configuration that transformers cannot open, sequences beyond its positions, or nothing to
            prune.
    """
    dtype = most_common_dtype(checkpoint)
    model = empty_model_of(checkpoint, DTYPES[dtype])
    shapes = _Shapes.of(checkpoint, model, ITEM_BYTES[dtype], prunable_names(model, include=include, exclude=exclude))
    positions = position_count(checkpoint.config, checkpoint.folder)
    tokens = workload.tokens
    if tokens is None:
        tokens = min(positions, 2048) if positions else max(_patches(getattr(model, "config", None)), 1)
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
    sizes = Sizes(shapes.matrices, len(shapes.blocks), shapes.active, shapes.outputs, tokens, checkpoint.size, fisher)
    duration = Duration(sizes, workload, Rates.measured(product_dtype(DTYPES[dtype], workload.products)))
    seconds, passes = duration.seconds(), duration.passes
    activations = _activations(shapes, workload, tokens, ITEM_BYTES[dtype])
    computing = {
        "activations of a batch": _batch_bytes(shapes, workload, tokens, ITEM_BYTES[dtype]),
        "statistics of a block": _statistics_bytes(shapes, workload, ITEM_BYTES[dtype]),
        "pruner of a matrix": _pruner_bytes(shapes, workload, ITEM_BYTES[dtype]),
    }
    if duration.curves in ("fisher", "anchored"):
        computing["x and g of Fisher curves"] = fisher.collected
        computing["activations of a batch"] = max(computing["activations of a batch"], fisher.graph)
    memory = {
        "libraries": psutil.Process().memory_info().rss,
        "weights": min(workload.resident + _block_bytes(shapes, ITEM_BYTES[dtype]), checkpoint.size),
        "experts, fused": shapes.fused_bytes,
    }
    is_cpu = workload.device == "cpu"
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
    if workload.activations == "disk":
        disk |= {use: size * workload.processes for use, size in activations.items()}
        memory["mapped activations"] = min(workload.resident, sum(activations.values()))
    else:
        on_device |= activations
    free = free_memory("cpu")
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
        None if is_cpu or not torch.cuda.is_available() else free_memory(workload.device),
    )


def scratch_bytes(model: nn.Module, sequences: Sequences, data: Any = None) -> int:
    """Most bytes of activations and dense outputs in files at one time; 0 where nothing tells.

    Runs the model on a sample of ``data``, a tensor, where its configuration does not tell the tokens of one: of
    sounds, and of images without patches.
    """
    config: Any = getattr(model, "config", None)
    tokens = 0 if config is None else sequences.tokens or _patches(config)
    if not tokens:
        return sum(_of_a_sample(model, data).largest(sequences, 1).values()) if isinstance(data, torch.Tensor) else 0
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    text = config.get_text_config()
    sizes = _Stored(
        width=getattr(text, "hidden_size", 0),
        outputs=getattr(config, "num_labels", 0) if head is None else head.weight.shape[0],
        blocks=getattr(text, "num_hidden_layers", 0),
        itemsize=next(model.parameters()).element_size(),
    )
    return sum(sizes.largest(sequences, tokens).values())


@torch.no_grad()
def _of_a_sample(model: nn.Module, data: Tensor) -> _Stored:
    """Sizes of a sample as of one token: the largest output of a stage in bytes, and the model's output."""
    sample = as_batches(data[:1], model)[0]
    check_runs(model, sample)
    stages, sizes = find_stages(model, sample), [0]

    def measure(_module: nn.Module, _inputs: Any, output: Any) -> None:
        sizes.append(sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor)))

    handles = [stage.register_forward_hook(measure) for _, stage in stages]
    try:
        outputs = values_of(sample.run(model)).numel()
    finally:
        for handle in handles:
            handle.remove()
    return _Stored(width=max(sizes), outputs=outputs, blocks=len(stages), itemsize=1)


def _patches(config: Any) -> int:
    """Tokens of an image; 0 for a model without patches."""
    image, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    return (image // patch) ** 2 + 1 if isinstance(image, int) and isinstance(patch, int) and patch else 0


@dataclass(frozen=True)
class Sequences:
    """Numbers of sequences or images by use.

    Attributes:
        scored: for the statistics of a score; 0 where it needs none.
        curves, held_out, judging: for curves, the comparison, and a search.
        tokens: of a sequence; 0 for images.
    """

    scored: int
    curves: int
    held_out: int
    judging: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, scored: bool, data: Any, curves: Any, held_out: Any, judging: Any) -> Sequences:
        """Of tensors [samples, ...]; numbers of other data are 0."""
        numbers = [len(one) if isinstance(one, torch.Tensor) else 0 for one in (data, curves, held_out, judging)]
        is_text = isinstance(data, torch.Tensor) and not data.is_floating_point()
        return cls(numbers[0] if scored else 0, numbers[1], numbers[2], numbers[3], data.shape[1] if is_text else 0)


@dataclass(frozen=True)
class _Stored:
    """Sizes of what is cached of one token."""

    width: int
    outputs: int
    blocks: int
    itemsize: int

    def largest(self, sequences: Sequences, tokens: int) -> dict[str, int]:
        """Bytes at the time when most are stored: for curves, in the comparison, or in a search."""
        # the next position's are computed while those of the last are there
        cached = {count: 2 * (sequences.scored + count) for count in (sequences.curves, sequences.held_out)}
        judging = max(2 * (sequences.scored + sequences.judging), self.blocks * sequences.judging)
        phases = [*cached.items(), *([(sequences.judging, judging)] if sequences.judging else [])]
        uses = [
            {
                "activations before a block": positions * tokens * self.width * self.itemsize,
                "dense outputs": compared * tokens * self.outputs * 4,
            }
            for compared, positions in phases
        ]
        largest = max(uses, key=lambda use: sum(use.values()))
        return {use: size for use, size in largest.items() if size or use == "activations before a block"}


def _activations(shapes: _Shapes, workload: Workload, tokens: int, itemsize: int) -> dict[str, int]:
    """Bytes of cached activations and dense outputs, in memory or on disk."""
    outputs = min(shapes.outputs, 512 * 3) if workload.metric == "kl_topk" else shapes.outputs
    sequences = Sequences(
        workload.samples if has_statistics(workload.allocation, workload.score) else 0,
        workload.curve_samples if workload.allocation in MEASURED else 0,
        workload.held_out,
        # in memory, a search caches no more than is free
        workload.refine_samples if workload.activations == "disk" else 0,
    )
    return _Stored(shapes.width, outputs, len(shapes.blocks), itemsize).largest(sequences, tokens)


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
    needs = NEEDS[workload.score]
    outliers = 0
    if workload.allocation == "owl":  # Wanda's sums of all matrices, and scores and pruners of a block
        outliers = sum(8 * columns for _, columns in shapes.matrices)
        outliers += max(sum(rows * columns for rows, columns in block) for block in shapes.blocks) * (4 + itemsize)
    per_block = [
        sum(
            8 * columns * ("square_sum" in needs)
            + 4 * columns**2 * ("gram" in needs)
            + 8 * min(_GRADIENTS, workload.samples) * rows * columns * ("gradients" in needs)
            for rows, columns in block
        )
        for block in shapes.blocks
    ]
    return max(outliers, *per_block)


def _pruner_bytes(shapes: _Shapes, workload: Workload, itemsize: int) -> int:
    """Of the largest matrix while it is ranked or updated, and what is held of the matrices that change together."""
    factor = 20 if "gram" in NEEDS[workload.score] else 0
    largest = max(
        rows * columns * (_PRUNER_BYTES + itemsize) + factor * columns**2 for rows, columns in shapes.matrices
    )
    if workload.allocation != "dp" or workload.granularity != "block":
        return largest
    # copies before and after, and ranks; Cholesky factors
    held = max(
        sum(rows * columns * (2 * itemsize + 2) + factor // 5 * columns**2 for rows, columns in block)
        for block in shapes.blocks
    )
    return largest + held
