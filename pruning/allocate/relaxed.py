"""The knapsack of many groups by Lagrangian relaxation: steps of convex curves, steepest first.

A table takes states in proportion to the number of groups to resolve their costs, and so memory in proportion to its
square. With thousands of groups, as a mixture's experts are, this rule is as good: its loss is above the optimum by
less than the loss of one step of one group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# above this number, groups take more states than tables have
MOST_GROUPS = 512


class RelaxedKnapsack:
    """Answers every budget for the levels of some groups.

    Args:
        costs, losses: per group, one per level, finite, in any order.

    Notes:
        On each group's lower convex hull of (cost, loss), a step to the next dearer level saves ``slope`` of loss per
        unit of cost. All steps, sorted by slope, are the solutions of ``min sum losses + lambda * costs`` for falling
        lambda. O(n log n) time, and 40 bytes per level.
    """

    def __init__(self, costs: Sequence[npt.ArrayLike], losses: Sequence[npt.ArrayLike]) -> None:
        self._cheapest: list[int] = []
        self._least = self._most = 0.0
        groups, levels, step_costs, savings = [], [], [], []
        for g, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            c, d = np.asarray(cost, dtype=np.float64), np.asarray(loss, dtype=np.float64)
            hull = _hull(c, d)
            self._cheapest.append(hull[0])
            self._least += float(c[hull[0]])
            self._most += float(d[hull[0]])
            groups.append(np.full(len(hull) - 1, g))
            levels.append(np.array(hull[1:], dtype=np.int64))
            step_costs.append(np.diff(c[hull]))
            savings.append(-np.diff(d[hull]))
        cost_of, saved = np.concatenate(step_costs), np.concatenate(savings)
        order = np.argsort(-saved / cost_of, kind="stable")
        self._groups, self._levels = np.concatenate(groups)[order], np.concatenate(levels)[order]
        self._costs, self._saved = cost_of[order], saved[order]

    def choose(self, capacity: float) -> list[int]:
        """Level of every group within a capacity that the cheapest levels meet."""
        levels = list(self._cheapest)
        blocked: set[int] = set()
        spent = self._least
        whole = int(np.searchsorted(spent + np.cumsum(self._costs), capacity, side="right"))
        for group, level in zip(self._groups[:whole].tolist(), self._levels[:whole].tolist(), strict=True):
            levels[group] = level
        spent += float(self._costs[:whole].sum())
        rest = zip(*(part[whole:].tolist() for part in (self._groups, self._levels, self._costs)), strict=True)
        for group, level, cost in rest:
            if group not in blocked and spent + cost <= capacity:
                levels[group] = level
                spent += cost
            else:  # its dearer levels are beyond this one
                blocked.add(group)
        return levels

    def front(self) -> tuple[Floats, Floats]:
        """Increasing costs and decreasing losses of the solutions."""
        costs = self._least + np.concatenate([[0.0], np.cumsum(self._costs)])
        return costs, self._most - np.concatenate([[0.0], np.cumsum(self._saved)])


def _hull(costs: Floats, losses: Floats) -> list[int]:
    """Levels on the lower convex hull, from the cheapest to the one of least loss."""
    hull: list[int] = []
    # of levels of one cost the last has the least loss
    for level in np.lexsort((-losses, costs)).tolist():
        if hull and costs[level] == costs[hull[-1]]:
            hull.pop()
        if hull and losses[level] >= losses[hull[-1]]:
            continue
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], level, costs, losses):
            hull.pop()
        hull.append(level)
    return hull


def _is_above(first: int, middle: int, last: int, costs: Floats, losses: Floats) -> bool:
    """Whether the middle level is on or above the line from the first to the last."""
    rise, run = losses[last] - losses[first], costs[last] - costs[first]
    return bool((losses[middle] - losses[first]) * run >= rise * (costs[middle] - costs[first]))
