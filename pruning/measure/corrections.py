"""Curves for models whose distortions do not add up: measured around a pruned model, or scaled by what turns out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from leanstep.pruning.allocate.allocation import Allocation
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.groups import Group
from leanstep.pruning.measure.measure import Levels, Measurement, Progress, evaluating
from leanstep.pruning.measure.partial import PartialCurves
from leanstep.pruning.measure.snapshot import Originals
from leanstep.pruning.score.pruners import Pruning, prune_group

__all__ = ["CORRECTIONS", "relinearised_curves", "tuned_coefficients"]

CORRECTIONS = ("none", "relinearise", "coefficients")


def relinearised_curves(
    measurement: Measurement,
    groups: Sequence[Group],
    levels: Levels,
    around: Mapping[str, tuple[int, str]],
    pruning: Pruning,
    *,
    partial: PartialCurves | None = None,
    label: str = "",
    progress: Progress | None = None,
    originals: Originals | None = None,
) -> dict[str, Curve]:
    """Curves around a model that is pruned already: ``D_g(k) = D(g at k, the others as around) - D(g dense, others
    so)``.

    A sum of such curves is right to first order around that allocation, where the sum of :func:`measure_curves` is
    right around the dense model. Masks are those of the dense model's statistics. Costs as many passes, and memory for
    one copy of the matrices and what their pruners keep.

    Args:
        measurement: with the dense model's outputs as reference; the model has its dense weights now.
        levels: as of :func:`leanstep.pruning.measure.measure.levels_of`.
        around: level of every group: kept weights and an N:M pattern or "".
        originals: how the weights are put back; None: from a copy.
        label: what the points are called in ``partial``, in front of the group's name.
    """
    total = sum(len(levels[group.name][0]) for group in groups)
    done = 0
    found: dict[str, Curve] = {}
    points = {} if partial is None else partial.points
    originals = originals or Originals([target for group in groups for target in group.targets])
    with evaluating(measurement.model), originals.kept():
        pruning.cache.reset()
        pruners = pruning.pruners(groups)  # each is made of the dense weights, before its group is pruned
        for group in groups:
            for target, weight in prune_group(group, pruners, *around[group.name]):
                target.weight.copy_(weight)
        for start, members in measurement.by_start(groups):
            measurement.cache.advance(start)
            for group in members:
                kept, patterns = levels[group.name]
                measured = []
                for k, count in enumerate(kept):
                    point = points.get((label + group.name, count))
                    if point is None:
                        if k == 0:
                            changed = [(target, pruners[target.name].given) for target in group.targets]
                        else:
                            changed = prune_group(group, pruners, count, patterns[k] if patterns else "")
                        point = measurement.measure(changed)
                        if partial is not None:
                            partial.add(label + group.name, count, point)
                    measured.append(point)
                    done += 1
                    if progress is not None:
                        progress(done, total, group.name)
                pruners.release(group)
                found[group.name] = Curve(
                    name=group.name,
                    numel=group.layer.numel,
                    kept=kept,
                    distortion=tuple(point.mean - measured[0].mean for point in measured),
                    stderr=(0.0, *(0.0 if point.stderr != point.stderr else point.stderr for point in measured[1:])),
                    metric=measurement.metric.name,
                    patterns=patterns,
                )
        measurement.cache.reset()
    return {group.name: found[group.name] for group in groups}


def tuned_coefficients(
    curves: Mapping[str, Curve],
    solve: Callable[[Mapping[str, Curve]], Allocation],
    cost: Callable[[Allocation], float],
    *,
    starts: int = 100,
    patience: int = 100,
    share: float = 0.1,
    seed: int = 0,
) -> tuple[Allocation, float]:
    """Scale each layer's curve by a coefficient in (0, 1), chosen so that the solver's allocation is cheapest in truth.

    The search of SPDY (Frantar and Alistarh, arXiv 2201.13096, section 3.3): ``starts`` random coefficients, then
    resampling of a ``share`` of the best ones until ``patience`` tries in a row were no better.

    Args:
        curves: name -> curve.
        solve: curves -> allocation.
        cost: allocation -> joint distortion, on data that the guard does not use.

    Returns:
        the best allocation seen, that of unscaled curves included, and its cost.
    """
    generator = torch.Generator().manual_seed(seed)
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
            picked = torch.randperm(len(names), generator=generator)[: max(1, round(share * len(names)))]
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
