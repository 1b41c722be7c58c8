"""The best polynomials in place of exp, to test bounds that hold for any polynomial."""

import functools

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial


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
