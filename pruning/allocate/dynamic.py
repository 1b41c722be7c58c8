"""The layers' levels with the least summed distortion within a budget: curves to knapsack and back to exact counts."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leanstep.pruning.allocate.budgets import Budget, cost, quantize
from leanstep.pruning.allocate.knapsack import InfeasibleBudget, KnapsackTable, solve_knapsack, solve_lagrange
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.score.targets import Layer

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# states of a table: LLaMA-7B's 224 matrices with a hundred levels each take under a second on one core
STATES = 1 << 15


@dataclass(frozen=True)
class Choice:
    """A solution: kept counts and levels by layer, its cost in the budget's unit, and its predicted distortion."""

    kept: dict[str, int]
    patterns: dict[str, str]
    cost: float
    predicted: float
    lagrange_gap: float


@dataclass(frozen=True)
class _Levels:
    """The levels that one layer may have: kept counts, decreasing, what each costs and loses, N:M patterns if any."""

    layer: Layer
    kept: Ints
    loss: Floats
    cost: Floats
    patterns: tuple[str, ...]


class Problem:
    """Layers with their curves, and a budget of one kind; one table answers for every target.

    Args:
        layers: with unique names.
        curves: by name; cleaned here. Unstructured ones are refined to ``points`` levels, unless the budget is a table
            of latencies, which knows the curve's own levels only.
        budget: kind, largest target and table.
        lower, upper: fewest and most weights of each layer.
        points: levels per layer.
        states: of the knapsack's table.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        curves: Mapping[str, Curve],
        budget: Budget,
        lower: Mapping[str, int],
        upper: Mapping[str, int],
        points: int = 101,
        states: int = STATES,
    ):
        _check_curves(layers, curves)
        # by name, so that the order in which layers come does not decide between equals
        ordered = sorted(layers, key=lambda layer: layer.name)
        dense = sum(float(_cost_of(budget, layer, curves[layer.name].kept[0], 0)) for layer in ordered)
        self._budget = budget
        self._levels = [
            _levels(layer, curves[layer.name], budget, lower[layer.name], upper[layer.name], points, dense / states)
            for layer in ordered
        ]
        self._offset, self._unit, self._table = self._solve(states, dense / states)

    def _check(self, target: float) -> tuple[float, float]:
        """What the sparsest levels cost, and the densest; refuse a target below."""
        least, most = (sum(float(pick(levels.cost)) for levels in self._levels) for pick in (np.min, np.max))
        if target < least:
            also = ""
            if self._budget.kind == "params":
                total = sum(levels.layer.numel for levels in self._levels)
                also = (
                    f": sparsities of {1 - most / total:.4g} to {1 - least / total:.4g}, not {1 - target / total:.4g}"
                )
            raise InfeasibleBudget(
                f"a budget of {target:.12g} ({self._budget.kind}) cannot be met: the levels of the layers cost "
                f"{least:.12g} to {most:.12g}{also}",
                least,
                most,
            )
        return least, most

    def _solve(self, states: int, unit: float) -> tuple[float, float, KnapsackTable]:
        """The table, what 0 of its units stands for, and what one does."""
        costs = [levels.cost for levels in self._levels]
        losses = [levels.loss for levels in self._levels]
        least, most = self._check(self._budget.target)
        largest = min(self._budget.target, most)
        whole = self._budget.kind != "latency"
        if whole and (largest - least) <= 2 * states * common_step(costs):
            self._costs = [c.astype(np.int64) for c in costs]
            return 0.0, 1.0, solve_knapsack(self._costs, losses, math.floor(largest))
        unit = unit if whole else (largest - least) / states or 1.0
        unit = max(math.floor(unit), 1) if self._budget.kind == "params" else unit
        self._costs, units = quantize(costs, largest, unit)
        return least, unit, solve_knapsack(self._costs, losses, units + len(costs))

    def choose(self, target: float) -> Choice:
        """The best levels for one target, at most the largest, with what rounding left of it given back.

        Raises:
            InfeasibleBudget: for a target below what the sparsest levels cost.
        """
        self._check(target)
        units = min(math.floor((target - self._offset) / self._unit + 1e-9), self._table.budget)
        # rounded up, costs may add up to as many units too many as there are layers: what fits in truth is taken
        for slack in range(0 if self._unit == 1.0 else len(self._levels), -1, -1):
            places = self._table.choose(min(units + slack, self._table.budget))
            if sum(float(levels.cost[k]) for levels, k in zip(self._levels, places, strict=True)) <= target:
                break
        losses = [levels.loss for levels in self._levels]
        gap = solve_lagrange(self._costs, losses, units)[1] - self._table.value(units)
        return self._repaired(places, target, max(gap, 0.0))

    def front(self, most: int = 200) -> list[tuple[float, float]]:
        """Costs at which a larger budget first pays, and the summed distortions: of all targets up to the largest.

        Of more than ``most`` points, that many are given, evenly spread, the ends among them.
        """
        costs, losses = self._table.front()
        inside = self._offset + self._unit * costs <= self._budget.target
        costs, losses = costs[inside], losses[inside]
        if len(costs) > most:
            some = np.unique(np.linspace(0, len(costs) - 1, most).round().astype(np.int64))
            costs, losses = costs[some], losses[some]
        return [(self._offset + self._unit * int(c), float(d)) for c, d in zip(costs, losses, strict=True)]

    def _repaired(self, places: list[int], target: float, gap: float) -> Choice:
        """Raise levels while the budget allows, the steepest step first: N:M by whole steps, others by any part."""
        kept = [int(levels.kept[k]) for levels, k in zip(self._levels, places, strict=True)]
        spent = sum(float(levels.cost[k]) for levels, k in zip(self._levels, places, strict=True))
        steps = [(-self._slope(g, k), g, k) for g, k in enumerate(places) if k > 0]
        heapq.heapify(steps)
        while steps:
            _, g, k = heapq.heappop(steps)
            levels = self._levels[g]
            up = self._raised(levels, kept[g], k, target - spent)
            if up > kept[g]:
                spent += self._cost(levels, up, k) - self._cost(levels, kept[g], k)
                kept[g] = up
            if up == levels.kept[k - 1] and k > 1:
                heapq.heappush(steps, (-self._slope(g, k - 1), g, k - 1))
        names = [levels.layer.name for levels in self._levels]
        # np.interp wants increasing counts
        predicted = sum(
            float(np.interp(count, levels.kept[::-1], levels.loss[::-1]))
            for levels, count in zip(self._levels, kept, strict=True)
        )
        patterns = {
            levels.layer.name: levels.patterns[int(np.flatnonzero(levels.kept == count)[0])]
            for levels, count in zip(self._levels, kept, strict=True)
            if levels.patterns
        }
        return Choice(dict(zip(names, kept, strict=True)), patterns, spent, predicted, gap)

    def _slope(self, g: int, k: int) -> float:
        """Distortion that level k - 1 saves per unit of cost, seen from level k."""
        levels = self._levels[g]
        dearer = float(levels.cost[k - 1] - levels.cost[k])
        return float(levels.loss[k] - levels.loss[k - 1]) / dearer if dearer > 0 else math.inf

    def _raised(self, levels: _Levels, kept: int, k: int, room: float) -> int:
        """The largest count from ``kept`` to that of level k - 1 whose additional cost is at most ``room``."""
        top = int(levels.kept[k - 1])
        if self._cost(levels, top, k) - self._cost(levels, kept, k) <= room:
            return top
        if levels.patterns or self._budget.kind == "latency":
            return kept
        low, high = kept, top  # cost does not decrease in the count
        while high - low > 1:
            middle = (low + high) // 2
            if self._cost(levels, middle, k) - self._cost(levels, kept, k) <= room:
                low = middle
            else:
                high = middle
        return low

    def _cost(self, levels: _Levels, kept: int, k: int) -> float:
        if self._budget.kind == "latency":
            return float(levels.cost[int(np.flatnonzero(levels.kept == kept)[0])])
        return float(cost(self._budget.kind, levels.layer, kept))


def common_step(costs: Sequence[Floats]) -> int:
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


def _cost_of(budget: Budget, layer: Layer, kept: int, level: int) -> float:
    if budget.seconds is not None:
        return float(budget.seconds[layer.name][level])
    return float(cost(budget.kind, layer, kept))


def _levels(layer: Layer, curve: Curve, budget: Budget, lower: int, upper: int, points: int, unit: float) -> _Levels:
    """The levels of a layer within its bounds."""
    clean = curve.cleaned()
    if budget.seconds is not None:
        seconds = np.asarray(budget.seconds.get(layer.name, ()), dtype=np.float64)
        if seconds.shape != (len(curve.kept),) or not (seconds >= 0).all():
            raise ValueError(f"allocate: expected {len(curve.kept)} latencies of {layer.name!r}, one per level")
        kept, loss, costs = np.array(clean.kept), np.array(clean.distortion), seconds
    else:
        fine = clean
        if not curve.patterns and len(curve.kept) > 1:
            # steps of one cost in all layers
            weight = float(cost(budget.kind, layer, 1) - cost(budget.kind, layer, 0)) or 1.0
            fine = clean.dense_grid(points, max(1, int(unit / weight)))
        kept, loss = np.array(fine.kept), np.array(fine.distortion)
        if not curve.patterns:
            kept, loss = _cut(kept, loss, lower, upper)
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


def _cut(kept: Ints, loss: Floats, lower: int, upper: int) -> tuple[Ints, Floats]:
    """The levels with the bounds themselves among them, where they lie between levels."""
    ends = [bound for bound in (lower, upper) if kept[-1] < bound < kept[0]]
    every = np.unique(np.concatenate([kept, ends]).astype(np.int64))[::-1]
    return every, np.interp(every, kept[::-1], loss[::-1])
