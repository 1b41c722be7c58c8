"""Anchored curves: Fisher curves, each scaled to true measurements at levels near the solution."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.measure.points import Points
from leanstep.pruning.result import Allocation
from leanstep.pruning.score.calibration import Pruning

if TYPE_CHECKING:
    from leanstep.pruning.measure.measure import Measurement

Solve = Callable[[Mapping[str, Curve]], Allocation]

# times that the allocation is solved and the curves are anchored near it
_ROUNDS = 2


def anchored_curves(
    measurement: Measurement, fisher: Mapping[str, Curve], points: Points, pruning: Pruning, solve: Solve, until: float
) -> dict[str, Curve]:
    """Measure every curve once or twice near the allocation, and scale the Fisher curves to that.

    Each round allocates by the present curves and measures each group at its level of the allocation, where that is
    not measured yet. Where time is short, the groups with the largest distortion at their level are measured.

    Args:
        measurement: of the dense model.
        fisher: the curves to second order.
        points: receives the measured points; those it has already are anchors too.
        pruning: as for :meth:`Measurement.curves`.
        solve: curves -> the allocation.
        until: value of ``time.monotonic()`` after which no point is begun.
    """
    anchors: dict[str, dict[int, Distortion]] = {name: {} for name in fisher}
    for _ in range(_ROUNDS):
        # from the anchors of earlier rounds only, so that an interrupted run goes on to the same allocation
        curves = {name: anchored(curve, anchors[name]) for name, curve in fisher.items()}
        allocation = solve(curves)
        wanted = {n: _nearest(curve, allocation.counts[n]) for n, curve in curves.items() if len(curve.counts) > 1}
        new = {n: curves[n].distortion[k] for n, k in wanted.items() if curves[n].counts[k] not in points.at(n)}
        ordered = sorted((g for g in points.groups if g.name in new), key=lambda group: -new[group.name])
        seconds = (until - time.monotonic()) * pruning.processes.size
        # by the clock of the first process
        names = pruning.processes.all_gather([group.name for group in measurement.affordable(ordered, seconds)])[0]
        affordable = [group for group in ordered if group.name in names]
        levels = {g.name: [points.missing_level(g.name, curves[g.name].counts[wanted[g.name]])] for g in affordable}
        points.limit_to(levels)
        measurement.measure_points(points, levels, pruning, until)
        for name, level in wanted.items():
            count = fisher[name].counts[level]
            if count in points.at(name):
                anchors[name][count] = points.at(name)[count]
    return anchored_to(fisher, points)


def anchored_to(fisher: Mapping[str, Curve], points: Points) -> dict[str, Curve]:
    """Fisher curves scaled to all points that are measured."""
    return {name: anchored(curve, points.at(name)) for name, curve in fisher.items()}


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
    known = [
        (float(curve.coordinate(np.array(count))), math.log(anchors[count].mean / value))
        for count, value in zip(curve.counts, curve.distortion, strict=True)
        if count in anchors and anchors[count].mean > 0 and value > 0
    ]
    if not known:
        return curve
    x, factors = zip(*known, strict=True)
    scale = np.exp(np.interp(curve.coordinate(np.array(curve.counts)), x, factors)).tolist()
    distortion = [value * factor for value, factor in zip(curve.distortion, scale, strict=True)]
    errors = [error * factor for error, factor in zip(curve.stderr, scale, strict=True)]
    for level, count in enumerate(curve.counts):
        if count in anchors:
            distortion[level] = anchors[count].mean
            errors[level] = 0.0 if math.isnan(anchors[count].stderr) else anchors[count].stderr
    return replace(curve, distortion=tuple(distortion), stderr=tuple(errors), source="anchored")


def _nearest(curve: Curve, count: int) -> int:
    """The pruned level of a curve that is nearest to a count, in log(removed / left)."""
    levels, at = curve.coordinate(np.array(curve.counts[1:])), curve.coordinate(np.array(count))
    return 1 + int(np.abs(levels - at).argmin())
