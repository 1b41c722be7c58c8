"""Anchored curves: Fisher curves, each scaled to true measurements at levels near the solution.

Where time is short, the measurements are on the first samples alone. Fisher curves of these samples and of all then
tell what the choice of the samples does: see :mod:`leanstep.pruning.measure.fisher.sampling`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean, median

import numpy as np

from leanstep.pruning.measure.curve_file import PartialCurves, Points
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.fisher.sampling import (
    Anchors,
    on_all_samples,
    seconds_of_statistics,
    towards_neighbours,
    without_numbers,
)
from leanstep.pruning.measure.measurement import Measurement
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.result import Allocation
from leanstep.pruning.score.calibration import Pruning

Solve = Callable[[Mapping[str, Curve]], Allocation]

# share of the time for the first measurements, which show how long they take
_FIRST_SHARE = 1 / 3
# rounds that measure groups once more; those that follow measure others
_ROUNDS = 3


def curves_within(
    minutes: float,
    measurement: Measurement,
    fisher: Mapping[int, Mapping[str, Curve]],
    points_of: Callable[[str], Points],
    pruning: Pruning,
    solve: Solve,
    partial: PartialCurves | None,
) -> dict[str, Curve]:
    """Anchored curves from measurements within a time, on all samples or on the first ones.

    Args:
        minutes: time for the measurements.
        measurement: on all samples.
        fisher: number of samples -> the curves to second order, of all samples and of those on which to measure.
        points_of: gives the points of all groups, from the prefix of their names in the file.
        pruning, solve: as for :func:`anchored_curves`.
        partial: the file of points. Its end holds, and is appended. None: no file.
    """
    until, samples = time.monotonic() + 60 * minutes, min(fisher)
    whole, first = fisher[max(fisher)], fisher[samples] if len(fisher) > 1 else None
    points = points_of("" if first is None else f"first {samples}: ")
    if partial is not None and partial.complete:
        curves = anchored_to(whole, points, first)
    else:
        measurement = measurement if first is None else measurement.of_first(samples)
        curves = anchored_curves(measurement, whole, points, pruning, solve, until, first)
        if partial is not None:
            partial.finish()
    if first is None or not any(points.at(name) for name in whole):
        return curves
    return {name: replace(curve, samples=samples) for name, curve in curves.items()}


def anchored_curves(
    measurement: Measurement,
    fisher: Mapping[str, Curve],
    points: Points,
    pruning: Pruning,
    solve: Solve,
    until: float,
    first: Mapping[str, Curve] | None = None,
) -> dict[str, Curve]:
    """Measure every curve one to three times near the allocation, and scale the Fisher curves to that.

    Each round allocates by the present curves and measures each group at its level of the allocation, where that is
    not measured yet. The rounds end where all groups are measured at their levels. Where time is short, the first ones
    of :func:`in_order` are measured, and further rounds use what is left of it.

    Args:
        measurement: of the dense model, on all samples or the first ones.
        fisher: the curves to second order.
        points: receives the measured points; those it has already are anchors too.
        pruning: makes the pruners of all groups.
        solve: curves -> the allocation.
        until: value of ``time.monotonic()`` after which no point is begun.
        first: the curves to second order of the samples of the measurement; None: it is on all.
    """
    anchors: dict[str, dict[int, Distortion]] = {name: {} for name in fisher}
    by_name, size = {group.name: group for group in points.groups}, pruning.processes.size
    spent = expected = 0.0
    for number in itertools.count():
        # from the anchors of earlier rounds only, so that an interrupted run goes on to the same allocation
        curves = all_anchored(fisher, anchors, first)
        wanted = _wanted(curves, solve(curves), {} if number < _ROUNDS else anchors)
        new = {n: curves[n].distortion[k] for n, k in wanted.items() if curves[n].counts[k] not in points.at(n)}
        begin = time.monotonic()
        seconds = (until - begin) * size * (1.0 if number else _FIRST_SHARE)
        # by how long the measurements of earlier rounds took
        seconds *= expected / spent if expected and spent else 1.0
        ordered = [by_name[name] for name in in_order(new, anchors)]
        statistics = seconds_of_statistics(measurement, ordered, pruning)
        affordable = measurement.affordable(ordered, seconds - statistics) if seconds > statistics else []
        # by the clock of the first process
        names = pruning.processes.all_gather([group.name for group in affordable])[0]
        levels = {name: [points.missing_level(name, curves[name].counts[wanted[name]])] for name in names}
        points.limit_to(levels)
        measurement.measure_points(points, levels, pruning, until)
        expected += measurement.seconds_of_singles([by_name[name] for name in names]) + (statistics if names else 0.0)
        spent += (time.monotonic() - begin) * size
        before = sum(map(len, anchors.values()))
        for name, level in wanted.items():
            count = fisher[name].counts[level]
            if count in points.at(name):
                anchors[name][count] = points.at(name)[count]
        # points of an interrupted run are anchors without a measurement; the first round has a part of the time alone
        if number and not names and sum(map(len, anchors.values())) == before:
            break
    return anchored_to(fisher, points, first)


def anchored_to(
    fisher: Mapping[str, Curve], points: Points, first: Mapping[str, Curve] | None = None
) -> dict[str, Curve]:
    """Fisher curves scaled to all points that are measured."""
    return all_anchored(fisher, {name: points.at(name) for name in fisher}, first)


def in_order(distortion: Mapping[str, float], anchors: Anchors) -> list[str]:
    """Names of groups in the order in which to measure them: first those without a measurement.

    Fisher curves take the rows of a sequence for independent. How far that is wrong depends on what follows a matrix,
    and so on its kind: the same part of every kind comes first, those with the largest distortions.
    """
    sizes, before = Counter(map(without_numbers, distortion)), Counter[str]()
    keys: dict[str, tuple[bool, float, float]] = {}
    for name in sorted(distortion, key=lambda name: -distortion[name]):
        kind = without_numbers(name)
        keys[name] = bool(anchors.get(name)), before[kind] / sizes[kind], -distortion[name]
        before[kind] += 1
    return sorted(keys, key=lambda name: keys[name])


def all_anchored(
    fisher: Mapping[str, Curve], anchors: Anchors, first: Mapping[str, Curve] | None = None
) -> dict[str, Curve]:
    """Fisher curves scaled to their own measured points, or without any by what is known of others.

    The logarithm of their factor is a mean over the measured curves of the kind, with the median of all measured curves
    as one more. Where the points are of the first samples, whose Fisher curves are ``first``, they are scaled to what
    :func:`on_all_samples` and :func:`towards_neighbours` make of them.
    """
    if first is not None:
        anchors = on_all_samples(anchors, fisher, first)
    curves = {name: anchored(curve, anchors[name]) for name, curve in fisher.items()}
    factors = {name: _mean_factor(curve, anchors[name]) for name, curve in fisher.items()}
    known = {name: factor for name, factor in factors.items() if factor is not None}
    if not known:
        return curves
    if first is not None:
        near = towards_neighbours(known, fisher, first, anchors)
        curves |= {name: _scaled(curves[name], [near[name] - known[name]] * len(curves[name].counts)) for name in known}
        known = near
    by_kind: dict[str, list[float]] = defaultdict(list)
    for name, factor in known.items():
        by_kind[without_numbers(name)].append(factor)
    middle = median(factor for factors in by_kind.values() for factor in factors)
    for name, curve in curves.items():
        if name not in known:
            scaled = _scaled(curve, [mean([middle, *by_kind[without_numbers(name)]])] * len(curve.counts))
            # measured, and not above the rounding of activations: it has no factor of its own
            curves[name] = replace(scaled, source="anchored" if anchors[name] else scaled.source)
    return curves


def anchored(curve: Curve, anchors: Mapping[int, Distortion]) -> Curve:
    """A curve scaled to measured points: exact there.

    The logarithm of the factor is linear in log(removed / left) between two anchors, and constant outside of them.

    Args:
        curve: a Fisher curve.
        anchors: count -> measured distortion, at levels of the curve; those that are not positive give no factor. The
            curve ends before one that is not finite.
    """
    curve = curve.until(
        next((k for k, n in enumerate(curve.counts) if n in anchors and not anchors[n].is_finite), None)
    )
    factors = _log_factors(curve, anchors)
    if not factors:
        return curve
    x, values = zip(*factors, strict=True)
    curve = _scaled(curve, np.interp(curve.coordinate(np.array(curve.counts)), x, values).tolist())
    distortion, errors = list(curve.distortion), list(curve.stderr)
    for level, count in enumerate(curve.counts):
        if count in anchors:
            distortion[level] = anchors[count].mean
            errors[level] = 0.0 if math.isnan(anchors[count].stderr) else anchors[count].stderr
    return replace(curve, distortion=tuple(distortion), stderr=tuple(errors), source="anchored")


def _log_factors(curve: Curve, anchors: Mapping[int, Distortion]) -> list[tuple[float, float]]:
    """(log(removed / left), log(measured / second order)) of the anchors at which both are positive."""
    return [
        (float(curve.coordinate(np.array(count))), math.log(anchors[count].mean / value))
        for count, value in zip(curve.counts, curve.distortion, strict=True)
        if count in anchors and anchors[count].mean > 0 and value > 0 and anchors[count].is_finite
    ]


def _mean_factor(curve: Curve, anchors: Mapping[int, Distortion]) -> float | None:
    factors = _log_factors(curve, anchors)
    return mean(factor for _, factor in factors) if factors else None


def _scaled(curve: Curve, log_factors: Sequence[float]) -> Curve:
    """A curve with the distortion and the error of every level multiplied by exp of its factor."""
    factors = [math.exp(factor) for factor in log_factors]
    distortion = tuple(value * factor for value, factor in zip(curve.distortion, factors, strict=True))
    errors = tuple(error * factor for error, factor in zip(curve.stderr, factors, strict=True))
    return replace(curve, distortion=distortion, stderr=errors)


def _wanted(curves: Mapping[str, Curve], allocation: Allocation, measured: Anchors) -> dict[str, int]:
    """The pruned level of every group that is nearest to its allocation, without groups that are measured."""
    return {
        name: _nearest(curve, allocation.counts[name])
        for name, curve in curves.items()
        if len(curve.counts) > 1 and not measured.get(name)
    }


def _nearest(curve: Curve, count: int) -> int:
    """The pruned level of a curve that is nearest to a count, in log(removed / left)."""
    levels, at = curve.coordinate(np.array(curve.counts[1:])), curve.coordinate(np.array(count))
    return 1 + int(np.abs(levels - at).argmin())
