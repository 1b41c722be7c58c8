"""The rule of layer-adaptive pruning: the multiple-choice knapsack by dynamic programming, exact in integers.

One level k_g per group g, least total loss within a budget B:

    min sum_g losses[g][k_g]   subject to   sum_g costs[g][k_g] <= B
    f_0(b) = 0,   f_n(b) = min_k f_{n-1}(b - costs[n][k]) + losses[n][k]      :func:`next_row`
    k_n = the k of that minimum at b,   b <- b - costs[n][k_n],   n = N .. 1   :func:`level_at`

:func:`solve_knapsack` makes the rows f_1 .. f_N, and :class:`KnapsackTable` goes back through them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

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

    ``f_0 = 0`` and ``f_n(b) = min_k f_{n-1}(b - costs[n][k]) + losses[n][k]`` for every b from the least possible cost
    to the budget, group after group. Going back from b = budget gives the levels.

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
    unit = math.gcd(*(math.gcd(*(cost - low).tolist()) for (cost, _), low in zip(groups, least, strict=True))) or 1
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
        """Least total loss of a choice that costs at most ``budget`` (None: the table's)."""
        return float(self._rows[-1][self._state(budget)])

    def choose(self, budget: int | None = None) -> list[int]:
        """Level of every group, in the given order, of a choice with the least loss.

        Ties go to the dearest level, so that no weight is pruned for nothing.

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

    def _state(self, budget: int | None) -> int:
        budget = self.budget if budget is None else budget
        if budget > self.budget:
            raise ValueError(f"the table answers for budgets up to {self.budget}, not {budget}: make one for that")
        _check_reachable(budget, self.lowest, self.highest)
        return min((budget - self.lowest) // self.unit, len(self._rows[-1]) - 1)


def solve_lagrange(
    costs: Sequence[npt.ArrayLike], losses: Sequence[npt.ArrayLike], budget: int, *, tolerance: float = 1e-12
) -> tuple[list[int], float]:
    """Approximate :func:`solve_knapsack` by a Lagrangian: every group minimizes ``loss + price * cost`` by itself.

    Bisection finds the lowest price at which the levels fit the budget. The levels are the best for their cost, but may
    leave some of the budget unused: the Lagrangian reaches only the lower convex hull of the Pareto front. Its loss is
    never below the exact one.

    Args:
        costs, losses, budget: as for :func:`solve_knapsack`.
        tolerance: relative width of the price's interval at which the search ends.

    Returns:
        Level of every group, and the total loss.

    Raises:
        As :func:`solve_knapsack`.
    """
    groups = _checked(costs, losses)
    _check_reachable(budget, sum(int(c.min()) for c, _ in groups), sum(int(c.max()) for c, _ in groups))

    # cheapest levels first, so that argmin breaks ties in their favor
    orders = [np.argsort(cost, kind="stable") for cost, _ in groups]
    shape = len(groups), max(map(len, orders))
    paid, lost = np.zeros(shape), np.full(shape, np.inf)  # the padding of short rows is never the minimum
    for g, ((cost, loss), order) in enumerate(zip(groups, orders, strict=True)):
        paid[g, : len(order)], lost[g, : len(order)] = cost[order], loss[order]

    def at(price: float) -> tuple[npt.NDArray[np.intp], float, float]:
        levels = (lost + price * paid).argmin(axis=1)
        rows = np.arange(len(groups))
        return levels, float(paid[rows, levels].sum()), float(lost[rows, levels].sum())

    low, high = 0.0, 1.0
    best = at(low)
    if best[1] > budget:
        while (best := at(high))[1] > budget:
            low, high = high, 2 * high
        while high - low > tolerance * high:
            middle = (low + high) / 2
            candidate = at(middle)
            if candidate[1] <= budget:
                high, best = middle, candidate if candidate[2] <= best[2] else best
            else:
                low = middle
    return [int(order[k]) for order, k in zip(orders, best[0], strict=True)], best[2]


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


def _check_reachable(budget: int, lowest: int, highest: int) -> None:
    if budget < lowest:
        raise InfeasibleBudget(
            f"a budget of {budget} cannot be met: the cheapest levels cost {lowest}, the dearest {highest}",
            lowest,
            highest,
        )
