"""Budgets: what the weights of a matrix cost, and the largest cost that a sparsity allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leanstep.pruning.allocate.knapsack import InfeasibleBudget
from leanstep.pruning.allocate.latency import LatencyTable
from leanstep.pruning.measure.curves import Levels
from leanstep.pruning.score.targets import Group, Layer

UNITS = {
    "params": "weights",
    "flops": "operations per sample",
    "bytes": "bytes",
    "size": "bytes",
    "latency": "seconds",
}
Ints = npt.NDArray[np.int64]
# center of the levels if no uniform sparsity meets the budget; the solver then reports the reachable range
_SPARSEST = 0.99


@dataclass(frozen=True)
class Budget:
    """Largest total cost of the pruned layers.

    Attributes:
        kind: * "params": weights that are left.
            * "flops": operations per sample, 2 for every weight left and use (``Layer.uses``).
            * "bytes": the values left and a mask of one bit per weight, or the dense matrix if that is smaller.
            * "size": with a menu, the bytes of all levels.
            * "latency": seconds, from a table.
        target: the largest cost, in that unit.
        seconds: for "latency": by layer name, seconds at every level of its curve, as measured. A curve that ends
            early has the first of them.

    Raises:
        ValueError: for an unknown kind, a target that is not positive, "latency" without ``seconds``, or ``seconds``
            with another kind.
    """

    kind: str
    target: float
    seconds: Mapping[str, Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.kind not in UNITS:
            raise ValueError(f"Budget: kind must be one of {', '.join(UNITS)}, got {self.kind!r}")
        if not 0 < self.target < math.inf:
            raise ValueError(f"Budget: expected a positive target, got {self.target}")
        if (self.kind == "latency") != (self.seconds is not None):
            raise ValueError("Budget: kind 'latency' goes with a table of seconds, and no other kind does")

    @classmethod
    def fraction(
        cls, kind: str, of_dense: float, layers: Sequence[Layer], seconds: Mapping[str, Sequence[float]] | None = None
    ) -> Budget:
        """A budget of ``of_dense`` times the dense cost. The first of a layer's ``seconds`` is its dense cost."""
        return cls(kind, of_dense * dense_cost(kind, layers, seconds), seconds)


def dense_cost(kind: str, layers: Sequence[Layer], seconds: Mapping[str, Sequence[float]] | None = None) -> float:
    """Cost of layers with all their weights; latencies are those of the first level."""
    if seconds is not None:
        return sum(seconds[layer.name][0] for layer in layers)
    return sum(float(cost(kind, layer, layer.numel)) for layer in layers)


def cost(kind: str, layer: Layer, counts: npt.ArrayLike) -> Ints:
    """Cost of a layer with ``counts`` weights left, int64; for every kind except "latency"."""
    counts = np.asarray(counts, dtype=np.int64)
    if kind == "flops":
        return 2 * layer.uses * counts
    if kind == "bytes":
        return np.minimum(layer.numel * layer.itemsize, counts * layer.itemsize + -(-layer.numel // 8))
    assert kind in ("params", "size"), kind
    return counts


def keep_total(total: int, sparsity: float | None) -> int:
    """Number of weights of ``total`` to keep; the number of zeros is rounded up."""
    # 1e-6: in floating point, 0.7 * 1000 is slightly more than 700
    return total - math.ceil((sparsity or 0.0) * total - 1e-6)


@dataclass(frozen=True)
class BudgetConstraint:
    """A budget for some layers, and the cost of these layers at any density.

    Attributes:
        budget: kind, target, and for latencies the seconds of each layer at each of its levels.
        layers: one for each group.
        dense: cost of the layers with all their weights.
        counts: for latencies, weights left at each level of each layer.
    """

    budget: Budget
    layers: Sequence[Layer]
    dense: float
    counts: Mapping[str, Sequence[int]]

    @classmethod
    def of(
        cls,
        budget: Budget | LatencyTable | str,
        groups: Sequence[Group],
        sparsity: float | None,
        counts: Mapping[str, Sequence[int]],
    ) -> BudgetConstraint:
        """Make a constraint from a budget, or from a cost that may be at most ``1 - sparsity`` of the dense model's.

        Args:
            budget: a budget; ``params``, ``flops`` or ``bytes``; or a table of latencies.
            groups: groups of matrices; for ``flops``, with their uses counted.
            sparsity: fraction of the dense cost to remove; None with a :class:`Budget`.
            counts: for latencies, weights left at each level of each group's curve.

        Raises:
            ValueError: if the table lacks a layer or a level, or for "flops" if the matrices of a group are not used
                equally often.
        """
        layers = [group.layer for group in groups]
        if isinstance(budget, Budget):
            kind, seconds = budget.kind, budget.seconds
            dense = dense_cost(kind, [x for x in layers if seconds is None or x.name in seconds], seconds)
        elif isinstance(budget, LatencyTable):
            kind, seconds = "latency", budget.of(groups, counts)
            # the first level of a model that was pruned before is not the dense one
            dense = sum(budget.seconds[target.name][0] for group in groups for target in group.targets)
        else:
            kind, seconds, dense = budget, None, dense_cost(budget, layers)
        if kind == "flops":
            _check_uses(groups)
        if not isinstance(budget, Budget):
            assert sparsity is not None
            target = max(keep_total(int(dense), sparsity), 1) if kind == "params" else (1 - sparsity) * dense
            budget = Budget(kind, target, seconds)
        return cls(budget, layers, dense, counts)

    @property
    def uniform_sparsity(self) -> float:
        """The uniform sparsity that meets the budget, at most 0.99; 0.5 for latencies. Levels lie around it."""
        if self.budget.kind == "latency":
            return 0.5
        low, high = 0.0, 1.0
        for _ in range(40):
            density = (low + high) / 2
            spent = self.cost({layer.name: int(density * layer.numel) for layer in self.layers})
            low, high = (density, high) if spent <= self.budget.target else (low, density)
        return min(1 - low, _SPARSEST)

    def cost(self, counts: Mapping[str, int]) -> float:
        """Cost of counts of weights. Latencies are those of the sparsest level that keeps at least as many."""
        if self.budget.seconds is None:
            return sum(float(cost(self.budget.kind, layer, counts[layer.name])) for layer in self.layers)
        total = 0.0
        for layer in self.layers:
            enough = [level for level, count in enumerate(self.counts[layer.name]) if count >= counts[layer.name]]
            total += self.budget.seconds[layer.name][max(enough, default=0)]
        return total

    def reach(self, levels: Levels, upper: Mapping[str, int]) -> tuple[float, float]:
        """Cost of the sparsest and of the densest levels with at most ``upper`` weights, of layers that have levels.

        Args:
            levels: of each layer; they may end before those of the budget's seconds.
            upper: most weights of each layer.
        """
        least = most = 0.0
        for layer in self.layers:
            if layer.name not in levels:
                continue
            counts = levels[layer.name][0]
            if self.budget.seconds is None:
                costs = cost(self.budget.kind, layer, counts).astype(np.float64)
            else:
                costs = np.asarray(self.budget.seconds[layer.name], dtype=np.float64)[: len(counts)]
            allowed = costs[[count <= upper[layer.name] for count in counts[: len(costs)]]]
            allowed = allowed if len(allowed) else costs[-1:]
            least, most = least + float(allowed.min()), most + float(allowed.max())
        return least, most

    def check_reach(self, levels: Levels, upper: Mapping[str, int], sparsity: float | None) -> None:
        """Raise InfeasibleBudget for a target that no levels with at most ``upper`` weights meet.

        Args:
            levels, upper: as for :meth:`reach`.
            sparsity: the requested sparsity, for the message; None for costs.
        """
        least, most = self.reach(levels, upper)
        if self.budget.target >= least:
            return
        requested, largest, smallest = (1 - spent / self.dense for spent in (self.budget.target, least, most))
        if self.budget.seconds is not None:
            others = "a table with sparser levels (--latency-table)"
        elif any(patterns for _, patterns in levels.values()):
            others = "no pattern (--pattern)"
        else:
            others = "other levels (--levels)"
        advice = f"ask for less (--sparsity), or {others}"
        if sparsity is not None:
            message = (
                f"a sparsity of {sparsity:g} is out of reach: the levels of these matrices give sparsities from "
                f"{smallest:.4g} to {largest:.4g}; {advice}"
            )
        else:
            message = (
                f"removing {requested:.4g} of the cost ({self.budget.kind}) is out of reach: the matrices' levels "
                f"remove from {max(smallest, 0.0):.4g} to {largest:.4g}; {advice}"
            )
        raise InfeasibleBudget(message, least, most)

    def check_sparsity(self, sparsity: float | None, nonzero: Mapping[str, int], *, may_keep_none: bool) -> None:
        """Raise InfeasibleBudget for a model with more zeros than asked, or for a sparsity that keeps no weight.

        Args:
            sparsity: the requested one; None for costs, which are checked by :meth:`check_reach` alone.
            nonzero: weights of each layer that are not zero.
            may_keep_none: whether the allocation itself refuses to keep no weight.
        """
        if sparsity is None:
            return
        total, left = sum(layer.numel for layer in self.layers), sum(nonzero.values())
        keep = keep_total(total, sparsity)
        if keep > left:
            raise InfeasibleBudget(
                f"the model already has {1 - left / total:.4g} zeros, more than the {sparsity:g} that was asked, and "
                "zeros stay zero: ask for more, or prune the dense model",
                0,
                left,
            )
        if keep == 0 and not may_keep_none:
            raise InfeasibleBudget(
                f"a sparsity of {sparsity!r} keeps none of the {total:,} weights; ask for less", 1, left
            )

    def uniform(self, upper: Mapping[str, int], levels: Levels | None) -> tuple[dict[str, int], dict[str, str]] | None:
        """Counts and patterns of the densest uniform sparsity within the budget; None if there is none.

        Args:
            upper: most weights of each layer.
            levels: counts and patterns of each layer, for N:M patterns and latencies. Each layer takes its
                densest level that is at least as sparse. None: any count is possible.
        """
        sizes = {layer.name: layer.numel for layer in self.layers}
        if levels is None:
            density = 1 - self.uniform_sparsity
            counts = {name: min(int(density * size), upper[name]) for name, size in sizes.items()}
            return (counts, {}) if self.cost(counts) <= self.budget.target else None
        for sparsity in sorted({1 - count / sizes[name] for name in sizes for count in levels[name][0]}):
            at = {name: _level_at(levels[name][0], sizes[name], sparsity) for name in sizes}
            counts = {name: int(levels[name][0][level]) for name, level in at.items()}
            if self.cost(counts) <= self.budget.target:
                return counts, {name: levels[name][1][level] for name, level in at.items() if levels[name][1]}
        return None


def _check_uses(groups: Sequence[Group]) -> None:
    for group in groups:
        if len({target.layer.uses for target in group.targets}) > 1:
            raise ValueError(
                f"{group.name} has matrices that are used differently often: its operations are not proportional "
                "to its weights; use granularity='matrix'"
            )


def _level_at(counts: Sequence[int], numel: int, sparsity: float) -> int:
    """Index of the densest level of at least this sparsity, or of the sparsest level."""
    most = math.floor((1 - sparsity) * numel + 0.5)
    return next((level for level, count in enumerate(counts) if count <= most), len(counts) - 1)
