"""Polynomials in place of exp: Taylor's and the best ones, their errors, and the degree that a tolerance needs.

Errors are relative to exp, on ``|x| <= bound``: delta = ``max |p(x) / exp(x) - 1|``. A softmax whose exponentials are
off by delta has weights off by eta = ``2 delta / (1 - delta)``, relative to each of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

__all__ = [
    "MOST_DEGREE",
    "minimax_coefficients",
    "needed_degree",
    "relative_error",
    "slope_error",
    "softmax_error",
    "taylor_coefficients",
]

# the error of Taylor sums of a higher degree cannot be computed in fp64
MOST_DEGREE = 64


def taylor_coefficients(degree: int) -> list[float]:
    """``1 / t!`` for t up to ``degree``. Of even degree, the sum is positive everywhere."""
    if degree < 0:
        raise ValueError(f"expected a degree >= 0, got {degree}")
    return [1 / math.factorial(t) for t in range(degree + 1)]


def relative_error(coefficients: Sequence[float], bound: float) -> float:
    """delta of a polynomial: the largest of ``|p(x) / exp(x) - 1|`` over ``|x| <= bound``; inf where exp overflows.

    Exact, not sampled: the largest error is at an end or where ``p' = p``.
    """
    return _error_of(Polynomial(list(coefficients)), bound)


def slope_error(coefficients: Sequence[float], bound: float) -> float:
    """delta of the polynomial's derivative, which stands in for exp in the gradient."""
    return _error_of(Polynomial(list(coefficients)).deriv(), bound)


def softmax_error(delta: float) -> float:
    """eta: the largest relative error of softmax weights; inf for delta of 1 and more."""
    return 2 * delta / (1 - delta) if delta < 1 else math.inf


def _error_of(p: Polynomial, bound: float) -> float:
    if not bound >= 0:
        raise ValueError(f"expected a bound >= 0 of the logits, got {bound}")
    if bound > 300:
        return math.inf
    points = [-bound, 0.0, bound]
    turning = p.deriv() - p
    if turning.degree() > 0:
        roots = turning.roots()
        # a double root gets an imaginary part by rounding; a point too many does no harm
        points += [x for x in roots.real if abs(x) < bound]
    return float(max(abs(p(x) * math.exp(-x) - 1) for x in points))


@functools.lru_cache(maxsize=256)
def minimax_coefficients(bound: float, degree: int) -> tuple[float, ...]:
    """Coefficients of the polynomial with the least delta on ``|x| <= bound``, by Remez's exchange.

    It needs a lower degree than Taylor's for the same delta, and is positive on that interval if its delta is below 1.
    Beyond the bound it approximates nothing. Taylor's is better near 0, where most logits of most heads lie. Raises
    ValueError for a bound outside (0, 30], or a degree outside 0 to 24.
    """
    if not 0 < bound <= 30 or not 0 <= degree <= 24:
        raise ValueError(
            f"minimax_coefficients: expected a bound in (0, 30] and a degree up to 24, got {bound} and {degree}"
        )
    grid = bound * np.cos(np.linspace(np.pi, 0, 64 * (degree + 2) + 1))
    inverse = np.exp(-grid)
    basis = np.polynomial.chebyshev.chebvander(grid / bound, degree) * inverse[:, None]
    nodes = np.linspace(0, len(grid) - 1, degree + 2).round().astype(int)
    best, least = np.zeros(degree + 1), np.inf
    for _ in range(40):
        signs = np.where(np.arange(degree + 2) % 2, -1.0, 1.0)
        solved = np.linalg.solve(np.column_stack([basis[nodes], signs]), np.ones(degree + 2))
        error = basis @ solved[:-1] - 1
        worst = np.abs(error).max()
        # where rounding is as large as the error, exchanges lead nowhere
        if worst < least:
            best, least = solved[:-1], worst
        if worst <= abs(solved[-1]) * (1 + 1e-9) + 1e-15:
            break
        exchanged = _extremes(error, degree + 2)
        if exchanged is None or (exchanged == nodes).all():
            break
        nodes = exchanged
    power = Chebyshev(best, domain=[-bound, bound]).convert(kind=Polynomial)
    return tuple(float(c) for c in np.pad(power.coef, (0, degree + 1 - len(power.coef))))


def _extremes(error: np.ndarray, count: int) -> np.ndarray | None:
    """The indices of ``count`` neighbouring extremes of alternating sign with the largest errors; None if too few."""
    runs = np.split(np.arange(len(error)), np.flatnonzero(np.diff(np.sign(error))) + 1)
    peaks = np.array([run[np.abs(error[run]).argmax()] for run in runs])
    if len(peaks) < count:
        return None
    while len(peaks) > count:
        peaks = peaks[1:] if abs(error[peaks[0]]) < abs(error[peaks[-1]]) else peaks[:-1]
    return peaks


def needed_degree(bound: float, tolerance: float, *, kind: str = "softmax", even: bool = True) -> int | None:
    """The least degree of Taylor's sum within a tolerance where no logit is larger than ``bound``.

    Args:
        bound: S, the largest absolute logit, scaled and with centred keys.
        tolerance: of eta with ``kind="softmax"``, of delta with ``"exp"``, and with ``"minimax"`` of the delta of the
            best polynomial instead of Taylor's.
        even: only even degrees from 2 on, whose sums are positive everywhere.

    Returns:
        The degree; None where it would be above 64 (24 for ``"minimax"``).
    """
    if kind not in ("softmax", "exp", "minimax"):
        raise ValueError(f"needed_degree: expected kind 'softmax', 'exp' or 'minimax', got {kind!r}")
    if not tolerance > 0:
        raise ValueError(f"needed_degree: expected a tolerance > 0, got {tolerance}")
    most = 24 if kind == "minimax" else MOST_DEGREE
    if not bound < most:
        return None
    for degree in range(2 if even else 0, most + 1, 2 if even else 1):
        best = kind == "minimax" and bound > 0
        coefficients = minimax_coefficients(bound, degree) if best else taylor_coefficients(degree)
        delta = relative_error(coefficients, bound)
        if (softmax_error(delta) if kind == "softmax" else delta) <= tolerance:
            return degree
    return None
