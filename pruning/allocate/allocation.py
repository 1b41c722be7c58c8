"""Choose how many weights each layer keeps: by dynamic programming over measured curves, or by a rule."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from leanstep.pruning.allocate.budgets import Budget, cost, keep_total, quantize
from leanstep.pruning.allocate.closed_form import OWL_SPREAD, counts_by_rule
from leanstep.pruning.allocate.knapsack import InfeasibleBudget, KnapsackTable, solve_knapsack, solve_lagrange
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.result import Allocation
from leanstep.pruning.score.targets import Layer

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# levels per layer and states per table: LLaMA-7B's 224 matrices take under a second on one core
POINTS = 101
STATES = 1 << 15
_FRONT_POINTS = 200
METHODS = ("dp", "uniform", "global", "lamp", "erk", "owl", "atp")
# argument that a method needs besides the sparsity, and a hint for the error message
_NEEDED = {
    "dp": ("curves", ""),
    "global": ("scores", ""),
    "lamp": ("scores", ""),
    "owl": ("outliers", " (see outlier_ratio)"),
    "atp": ("beta", " (see atp_betas)"),
}


def allocate(
    layers: Sequence[Layer],
    sparsity: float | None = None,
    *,
    method: str = "dp",
    budget: Budget | None = None,
    curves: Mapping[str, Curve] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    outliers: Mapping[int, float] | Mapping[str, float] | None = None,
    spread: float = OWL_SPREAD,
    beta: float | None = None,
    at_least: float | Mapping[str, float] = 0.0,
    at_most: Mapping[str, int] | None = None,
) -> Allocation:
    """Choose how many weights each layer keeps, so that all of them together meet a target.

    =========  ====================================================================================================
    method     layers keep
    =========  ====================================================================================================
    "dp"       counts that minimize the sum of the curves' distortions: exact, by dynamic programming
    "uniform"  the same fraction
    "global"   the largest scores of all layers
    "lamp"     the largest LAMP scores of all layers
    "erk"      a fraction proportional to sum(shape) / prod(shape), at most 1
    "owl"      a fraction that rises with the outlier ratio of their block, over a range of 2 ``spread``
    "atp"      a fraction that falls by ``beta`` from block to block
    =========  ====================================================================================================

    Every rule meets the target exactly: fractions are scaled ("uniform", "erk") or shifted ("owl", "atp") within the
    bounds of each layer until the counts add up. The largest remainders are rounded up. For blocks of equal size, and
    if no bound is reached, this is the papers' formula. "dp" spends the rest of its budget where a weight saves most
    distortion.

    Args:
        layers: with unique names.
        sparsity: fraction of zeros in all layers together, 0 <= sparsity < 1. The number of zeros is rounded up.
        method: a name of the table.
        budget: for "dp", instead of a sparsity: weights, operations, bytes or seconds.
        curves: for "dp", by name. Curves are cleaned (:meth:`Curve.cleaned`). Unstructured ones get levels between the
            measured ones (:meth:`Curve.dense_grid`). Other methods use curves only for ``predicted``.
        scores: for "global" and "lamp", by name, >= 0. Each is read three times; a mapping may compute it on access.
            LAMP squares them; its paper uses magnitudes.
        outliers: for "owl", by block or name; :func:`leanstep.pruning.outlier_ratio`.
        spread: for "owl", lambda.
        beta: for "atp"; :func:`leanstep.pruning.atp_betas`.
        at_least: lowest density of all layers, or by name; a layer without an entry may lose all weights.
        at_most: most weights of a layer, by name. For a layer with zeros that must stay: its number of nonzeros.

    Returns:
        :class:`Allocation`. The order of the layers does not change it.

    Raises:
        InfeasibleBudget: if bounds or levels exclude the target; the message gives the possible range.
        ValueError: for an unknown method, duplicate names, a missing argument of the method, or values out of range.

    Notes:
        "dp" is exact for weights and operations where the cheapest and the dearest levels are at most 65,536 units
        apart. Above, costs are rounded up to 1 / 32,768 of the dense cost; allocations whose true cost fits are still
        considered. It takes 32,768 additions per layer and level, and 8 bytes per layer and state. That distortions add
        up is an assumption; measure the result on other data.

    References:
        Xu et al., arXiv 2308.10438 ("dp"); Frantar, Alistarh, "SPDY", arXiv 2201.13096 (the same program under
        latency); Lee et al., arXiv 2010.07611 ("lamp"); Evci et al., arXiv 1911.11134 ("erk"); Yin et al., arXiv
        2310.05175 ("owl"); Huang et al., arXiv 2502.14770 ("atp").

    Example:
        >>> layers = [Layer("up", (8, 4)), Layer("down", (4, 8))]
        >>> allocate(layers, 0.5, method="uniform").kept
        {'up': 16, 'down': 16}
    """
    needed = {"curves": curves, "scores": scores, "outliers": outliers, "beta": beta}
    _check(layers, sparsity, method, budget, needed)
    lower, upper = _bounds(layers, at_least, at_most)
    keep = keep_total(sum(layer.numel for layer in layers), sparsity)
    if method == "dp":
        assert curves is not None
        return Program(layers, curves, budget or Budget("params", max(keep, 1)), lower, upper).allocation()
    # sorted by name: the order of the layers must not break ties
    ordered = sorted(layers, key=lambda layer: layer.name)
    low, high = (np.array([bound[layer.name] for layer in ordered], dtype=np.int64) for bound in (lower, upper))
    counts = counts_by_rule(
        ordered, method, sparsity or 0.0, keep, low, high, scores=scores, outliers=outliers, spread=spread, beta=beta
    )
    by_name = {layer.name: int(count) for layer, count in zip(ordered, counts, strict=True)}
    kept = {layer.name: by_name[layer.name] for layer in layers}
    predicted = None
    if curves and all(n in curves and curves[n].kept[-1] <= count <= curves[n].kept[0] for n, count in by_name.items()):
        predicted = sum(curves[name].cleaned().at(count) for name, count in by_name.items())
    sizes = {layer.name: layer.numel for layer in layers}
    return Allocation(method, sizes, kept, keep, cost=float(keep), predicted=predicted)


def allocations_along(
    layers: Sequence[Layer],
    sparsities: Sequence[float],
    *,
    curves: Mapping[str, Curve],
    at_least: float | Mapping[str, float] = 0.0,
    at_most: Mapping[str, int] | None = None,
) -> list[Allocation]:
    """The allocations of method "dp" for several sparsities, from one table.

    Arguments, result and errors are those of :func:`allocate`.
    """
    if not sparsities:
        return []
    for sparsity in sparsities:
        _check(layers, sparsity, "dp", None, {"curves": curves})
    total = sum(layer.numel for layer in layers)
    targets = [max(keep_total(total, sparsity), 1) for sparsity in sparsities]
    program = Program(layers, curves, Budget("params", max(targets)), *_bounds(layers, at_least, at_most))
    return [program.allocation(target) for target in targets]


def _check(
    layers: Sequence[Layer], sparsity: float | None, method: str, budget: Budget | None, needed: Mapping[str, Any]
) -> None:
    if method not in METHODS:
        raise ValueError(f"allocate: method must be one of {', '.join(METHODS)}, got {method!r}")
    names = [layer.name for layer in layers]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"allocate: expected layers with unique names, got {len(names)}, {len(set(names))} of them unique"
        )
    if (sparsity is None) == (budget is None):
        raise ValueError("allocate: give a sparsity or a budget, one of the two")
    if budget is not None and method != "dp":
        raise ValueError(f"allocate: a budget is for method 'dp'; {method!r} takes a sparsity")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"allocate: expected 0 <= sparsity < 1, got {sparsity}")
    argument, where = _NEEDED.get(method, ("", ""))
    if argument and needed[argument] is None:
        raise ValueError(f"allocate: method {method!r} needs {argument}{where}")
    if argument == "scores" and (missing := [name for name in names if name not in needed["scores"]]):
        raise ValueError(f"allocate: no scores of {missing[:5]}")


def _bounds(
    layers: Sequence[Layer], at_least: float | Mapping[str, float], at_most: Mapping[str, int] | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Fewest and most weights by layer."""
    upper = {layer.name: min(layer.numel, (at_most or {}).get(layer.name, layer.numel)) for layer in layers}
    lower = {}
    for layer in layers:
        density = at_least.get(layer.name, 0.0) if isinstance(at_least, Mapping) else at_least
        if not 0 <= density <= 1 or upper[layer.name] < 0:
            raise ValueError(f"allocate: bounds of {layer.name!r} are out of range: {density} and {upper[layer.name]}")
        # a layer that is already sparser than its floor stays as it is
        lower[layer.name] = min(math.ceil(density * layer.numel - 1e-6), upper[layer.name])
    return lower, upper


@dataclass(frozen=True)
class _Levels:
    """Possible levels of a layer: decreasing kept counts, with the distortion, cost and N:M pattern of each."""

    layer: Layer
    kept: Ints
    loss: Floats
    cost: Floats
    patterns: tuple[str, ...]

    def cost_of(self, kept: int, kind: str) -> float:
        """Cost of a kept count. Latencies are known at levels only, other costs also between them."""
        if kind == "latency":
            return float(self.cost[int(np.flatnonzero(self.kept == kept)[0])])
        return float(cost(kind, self.layer, kept))

    def slope(self, level: int) -> float:
        """Distortion that the next denser level saves per unit of cost."""
        dearer = float(self.cost[level - 1] - self.cost[level])
        return float(self.loss[level] - self.loss[level - 1]) / dearer if dearer > 0 else math.inf


class Program:
    """The knapsack of some layers. Its table is solved once and answers for every target up to the budget's.

    Args:
        layers: with unique names.
        curves: by name; cleaned here. Unstructured ones get levels between the measured ones, except for latencies,
            which are known at the measured levels only.
        budget: kind, largest target and, for latencies, seconds.
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
        # sorted by name: the order of the layers must not break ties
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
        """The best allocation for a target, by default the budget's.

        Raises:
            InfeasibleBudget: for a target below the cost of the sparsest levels.
        """
        target = self._budget.target if target is None else target
        self._reach(target)
        units = min(math.floor((target - self._offset) / self._unit + 1e-9), self._table.budget)
        # rounding costs up adds at most one unit per layer: try that many more units, and take the largest number
        # whose levels fit the target in true cost
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
        """Cost of the sparsest and of the densest levels; raises InfeasibleBudget for a target below them."""
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
        """Solve the knapsack; returns the cost at state 0, the cost per state, and the table."""
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
        self._costs, units = quantize(costs, largest, unit)
        return least, unit, solve_knapsack(self._costs, self._losses, units + len(costs))

    def _front(self) -> list[tuple[float, float]]:
        """Evenly spaced points of the Pareto front within the budget, including both ends."""
        costs, losses = self._table.front()
        inside = self._offset + self._unit * costs <= self._budget.target
        costs, losses = costs[inside], losses[inside]
        if len(costs) > _FRONT_POINTS:
            spread = np.unique(np.linspace(0, len(costs) - 1, _FRONT_POINTS).round().astype(np.int64))
            costs, losses = costs[spread], losses[spread]
        return [(self._offset + self._unit * int(c), float(d)) for c, d in zip(costs, losses, strict=True)]

    def _spend_rest(self, levels_at: Sequence[int], target: float) -> tuple[dict[str, int], float]:
        """Raise kept counts within the target, steepest slope first; returns the counts and their cost.

        N:M patterns and latencies rise by whole levels, other counts by any number.
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
        """The largest count up to the next denser level that adds at most ``room`` to the cost."""
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
            # one step costs the same in all layers
            weight = float(cost(budget.kind, layer, 1) - cost(budget.kind, layer, 0)) or 1.0
            clean = clean.dense_grid(POINTS, max(1, int(unit / weight)))
        kept, loss = np.array(clean.kept), np.array(clean.distortion)
        if not curve.patterns:
            # add the bounds as levels
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


def snap(allocation: Allocation, levels: Mapping[str, tuple[Sequence[int], Sequence[str]]]) -> Allocation:
    """Move an allocation of arbitrary counts to the nearest N:M patterns.

    Minimizes the sum of ``numel * (difference of densities)^2`` without increasing the total of kept weights.

    Args:
        allocation: of any method.
        levels: kept counts and patterns of each layer, for instance :func:`leanstep.pruning.nm_levels`.

    Raises:
        InfeasibleBudget: if the sparsest patterns keep more weights than the allocation.
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
    whole, units = quantize(costs, min(total, most), unit)
    table = solve_knapsack(whole, losses, units)
    kept, patterns = dict(allocation.kept), {}
    for name, level in zip(names, table.choose(), strict=True):
        kept[name], patterns[name] = int(levels[name][0][level]), levels[name][1][level]
    patterns = {name: patterns[name] for name in kept if name in patterns}
    changed: dict[str, Any] = {"cost": float(sum(kept.values())), "predicted": None, "lagrange_gap": None}
    return replace(allocation, kept=kept, patterns=patterns, budget_kind="params", **changed)


def _common_step(costs: Sequence[Floats]) -> int:
    """Greatest common divisor of all differences of whole costs within a layer; 0 if there are none."""
    return math.gcd(*(math.gcd(*(c - c.min()).astype(np.int64).tolist()) for c in costs))
