"""What pruning takes, told before anything is loaded: a plan of shapes, data and settings, and the cost of a phase.

Each phase of a run has a function from a :class:`Plan` to a :class:`Cost` beside the code that it is about;
:func:`leanstep.pruning.folder.estimate.estimate_pruning` adds them up. A worked example is
:func:`leanstep.pruning.allocate.refine.search_cost`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from torch import nn

from leanstep._checkpoint.mapped import RESIDENT
from leanstep.pruning.config import PruneConfig, Refinement, read_config
from leanstep.pruning.folder.files import DTYPES, Checkpoint, most_common_dtype
from leanstep.pruning.measure.blocks import candidate_blocks
from leanstep.pruning.score.targets import block_numbers

# calls of torch in a block of a transformer, and around the blocks
_BLOCK_CALLS, _OTHER_CALLS = 60, 60

Bytes = Mapping[str, int]
N = TypeVar("N", int, float)


@dataclass(frozen=True, init=False)
class Workload:
    """Calibration data and settings that decide what pruning takes.

    Attributes:
        config: the settings of :func:`leanstep.pruning.prune`. Of ``levels``, their number is enough.
        samples, curve_samples, held_out: numbers of sequences (or images).
        tokens: of a sequence; None: the model's positions, at most 512, or the patches of an image. The tokenizer's
            limit is not looked at.
        activations, resident: as for :func:`leanstep.pruning.prune_checkpoint`.
        refine_samples: sequences that judge exchanges; 0: no search.
        processes: that share the work.
        device: that computes. Of another one than the CPU, the memory is estimated and not the time.

    Args:
        config: as above.
        **options: the other attributes; settings by name, which change those of ``config``; and ``refine_minutes``,
            ``refine_evaluations``, the limits of a search.

    Raises:
        TypeError: for an unknown option.
        ValueError: for numbers of samples or tokens that no run takes.
    """

    config: PruneConfig
    samples: int = 32
    curve_samples: int = 4
    held_out: int = 8
    tokens: int | None = None
    activations: str = "memory"
    resident: int = RESIDENT
    refine_samples: int = 0
    processes: int = 1
    device: str = "cpu"

    def __init__(self, config: PruneConfig | None = None, **options: Any) -> None:
        for one in fields(self)[1:]:
            object.__setattr__(self, one.name, options.pop(one.name, one.default))
        minutes, evaluations = (options.pop(f"refine_{limit}", None) for limit in ("minutes", "evaluations"))
        if minutes is not None or evaluations is not None:
            options["refine"] = Refinement(minutes, evaluations)
        if isinstance(number := options.get("levels"), int):
            options["levels"] = (0.5,) * number
        config = read_config("Workload", config, options)
        object.__setattr__(self, "config", config)
        counts = (self.samples, self.curve_samples, self.held_out)
        if self.config.batch_size < 1 or min(counts) < 0:
            raise ValueError(
                "expected samples, curve_samples and held_out of at least 0 and batch_size of at least 1, got "
                f"{', '.join(map(str, (*counts, self.config.batch_size)))}"
            )
        if self.tokens is not None and self.tokens < 2:
            raise ValueError(f"expected at least 2 tokens in a sequence, got {self.tokens}")

    @property
    def sparsity(self) -> float:
        """The sparsity asked for, around which levels lie; 0.5 for another budget."""
        return 0.5 if self.config.sparsity is None else self.config.sparsity


@dataclass(frozen=True)
class Shapes:
    """Matrices [out, in] of a model by block, and its sizes.

    Attributes:
        blocks: the matrices to prune of each block.
        parameters: number of all weights.
        active: those that are used for one token: of experts, those that it is routed to.
        width, outputs: values of a token before a block, and logits.
        fused_bytes: of experts that are joined in memory, then copied to a mapped file.
        moved: bytes of the largest block that is copied to a device.
        one_output: whether a sample has one output, as of a classifier.
        itemsize: bytes of a weight.
        size: bytes of the files.
        tokens: of a sample.
    """

    blocks: list[list[tuple[int, int]]]
    parameters: int
    active: int
    width: int
    outputs: int
    fused_bytes: int
    moved: int
    one_output: bool
    itemsize: int
    size: int
    tokens: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Those of all blocks."""
        return [matrix for block in self.blocks for matrix in block]

    @property
    def pruned(self) -> int:
        """Weights of all matrices."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def largest_block(self) -> int:
        """Most weights of the matrices of a block."""
        return max(sum(rows * columns for rows, columns in block) for block in self.blocks)

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: nn.Module, names: list[str], tokens: int = 0) -> Shapes:
        """Of the parameters ``names`` of a model without values."""
        itemsize, parameters = DTYPES[most_common_dtype(checkpoint)].itemsize, dict(model.named_parameters())
        numbers = block_numbers(names)
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
        head = getattr(model, "get_output_embeddings", lambda: None)()
        # made of several tensors of the files
        joined = [p.numel() for name, p in parameters.items() if ".experts." in name and name not in checkpoint.names]
        moved = [sum(parameter.numel() for parameter in block.parameters()) for _, block in candidate_blocks(model)]
        return cls(
            blocks=list(blocks.values()),
            parameters=numel,
            active=int(numel - experts * (1 - min(1.0, routed / total))),
            width=getattr(text, "hidden_size", None) or largest,
            outputs=getattr(config, "num_labels", largest) if head is None else head.weight.shape[0],
            fused_bytes=3 * itemsize * max(joined, default=0),
            moved=itemsize * max(moved, default=0),
            one_output=bool(re.search(r"For(Sequence|Image|Audio|Video)Classification", type(model).__name__)),
            itemsize=itemsize,
            size=checkpoint.size,
            tokens=tokens,
        )


@dataclass(frozen=True)
class Rates:
    """Seconds of an operation of a product, of a weight that is ranked, of a call of torch, of a logit that is
    compared, and of a byte that is copied and that is hashed.
    """

    operation: float = 0.0
    ranked: float = 0.0
    call: float = 0.0
    logit: float = 0.0
    copied: float = 0.0
    hashed: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What a phase takes.

    Attributes:
        seconds: by use.
        passes: over all weights.
        memory, disk: bytes by use that the phase holds until it ends.
        working: bytes of memory by use for one batch or one matrix at a time. The allocator keeps what was freed: the
            process has the most that any phase had.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    passes: float = 0.0
    memory: Bytes = field(default_factory=dict)
    disk: Bytes = field(default_factory=dict)
    working: Bytes = field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        """Of two parts of a phase, which hold their bytes at the same time."""
        working = {use: max(size, self.working.get(use, 0)) for use, size in other.working.items()}
        return Cost(
            _sums(self.seconds, other.seconds),
            self.passes + other.passes,
            _sums(self.memory, other.memory),
            _sums(self.disk, other.disk),
            {**self.working, **working},
        )


def _sums(one: Mapping[str, N], other: Mapping[str, N]) -> dict[str, N]:
    return {**one, **{use: value + one[use] if use in one else value for use, value in other.items()}}


@dataclass(frozen=True)
class Plan:
    """A run to tell the cost of: a model's shapes, data and settings, and the rates of this machine."""

    shapes: Shapes
    workload: Workload
    rates: Rates = Rates()

    @property
    def config(self) -> PruneConfig:
        """The settings."""
        return self.workload.config

    @property
    def in_files(self) -> bool:
        """Whether activations, and what a phase needs of all matrices, are in files."""
        return self.workload.activations == "disk"

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes, which has all weights and recomputes activations."""
        return self.workload.device == "cpu"

    @property
    def groups(self) -> int:
        """Number of the matrices, or blocks, that have a level of their own."""
        return len(self.shapes.blocks if self.config.granularity == "block" else self.shapes.matrices)

    def cost(
        self,
        seconds: dict[str, float] | None = None,
        *,
        passes: float = 0.0,
        stored: Bytes | None = None,
        memory: Bytes | None = None,
        working: Bytes | None = None,
    ) -> Cost:
        """A cost whose ``stored`` bytes are in files or in memory, and ``memory`` in memory in either case."""
        disk, memory = (stored or {}, memory or {}) if self.in_files else ({}, {**(stored or {}), **(memory or {})})
        return Cost(seconds or {}, passes, memory, disk, working or {})

    def pass_seconds(self, samples: float, *, compared: bool = False, batch_size: int | None = None) -> float:
        """Of a pass of samples through all blocks."""
        shapes, rates = self.shapes, self.rates
        batches = samples / min(batch_size or self.config.batch_size, max(samples, 1))
        seconds = 2 * shapes.active * shapes.tokens * samples * rates.operation
        seconds += batches * (_BLOCK_CALLS * len(shapes.blocks) + _OTHER_CALLS) * rates.call
        return seconds + (samples * shapes.tokens * shapes.outputs * rates.logit if compared else 0.0)
