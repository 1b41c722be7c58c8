"""How many weights each layer keeps, and the program that finds the best levels: curves to a knapsack and back."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from leanstep.pruning.allocate.budgets import Budget, cost, quantize
from leanstep.pruning.allocate.knapsack import InfeasibleBudget, KnapsackTable, solve_knapsack, solve_lagrange
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.score.targets import Layer

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# levels of each layer, and states of a table: LLaMA-7B's 224 matrices take under a second on one core
POINTS = 101
STATES = 1 << 15
_FRONT_POINTS = 200


@dataclass(frozen=True)
class Allocation:
    """Weights that each layer keeps.

    Attributes:
        method: the method of :func:`allocate`.
        numel, kept: weights and weights kept, by layer.
        target: most weights that all layers may keep; None for a budget of another kind.
        patterns: N:M patterns by layer, where levels are patterns.
        budget_kind, cost: kind of the budget, and the allocation's cost in its unit.
        predicted: sum of the layers' distortions, where there are curves.
        lagrange_gap: how much larger the Lagrangian's summed distortion is; >= 0.
        front: for "dp", up to 200 points (cost, summed distortion) at which a larger budget lowers the distortion.
    """

    method: str
    numel: dict[str, int]
    kept: dict[str, int]
    target: int | None = None
    patterns: dict[str, str] = field(default_factory=dict)
    budget_kind: str = "params"
    cost: float | None = None
    predicted: float | None = None
    lagrange_gap: float | None = None
    front: tuple[tuple[float, float], ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all layers together."""
        return 1 - sum(self.kept.values()) / sum(self.numel.values())

    def layer_sparsity(self, name: str) -> float:
        """Fraction of zeros in one layer."""
        return 1 - self.kept[name] / self.numel[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"front": [list(point) for point in self.front]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Allocation:
        """The allocation that :meth:`to_dict` wrote."""
        return cls(**{**values, "front": tuple((c, d) for c, d in values.get("front", ()))})


@dataclass(frozen=True)
class _Levels:
    """Levels that a layer may have: kept counts, decreasing, the distortion and cost of each, N:M patterns if any."""

    layer: Layer
    kept: Ints
    loss: Floats
    cost: Floats
    patterns: tuple[str, ...]

    def cost_of(self, kept: int, kind: str) -> float:
        """Cost of a count that may lie between levels; of latencies, only of a level."""
        if kind == "latency":
            return float(self.cost[int(np.flatnonzero(self.kept == kept)[0])])
        return float(cost(kind, self.layer, kept))

    def slope(self, level: int) -> float:
        """Distortion that the next denser level saves per unit of cost."""
        dearer = float(self.cost[level - 1] - self.cost[level])
        return float(self.loss[level] - self.loss[level - 1]) / dearer if dearer > 0 else math.inf


class Program:
    """Layers with their curves, and a budget of one kind; one table answers for every target.

    Args:
        layers: with unique names.
        curves: by name; cleaned here. Unstructured ones get levels between the measured ones, except for latencies,
            which are known at the measured levels only.
        budget: kind, largest target and table.
        lower, upper: fewest and most weights of each layer.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        curves: Mapping[str, Curve],
        budget: Budget,
        lower: Mapping[str, int],
        upper: Mapping[str, int],
    ):
        _check_curves(layers, curves)
        self._layers, self._budget = layers, budget
        # by name, so that the order in which layers come does not decide between equals
        ordered = sorted(layers, key=lambda layer: layer.name)
        if budget.seconds is None:
            dense = sum(float(cost(budget.kind, layer, curves[layer.name].kept[0])) for layer in ordered)
        else:
            dense = sum(float(next(iter(budget.seconds.get(layer.name, ())), 0.0)) for layer in ordered)
        self._levels = [
            _levels(layer, curves[layer.name], budget, lower[layer.name], upper[layer.name], dense / STATES)
            for layer in ordered
        ]
        self._offset, self._unit, self._table = self._solve(dense / STATES)

    def allocation(self, target: float | None = None) -> Allocation:
        """The best allocation for one target, at most the budget's; None: for that.

        Raises:
            InfeasibleBudget: for a target below the cost of the sparsest levels.
        """
        target = self._budget.target if target is None else target
        self._reach(target)
        units = min(math.floor((target - self._offset) / self._unit + 1e-9), self._table.budget)
        # costs are rounded up, together by as many units as there are layers at most: allow that much more, and take
        # the largest budget whose levels fit the target in truth
        for slack in range(0 if self._unit == 1.0 else len(self._levels), -1, -1):
            levels_at = self._table.choose(min(units + slack, self._table.budget))
            if sum(float(levels.cost[k]) for levels, k in zip(self._levels, levels_at, strict=True)) <= target:
                break
        gap = solve_lagrange(self._costs, self._losses, units)[1] - self._table.value(units)
        kept, spent = self._spend_rest(levels_at, target)
        # np.interp wants increasing counts
        predicted = sum(float(np.interp(kept[x.layer.name], x.kept[::-1], x.loss[::-1])) for x in self._levels)
        patterns = {
            x.layer.name: x.patterns[int(np.flatnonzero(x.kept == kept[x.layer.name])[0])]
            for x in self._levels
            if x.patterns
        }
        names = [layer.name for layer in self._layers]
        return Allocation(
            "dp",
            {layer.name: layer.numel for layer in self._layers},
            {name: kept[name] for name in names},
            int(target) if self._budget.kind == "params" else None,
            {name: patterns[name] for name in names if name in patterns},
            self._budget.kind,
            spent,
            predicted,
            max(gap, 0.0),
            tuple(self._front()),
        )

    def _reach(self, target: float) -> tuple[float, float]:
        """Cost of the sparsest levels and of the densest; InfeasibleBudget for a target below."""
        least, most = (sum(float(pick(levels.cost)) for levels in self._levels) for pick in (np.min, np.max))
        if target >= least:
            return least, most
        sparsities = ""
        if self._budget.kind == "params":
            total = sum(levels.layer.numel for levels in self._levels)
            lowest, highest, wanted = (1 - count / total for count in (most, least, target))
            sparsities = f": sparsities of {lowest:.4g} to {highest:.4g}, not {wanted:.4g}"
        raise InfeasibleBudget(
            f"a budget of {target:.12g} ({self._budget.kind}) cannot be met: the levels of the layers cost "
            f"{least:.12g} to {most:.12g}{sparsities}",
            least,
            most,
        )

    def _solve(self, unit: float) -> tuple[float, float, KnapsackTable]:
        """Cost that state 0 of the table stands for, cost of a state, and the table."""
        costs = [levels.cost for levels in self._levels]
        self._losses = [levels.loss for levels in self._levels]
        least, most = self._reach(self._budget.target)
        largest = min(self._budget.target, most)
        whole = self._budget.kind != "latency"
        if whole and (largest - least) <= 2 * STATES * _common_step(costs):
            self._costs = [c.astype(np.int64) for c in costs]
            return 0.0, 1.0, solve_knapsack(self._costs, self._losses, math.floor(largest))
        unit = unit if whole else (largest - least) / STATES or 1.0
        unit = max(math.floor(unit), 1) if self._budget.kind == "params" else unit
        self._costs, _, units = _in_units(costs, self._losses, largest, unit)
        return least, unit, solve_knapsack(self._costs, self._losses, units + len(costs))

    def _front(self) -> list[tuple[float, float]]:
        """Some points of the Pareto front up to the budget, evenly spread, the ends among them."""
        costs, losses = self._table.front()
        inside = self._offset + self._unit * costs <= self._budget.target
        costs, losses = costs[inside], losses[inside]
        if len(costs) > _FRONT_POINTS:
            spread = np.unique(np.linspace(0, len(costs) - 1, _FRONT_POINTS).round().astype(np.int64))
            costs, losses = costs[spread], losses[spread]
        return [(self._offset + self._unit * int(c), float(d)) for c, d in zip(costs, losses, strict=True)]

    def _spend_rest(self, levels_at: Sequence[int], target: float) -> tuple[dict[str, int], float]:
        """Kept counts and cost after raising levels while the target allows, the steepest slope first.

        N:M levels and latencies are raised by whole levels, others by any count.
        """
        kept = [int(levels.kept[k]) for levels, k in zip(self._levels, levels_at, strict=True)]
        spent = sum(float(levels.cost[k]) for levels, k in zip(self._levels, levels_at, strict=True))
        steps = [(-self._levels[g].slope(k), g, k) for g, k in enumerate(levels_at) if k > 0]
        heapq.heapify(steps)
        while steps:
            _, g, k = heapq.heappop(steps)
            levels = self._levels[g]
            raised = self._raised(levels, kept[g], k, target - spent)
            if raised > kept[g]:
                spent += levels.cost_of(raised, self._budget.kind) - levels.cost_of(kept[g], self._budget.kind)
                kept[g] = raised
            if raised == levels.kept[k - 1] and k > 1:
                heapq.heappush(steps, (-levels.slope(k - 1), g, k - 1))
        return {levels.layer.name: count for levels, count in zip(self._levels, kept, strict=True)}, spent

    def _raised(self, levels: _Levels, kept: int, level: int, room: float) -> int:
        """The largest count, up to that of the next denser level, whose additional cost is at most ``room``."""
        kind, top = self._budget.kind, int(levels.kept[level - 1])
        limit = levels.cost_of(kept, kind) + room
        if levels.cost_of(top, kind) <= limit:
            return top
        if levels.patterns or kind == "latency":
            return kept
        low, high = kept, top  # cost does not decrease in the count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if levels.cost_of(middle, kind) <= limit else (low, middle)
        return low


def snap(allocation: Allocation, levels: Mapping[str, tuple[Sequence[int], Sequence[str]]]) -> Allocation:
    """The nearest allocation whose layers have N:M patterns: for rules that know nothing of them.

    Minimizes the sum of ``numel * (difference of densities)^2``, with no more weights in all than before.

    Args:
        allocation: of any method.
        levels: by layer, kept counts and patterns, for instance :func:`leanstep.pruning.nm_levels`.

    Raises:
        InfeasibleBudget: where the sparsest patterns keep more weights than the allocation.
    """
    names = sorted(levels)
    costs = [np.array(levels[name][0], dtype=np.float64) for name in names]
    losses = [(c - allocation.kept[name]) ** 2 / allocation.numel[name] for name, c in zip(names, costs, strict=True)]
    total = float(sum(allocation.kept[name] for name in names))
    least, most = (sum(float(pick(cost)) for cost in costs) for pick in (np.min, np.max))
    if total < least:
        raise InfeasibleBudget(
            f"snap: {total:g} weights cannot be kept: the patterns keep {least:g} or more", least, most
        )
    unit = max(_common_step(costs), math.ceil((min(total, most) - least) / (2 * STATES)), 1)
    table = solve_knapsack(*_in_units(costs, losses, min(total, most), unit))
    kept, patterns = dict(allocation.kept), {}
    for name, level in zip(names, table.choose(), strict=True):
        kept[name], patterns[name] = int(levels[name][0][level]), levels[name][1][level]
    patterns = {name: patterns[name] for name in kept if name in patterns}
    changed: dict[str, Any] = {"cost": float(sum(kept.values())), "predicted": None, "lagrange_gap": None}
    return replace(allocation, kept=kept, patterns=patterns, budget_kind="params", **changed)


def _in_units(
    costs: Sequence[Floats], losses: list[Floats], largest: float, unit: float
) -> tuple[list[Ints], list[Floats], int]:
    """Costs, losses and budget of a table in whole units; costs are rounded up."""
    whole, units = quantize(costs, largest, unit)
    return whole, losses, units


def _common_step(costs: Sequence[Floats]) -> int:
    """Greatest common divisor of all differences of whole costs within a layer; 0 where there are none."""
    return math.gcd(*(math.gcd(*(c - c.min()).astype(np.int64).tolist()) for c in costs))


def _check_curves(layers: Sequence[Layer], curves: Mapping[str, Curve]) -> None:
    for layer in layers:
        curve = curves.get(layer.name)
        if curve is None:
            raise ValueError(f"allocate: method 'dp' needs a curve of every layer; {layer.name!r} has none")
        if curve.numel != layer.numel:
            raise ValueError(
                f"allocate: the curve of {layer.name!r} is for {curve.numel} weights, the layer has {layer.numel}"
            )
    metrics = {curves[layer.name].metric for layer in layers}
    if len(metrics) > 1:
        raise ValueError(f"allocate: distortions of different metrics cannot be added: {', '.join(sorted(metrics))}")


def _levels(layer: Layer, curve: Curve, budget: Budget, lower: int, upper: int, unit: float) -> _Levels:
    """The levels of a layer within its bounds."""
    clean = curve.cleaned()
    if budget.seconds is not None:
        costs = np.asarray(budget.seconds.get(layer.name, ()), dtype=np.float64)
        if costs.shape != (len(curve.kept),) or not (costs >= 0).all():
            raise ValueError(f"allocate: expected {len(curve.kept)} latencies of {layer.name!r}, one per level")
        kept, loss = np.array(clean.kept), np.array(clean.distortion)
    else:
        if not curve.patterns and len(curve.kept) > 1:
            # steps of one cost in all layers
            weight = float(cost(budget.kind, layer, 1) - cost(budget.kind, layer, 0)) or 1.0
            clean = clean.dense_grid(POINTS, max(1, int(unit / weight)))
        kept, loss = np.array(clean.kept), np.array(clean.distortion)
        if not curve.patterns:
            # the bounds are levels, too
            ends = [bound for bound in (lower, upper) if kept[-1] < bound < kept[0]]
            every = np.union1d(kept, ends).astype(np.int64)[::-1]
            kept, loss = every, np.interp(every, kept[::-1], loss[::-1])
        costs = cost(budget.kind, layer, kept).astype(np.float64)
    inside = (kept >= lower) & (kept <= upper)
    if not inside.any():
        raise InfeasibleBudget(
            f"allocate: no level of {layer.name!r} keeps {lower} to {upper} of {layer.numel} weights; its levels keep "
            f"{kept[-1]} to {kept[0]}",
            int(kept[-1]),
            int(kept[0]),
        )
    patterns = tuple(p for p, ok in zip(curve.patterns, inside, strict=False) if ok)
    return _Levels(layer, kept[inside], loss[inside], costs[inside], patterns)
