"""Measurements on the first samples alone: on how many of them, and what they tell of all."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

import numpy as np

from leanstep.pruning.measure.batches import first_samples
from leanstep.pruning.measure.curve_file import PartialCurves
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.measurement import Measurement
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.score.calibration import Pruning
from leanstep.pruning.score.targets import Group

# name of a group -> number of weights left -> what was measured
Anchors = Mapping[str, Mapping[int, Distortion]]

# share of the time in which to measure every group once; the rest is for groups whose level these measurements move
_ONCE = 4 / 5
# fewest outputs to measure on: tokens, or samples of a classifier
_FEWEST_OUTPUTS = 128
# what samples may always add to the time that does not depend on them
_LEAST_ADDED = 1 / 4
# what the choice of the samples does to the logarithm of a measured distortion, over what it does to that of Fisher
# curves; and the variance of the rest, over the variance of the latter. Chosen on the matrices of SmolLM2-135M, with
# one and two of four sequences
_SHARED, _NOT_SHARED = 0.5, 0.6
# distance in blocks of a neighbour that counts half as much as one in the same block
_NEAR = 2.0


def choose_samples(
    minutes: float,
    measurement: Measurement,
    groups: Sequence[Group],
    pruning: Pruning,
    partial: PartialCurves | None,
) -> int:
    """The number of first samples on which to measure within a time, in all processes that of the first.

    What the file says holds, and what it does not say is appended.
    """
    processes = pruning.processes
    if partial is not None and (partial.samples or partial.complete):
        return partial.samples or len(measurement.outputs)  # a finished file of an earlier version
    samples = processes.all_gather(samples_within(measurement, groups, pruning, 60 * minutes * processes.size))[0]
    if partial is not None:
        partial.choose_samples(samples)
    return samples


def samples_within(measurement: Measurement, groups: Sequence[Group], pruning: Pruning, seconds: float) -> int:
    """On how many of the first samples all groups can be measured once, in most of the time.

    An allocation compares matrices. Measured on the same few samples, their distortions rank nearly as on all. Curves
    to second order that few measurements scale rank worse. So few samples serve better than few matrices.

    Args:
        measurement: on all samples.
        groups: to be measured.
        pruning: makes their pruners.
        seconds: for all rounds, of all processes together.

    Returns:
        the number of samples. They have at least 128 outputs (tokens, or samples of a classifier), and add at least a
        quarter to what does not depend on their number, or they are all.
    """
    outputs, passes = measurement.outputs.cumsum(0), measurement.passes_of(groups)
    # these every process makes
    shares = passes + pruning.processes.size * _passes_besides(measurement, groups)
    fewest = min(int((outputs < _FEWEST_OUTPUTS).sum()) + 1, len(outputs))
    if fewest == len(outputs):
        return fewest
    # a pass is a line over the samples: weights that are copied to a device, or read from a disk, take as long for one
    each = (measurement.seconds - (few := _seconds_of_first(measurement, fewest))) / (len(outputs) - fewest)
    fixed = shares * max(few - fewest * each, 0.0) + seconds_of_statistics(measurement, groups, pruning)
    fixed += measurement.seconds_of_singles(groups) - passes * measurement.seconds
    if shares * each <= 0:
        return len(outputs)
    fitting = max(_ONCE * seconds - fixed, _LEAST_ADDED * fixed) / (shares * each)
    return max(fewest, math.floor(min(fitting, len(outputs))))


def _passes_besides(measurement: Measurement, groups: Sequence[Group]) -> float:
    """Passes for the dense outputs, for a comparison with them, and to check the starts of the stages but the first."""
    starts = [start for start, _ in measurement.cache.by_start(groups) if start]
    return 2 + sum(1 - start / len(measurement.cache.stages) for start in starts)


def _seconds_of_first(measurement: Measurement, samples: int) -> float:
    """Time of a pass over the first samples."""
    begin = time.monotonic()
    for batch in first_samples(measurement.batches, samples):
        measurement.metric.reference(batch.run(measurement.model), batch)
    return time.monotonic() - begin


def seconds_of_statistics(measurement: Measurement, groups: Sequence[Group], pruning: Pruning) -> float:
    """Expected time of the statistics of groups, where it was not timed together with their pruners."""
    if measurement.preparation_seconds:
        return 0.0
    samples = sum(batch.size for batch in pruning.cache.all_batches)
    return pruning.passes_for(groups) * samples * measurement.sample_seconds


def on_all_samples(anchors: Anchors, fisher: Mapping[str, Curve], first: Mapping[str, Curve]) -> Anchors:
    """Estimates of distortions on all samples, from those that were measured on the first ones.

    A measured distortion differs between the first samples and all by about the square root of the factor by which the
    one to second order does. ``fisher`` are the curves of all samples, ``first`` those of the first.
    """
    estimates: dict[str, dict[int, Distortion]] = {}
    for name, points in anchors.items():
        factors = [math.exp(-_SHARED * ratio) for ratio in _log_ratios(fisher[name], first[name], points)]
        pairs = zip(points.items(), factors, strict=True)
        estimates[name] = {n: Distortion(point.mean * factor, point.stderr * factor) for (n, point), factor in pairs}
    return estimates


def towards_neighbours(
    factors: Mapping[str, float], fisher: Mapping[str, Curve], first: Mapping[str, Curve], anchors: Anchors
) -> dict[str, float]:
    """Logarithms of factors, each drawn towards those of its kind in blocks nearby, by what is noise in it.

    The choice of the first samples is noise. Its variance is known from Fisher curves of the first samples and of all,
    as that of the difference to neighbours. Without noise, as with all samples, factors stay as they are.
    """
    of_samples = {name: mean(_log_ratios(fisher[name], first[name], anchors[name])) for name in factors}
    above, noise = _above_neighbours(factors), _NOT_SHARED * _mean_square(_above_neighbours(of_samples))
    variance = _mean_square(above)
    drawn = min(1.0, noise / variance) if variance > 0 else 0.0
    return {name: factor - drawn * above.get(name, 0.0) for name, factor in factors.items()}


def _above_neighbours(values: Mapping[str, float]) -> dict[str, float]:
    """What each value is above the mean of others of its kind, near blocks counting most; none of a kind of one."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for name in values:
        by_kind[without_numbers(name)].append(name)
    above: dict[str, float] = {}
    for names in by_kind.values():
        if len(names) == 1:
            continue
        of_kind = np.array([values[name] for name in names])
        blocks, of_each = np.unique([_block(name) for name in names], return_inverse=True)
        near = 1 / (1 + ((blocks[:, None] - blocks) / _NEAR) ** 2)
        # sums over all others of the kind, which blocks of many experts share
        weights, sums = near @ np.bincount(of_each), near @ np.bincount(of_each, of_kind)
        means = (sums[of_each] - of_kind) / (weights[of_each] - 1)
        above |= zip(names, (of_kind - means).tolist(), strict=True)
    return above


def _block(name: str) -> int:
    """The first number in a group's name, which is that of its block, or 0."""
    number = re.search(r"\b\d+\b", name)
    return int(number[0]) if number else 0


def _mean_square(values: Mapping[str, float]) -> float:
    return mean(value * value for value in values.values()) if values else 0.0


def _log_ratios(curve: Curve, first: Curve, counts: Iterable[int]) -> list[float]:
    """log(first / curve) at some counts, 0 where one of them is not positive or a curve has ended."""
    pairs = dict(zip(curve.counts, zip(first.distortion, curve.distortion, strict=False), strict=False))
    ratios = (pairs.get(count, (0.0, 0.0)) for count in counts)
    return [math.log(a / b) if a > 0 and b > 0 else 0.0 for a, b in ratios]


def without_numbers(name: str) -> str:
    """A group's name without the numbers of blocks and experts: the same for every q_proj, not for fc1 and fc2."""
    return re.sub(r"\b\d+\b", "*", name)
