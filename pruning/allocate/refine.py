"""Refine an allocation of a model by the search on its joint distortion."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanstep.pruning.allocate.allocation import layer_levels
from leanstep.pruning.allocate.budgets import Budget
from leanstep.pruning.allocate.descent import Descent, SearchFile, descend
from leanstep.pruning.allocate.exchange import ExchangeSpace
from leanstep.pruning.compress.menu import rounding_identity
from leanstep.pruning.config import Progress, Refinement
from leanstep.pruning.cost import Cost, Plan
from leanstep.pruning.measure.activation_cache import activation_bytes, score_samples
from leanstep.pruning.measure.batches import Batch, as_batches, batches_hash, evaluating
from leanstep.pruning.measure.checks import Trial
from leanstep.pruning.measure.curve_file import configuration_hash, weights_hash
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.joint import JointJudge, judge_cost
from leanstep.pruning.measure.measurement import Measurement, stored_by_measurement
from leanstep.pruning.measure.products import products_of
from leanstep.pruning.result import Allocation
from leanstep.pruning.score.base import LayerPruner, NonFiniteInputsError
from leanstep.pruning.score.calibration import all_pruners_bytes, all_statistics_bytes, score_seconds
from leanstep.pruning.score.in_files import PrunersInFiles

# method of a refined allocation
REFINED = "refined"
# part of the calibration data that judges, where no other data is given
_SHARE = 4
# batches of the judging data: a change can be rejected after a quarter of them
_BATCHES = 8


def judging_batches(model: nn.Module, data: Any, settings: Refinement, batch_size: int) -> tuple[Any, list[Batch]]:
    """The calibration data without what is set aside to judge exchanges, and the batches that judge.

    Raises:
        ValueError: for too few samples.
    """
    if settings.data is not None:
        judging: Any = settings.data
    else:
        data = data if isinstance(data, Tensor) else as_batches(data, model, batch_size=batch_size)
        first = len(data) - max(2, len(data) // _SHARE)
        if first < 1:
            unit = "samples" if isinstance(data, Tensor) else "batches"
            raise ValueError(
                f"refinement sets at least 2 {unit} aside to judge, of {len(data)}; give more, or its data"
            )
        data, judging = data[:first], data[first:]
    if isinstance(judging, Tensor):
        batch_size = max(1, min(batch_size, len(judging) // _BATCHES))
    batches = as_batches(judging, model, batch_size=batch_size, what="the data of refinement")
    if sum(batch.size for batch in batches) < 2:
        raise ValueError("refinement compares changes over samples: give at least 2 to judge them")
    return data, batches


def refine_allocation(
    start: Allocation,
    trial: Trial,
    batches: Sequence[Batch],
    measurement: Measurement,
    curves: Mapping[str, Curve],
    budget: Budget,
    settings: Refinement,
    progress: Progress | None = None,
) -> tuple[Allocation, Descent | None]:
    """Search from an allocation by exchanges within its budget; the model's dense weights are restored.

    Args:
        start: the allocation by dynamic programming.
        trial: the matrices, their score and its calibration data; the model has its dense weights.
        batches: the calibration data, for the identity of the search.
        measurement: of the dense model on the data that judges.
        curves, budget: by which it was solved.
        settings: limits, seed and file of the search.
        progress: see :func:`leanstep.pruning.allocate.descent.descend`.

    Returns:
        the allocation, and how the search went: the start and None if the outputs are not finite there, so that no
        exchange can be compared with it.

    Raises:
        ValueError: for a file of another search.
    """
    layers = [group.layer for group in trial.groups]
    nonzero = {group.name: group.nonzero() for group in trial.groups}
    space = ExchangeSpace(layer_levels(layers, curves, budget, nonzero), budget.target)
    state = None if settings.state is None else Path(settings.state)
    file = SearchFile(state, _identity(start, trial, batches, measurement, space, settings))
    processes = trial.pruning.processes
    processes.from_first(file.read)  # refuse a file of another search before anything is pruned
    scratch = trial.pruning.cache.scratch
    pruners: dict[str, LayerPruner] | PrunersInFiles
    pruners = {} if scratch is None else PrunersInFiles(trial.pruning, trial.snapshot, scratch)
    with evaluating(measurement.model), trial.snapshot.restored():
        try:
            trial.apply(start, pruners)
        except NonFiniteInputsError:
            trial.pruning.cache.reset()
            return start, None
        judge = JointJudge(trial.groups, measurement, pruners, start.counts, start.patterns, processes)
        if not judge.distortion.is_finite:
            return start, None
        descent = descend(judge, space, settings, file, progress, processes)
    counts = {name: descent.counts[name] for name in start.counts}
    predicted = sum(layer.loss_of(counts[name]) for name, layer in space.levels.items())
    refined = replace(
        start,
        method=REFINED,
        counts=counts,
        patterns=space.patterns(counts),
        cost=space.cost(counts),
        predicted=predicted,
    )
    return refined, descent


def _identity(
    start: Allocation,
    trial: Trial,
    batches: Sequence[Batch],
    measurement: Measurement,
    space: ExchangeSpace,
    settings: Refinement,
) -> dict[str, Any]:
    """Everything that the search depends on."""
    levels = [(name, layer.counts.tolist(), layer.cost.tolist()) for name, layer in space.levels.items()]
    return {
        "weights": weights_hash(measurement.model),
        "configuration": configuration_hash(measurement.model),
        "data": batches_hash(measurement.batches),
        "score data": batches_hash(batches),
        "metric": measurement.metric.identity,
        "score": trial.pruning.score,
        "score options": trial.pruning.options,
        "inputs": trial.inputs,
        "products": products_of(measurement.model),
        "start": hashlib.sha256(repr((sorted(start.counts.items()), space.target)).encode()).hexdigest(),
        "levels": hashlib.sha256(repr(levels).encode()).hexdigest(),
        "seed": settings.seed,
        "noise": settings.noise,
        **rounding_identity(trial.groups),
    }


def search_cost(plan: Plan) -> Cost:
    """What :func:`refine_allocation` takes within its limits, with the pruners of all matrices in every process."""
    config, workload = plan.config, plan.workload
    judging, settings = workload.refine_samples, config.refine
    planned, once = score_seconds(plan, config.planning_score), plan.pass_seconds(judging, compared=True)
    seconds = planned.statistics + workload.processes * (planned.prune - planned.statistics) + 3 * once
    # the result is pruned anew and measured
    seconds += score_seconds(plan, config.score).prune + once
    minutes, evaluations = (None, None) if settings is None else (settings.minutes, settings.evaluations)
    # an exchange takes half of a pass, from the first changed block on
    limits = (minutes and 60 * minutes, evaluations and evaluations * once / 2)
    seconds += min((limit for limit in limits if limit is not None), default=0.0)
    # as many weights are replaced in an exchange at most
    stored = stored_by_measurement(plan, judging) | {"replaced weights": plan.shapes.pruned * plan.shapes.itemsize}
    # the judge caches the inputs of its data
    stored["activations before a block"] = activation_bytes(plan, 2 * score_samples(plan))
    if plan.in_files:
        stored["statistics of all matrices"] = all_statistics_bytes(plan)
    else:
        stored["pruners of all matrices"] = all_pruners_bytes(plan)
    judge = judge_cost(plan, judging, max(1, min(config.batch_size, judging // _BATCHES)))
    return plan.cost({"search": seconds}, stored=stored) + judge
