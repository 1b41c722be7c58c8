"""From densities that a rule wants to whole numbers of weights that add up exactly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from leanstep.pruning.allocate.knapsack import InfeasibleBudget

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def apportion(wanted: Floats, total: int, lower: Ints, upper: Ints) -> Ints:
    """Integers within bounds that add up to ``total``, each at most one from ``wanted`` where that adds up to it.

    Rounded down, and what is missing goes to the largest fractions (Hamilton's method); of equal ones the first.

    Args:
        wanted: [n], between the bounds; its sum is ``total`` up to rounding.
        total: the sum.
        lower, upper: [n].

    Raises:
        InfeasibleBudget: where the bounds leave no such integers.
    """
    check_total(total, lower, upper)
    counts = np.clip(np.floor(wanted + 1e-9).astype(np.int64), lower, upper)
    while (missing := total - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        room = counts < upper if step > 0 else counts > lower
        order = np.argsort(-step * (wanted - counts), kind="stable")
        chosen = order[room[order]][: abs(missing)]
        counts[chosen] += step
    return counts


def scaled(base: Floats, numel: Ints, total: int, lower: Ints, upper: Ints) -> Ints:
    """Counts in proportion to ``base * numel``: ``clip(c * base * numel)`` with the c that makes their sum ``total``.

    Args:
        base: [n], > 0: densities up to a common factor. Those that reach a bound stay there, and c makes up for it.
        numel, total, lower, upper: weights of each, of all, and bounds of each.
    """
    check_total(total, lower, upper)
    return _fitted(lambda c: np.clip(c * base * numel, lower, upper), 0.0, float(1 / base.min()), total, lower, upper)


def shifted(base: Floats, numel: Ints, total: int, lower: Ints, upper: Ints) -> Ints:
    """Counts ``clip((base + c) * numel)`` with the c that makes their sum ``total``; arguments as :func:`scaled`."""
    check_total(total, lower, upper)
    low, high = float(-base.max()), float(1 - base.min())
    return _fitted(lambda c: np.clip((base + c) * numel, lower, upper), low, high, total, lower, upper)


def check_total(total: int, lower: Ints, upper: Ints) -> None:
    """Refuse a total that the bounds exclude."""
    least, most = int(lower.sum()), int(upper.sum())
    if not least <= total <= most:
        raise InfeasibleBudget(f"{total} weights cannot be kept: the bounds allow {least} to {most}", least, most)


def _fitted(counts, low: float, high: float, total: int, lower: Ints, upper: Ints) -> Ints:
    """Bisection for the argument at which ``counts``, which do not decrease in it, add up to ``total``."""
    for _ in range(200):
        middle = (low + high) / 2
        if counts(middle).sum() < total:
            low = middle
        else:
            high = middle
    return apportion(counts(high), total, lower, upper)
