"""Rate-distortion curves: what pruning one matrix alone to each of some levels does to the model's output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from leanstep.pruning.measure.monotone import isotonic, monotone_cubic
from leanstep.sparsity.patterns import NM

# a curve's slope in logarithms below its first measured level, where the fit of the two levels above may be off
_STEEPEST = 4.0


@dataclass(frozen=True)
class Curve:
    """Distortion D of the model's output when one matrix is pruned to each of some levels and nothing else is changed.

    Attributes:
        name: of the layer.
        numel: weights of the matrix, zeros included.
        kept: weights left at each level, strictly decreasing. The first is the matrix as it is.
        distortion: D at each level, the first exactly 0. As measured: not necessarily monotone.
        stderr: standard error of each D; 0 where it is not known.
        metric: what D is, for instance "kl"; D of different metrics must not be added.
        patterns: the N:M pattern of each level, as text; empty for unstructured levels, between which any count is
            possible.

    Raises:
        ValueError: for lengths that differ, counts that do not decrease or are out of range, a first D that is not 0,
            D or errors that are not finite, or patterns that do not keep these counts.
    """

    name: str
    numel: int
    kept: tuple[int, ...]
    distortion: tuple[float, ...]
    stderr: tuple[float, ...]
    metric: str
    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("kept", "distortion", "stderr", "patterns"):  # JSON has lists
            object.__setattr__(self, field, tuple(getattr(self, field)))
        problem = self._problem()
        if problem:
            raise ValueError(f"Curve {self.name!r}: {problem}")

    def _problem(self) -> str:
        lengths = {len(self.kept), len(self.distortion), len(self.stderr), len(self.patterns) or len(self.kept)}
        if len(lengths) > 1 or not self.kept:
            return "expected as many kept counts as distortions, standard errors and patterns, and at least one"
        if any(a <= b for a, b in zip(self.kept, self.kept[1:], strict=False)):
            return f"kept counts must strictly decrease, got {self.kept}"
        if not 0 <= self.kept[-1] <= self.kept[0] <= self.numel:
            return f"kept counts must be in 0 .. {self.numel}, got {self.kept[-1]} .. {self.kept[0]}"
        if self.distortion[0] != 0.0:
            return (
                f"nothing is pruned at the first level, so its distortion must be exactly 0; got {self.distortion[0]}"
            )
        if not all(map(math.isfinite, (*self.distortion, *self.stderr))) or min(self.stderr) < 0:
            return "distortions and standard errors must be finite, and errors not negative"
        for pattern, kept in zip(self.patterns, self.kept, strict=False):
            parsed = NM.parse(pattern)
            if kept * parsed.m != parsed.n * self.numel:
                return (
                    f"the pattern {pattern} keeps {parsed.density * self.numel:g} of {self.numel} weights, not {kept}"
                )
        return ""

    def cleaned(self) -> Curve:
        """The curve made non-decreasing in sparsity and not negative.

        Isotonic regression with weights 1 / stderr^2 (all equal where an error is 0, that is, unknown). A larger
        sparsity does not truly do less harm, but a finite calibration set can say so, and a solver would believe it.
        """
        values, errors = np.array(self.distortion[1:]), np.array(self.stderr[1:])
        weights = 1 / errors**2 if len(errors) and (errors > 0).all() else None
        if weights is not None and not np.isfinite(weights).all():
            weights = None  # errors so small that their squares vanish
        return replace(self, distortion=(0.0, *np.maximum(isotonic(values, weights), 0.0).tolist()))

    def at(self, kept: int) -> float:
        """D with ``kept`` weights left: linear in the count between levels.

        Raises:
            ValueError: for a count outside the curve's levels.
        """
        if not self.kept[-1] <= kept <= self.kept[0]:
            raise ValueError(
                f"Curve {self.name!r}: kept = {kept} is outside its levels {self.kept[-1]} .. {self.kept[0]}"
            )
        return float(np.interp(kept, self.kept[::-1], self.distortion[::-1]))

    def dense_grid(self, points: int = 101, unit: int = 1) -> Curve:
        """The curve, cleaned, with levels between the measured ones: ``points`` in all, unless more were measured.

        The measured levels keep their counts and their cleaned D. A monotone cubic joins them: log D over the log of
        pruned to kept weights, where curves are near to straight, because D is about a power of the sparsity where that
        is small, and of the density where that is small. Between the first two levels the power goes on, at most the
        fourth and at least the first. Half of the levels between lie evenly in the count, the others evenly in its
        logarithm; they keep a multiple of ``unit`` more than the last level.

        Raises:
            ValueError: for a curve of N:M levels, between which there is nothing; for points or unit below 1.
        """
        if self.patterns:
            raise ValueError(f"Curve {self.name!r}: there is nothing between N:M levels; use them as they are")
        if points < 2 or unit < 1:
            raise ValueError(f"Curve.dense_grid: expected points >= 2 and unit >= 1, got {points} and {unit}")
        clean = self.cleaned()
        measured = np.array(clean.kept)
        kept = np.union1d(measured, clean._between(points - len(measured), unit))[::-1]
        values = np.array([0.0, *clean._interpolate(kept[1:])])
        values[np.isin(kept, measured)] = clean.distortion
        values = np.maximum.accumulate(values)
        errors = np.interp(kept, self.kept[::-1], self.stderr[::-1])
        lists = (tuple(array.tolist()) for array in (kept, values, errors))
        return replace(clean, **dict(zip(("kept", "distortion", "stderr"), lists, strict=True)))

    def _between(self, count: int, unit: int) -> np.ndarray:
        """At most ``count`` kept counts from the last level to the first."""
        first, last = self.kept[0], self.kept[-1]
        half = max(count, 0) // 2
        even = np.linspace(last, first, max(count, 0) - half)
        log_even = np.geomspace(last + 0.5, first + 0.5, half) - 0.5
        steps = np.rint((np.concatenate([even, log_even]) - last) / unit).clip(0, (first - last) // unit)
        return last + steps.astype(np.int64) * unit

    def _coordinate(self, kept: np.ndarray) -> np.ndarray:
        """log(removed / kept), by half a weight away from infinity."""
        return np.log((self.kept[0] - kept + 0.5) / (kept + 0.5))

    def _interpolate(self, kept: np.ndarray) -> np.ndarray:
        """D of a cleaned curve at counts."""
        positive = np.array(self.distortion) > 0
        known, values = np.array(self.kept)[positive], np.array(self.distortion)[positive]
        if not len(known):
            return np.zeros(len(kept))
        x, y, at = self._coordinate(known), np.log(values), self._coordinate(kept)
        found = np.exp(monotone_cubic(x, y, at))
        # towards the levels that cost nothing: a power of what is removed beyond them
        start = self.kept[int(np.argmax(positive)) - 1]
        removed = np.log(start - known[:2])
        power = np.clip((y[1] - y[0]) / (removed[1] - removed[0]), 1.0, _STEEPEST) if len(x) > 1 else 2.0
        share = np.clip((start - kept) / (start - known[0]), 0.0, 1.0)
        return np.where(kept > known[0], values[0] * share**power, found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Curve:
        """The curve that :meth:`to_dict` wrote."""
        return cls(**values)


def level_grid(
    numel: int,
    target: float,
    *,
    lowest: float = 0.0,
    highest: float = 0.95,
    extra: Iterable[float] = (),
    unit: int = 1,
) -> tuple[int, ...]:
    """Counts of kept weights at which a curve is worth measuring, for a model that is to reach a target sparsity.

    Sparsities 0, 0.1, 0.2, 0.3, 0.4; target plus and minus 0.05, 0.1, 0.15, 0.2, 0.25; and 1 - 2^-j, which are dense
    near 1, where layers differ most: an even grid has two or three useful points at a target of 98 %.

    Args:
        numel: weights of the matrix.
        target: sparsity of the whole model, 0 <= target < 1.
        lowest, highest: sparsities that bound the levels, besides the dense one; 0 <= lowest <= highest <= 1. The
            default never removes a matrix whole.
        extra: more sparsities.
        unit: removed counts are multiples of it.

    Returns:
        Strictly decreasing, the first ``numel``.

    Raises:
        ValueError: for values out of range.
    """
    if not 0 <= target < 1 or not 0 <= lowest <= highest <= 1 or unit < 1 or numel < 1:
        raise ValueError(
            f"level_grid: expected 0 <= target < 1, 0 <= lowest <= highest <= 1, unit >= 1 and numel >= 1; got target "
            f"{target}, lowest {lowest}, highest {highest}, unit {unit}, numel {numel}"
        )
    near = [target + sign * step for step in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25) for sign in (-1, 1)]
    halvings = [1 - 0.5**j for j in range(1, 8)]
    wanted = [0.1, 0.2, 0.3, 0.4, *near, *halvings, highest, *extra]
    inside = [s for s in wanted if max(lowest, 1e-9) <= s <= highest]
    most = int(highest * numel / unit + 1e-9)
    removed = {0, *(min(round(s * numel / unit), most) * unit for s in inside)}
    return tuple(numel - r for r in sorted(removed))


def nm_levels(numel: int, m: int = 8, fewest: int = 2) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Kept counts and patterns m:m, (m-1):m, ..., fewest:m: the levels of mixed N:M sparsity.

    Raises:
        ValueError: where groups of m do not fill ``numel`` weights, or ``fewest`` is not in 0 .. m.
    """
    if m < 1 or numel % m or not 0 <= fewest <= m:
        raise ValueError(f"nm_levels: groups of {m} must fill the {numel} weights, and 0 <= fewest = {fewest} <= {m}")
    counts = range(m, fewest - 1, -1)
    return tuple(numel // m * n for n in counts), tuple(f"{n}:{m}" for n in counts)
