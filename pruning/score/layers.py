"""A prunable matrix as allocations see it, and the weight of a module seen as a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

LAYOUTS = ("out_in", "in_out", "conv")


@dataclass(frozen=True)
class Layer:
    """Name and size of one prunable matrix.

    Attributes:
        name: unique among the layers that are pruned together.
        shape: (out, in), or (out, in / groups, kernel...) of a convolution.
        block: number of the transformer block it is in, from 0; None outside of blocks.
        uses: how often each weight is multiplied per sample: the output positions of a convolution, the tokens of a
            sequence.
        itemsize: bytes of a stored weight.

    Raises:
        ValueError: for fewer than two dimensions, an empty matrix, or numbers below 1.
    """

    name: str
    shape: tuple[int, ...]
    block: int | None = None
    uses: int = 1
    itemsize: int = 4

    def __post_init__(self) -> None:
        if len(self.shape) < 2 or self.numel < 1:
            raise ValueError(f"Layer {self.name!r}: expected a shape (out, in, ...) without zeros, got {self.shape}")
        if self.uses < 1 or self.itemsize < 1:
            raise ValueError(f"Layer {self.name!r}: uses = {self.uses} and itemsize = {self.itemsize} must be >= 1")

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def as_matrix(weight: Tensor, layout: str = "out_in") -> Tensor:
    """A weight as a matrix [out, in] that shares its memory; what is written to it, is written to the weight.

    Args:
        weight: the parameter's data, or one expert of a three-dimensional parameter.
        layout: "out_in" for ``nn.Linear``; "in_out" for transformers' ``Conv1D`` and experts stored [in, out], which
            are transposed; "conv" for convolutions [out, in / groups, kernel...], whose rows are flattened.

    Raises:
        ValueError: for another layout, a number of dimensions that it does not have, or a convolution whose memory
            no matrix can share.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"as_matrix: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if (weight.dim() < 3) if layout == "conv" else (weight.dim() != 2):
        needed = "three or more" if layout == "conv" else "two"
        raise ValueError(f"as_matrix: layout {layout!r} needs {needed} dimensions, got shape {tuple(weight.shape)}")
    if layout == "in_out":
        return weight.T
    if layout == "out_in":
        return weight
    try:
        return weight.view(weight.shape[0], -1)
    except RuntimeError:
        raise ValueError(
            f"as_matrix: a convolution's weight with strides {weight.stride()} has no rows in one piece; make it "
            "contiguous (weight.contiguous()) first"
        ) from None
