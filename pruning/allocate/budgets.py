"""What a budget counts: weights, operations, bytes or seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leanstep.pruning.score.layers import Layer

KINDS = ("params", "flops", "bytes", "latency")
UNITS = {"params": "weights", "flops": "operations per sample", "bytes": "bytes", "latency": "seconds"}


@dataclass(frozen=True)
class Budget:
    """The most that the pruned layers may cost together.

    Attributes:
        kind: * "params": weights that are kept.
            * "flops": operations per sample, 2 for every kept weight and use (``Layer.uses``).
            * "bytes": of kept values and a bit per weight that says which they are, or of the dense matrix where that
              is smaller.
            * "latency": seconds, from a table.
        target: the most, in that unit.
        seconds: for "latency": by layer name, seconds at every level of its curve, as measured.

    Raises:
        ValueError: for an unknown kind, a target that is not positive, or a table where there is none or none where
            there must be one.
    """

    kind: str
    target: float
    seconds: Mapping[str, Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Budget: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0 < self.target < math.inf:
            raise ValueError(f"Budget: expected a positive target, got {self.target}")
        if (self.kind == "latency") != (self.seconds is not None):
            raise ValueError("Budget: kind 'latency' goes with a table of seconds, and no other kind does")

    @classmethod
    def fraction(
        cls, kind: str, of_dense: float, layers: Sequence[Layer], seconds: Mapping[str, Sequence[float]] | None = None
    ) -> Budget:
        """A budget of a fraction of what the dense layers cost; of a table, its first levels."""
        if seconds is not None:
            return cls(kind, of_dense * sum(seconds[layer.name][0] for layer in layers), seconds)
        return cls(kind, of_dense * sum(float(cost(kind, layer, layer.numel)) for layer in layers))


def cost(kind: str, layer: Layer, kept: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Integer cost of kept counts, for every kind but "latency"."""
    counts = np.asarray(kept, dtype=np.int64)
    if kind == "params":
        return counts
    if kind == "flops":
        return 2 * layer.uses * counts
    if kind == "bytes":
        return np.minimum(layer.numel * layer.itemsize, counts * layer.itemsize + -(-layer.numel // 8))
    raise ValueError(f"no cost of kept weights is known for a budget of kind {kind!r}")


def quantize(
    costs: Sequence[npt.NDArray[np.float64]], budget: float, unit: float
) -> tuple[list[npt.NDArray[np.int64]], int]:
    """Costs and budget in whole units, counted from each group's cheapest level.

    Costs are rounded up and the budget down: what fits in units, fits.
    """
    least = [float(cost.min()) for cost in costs]
    # what is a whole number of units must not become one more by rounding
    whole = [np.ceil((cost - low) / unit - 1e-9).astype(np.int64) for cost, low in zip(costs, least, strict=True)]
    return whole, math.floor((budget - sum(least)) / unit + 1e-9)
