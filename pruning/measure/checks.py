"""Compare joint with summed distortion, and correct curves whose distortions do not add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from leanstep.pruning.measure.curves import Curve, Levels
from leanstep.pruning.measure.measure import Measurement, Progress, WeightSnapshot, curve_of, evaluating
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.result import Additivity, Allocation, levels_by_group
from leanstep.pruning.score.calibration import Pruning, prune_group
from leanstep.pruning.score.targets import Group


def apply_allocation(groups: Sequence[Group], allocated: Mapping[str, tuple[int, str]], pruning: Pruning) -> None:
    """Prune the model in place, block by block. Statistics of a block are collected after pruning the blocks before."""
    pruning.cache.reset()
    with evaluating(pruning.cache.model):
        for start, stage in pruning.cache.by_start(groups):
            pruners = pruning.pruners(stage, start)
            for group in stage:
                for target, weight in prune_group(group, pruners, *allocated[group.name]):
                    target.weight.copy_(weight)
                pruners.release(group)
    pruning.cache.reset()


def joint_of(
    measurement: Measurement,
    groups: Sequence[Group],
    allocated: Mapping[str, tuple[int, str]],
    pruning: Pruning,
    snapshot: WeightSnapshot,
    *,
    stay: bool = False,
) -> Distortion:
    """Distortion of an allocation. Restores the weights, or with ``stay`` leaves the model pruned."""
    snapshot.take()
    with evaluating(measurement.model), nullcontext() if stay else snapshot.restored():
        apply_allocation(groups, allocated, pruning)
        return measurement.joint()


def measure_additivity(
    measurement: Measurement,
    groups: Sequence[Group],
    allocation: Allocation,
    pruning: Pruning,
    snapshot: WeightSnapshot,
    *,
    stay: bool,
) -> Additivity:
    """Joint and summed distortion of an allocation on the measurement's data.

    Single matrices are pruned with the statistics of the dense model, all together as by :func:`apply_allocation`.
    Restores the weights, or with ``stay`` leaves the model pruned.
    """
    allocated = levels_by_group(allocation, groups)
    with evaluating(measurement.model):
        alone = measurement.singles(groups, allocated, pruning)
    joint = joint_of(measurement, groups, allocated, pruning, snapshot, stay=stay)
    summed = sum(point.mean for point in alone.values())
    return Additivity(allocation.method, joint.mean, joint.stderr, summed)


# fraction of the coefficients that a try of the search draws anew
_RESAMPLED = 0.1
CORRECTIONS = ("none", "relinearise", "coefficients")


def relinearised_curves(
    measurement: Measurement,
    groups: Sequence[Group],
    levels: Levels,
    around: Mapping[str, tuple[int, str]],
    pruning: Pruning,
    snapshot: WeightSnapshot,
    progress: Progress | None = None,
) -> dict[str, Curve]:
    """Measure curves around a pruned model: ``D_g(k) = D(g at level k) - D(g dense)``, all others at ``around``.

    The sum of these curves is right to first order near ``around``; that of :func:`measure_curves`, near the dense
    model. Masks use the dense model's statistics. Time: as :func:`measure_curves`. Memory: a copy of the matrices, and
    their pruners.

    Args:
        measurement: with the dense model's outputs as reference; the model has its dense weights now.
        levels: see :func:`leanstep.pruning.measure.curves.levels_of`.
        around: level of every group: kept weights and an N:M pattern or "".
        snapshot: of the dense weights, which are restored.
    """
    total = sum(len(levels[group.name][0]) for group in groups)
    done = 0
    curves: dict[str, Curve] = {}
    with evaluating(measurement.model), snapshot.restored():
        pruning.cache.reset()
        pruners = pruning.pruners(groups)  # each is made of the dense weights, before its group is pruned
        for group in groups:
            for target, weight in prune_group(group, pruners, *around[group.name]):
                target.weight.copy_(weight)
        for start, stage in measurement.cache.by_start(groups):
            measurement.cache.advance(start)
            for group in stage:
                kept, patterns = levels[group.name]
                measured: dict[int, Distortion] = {}
                for k, count in enumerate(kept):
                    if k == 0:
                        changed = [(target, pruners[target.name].given) for target in group.targets]
                    else:
                        changed = prune_group(group, pruners, count, patterns[k] if patterns else "")
                    measured[count] = measurement.measure(changed)
                    done += 1
                    if progress is not None:
                        progress(done, total, group.name)
                pruners.release(group)
                base = measured[kept[0]].mean
                curves[group.name] = curve_of(group, levels[group.name], measured, measurement.metric.name, base)
        measurement.cache.reset()
    return {group.name: curves[group.name] for group in groups}


def tuned_coefficients(
    curves: Mapping[str, Curve],
    solve: Callable[[Mapping[str, Curve]], Allocation],
    cost: Callable[[Allocation], float],
    *,
    starts: int,
    patience: int,
) -> tuple[Allocation, float]:
    """Scale each curve by a coefficient in (0, 1), so that the solver's allocation has the smallest joint distortion.

    The search of SPDY (Frantar and Alistarh, arXiv 2201.13096, section 3.3): draws ``starts`` random coefficients, then
    resamples a tenth of the best ones until ``patience`` tries in a row are no better.

    Args:
        curves: name -> curve.
        solve: curves -> allocation.
        cost: allocation -> joint distortion, on data other than the held-out data.

    Returns:
        the best allocation, including that of unscaled curves, and its cost.
    """
    generator = torch.Generator().manual_seed(0)
    names = list(curves)
    best = solve(curves)
    best_cost = cost(best)
    known = {_key(best): best_cost}
    coefficients = torch.ones(len(names))
    tries = failed = 0
    while failed < patience:
        if tries < starts:
            candidate = torch.rand(len(names), generator=generator).clamp_min(1e-3)
        else:
            candidate = coefficients.clone()
            picked = torch.randperm(len(names), generator=generator)[: max(1, round(_RESAMPLED * len(names)))]
            candidate[picked] = torch.rand(len(picked), generator=generator).clamp_min(1e-3)
        allocation = solve({name: _scaled(curves[name], float(a)) for name, a in zip(names, candidate, strict=True)})
        key = _key(allocation)
        if key not in known:
            known[key] = cost(allocation)
        tries += 1
        if known[key] < best_cost:
            best, best_cost, coefficients = allocation, known[key], candidate
            failed = 0
        elif tries >= starts:
            failed += 1
    return best, best_cost


def _scaled(curve: Curve, factor: float) -> Curve:
    distortion = tuple(factor * value for value in curve.distortion)
    return replace(curve, distortion=distortion, stderr=tuple(factor * value for value in curve.stderr))


def _key(allocation: Allocation) -> tuple[int, ...]:
    return tuple(allocation.kept.values())
