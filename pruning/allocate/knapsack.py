"""The multiple-choice knapsack: one level per group, least total loss within a budget; exact, in integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# states worked on at a time: a stretch of this length and its two operands stay in a core's cache
_STRETCH = 1 << 14


class InfeasibleBudget(ValueError):
    """A budget that no choice of levels can meet.

    Attributes:
        lowest: the least that any choice costs, in the unit of the budget.
        highest: what the dearest choice costs.
    """

    def __init__(self, message: str, lowest: float, highest: float):
        super().__init__(message)
        self.lowest, self.highest = lowest, highest


@dataclass(frozen=True)
class KnapsackTable:
    """What :func:`solve_knapsack` found: the best choice for every budget up to the one it was made for.

    Attributes:
        budget: the largest budget it answers for.
        lowest, highest: cost of the cheapest choice of all, and of the dearest.
        unit: greatest common divisor of all differences of costs within a group: the table has a state per unit.
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
        """Level of every group, in the order they were given, of a choice with that loss.

        Of levels that give the same loss the dearer one is taken: what is kept at no loss is kept.

        Notes:
            O(groups * levels): a table is made once and asked for any number of budgets.
        """
        state = self._state(budget)
        levels = [0] * len(self._order)
        for place in range(len(self._order) - 1, -1, -1):
            before, row = self._rows[place], self._rows[place + 1]
            state = min(state, len(row) - 1)
            costs, losses = self._costs[place], self._losses[place]
            fits = np.flatnonzero(costs <= state)
            found = before[np.minimum(state - costs[fits], len(before) - 1)] + losses[fits]
            # the sums are those the row was made of, so that equal means equal
            best = fits[found == row[state]]
            level = int(best[np.argmax(costs[best])])
            levels[self._order[place]] = level
            state -= int(costs[level])
        return levels

    def front(self) -> tuple[Ints, Floats]:
        """The Pareto front: costs at which a larger budget first pays, increasing, and the losses, decreasing."""
        row = self._rows[-1]
        first = np.flatnonzero(np.diff(row, prepend=np.inf) < 0)
        return self.lowest + first * self.unit, row[first]

    def _state(self, budget: int | None) -> int:
        budget = self.budget if budget is None else budget
        if budget > self.budget:
            raise ValueError(f"the table answers for budgets up to {self.budget}, not {budget}: make one for that")
        _check_reachable(budget, self.lowest, self.highest)
        return min((budget - self.lowest) // self.unit, len(self._rows[-1]) - 1)


def solve_knapsack(costs: Sequence[npt.ArrayLike], losses: Sequence[npt.ArrayLike], budget: int) -> KnapsackTable:
    """Minimize ``sum_g losses[g][k_g]`` subject to ``sum_g costs[g][k_g] <= budget`` over the levels k, exactly.

    With groups 1 .. n taken in turn, ``f_n(b) = min_k f_{n-1}(b - costs[n][k]) + losses[n][k]`` for every b from the
    least possible cost to the budget, and f_0 = 0. Going back from b finds the levels.

    Args:
        costs: per group, integers >= 0, one per level, in any order.
        losses: per group, finite, one per level; need not be monotone.
        budget: largest total cost.

    Returns:
        :class:`KnapsackTable`, for this budget and every smaller one.

    Raises:
        InfeasibleBudget: where the cheapest levels together cost more than the budget.
        ValueError: for no groups, a group without levels, or values out of range.
        TypeError: for costs that are no integers.

    Notes:
        Costs are counted from each group's cheapest level and in units of the greatest common divisor of their
        differences, which loses nothing. With S states, that is (budget - cheapest) / unit: time O(S * levels) per
        group, linear in the budget, and 8 S bytes per group; less for the groups whose costs do not add up to S yet,
        and the cheap groups come first. The sums are float64, in an order that depends on costs and losses only.

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
        rows.append(_extend(rows[-1], *scaled[g], states))
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


def _extend(before: Floats, costs: Ints, losses: Floats, states: int) -> Floats:
    """The next row: min over levels of ``before[b - cost] + loss`` for b = 0, ..., as far as it is not constant."""
    size = min(states, len(before) - 1 + int(costs.max())) + 1
    padded = np.concatenate([before, np.full(size - len(before), before[-1])])
    row = np.full(size, np.inf)
    spare = np.empty(min(size, _STRETCH))
    levels = sorted(zip(costs.tolist(), losses.tolist(), strict=True))
    for start in range(0, size, _STRETCH):
        stop = min(start + _STRETCH, size)
        for cost, loss in levels:
            if cost >= stop:
                break
            first = max(start, cost)
            sums = np.add(padded[first - cost : stop - cost], loss, out=spare[: stop - first])
            np.minimum(row[first:stop], sums, out=row[first:stop])
    return row


def solve_lagrange(
    costs: Sequence[npt.ArrayLike], losses: Sequence[npt.ArrayLike], budget: int, *, tolerance: float = 1e-12
) -> tuple[list[int], float]:
    """A quick answer to what :func:`solve_knapsack` solves: every group minimizes ``loss + price * cost`` by itself.

    The price of a unit of cost is found by bisection: the lowest at which the choice fits the budget. The choice is the
    best one for what it costs, but it may leave some of the budget unused: only choices on the lower convex hull of the
    Pareto front can be found. Its loss is never below the exact one.

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

    # cheapest levels first, so that the first of equals is the cheapest
    orders = [np.argsort(cost, kind="stable") for cost, _ in groups]
    shape = len(groups), max(map(len, orders))
    paid, lost = np.zeros(shape), np.full(shape, np.inf)  # what fills short rows is never the least
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
            found = at(middle)
            if found[1] <= budget:
                high, best = middle, found if found[2] <= best[2] else best
            else:
                low = middle
    return [int(order[k]) for order, k in zip(orders, best[0], strict=True)], best[2]


def _checked(costs: Sequence[npt.ArrayLike], losses: Sequence[npt.ArrayLike]) -> list[tuple[Ints, Floats]]:
    if len(costs) != len(losses) or not len(costs):
        raise ValueError(f"knapsack: expected costs and losses of as many groups, got {len(costs)} and {len(losses)}")
    found = []
    for g, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        c, d = np.asarray(cost), np.asarray(loss, dtype=np.float64)
        if not np.issubdtype(c.dtype, np.integer):
            raise TypeError(f"knapsack: costs must be integers, those of group {g} are {c.dtype}")
        if c.ndim != 1 or c.shape != d.shape or not len(c):
            raise ValueError(f"knapsack: group {g} has costs of shape {c.shape} and losses of shape {d.shape}")
        if (c < 0).any() or not np.isfinite(d).all():
            raise ValueError(f"knapsack: group {g} has a cost below 0 or a loss that is not finite")
        found.append((c.astype(np.int64), d))
    return found


def _check_reachable(budget: int, lowest: int, highest: int) -> None:
    if budget < lowest:
        raise InfeasibleBudget(
            f"a budget of {budget} cannot be met: the cheapest levels cost {lowest}, the dearest {highest}",
            lowest,
            highest,
        )
