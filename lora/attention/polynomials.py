"""Polynomials in place of exp: Taylor's, the error of any, and the degree that a tolerance needs.

Errors are relative to exp, on ``|x| <= bound``: delta = ``max |p(x) / exp(x) - 1|``. A softmax whose exponentials are
off by delta has weights off by eta = ``2 delta / (1 - delta)``, relative to each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from numpy.polynomial import Polynomial

__all__ = [
    "MAX_DEGREE",
    "needed_degree",
    "relative_error",
    "slope_error",
    "softmax_error",
    "taylor_coefficients",
]

# the error of Taylor sums of a higher degree cannot be computed in fp64
MAX_DEGREE = 64


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


def needed_degree(bound: float, tolerance: float) -> int | None:
    """The least even degree of Taylor's sum whose eta is within a tolerance where no logit is larger than ``bound``.

    None where it would be above 64. Raises ValueError for a tolerance that is not above 0.
    """
    if not tolerance > 0:
        raise ValueError(f"needed_degree: expected a tolerance > 0, got {tolerance}")
    if not bound < MAX_DEGREE:
        return None
    return next((g for g in range(2, MAX_DEGREE + 1, 2) if _eta(g, bound) <= tolerance), None)


def _eta(degree: int, bound: float) -> float:
    return softmax_error(relative_error(taylor_coefficients(degree), bound))
