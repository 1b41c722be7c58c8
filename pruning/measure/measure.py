"""Measure rate-distortion curves: prune one matrix at a time, run the model from there on, and compare its output."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from leanstep._checkpoint.mapped import Scratch
from leanstep._processes import Processes
from leanstep.pruning.allocate.allocation import allocate
from leanstep.pruning.allocate.levels import level_count, levels_of
from leanstep.pruning.compress.menu import rounding_identity
from leanstep.pruning.config import Execution, PruneConfig, read_config, read_fields, takes_fields
from leanstep.pruning.cost import Cost, Plan
from leanstep.pruning.measure.activation_cache import ActivationCache
from leanstep.pruning.measure.batches import as_batches, batches_hash, evaluating
from leanstep.pruning.measure.curve_file import PartialCurves, Points, configuration_hash, weights_hash
from leanstep.pruning.measure.curves import SOURCES, Curve
from leanstep.pruning.measure.fisher.anchored import Solve, curves_within
from leanstep.pruning.measure.fisher.sampling import choose_samples
from leanstep.pruning.measure.fisher.second_order import SecondOrder, fisher_curves, second_order_cost
from leanstep.pruning.measure.measurement import Measurement, stored_by_measurement
from leanstep.pruning.measure.metrics import make_metric, metric_name
from leanstep.pruning.measure.products import products_in, products_of, rounding_unit
from leanstep.pruning.score.base import FISHER_SCORES, UPDATES_WEIGHTS
from leanstep.pruning.score.calibration import Pruning, score_seconds
from leanstep.pruning.score.targets import Group, find_targets, make_groups


@takes_fields(Execution, PruneConfig)
def measure_curves(
    model: nn.Module,
    data: Any,
    config: PruneConfig | None = None,
    *,
    groups: Sequence[Group] | None = None,
    score_data: Any = None,
    prefix_cache: bool = True,
    method: str | None = "measured",
    solve: Solve | None = None,
    target: Sequence[Any] = (),
    **options: Any,
) -> dict[str, Curve]:
    """Measure how the model's output changes when one matrix alone is pruned, to each of several levels.

    ``D_g(k) = metric(f(x; W), f(x; W with matrix g at level k))``, a mean over the data with its standard error. Of a
    model in bf16 or fp16, less what a change does by rounding the activations otherwise
    (:class:`leanstep.pruning.measure.products.Roundings`).
    Restores all weights, bit for bit, also after an error.

    The methods: ``measured`` runs the model for every matrix and level, and is the definition of a curve. ``fisher``
    computes D to second order from one forward pass and a few backward passes, see :class:`SecondOrder`; exact for
    small changes. ``anchored`` measures each matrix one to three times, at levels near the allocation, and scales the
    Fisher curves to that.

    Args:
        model: any module; it is run in eval mode, without gradients.
        data: see :func:`leanstep.pruning.measure.batches.as_batches`; 8 to 32 sequences suffice for language models.
        config: the settings, as one object. Read are ``sparsity`` (None: 0.5), around which the grid of levels is
            finest, ``score``, ``pattern``, ``metric``, ``granularity``, ``levels``, ``score_options``, ``batch_size``,
            ``minutes`` and ``products``. Fisher curves of ``alps`` are SparseGPT's, which takes a tenth of the time for
            a level, or less.
        groups: groups to measure; None: all of :func:`find_targets`, grouped by ``granularity``.
        score_data: data for the score's statistics; None: ``data``.
        prefix_cache: compute the activations before a matrix's block once, not for every level.
        method: ``measured``, ``fisher`` or ``anchored``; None: ``measured`` if that takes less than ``minutes`` by the
            time of one pass and, for scores that update weights, of one block's levels, or for a metric without a root;
            else ``anchored``.
        solve: curves -> the allocation near which ``anchored`` measures; None: that of :func:`allocate` for
            ``sparsity``.
        target: besides ``sparsity``, what ``solve`` depends on, in plain values: decisions in ``resume`` hold for it.
        **options: settings by name, which change those of ``config``; and the fields of
            :class:`leanstep.pruning.Execution`.

    Returns:
        name of the matrix or group -> :class:`Curve`, in the order of the targets. Its ``source`` is the method. A
        curve ends before the first level at which the pruned model's distortion is not finite.

    Raises:
        ValueError: for unknown settings, ``fisher`` and ``anchored`` with a metric that has no root, a model whose
            output is not reproducible, or a ``resume`` file of another model, other data or settings, or a run that
            goes on.

    Notes:
        Memory: the dense outputs (for ``kl``, 4 bytes per token and entry of the vocabulary), one hidden state per
        token, and the statistics of one block. Time: a forward pass over the data per level, half of it on average with
        ``prefix_cache``. For ``fisher``: no dense outputs, and :class:`SecondOrder` of
        as many matrices as take 1 GiB, or of two blocks. Time: for each such portion, the work of up to five forward
        passes, and 4,096 products of a row and the matrix for every level.

    References:
        K. Xu, Z. Wang, X. Geng, M. Wu, X. Li, W. Lin, "Efficient Joint Optimization of Layer-Adaptive Weight Pruning in
        Deep Neural Networks", arXiv 2308.10438.
    """
    if method not in (None, *SOURCES):
        raise ValueError(f"method must be one of {', '.join(SOURCES)}, or None; got {method!r}")
    execution = read_fields(Execution, options)
    config = read_config("measure_curves", config, options)
    sparsity = 0.5 if config.sparsity is None else config.sparsity
    score, metric, minutes, batch_size = config.score, config.metric, config.minutes, config.batch_size
    groups = make_groups(find_targets(model), config.granularity) if groups is None else list(groups)
    levels_by_name = levels_of(groups, config, sparsity)
    batches = as_batches(data, model, batch_size=batch_size)
    source = batches if score_data is None else as_batches(score_data, model, batch_size=batch_size, what="score_data")
    processes, fisher_score = execution.processes or Processes(), FISHER_SCORES.get(score, score)
    files, resume, progress = Scratch.of(execution.scratch), execution.resume, execution.progress
    score_options, products = config.score_options, config.products
    resumed: AbstractContextManager[PartialCurves | None] = nullcontext()
    if resume is not None:
        identity = {
            "weights": weights_hash(model),
            "configuration": configuration_hash(model),
            "data": batches_hash(batches),
            "score data": batches_hash(source),
            "metric": metric_name(metric, model),
            "score": score,
            "score options": dict(score_options or {}),
            "levels": {name: patterns or counts for name, (counts, patterns) in levels_by_name.items()},
            "products": products_of(model, products),
            **rounding_identity(groups),
            **({"less rounding": True} if rounding_unit(model, products) else {}),
            **({} if fisher_score == score else {"score of Fisher curves": fisher_score}),
        }
        resumed = PartialCurves.shared(Path(resume), identity, processes, (sparsity, *target))
    with resumed as partial, products_in(model, products), evaluating(model):
        points_of = lambda prefix, shown=progress: Points(groups, levels_by_name, partial, shown, prefix)  # noqa: E731
        if method == "fisher" and not any(group.is_end for group in groups):
            cache = ActivationCache(model, source, enabled=prefix_cache, scratch=files, processes=processes)
            second = SecondOrder(model, batches, make_metric(metric, model))
            pruning = Pruning(cache, score, score_options).by(fisher_score)
            [curves] = fisher_curves(second, {len(second.samples): points_of("fisher: ")}, pruning).values()
            return curves
        measurement = Measurement(model, batches, metric, prefix_cache=prefix_cache, scratch=files)
        cache = ActivationCache(
            model, source, enabled=prefix_cache, like=measurement.cache, scratch=files, processes=processes
        )
        pruning = Pruning(cache, score, score_options, same_weights=True)
        points = points_of("")
        if method is None and partial is not None:
            method = partial.method
        is_complete = partial is not None and partial.complete
        if method in (None, "anchored") and score in UPDATES_WEIGHTS and not is_complete:
            measurement.time_levels(points, pruning)
        if method is None:
            fits = measurement.seconds_of(points) <= 60 * minutes * processes.size
            method = "measured" if fits or not measurement.metric.has_root else "anchored"
            method = processes.all_gather(method)[0]
            if partial is not None:
                partial.choose(method)
        if method == "measured":
            measurement.measure_points(points, points.missing, pruning)
            return points.curves(measurement.metric.identity)
        of_ends = dict[str, Curve]()
        if ends := [group for group in groups if group.is_end]:
            points = Points(ends, levels_by_name, partial, progress)
            measurement.measure_points(points, points.missing, pruning)
            of_ends = points.curves(measurement.metric.identity)
            groups = [group for group in groups if not group.is_end]
        second = SecondOrder(model, batches, measurement.metric)
        by_samples = {len(second.samples): points_of("fisher: ")}
        if method == "fisher":
            return of_ends | fisher_curves(second, by_samples, pruning.by(fisher_score))[len(second.samples)]
        if (samples := choose_samples(minutes, measurement, groups, pruning, partial)) < len(second.samples):
            by_samples[samples] = points_of(f"fisher, first {samples}: ", None)
        fisher = fisher_curves(second, by_samples, pruning.by(fisher_score))
        if solve is None:
            layers = [group.layer for group in groups]
            solve = lambda curves: allocate(layers, sparsity, method="dp", curves=curves)  # noqa: E731
        if of_ends:
            of_all = solve
            solve = lambda curves: of_all({**of_ends, **curves})  # noqa: E731
        return of_ends | curves_within(minutes, measurement, fisher, points_of, pruning, solve, partial)


def curves_cost(plan: Plan) -> Cost:
    """What :func:`measure_curves` takes. Each process measures its share of the matrices and levels."""
    config, method, number = plan.config, expected_method(plan), plan.workload.processes
    planned, levels = score_seconds(plan, config.planning_score), level_count(plan.config)
    seconds = planned.prune + (levels * planned.level + points_seconds(plan)) / number
    stored = stored_by_measurement(plan, plan.workload.curve_samples)
    if method == "measured":
        return plan.cost({"curves, measured": seconds}, passes=plan.groups * levels / 2, stored=stored)
    second = second_order_cost(plan)
    scored = score_seconds(plan, FISHER_SCORES.get(config.planning_score, config.planning_score))
    fisher = scored.prune + levels * scored.level / number + sum(second.seconds.values())
    if method == "anchored":
        fisher += min(60 * config.minutes, seconds)
    return plan.cost({f"curves, {method}": fisher}, stored=stored) + replace(second, seconds={})


def points_seconds(plan: Plan) -> float:
    """Seconds of one process for all points of curves, each half of a pass."""
    compared = plan.pass_seconds(plan.workload.curve_samples, compared=True)
    return plan.groups * level_count(plan.config) / 2 * compared


def expected_method(plan: Plan) -> str:
    """How a run obtains curves: by the time of the passes, and of the levels of scores that update weights."""
    config, seconds = plan.config, points_seconds(plan)
    if config.planning_score in UPDATES_WEIGHTS:
        seconds += level_count(plan.config) * score_seconds(plan, config.planning_score).level
    fits = seconds <= 60 * config.minutes * plan.workload.processes
    return config.curve_method or ("measured" if fits else "anchored")
