"""The rule of layer-adaptive pruning: the multiple-choice knapsack by dynamic programming, exact in integers.

One level k_g per group g, least total loss within a budget B:

    min sum_g losses[g][k_g]   subject to   sum_g costs[g][k_g] <= B
    f_0(b) = 0,   f_n(b) = min_k f_{n-1}(b - costs[n][k]) + losses[n][k]      :func:`next_row`
    k_n = the k of that minimum at b,   b <- b - costs[n][k_n],   n = N .. 1   :func:`level_at`

:func:`solve_knapsack` makes the rows f_1 .. f_N, and :class:`KnapsackTable` goes back through them.
:class:`LayerKnapsack` is the knapsack of layers, whose costs may have to be rounded. Of many layers it is relaxed
(:mod:`leanstep.pruning.allocate.relaxed`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leanstep.pruning.allocate.relaxed import MOST_GROUPS, RelaxedKnapsack
from leanstep.pruning.result import Allocation

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# states of a table whose costs are rounded: LLaMA-7B's 224 matrices take under a second on one core
STATES = 1 << 15
_FRONT_POINTS = 200
# states computed together: the three operands of this length stay in a core's cache
_STRETCH = 1 << 14


class InfeasibleBudget(ValueError):
    """A budget that no choice of levels can meet.

    Attributes:
        lowest: cost of the cheapest choice, in the unit of the budget.
        highest: cost of the dearest choice.
    """

    def __init__(self, message: str, lowest: float, highest: float):
        super().__init__(message)
        self.lowest, self.highest = lowest, highest


def next_row(previous: Floats, costs: Ints, losses: Floats, states: int) -> Floats:
    """``f_n(b) = min_k f_{n-1}(b - costs[k]) + losses[k]`` for b = 0 .. ``states``.

    Args:
        previous: f_{n-1}, float64 [any length]; constant beyond its end.
        costs, losses: of the levels of group n; costs >= 0, the cheapest 0.
        states: largest b.

    Returns:
        f_n, float64, cut where it becomes constant.
    """
    size = min(states, len(previous) - 1 + int(costs.max())) + 1
    padded = np.concatenate([previous[:size], np.full(max(size - len(previous), 0), previous[-1])])
    row = np.full(size, np.inf)
    sums = np.empty(min(size, _STRETCH))
    levels = sorted(zip(costs.tolist(), losses.tolist(), strict=True))
    for start in range(0, size, _STRETCH):
        stop = min(start + _STRETCH, size)
        for cost, loss in levels:
            if cost >= stop:
                break
            first = max(start, cost)
            candidate = np.add(padded[first - cost : stop - cost], loss, out=sums[: stop - first])
            np.minimum(row[first:stop], candidate, out=row[first:stop])
    return row


def level_at(previous: Floats, row: Floats, costs: Ints, losses: Floats, state: int) -> int:
    """The level k with ``f_{n-1}(b - costs[k]) + losses[k] = f_n(b)`` at b = ``state``; of several the dearest.

    Args:
        previous, row: f_{n-1} and f_n of :func:`next_row`.
        costs, losses: of the levels of group n.
        state: b, within the row.
    """
    fits = np.flatnonzero(costs <= state)
    sums = previous[np.minimum(state - costs[fits], len(previous) - 1)] + losses[fits]
    # the row was made of these same sums, so that equality is exact
    best = fits[sums == row[state]]
    return int(best[np.argmax(costs[best])])


def solve_knapsack(costs: Sequence[npt.ArrayLike], losses: Sequence[npt.ArrayLike], budget: int) -> KnapsackTable:
    """Minimize ``sum_g losses[g][k_g]`` subject to ``sum_g costs[g][k_g] <= budget`` over the levels k, exactly.

    Args:
        costs: per group, integers >= 0, one per level, in any order.
        losses: per group, finite, one per level; need not be monotone.
        budget: largest total cost.

    Returns:
        :class:`KnapsackTable`, for this budget and every smaller one.

    Raises:
        InfeasibleBudget: if the cheapest levels together cost more than the budget.
        ValueError: for no groups, a group without levels, or values out of range.
        TypeError: for costs that are no integers.

    Notes:
        Costs are counted from each group's cheapest level and in units of the greatest common divisor of their
        differences, which loses nothing. With S = (budget - cheapest) / unit states, a group takes O(S * levels) time
        and at most 8 S bytes. Cheap groups come first, because their rows are shorter. The sums are float64, in an
        order that depends only on costs and losses.

    References:
        Xu, Wang, Geng, Lin, Wu, Li, Lin, "Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural
        Networks", arXiv 2308.10438, for layers; Kellerer, Pferschy, Pisinger, "Knapsack Problems" (2004), chapter 11.

    Example:
        >>> table = solve_knapsack([[4, 2, 0], [2, 1, 0]], [[0.0, 1.0, 5.0], [0.0, 0.5, 9.0]], budget=4)
        >>> table.choose(), table.value(), table.choose(3)
        ([1, 0], 1.0, [1, 1])
    """
    groups = _checked(costs, losses)
    least = [int(cost.min()) for cost, _ in groups]
    lowest, highest = sum(least), sum(int(cost.max()) for cost, _ in groups)
    _check_reachable(budget, lowest, highest)
    unit = common_step([cost for cost, _ in groups]) or 1
    scaled = [((cost - low) // unit, loss) for (cost, loss), low in zip(groups, least, strict=True)]
    order = sorted(range(len(groups)), key=lambda g: (int(scaled[g][0].max()), *(a.tolist() for a in scaled[g])))
    states = (min(budget, highest) - lowest) // unit
    rows = [np.zeros(1)]
    for g in order:
        rows.append(next_row(rows[-1], *scaled[g], states))
    return KnapsackTable(
        budget,
        lowest,
        highest,
        unit,
        tuple(scaled[g][0] for g in order),
        tuple(scaled[g][1] for g in order),
        tuple(order),
        tuple(rows),
    )


@dataclass(frozen=True)
class KnapsackTable:
    """The solution of :func:`solve_knapsack` for every budget up to the one it was made for.

    Attributes:
        budget: the largest budget it answers for.
        lowest, highest: total cost of the cheapest levels, and of the dearest.
        unit: greatest common divisor of all differences of costs within a group; a row has a state per unit.
    """

    budget: int
    lowest: int
    highest: int
    unit: int
    _costs: tuple[Ints, ...]  # in units above the group's cheapest level, in the order of the rows
    _losses: tuple[Floats, ...]
    _order: tuple[int, ...]
    _rows: tuple[Floats, ...]  # least loss of the first groups by budget in units; constant beyond a row's end

    @property
    def nbytes(self) -> int:
        """Memory of the table."""
        return sum(row.nbytes for row in self._rows)

    def value(self, budget: int | None = None) -> float:
        """Least total loss of a choice that costs at most ``budget`` (None: the table's).

        Raises:
            InfeasibleBudget: for a budget below the cheapest choice.
            ValueError: for one above the table's.
        """
        return float(self._rows[-1][self._state(budget)])

    def choose(self, budget: int | None = None) -> list[int]:
        """Level of every group, in the given order, of a choice with the least loss.

        Ties go to the dearest level, so that no weight is pruned for nothing.

        Raises:
            InfeasibleBudget, ValueError: as :meth:`value`.

        Notes:
            O(groups * levels) for each budget.
        """
        state = self._state(budget)
        levels = [0] * len(self._order)
        for n in range(len(self._order) - 1, -1, -1):
            state = min(state, len(self._rows[n + 1]) - 1)
            level = level_at(self._rows[n], self._rows[n + 1], self._costs[n], self._losses[n], state)
            levels[self._order[n]] = level
            state -= int(self._costs[n][level])
        return levels

    def front(self) -> tuple[Ints, Floats]:
        """The Pareto front: increasing costs, int64, and decreasing losses, float64."""
        row = self._rows[-1]
        first = np.flatnonzero(np.diff(row, prepend=np.inf) < 0)
        return self.lowest + first * self.unit, row[first]

    def _state(self, capacity: int | None) -> int:
        capacity = self.budget if capacity is None else capacity
        if capacity > self.budget:
            raise ValueError(f"the table answers for budgets up to {self.budget}, not {capacity}: make one for that")
        _check_reachable(capacity, self.lowest, self.highest)
        return min((capacity - self.lowest) // self.unit, len(self._rows[-1]) - 1)


def quantize(costs: Sequence[Floats], capacity: float, unit: float) -> tuple[list[Ints], int]:
    """Costs and capacity in whole units, counted from each group's cheapest level.

    Costs are rounded up and the capacity is rounded down, so that levels that fit in units fit it.
    """
    least = [float(cost.min()) for cost in costs]
    # 1e-9: a rounding error must not add a unit
    whole = [np.ceil((cost - low) / unit - 1e-9).astype(np.int64) for cost, low in zip(costs, least, strict=True)]
    return whole, math.floor((capacity - sum(least)) / unit + 1e-9)


def common_step(costs: Sequence[Floats | Ints]) -> int:
    """Greatest common divisor of all differences of whole costs within a group; 0 if there are none."""
    return math.gcd(*(math.gcd(*(cost - cost.min()).astype(np.int64).tolist()) for cost in costs))


def _checked(costs: Sequence[npt.ArrayLike], losses: Sequence[npt.ArrayLike]) -> list[tuple[Ints, Floats]]:
    if len(costs) != len(losses) or not len(costs):
        raise ValueError(f"knapsack: expected costs and losses of as many groups, got {len(costs)} and {len(losses)}")
    groups = []
    for g, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        c, d = np.asarray(cost), np.asarray(loss, dtype=np.float64)
        if not np.issubdtype(c.dtype, np.integer):
            raise TypeError(f"knapsack: costs must be integers, those of group {g} are {c.dtype}")
        if c.ndim != 1 or c.shape != d.shape or not len(c):
            raise ValueError(f"knapsack: group {g} has costs of shape {c.shape} and losses of shape {d.shape}")
        if (c < 0).any() or not np.isfinite(d).all():
            raise ValueError(f"knapsack: group {g} has a cost below 0 or a loss that is not finite")
        groups.append((c.astype(np.int64), d))
    return groups


def _check_reachable(capacity: int, lowest: int, highest: int) -> None:
    if capacity < lowest:
        raise InfeasibleBudget(
            f"a budget of {capacity} cannot be met: the cheapest levels cost {lowest}, the dearest {highest}",
            lowest,
            highest,
        )


@dataclass(frozen=True)
class LayerLevels:
    """Possible levels of a layer.

    Attributes:
        counts: decreasing numbers of weights.
        loss, cost, patterns: distortion, cost and N:M pattern of each level; patterns may be empty.
        between: cost of a count between two levels; None if only levels are possible.
    """

    name: str
    numel: int
    counts: Ints
    loss: Floats
    cost: Floats
    patterns: tuple[str, ...]
    between: Callable[[int], npt.NDArray[np.int64]] | None

    def index(self, count: int) -> int:
        """The level with this count."""
        return int(np.flatnonzero(self.counts == count)[0])

    def cost_of(self, count: int) -> float:
        """Cost of a count."""
        return float(self.cost[self.index(count)] if self.between is None else self.between(count))

    def loss_of(self, count: int) -> float:
        """Distortion of a count, between two levels on the line through them."""
        return float(np.interp(count, self.counts[::-1], self.loss[::-1]))

    def slope(self, level: int) -> float:
        """Distortion that the next denser level saves per unit of cost."""
        dearer = float(self.cost[level - 1] - self.cost[level])
        return float(self.loss[level] - self.loss[level - 1]) / dearer if dearer > 0 else math.inf

    def raised(self, count: int, level: int, room: float) -> int:
        """The largest possible count up to the next denser level that adds at most ``room`` to the cost."""
        top = int(self.counts[level - 1])
        limit = self.cost_of(count) + room
        if self.cost_of(top) <= limit:
            return top
        if self.between is None:
            return count
        low, high = count, top  # cost does not decrease in the count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.cost_of(middle) <= limit else (low, middle)
        return low


class LayerKnapsack:
    """The knapsack of some layers. Its table is solved once and answers for every target up to the given one.

    Args:
        layers: with unique names.
        kind: of the budget.
        target: largest total cost.
        unit: cost per state of the table, where costs have to be rounded; for latencies, the table chooses.
    """

    def __init__(self, layers: Sequence[LayerLevels], kind: str, target: float, unit: float) -> None:
        self._given, self._kind, self._target = layers, kind, target
        # sorted by name: the order of the layers must not break ties
        self._layers = sorted(layers, key=lambda layer: layer.name)
        self._relaxed: RelaxedKnapsack | None = None
        if len(layers) > MOST_GROUPS:
            self._reach(target)
            self._relaxed = RelaxedKnapsack([x.cost for x in self._layers], [x.loss for x in self._layers])
        else:
            self._offset, self._unit, self._table = self._solve(unit)

    def allocation(self, target: float | None = None) -> Allocation:
        """The best allocation for a target, by default the largest.

        Raises:
            InfeasibleBudget: for a target below the cost of the sparsest levels.
        """
        target = self._target if target is None else target
        self._reach(target)
        levels = self._relaxed.choose(target) if self._relaxed is not None else self._tabulated(target)
        counts, spent = self._spend_rest(levels, target)
        return Allocation(
            "dp",
            numel={x.name: x.numel for x in self._given},
            counts={x.name: counts[x.name] for x in self._given},
            target=int(target) if self._kind == "params" else None,
            patterns={x.name: x.patterns[x.index(counts[x.name])] for x in self._given if x.patterns},
            budget_kind=self._kind,
            cost=spent,
            predicted=sum(x.loss_of(counts[x.name]) for x in self._layers),
            front=tuple(self._front()),
        )

    def _tabulated(self, target: float) -> list[int]:
        """Levels by the table for a target."""
        units = min(math.floor((target - self._offset) / self._unit + 1e-9), self._table.budget)
        # rounding costs up adds at most one unit per layer: try that many more units, and take the largest number
        # whose levels fit the target in true cost
        for slack in range(0 if self._unit == 1.0 else len(self._layers), -1, -1):
            levels = self._table.choose(min(units + slack, self._table.budget))
            if sum(float(x.cost[k]) for x, k in zip(self._layers, levels, strict=True)) <= target:
                break
        return levels

    def _reach(self, target: float) -> tuple[float, float]:
        """Cost of the sparsest and of the densest levels; raises InfeasibleBudget for a target below them."""
        least, most = (sum(float(pick(x.cost)) for x in self._layers) for pick in (np.min, np.max))
        if target >= least:
            return least, most
        sparsities = ""
        if self._kind == "params":
            total = sum(x.numel for x in self._layers)
            lowest, highest, requested = (1 - count / total for count in (most, least, target))
            sparsities = f": sparsities of {lowest:.4g} to {highest:.4g}, not {requested:.4g}"
        raise InfeasibleBudget(
            f"a budget of {target:.12g} ({self._kind}) cannot be met: the levels of the layers cost "
            f"{least:.12g} to {most:.12g}{sparsities}",
            least,
            most,
        )

    def _solve(self, unit: float) -> tuple[float, float, KnapsackTable]:
        """Solve the knapsack; returns the cost at state 0, the cost per state, and the table."""
        costs, losses = [x.cost for x in self._layers], [x.loss for x in self._layers]
        least, most = self._reach(self._target)
        largest = min(self._target, most)
        whole = self._kind != "latency"
        if whole and (largest - least) <= 2 * STATES * common_step(costs):
            return 0.0, 1.0, solve_knapsack([c.astype(np.int64) for c in costs], losses, math.floor(largest))
        unit = unit if whole else (largest - least) / STATES or 1.0
        unit = max(math.floor(unit), 1) if self._kind in ("params", "size") else unit
        whole_costs, units = quantize(costs, largest, unit)
        return least, unit, solve_knapsack(whole_costs, losses, units + len(costs))

    def _front(self) -> list[tuple[float, float]]:
        """Evenly spaced points of the Pareto front within the target, including both ends."""
        if self._relaxed is not None:
            costs, losses = self._relaxed.front()
        else:
            in_units, losses = self._table.front()
            costs = self._offset + self._unit * in_units.astype(np.float64)
        costs, losses = costs[costs <= self._target], losses[costs <= self._target]
        if len(costs) > _FRONT_POINTS:
            spread = np.unique(np.linspace(0, len(costs) - 1, _FRONT_POINTS).round().astype(np.int64))
            costs, losses = costs[spread], losses[spread]
        return [(float(c), float(d)) for c, d in zip(costs, losses, strict=True)]

    def _spend_rest(self, levels: Sequence[int], target: float) -> tuple[dict[str, int], float]:
        """Raise counts within the target, steepest slope first; returns the counts and their cost."""
        counts = [int(x.counts[k]) for x, k in zip(self._layers, levels, strict=True)]
        spent = sum(float(x.cost[k]) for x, k in zip(self._layers, levels, strict=True))
        steps = [(-self._layers[g].slope(k), g, k) for g, k in enumerate(levels) if k > 0]
        heapq.heapify(steps)
        while steps:
            _, g, k = heapq.heappop(steps)
            layer = self._layers[g]
            raised = layer.raised(counts[g], k, target - spent)
            if raised > counts[g]:
                spent += layer.cost_of(raised) - layer.cost_of(counts[g])
                counts[g] = raised
            if raised == layer.counts[k - 1] and k > 1:
                heapq.heappush(steps, (-layer.slope(k - 1), g, k - 1))
        return {layer.name: count for layer, count in zip(self._layers, counts, strict=True)}, spent
