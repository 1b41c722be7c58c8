"""Monotone fits in one variable: isotonic regression, and cubic interpolation that does not overshoot."""

from __future__ import annotations

import numpy as np


def isotonic(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The non-decreasing sequence nearest to ``values`` in weighted least squares.

    Neighbours in the wrong order are merged into their weighted mean until none is left (pool adjacent violators).

    Args:
        values: [n], finite.
        weights: [n], > 0; None: all equal.

    Returns:
        float64 [n].

    Raises:
        ValueError: for shapes that differ, values that are not finite, or weights that are not positive.

    Notes:
        O(n). Values that are in order already come back bit for bit.

    References:
        Ayer, Brunk, Ewing, Reid, Silverman, "An Empirical Distribution Function for Sampling with Incomplete
        Information" (1955).
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or values.shape != weights.shape:
        raise ValueError(f"isotonic: expected two sequences of one length, got {values.shape} and {weights.shape}")
    if not (np.isfinite(values).all() and np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError("isotonic: expected finite values and finite weights above 0")
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for mean, weight, length in zip(values.tolist(), weights.tolist(), [1] * len(values), strict=True):
        while pools and pools[-1][0] > mean:
            before, heavy, more = pools.pop()
            mean = (before * heavy + mean * weight) / (heavy + weight)
            weight, length = weight + heavy, length + more
        pools.append((mean, weight, length))
    return np.repeat([pool[0] for pool in pools], [pool[2] for pool in pools])


def monotone_cubic(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Piecewise cubic through (x, y) that is monotone wherever the points are (PCHIP); linear outside of them.

    The slope at an inner point is the weighted harmonic mean of the two secants beside it, and 0 where they differ in
    sign; at the ends, the secant. Outside, the line with the slope of the end goes on.

    Args:
        x: [n], strictly increasing, n >= 1.
        y: [n].
        at: [q], where it is wanted.

    Returns:
        float64 [q]; with n = 1 the constant y.

    Raises:
        ValueError: for x that does not increase, or shapes that differ.

    References:
        Fritsch, Butland, "A Method for Constructing Local Monotone Piecewise Cubic Interpolants" (1984).
    """
    x, y, at = (np.asarray(a, dtype=np.float64) for a in (x, y, at))
    if x.ndim != 1 or x.shape != y.shape or not len(x) or (np.diff(x) <= 0).any():
        raise ValueError("monotone_cubic: expected x that strictly increases, and y of the same length")
    if len(x) == 1:
        return np.full(at.shape, y[0])
    h, secant = np.diff(x), np.diff(y) / np.diff(x)
    slope = np.concatenate([secant[:1], np.zeros(len(x) - 2), secant[-1:]])
    for i in range(1, len(x) - 1):
        left, right = secant[i - 1], secant[i]
        if left * right > 0:
            a, b = 2 * h[i] + h[i - 1], h[i] + 2 * h[i - 1]
            slope[i] = (a + b) / (a / left + b / right)
    place = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    t = (at - x[place]) / h[place]
    inside = (
        y[place] * (1 + 2 * t) * (1 - t) ** 2
        + slope[place] * h[place] * t * (1 - t) ** 2
        + y[place + 1] * t**2 * (3 - 2 * t)
        - slope[place + 1] * h[place] * t**2 * (1 - t)
    )
    below, above = y[0] + slope[0] * (at - x[0]), y[-1] + slope[-1] * (at - x[-1])
    return np.where(at < x[0], below, np.where(at > x[-1], above, inside))
