"""Rate-distortion curves: distortion of the model's output when one matrix alone is pruned, level by level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from leanstep._files import one_line
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.score.targets import Group
from leanstep.sparsity.patterns import NM

Levels = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]

SOURCES = ("measured", "fisher", "anchored")

# levels of a curve with those between the measured ones: about 200 of them
POINTS = 221
# largest power of the curve below its first measured level, where a fit to two levels may be too steep
_STEEPEST = 4.0


@dataclass(frozen=True)
class Curve:
    """Distortion D of the model's output when one matrix alone is pruned, at several levels.

    Attributes:
        name: name of the layer.
        numel: weights of the matrix, zeros included.
        counts: number of weights left at each level, strictly decreasing. The first level is the unchanged matrix.
        distortion: D at each level, the first exactly 0. As measured: not necessarily monotone.
        stderr: standard error of each D; 0 if unknown.
        metric: identity of the metric, such as "kl" or "kl_topk(k=2)". D of different metrics must not be added.
        patterns: the N:M pattern of each level, as text, or its name in a menu, whose counts are bytes; empty for
            unstructured levels, between which any count is possible.
        source: how D was obtained: ``measured``; ``fisher``, to second order; or ``anchored``, a Fisher curve scaled to
            measured levels.
        samples: how many of the first samples alone gave the measurements to which this curve, or others of its kind,
            are scaled; 0: all samples.

    Raises:
        ValueError: for another source, a negative number of samples, lengths that differ, counts that do not decrease
            or are out of range, a first D that is not 0, D or errors that are not finite, or patterns that keep other
            counts.
    """

    name: str
    numel: int
    counts: tuple[int, ...]
    distortion: tuple[float, ...]
    stderr: tuple[float, ...]
    metric: str
    patterns: tuple[str, ...] = ()
    source: str = "measured"
    samples: int = 0

    def __post_init__(self) -> None:
        for field in ("counts", "distortion", "stderr", "patterns"):  # JSON has lists
            object.__setattr__(self, field, tuple(getattr(self, field)))
        problem = self._problem()
        if problem:
            raise ValueError(f"Curve {self.name!r}: {problem}")

    def _problem(self) -> str:
        if self.samples < 0:
            return f"samples must be a number of samples, or 0 for all; got {self.samples}"
        if self.source not in SOURCES:
            return f"source must be one of {', '.join(SOURCES)}, got {self.source!r}"
        lengths = {len(self.counts), len(self.distortion), len(self.stderr), len(self.patterns) or len(self.counts)}
        if len(lengths) > 1 or not self.counts:
            return "expected as many counts as distortions, standard errors and patterns, and at least one"
        if any(a <= b for a, b in zip(self.counts, self.counts[1:], strict=False)):
            return f"counts must strictly decrease, got {self.counts}"
        if not 0 <= self.counts[-1] <= self.counts[0] <= self.numel:
            return f"counts must be in 0 .. {self.numel}, got {self.counts[-1]} .. {self.counts[0]}"
        if self.distortion[0] != 0.0:
            return (
                f"nothing is pruned at the first level, so its distortion must be exactly 0; got {self.distortion[0]}"
            )
        if not all(map(math.isfinite, (*self.distortion, *self.stderr))) or min(self.stderr) < 0:
            return "distortions and standard errors must be finite, and errors not negative"
        for pattern, count in zip(() if self.is_of_menu else self.patterns, self.counts, strict=False):
            parsed = NM.parse(pattern)
            if count * parsed.m != parsed.n * self.numel:
                return (
                    f"the pattern {pattern} keeps {parsed.density * self.numel:g} of {self.numel} weights, not {count}"
                )
        return ""

    @property
    def kept(self) -> tuple[int, ...]:
        """The former name of :attr:`counts`."""
        return self.counts

    @property
    def is_of_menu(self) -> bool:
        """Whether the levels have names and bytes in place of patterns and counts."""
        return any(":" not in pattern for pattern in self.patterns)

    def until(self, level: int | None) -> Curve:
        """The curve without the levels from a number on; None: itself."""
        if level is None:
            return self
        fields = ("counts", "distortion", "stderr", "patterns")
        return replace(self, **{field: getattr(self, field)[:level] for field in fields})

    def cleaned(self) -> Curve:
        """The curve made non-decreasing in sparsity and not negative.

        Of a menu, levels are left out that a smaller one beats: they differ in kind, and their order is no error. Else
        isotonic regression with weights 1 / stderr^2 (all equal where an error is 0, that is, unknown). On a
        finite calibration set, a larger sparsity can seem to do less harm.
        """
        if self.is_of_menu:
            return self._undominated()
        values, errors = np.array(self.distortion[1:]), np.array(self.stderr[1:])
        weights = 1 / errors**2 if len(errors) and (errors > 0).all() else None
        if weights is not None and not np.isfinite(weights).all():
            weights = None  # errors so small that their squares vanish
        if len(values) > 1:
            from scipy.optimize import isotonic_regression

            values = isotonic_regression(values, weights=weights).x
        return replace(self, distortion=(0.0, *np.maximum(values, 0.0).tolist()))

    def _undominated(self) -> Curve:
        levels = [0]
        for level, value in enumerate(self.distortion[1:], 1):
            if all(value < later for later in self.distortion[level + 1 :]):
                levels.append(level)
        return replace(
            self,
            counts=tuple(self.counts[level] for level in levels),
            distortion=tuple(max(self.distortion[level], 0.0) for level in levels),
            stderr=tuple(self.stderr[level] for level in levels),
            patterns=tuple(self.patterns[level] for level in levels),
        )

    def at(self, count: int) -> float:
        """D with ``count`` weights left: linear in the count between levels.

        Raises:
            ValueError: for a count outside the curve's levels.
        """
        if not self.counts[-1] <= count <= self.counts[0]:
            raise ValueError(
                f"Curve {self.name!r}: a count of {count} is outside its levels {self.counts[-1]} .. {self.counts[0]}"
            )
        return float(np.interp(count, self.counts[::-1], self.distortion[::-1]))

    def dense_grid(self, points: int = POINTS, unit: int = 1) -> Curve:
        """The curve, cleaned, with levels between the measured ones: ``points`` in all, unless more were measured.

        The measured levels keep their counts and their cleaned D. A monotone cubic joins them, in log D over
        log(removed / left). Curves are nearly straight there: D is about a power of the sparsity where that is small,
        and of the density where that is small. Between the first two levels, D is a power of the removed count, with an
        exponent from 1 to 4. A third of the added levels is evenly spaced in the count, a third in its logarithm, and a
        third about in that of the removed count. Each keeps a multiple of ``unit`` more than the last level.

        Raises:
            ValueError: for a curve of N:M levels, between which there is nothing; for points or unit below 1.
        """
        if self.patterns:
            raise ValueError(f"Curve {self.name!r}: there is nothing between N:M levels; use them as they are")
        if points < 2 or unit < 1:
            raise ValueError(f"Curve.dense_grid: expected points >= 2 and unit >= 1, got {points} and {unit}")
        clean = self.cleaned()
        measured = np.array(clean.counts)
        counts = np.union1d(measured, clean._between(points - len(measured), unit))[::-1]
        values = np.array([0.0, *clean._interpolate(counts[1:])])
        values[np.isin(counts, measured)] = clean.distortion
        values = np.maximum.accumulate(values)
        errors = np.interp(counts, self.counts[::-1], self.stderr[::-1])
        return replace(
            clean, counts=tuple(counts.tolist()), distortion=tuple(values.tolist()), stderr=tuple(errors.tolist())
        )

    def _between(self, number: int, unit: int) -> np.ndarray:
        """At most ``number`` counts from the last level to the first."""
        first, last = self.counts[0], self.counts[-1]
        third = max(number, 0) // 3
        even = np.linspace(last, first, max(number, 0) - 2 * third)
        by_left = np.geomspace(last + 0.5, first + 0.5, third) - 0.5
        # of a model with few zeros, many matrices lose little: steps from 0.1 per mille of the matrix on
        small = max(first - last, 1) / 1000
        by_removed = first + small - np.geomspace(small, first - last + small, third)
        steps = np.rint((np.concatenate([even, by_left, by_removed]) - last) / unit).clip(0, (first - last) // unit)
        return last + steps.astype(np.int64) * unit

    def coordinate(self, counts: np.ndarray) -> np.ndarray:
        """log(removed / left), with half a weight added to both to stay finite."""
        return np.log((self.counts[0] - counts + 0.5) / (counts + 0.5))

    def _interpolate(self, counts: np.ndarray) -> np.ndarray:
        """D of a cleaned curve at counts."""
        positive = np.array(self.distortion) > 0
        known, values = np.array(self.counts)[positive], np.array(self.distortion)[positive]
        if not len(known):
            return np.zeros(len(counts))
        x, y = self.coordinate(known), np.log(values)
        fitted = np.exp(monotone_cubic(x, y, self.coordinate(counts)))
        # above the first distorted level: a power of the count removed beyond the last undistorted one
        start = self.counts[int(np.argmax(positive)) - 1]
        removed = np.log(start - known[:2])
        power = np.clip((y[1] - y[0]) / (removed[1] - removed[0]), 1.0, _STEEPEST) if len(x) > 1 else 2.0
        share = np.clip((start - counts) / (start - known[0]), 0.0, 1.0)
        return np.where(counts > known[0], values[0] * share**power, fitted)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Curve:
        """The curve that :meth:`to_dict` wrote, also under the former name of ``counts``.

        Raises:
            ValueError: as the class, and for missing or other keys, or values of another type.
        """
        entries = {"counts" if key == "kept" else key: value for key, value in values.items()}
        try:
            texts = [entries["name"], entries["metric"], entries.get("source", ""), *entries.get("patterns", ())]
            counts = [entries["numel"], entries.get("samples", 0), *entries["counts"]]
            numbers = [*entries["distortion"], *entries["stderr"]]
            typed = all(isinstance(text, str) for text in texts) and all(type(count) is int for count in counts)
            if not typed or not all(type(number) in (int, float) for number in numbers):
                raise TypeError("expected texts as names and patterns, whole numbers as counts, numbers as distortions")
            floats = {key: tuple(map(float, entries[key])) for key in ("distortion", "stderr")}
            return cls(**{**entries, **floats})
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"Curve {one_line(entries.get('name'))}: {one_line(error)}") from None


def monotone_cubic(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Piecewise cubic through (x, y), with x increasing, that is monotone wherever the points are (PCHIP).

    Slopes at inner points are those of Fritsch and Butland (1984), at the two ends the secants. Constant outside.
    """
    if len(x) == 1:
        return np.full(at.shape, y[0])
    from scipy.interpolate import CubicHermiteSpline, PchipInterpolator

    slopes = PchipInterpolator(x, y).derivative()(x)
    slopes[[0, -1]] = (np.diff(y) / np.diff(x))[[0, -1]]
    return CubicHermiteSpline(x, y, slopes)(np.clip(at, x[0], x[-1]))


def curve_of(
    group: Group,
    levels: tuple[tuple[int, ...], tuple[str, ...]],
    points: Sequence[Distortion],
    metric: str,
    base: float = 0.0,
    source: str = "measured",
) -> Curve:
    """The curve of a group from the distortions at its pruned levels, less ``base``.

    Ends before the first level that is not finite: the pruned model overflows there.
    """
    if not math.isfinite(base):
        raise ValueError(
            f"Curve {group.name!r}: the outputs of the pruned model around which it was measured are not finite; use "
            "correction='none', or compute in fp32"
        )
    end = next((level for level, point in enumerate(points) if not point.is_finite), len(points))
    counts, patterns, points = levels[0][: end + 1], levels[1][: end + 1], points[:end]
    return Curve(
        name=group.name,
        numel=group.layer.numel,
        counts=counts,
        distortion=(0.0, *(point.mean - base for point in points)),
        stderr=(0.0, *(0.0 if math.isnan(point.stderr) else point.stderr for point in points)),
        metric=metric,
        patterns=patterns,
        source=source,
    )


def counts_and_patterns(levels: tuple[tuple[int, ...], tuple[str, ...]]) -> list[tuple[int, str]]:
    """(count, N:M pattern or "") of each level of a group."""
    counts, patterns = levels
    return list(zip(counts, patterns or ("",) * len(counts), strict=True))
