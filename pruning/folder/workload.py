"""What an estimate is of: the data and settings of a run, and the shapes of a model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from leanstep._checkpoint.mapped import RESIDENT
from leanstep.pruning.allocate.descent import Refinement
from leanstep.pruning.config import PruneConfig, read_config
from leanstep.pruning.folder.files import ITEM_BYTES, Checkpoint, most_common_dtype
from leanstep.pruning.measure.blocks import candidate_blocks
from leanstep.pruning.score.targets import block_numbers


@dataclass(frozen=True, init=False)
class Workload:
    """Calibration data and settings that decide what pruning takes.

    Attributes:
        config: the settings of :func:`leanstep.pruning.prune`. Of ``levels``, their number is enough.
        samples, curve_samples, held_out: numbers of sequences (or images).
        tokens: of a sequence; None: the model's positions, at most 2048, or the patches of an image. The tokenizer's
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
    samples: int = 128
    curve_samples: int = 16
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
    itemsize: int
    # of a sample
    tokens: int

    @property
    def pruned(self) -> int:
        """Weights of all matrices."""
        return sum(rows * columns for rows, columns in self.matrices)

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: nn.Module, names: list[str], tokens: int = 0) -> Shapes:
        """Of the parameters ``names`` of a model without values."""
        itemsize, parameters = ITEM_BYTES[most_common_dtype(checkpoint)], dict(model.named_parameters())
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
            itemsize,
            tokens,
        )


def _is_joined(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a parameter of experts is made of several tensors of the files."""
    return ".experts." in name and name not in checkpoint.names
