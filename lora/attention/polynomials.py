"""Polynomial approximations of exp: Taylor coefficients, errors, and the degree that meets a tolerance.

Errors are relative, on ``|x| <= bound``: delta = ``max |p(x) / exp(x) - 1|``. If every exponential has a relative error
of at most delta, every softmax weight has one of at most eta = ``2 delta / (1 - delta)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from numpy.polynomial import Polynomial

# fp64 cannot resolve the error of Taylor sums of a higher degree
MAX_DEGREE = 64


def taylor_coefficients(degree: int) -> list[float]:
    """``1 / t!`` for t up to ``degree``. Sums of even degree are positive everywhere."""
    if degree < 0:
        raise ValueError(f"expected a degree >= 0, got {degree}")
    return [1 / math.factorial(t) for t in range(degree + 1)]


def relative_error(coefficients: Sequence[float], bound: float) -> float:
    """delta of a polynomial: the maximum of ``|p(x) / exp(x) - 1|`` over ``|x| <= bound``; inf if exp overflows.

    The maximum is exact, not sampled: it lies at an end of the interval or where ``p' = p``.
    """
    return _error_of(Polynomial(list(coefficients)), bound)


def slope_error(coefficients: Sequence[float], bound: float) -> float:
    """delta of the polynomial's derivative, which replaces exp in the gradient."""
    return _error_of(Polynomial(list(coefficients)).deriv(), bound)


def softmax_error(delta: float) -> float:
    """eta, the largest relative error of softmax weights; inf for delta >= 1."""
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
        # rounding gives double roots an imaginary part; extra points do no harm
        points += [x for x in roots.real if abs(x) < bound]
    return float(max(abs(p(x) * math.exp(-x) - 1) for x in points))


def needed_degree(bound: float, tolerance: float) -> int | None:
    """The smallest even Taylor degree that keeps eta within ``tolerance`` for logits up to ``bound``.

    Returns None if that degree is above 64. Raises ValueError unless the tolerance is above 0.
    """
    if not tolerance > 0:
        raise ValueError(f"needed_degree: expected a tolerance > 0, got {tolerance}")
    if not bound < MAX_DEGREE:
        return None
    errors = ((g, relative_error(taylor_coefficients(g), bound)) for g in range(2, MAX_DEGREE + 1, 2))
    return next((g for g, delta in errors if softmax_error(delta) <= tolerance), None)
