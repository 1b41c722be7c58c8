"""Measure rate-distortion curves: prune one matrix at a time, run the model from there on, and compare its output."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanstep._checkpoint.mapped import Scratch, touched
from leanstep._processes import Processes
from leanstep.pruning.allocate.allocation import allocate
from leanstep.pruning.config import Execution, PruneConfig, read_config, read_fields, takes_fields
from leanstep.pruning.measure.activation_cache import ActivationCache
from leanstep.pruning.measure.anchored import Solve, curves_within
from leanstep.pruning.measure.batches import Batch, as_batches, batches_hash, first_samples
from leanstep.pruning.measure.curve_file import PartialCurves, configuration_hash, weights_hash
from leanstep.pruning.measure.curves import SOURCES, Curve, levels_of
from leanstep.pruning.measure.fisher import SecondOrder, fisher_curves
from leanstep.pruning.measure.metrics import Distortion, Metric, make_metric, metric_name, summarise
from leanstep.pruning.measure.points import Points, Progress
from leanstep.pruning.measure.products import Roundings, products_in, products_of, rounding_unit
from leanstep.pruning.measure.sampling import choose_samples
from leanstep.pruning.result import Allocation
from leanstep.pruning.score.base import FISHER_SCORES, UPDATES_WEIGHTS
from leanstep.pruning.score.calibration import Pruning, prune_group
from leanstep.pruning.score.targets import Group, Target, as_matrix, find_targets, make_groups

# largest tolerated change of the output of unchanged weights
_NOISE = 1e-9

Stored = Callable[[str], Tensor | None]


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
    computes D to second order from one forward pass and a few backward passes, see
    :class:`leanstep.pruning.measure.fisher.SecondOrder`; exact for small changes. ``anchored`` measures each matrix
    one to three times, at levels near the allocation, and scales the Fisher curves to that.

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
        ``prefix_cache``. For ``fisher``: no dense outputs, and :class:`leanstep.pruning.measure.fisher.SecondOrder` of
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
    levels_by_name = levels_of(groups, sparsity, config.pattern, levels=config.levels)
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
            **({"less rounding": True} if rounding_unit(model, products) else {}),
            **({} if fisher_score == score else {"score of Fisher curves": fisher_score}),
        }
        resumed = PartialCurves.shared(Path(resume), identity, processes, (sparsity, *target))
    with resumed as partial, products_in(model, products), evaluating(model):
        points_of = lambda prefix, shown=progress: Points(groups, levels_by_name, partial, shown, prefix)  # noqa: E731
        if method == "fisher":
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
                partial.choose(method, processes)
        if method == "measured":
            measurement.measure_points(points, points.missing, pruning)
            return points.curves(measurement.metric.identity)
        second = SecondOrder(model, batches, measurement.metric)
        by_samples = {len(second.samples): points_of("fisher: ")}
        if (samples := choose_samples(minutes, measurement, groups, pruning, partial)) < len(second.samples):
            by_samples[samples] = points_of(f"fisher, first {samples}: ", None)
        fisher = fisher_curves(second, by_samples, pruning.by(fisher_score))
        if solve is None:
            layers = [group.layer for group in groups]
            solve = lambda curves: allocate(layers, sparsity, method="dp", curves=curves)  # noqa: E731
        return curves_within(minutes, measurement, fisher, points_of, pruning, solve, partial)


class Measurement:
    """Measures changed weights against the dense model's outputs on fixed data.

    The dense outputs are those of the weights at construction, in memory or with ``scratch`` in files.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        metric: str | Metric | None = None,
        *,
        prefix_cache: bool = True,
        like: ActivationCache | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.model, self.batches = model, batches
        self.metric = make_metric(metric, model)
        # starts whose cached activations change no output; before the first stage there are none
        self._checked = {0}
        with evaluating(model):
            self.cache = ActivationCache(model, batches, enabled=prefix_cache, like=like, scratch=scratch)
            self._roundings = Roundings(rounding_unit(model), self.cache.first_stage)
            references = (self.metric.reference(batch.run(model), batch) for batch in batches)
            self.reference = [one if scratch is None else scratch.store(one) for one in references]
            begin = time.monotonic()
            compared = list(self._compared())
            change = summarise(compared)
            # outputs of each sample that count: its tokens, or one of a classifier
            self.outputs = torch.cat([counts for _, counts in compared])
            # of one pass over all stages; by weight, and where they were timed: of the pruners, and of a level
            self.seconds, self.preparation_seconds, self.level_seconds = time.monotonic() - begin, 0.0, 0.0
            self.sample_seconds = self.seconds / len(self.outputs)
        if not abs(change.mean) <= _NOISE:
            raise ValueError(
                f"the model's output is not reproducible: the same inputs twice differ by {change.mean:g} in "
                f"{self.metric.name}. NaN comes from weights or inputs that are not finite, other numbers from dropout "
                "that eval() does not switch off or from kernels that are not deterministic"
            )

    def of_first(self, samples: int) -> Measurement:
        """On the first samples alone, with the dense outputs of these weights; gives up its own dense outputs."""
        self.reference = []
        batches, like = first_samples(self.batches, samples), self.cache
        part = Measurement(
            self.model, batches, self.metric, prefix_cache=bool(like.stages), like=like, scratch=like.scratch
        )
        part.preparation_seconds, part.level_seconds = self.preparation_seconds, self.level_seconds
        part.sample_seconds = self.sample_seconds  # in batches of full size
        return part

    def joint(self) -> Distortion:
        """Distortion of the current weights."""
        assert self.cache.position == 0
        with evaluating(self.model):
            return self._run()

    def measure_points(
        self,
        points: Points,
        missing: Mapping[str, Sequence[tuple[int, str]]],
        pruning: Pruning,
        until: float = math.inf,
    ) -> None:
        """Measure (count, N:M pattern) of some groups, in the order of the stages, and add them to the points.

        Begins none after ``time.monotonic()`` has reached ``until``. Each process measures a portion of every stage.
        """
        for start, stage in self._stages([g for g in points.groups if missing.get(g.name)], pruning, until):
            levels = [(group.name, count) for group in stage for count, _ in missing[group.name]]
            portion = set(pruning.processes.portion(levels))
            for group, pruners in pruning.each(stage, start):
                for count, pattern in missing[group.name]:
                    if (group.name, count) not in portion:
                        continue
                    if time.monotonic() >= until:
                        break
                    changed = prune_group(group, pruners, count, pattern)
                    points.add(group.name, count, self._alone(changed, group, points.groups))
            points.exchange(pruning.processes)

    def _alone(self, changed: Iterable[tuple[Target, Tensor]], group: Group, groups: Sequence[Group]) -> Distortion:
        """Distortion of one changed group, less :class:`Roundings`."""
        distortion = self.measure(changed)
        if distortion.mean == 0:  # no token reached it
            return distortion
        return Distortion(distortion.mean - self._roundings.of(group, groups, self.measure), distortion.stderr)

    def time_levels(self, points: Points, pruning: Pruning) -> None:
        """Time the pruners of the first stage and a level of each: some scores take longer than a pass of the model."""
        if not (groups := [group for group in points.groups if points.missing[group.name]]):
            return
        seconds, weights = 0.0, 0
        start, stage = next(self._stages(groups, pruning))
        first = time.monotonic()
        for group, pruners in pruning.each(stage, start):
            for target in group.targets:
                pruners[target.name]  # made before the clock of the level runs: it serves all levels
            count, pattern = points.missing[group.name][len(points.missing[group.name]) // 2]
            begin = time.monotonic()
            weights += sum(weight.numel() for _, weight in prune_group(group, pruners, count, pattern))
            seconds += time.monotonic() - begin
        self.level_seconds = seconds / weights
        self.preparation_seconds = (time.monotonic() - first - seconds) / weights
        self.cache.reset()
        pruning.cache.reset()

    def seconds_of(self, points: Points) -> float:
        """Expected time to measure all missing points: a level and a pass from its stage on for each."""
        missing = [group for group in points.groups if points.missing[group.name]]
        roundings = self.seconds * (self.passes_of(missing) - sum(map(self._share, missing)))
        return roundings + sum(len(points.missing[group.name]) * self._seconds_of_level(group) for group in missing)

    def _seconds_of_level(self, group: Group) -> float:
        return self._share(group) * self.seconds + group.layer.numel * self.level_seconds

    def seconds_of_singles(self, groups: Sequence[Group]) -> float:
        """Expected time of :meth:`singles`."""
        weights = sum(group.layer.numel for group in groups)
        return weights * (self.preparation_seconds + self.level_seconds) + self.seconds * self.passes_of(groups)

    def passes_of(self, groups: Sequence[Group]) -> float:
        """Passes over all stages that take as long as one for each group, from its stage on, and for roundings."""
        return sum(self._passes_of_each(groups))

    def _passes_of_each(self, groups: Sequence[Group]) -> list[float]:
        new = self._roundings.are_new(groups)
        return [self._share(group) * (2 if is_new else 1) for group, is_new in zip(groups, new, strict=True)]

    def affordable(self, groups: Sequence[Group], seconds: float) -> list[Group]:
        """The first groups for a point of each of which the time suffices."""
        by_weight = self.preparation_seconds + self.level_seconds
        each = zip(groups, self._passes_of_each(groups), strict=True)
        spent = itertools.accumulate(group.layer.numel * by_weight + self.seconds * passes for group, passes in each)
        return [group for group, total in zip(groups, spent, strict=True) if total <= seconds]

    def _share(self, group: Group) -> float:
        """Part of the stages that a pass for this group runs."""
        [(start, _)] = self.cache.by_start([group])
        return 1 - start / max(len(self.cache.stages), 1)

    def singles(
        self,
        groups: Sequence[Group],
        allocation: Allocation,
        pruning: Pruning,
        until: float,
        progress: Progress | None = None,
    ) -> list[Distortion] | None:
        """Distortion of each group alone at its allocated level, in the order of the stages.

        None if ``time.monotonic()`` of the first process reaches ``until`` before the last stage begins.
        """
        by_name: dict[str, Distortion] = {}
        share, in_order = {group.name for group in pruning.processes.share(groups)}, list[str]()
        for start, stage in self._stages(groups, pruning):
            if pruning.processes.all_gather(time.monotonic() > until)[0]:
                self.cache.reset()
                pruning.cache.reset()
                return None
            in_order += [group.name for group in stage]
            for group, pruners in pruning.each(stage, start):
                if group.name in share:
                    changed = prune_group(group, pruners, *allocation.level(group.name))
                    by_name[group.name] = self._alone(changed, group, groups)
            if progress is not None:
                progress(len(in_order), len(groups), "comparison")
        by_name = pruning.processes.merged(by_name)
        return [by_name[name] for name in in_order]

    def _stages(
        self, groups: Sequence[Group], pruning: Pruning, until: float = math.inf
    ) -> Iterator[tuple[int, list[Group]]]:
        """Start and groups of each stage, with the caches at the start; none after the time in the first process."""
        for start, stage in self.cache.by_start(groups):
            if until < math.inf and pruning.processes.all_gather(time.monotonic() >= until)[0]:
                break
            self._enter(start, pruning.cache)
            yield start, stage
        self.cache.reset()
        pruning.cache.reset()

    def _enter(self, start: int, statistics_cache: ActivationCache) -> None:
        """Cache the activations before a stage, and check that this changes no output; else disable both caches."""
        if start not in self.cache.starts:  # disabled at an earlier start
            return
        self.cache.advance(start)
        if start in self._checked:
            return
        self._checked.add(start)
        # that of one process decides for all
        changes = statistics_cache.processes.all_gather(self._run().mean)
        change = next((change for change in changes if not abs(change) <= _NOISE), 0.0)
        if change != 0.0:
            reason = (
                f"from {self.cache.stages[start][0]} on, they change the output of unchanged weights by {change:g} in "
                f"{self.metric.name}"
            )
            self.cache.disable(reason)
            statistics_cache.disable(reason)

    def _run(self) -> Distortion:
        return summarise(self._compared())

    def _compared(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(sums, counts) per sample of each batch, with the current weights."""
        for index, batch in enumerate(self.batches):
            yield self.metric.compare(Scratch.open(self.reference[index]), self.cache.run(index), batch)

    def measure(self, changed: Iterable[tuple[Target, Tensor]]) -> Distortion:
        """Distortion with some matrices changed, run from the cache's position on. Restores them, bit for bit.

        Of an iterator, each changed matrix is in memory until it is written.
        """
        saved: list[tuple[Target, Tensor]] = []
        try:
            for target, weight in changed:
                saved.append((target, target.weight.clone()))
                target.weight.copy_(weight)
                del weight
            return self._run()
        finally:
            for target, weight in saved:
                target.weight.copy_(weight)


class WeightSnapshot:
    """The original parameters of some targets.

    Args:
        targets: matrices that will be changed.
        stored: function from a parameter's name to its stored values on the CPU, or to None. Parameters equal to their
            stored values are not copied. Without a function, all are.
    """

    def __init__(self, targets: Sequence[Target], stored: Stored | None = None) -> None:
        self._parameters = {target.parameter: getattr(target.module, target.attribute) for target in targets}
        self._stored = stored
        self._copies: dict[str, Tensor] | None = None
        self._changed = False

    @torch.no_grad()
    def take(self) -> None:
        """Copy the parameters that are not stored. Call it before changing weights."""
        if self._copies is None:
            self._copies = {
                name: parameter.detach().clone()
                for name, parameter in self._parameters.items()
                if not self._is_stored(name, parameter)
            }
        self._changed = True

    def _is_stored(self, name: str, parameter: Tensor) -> bool:
        value = None if self._stored is None else self._stored(name)
        if value is None or value.dtype != parameter.dtype or value.shape != parameter.shape:
            return False
        return torch.equal(value.to(parameter.device), touched(parameter))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore all weights, bit for bit."""
        if not self._changed or self._copies is None:
            return
        for name, parameter in self._parameters.items():
            touched(parameter).copy_(self._original(name))
        self._changed = False

    def matrix(self, target: Target) -> Tensor:
        """The original weight [out, in] of a target, to be read. Call :meth:`take` before."""
        value = self._original(target.parameter)
        return as_matrix(value if target.expert is None else value[target.expert], target.layout)

    def _original(self, name: str) -> Tensor:
        assert self._copies is not None
        value = self._copies.get(name)
        if value is None and self._stored is not None:
            value = self._stored(name)
        assert value is not None
        return value

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Context manager: restores all weights on exit, bit for bit."""
        self.take()
        try:
            yield
        finally:
            self.restore()

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Context manager: restores all weights if an error is raised inside."""
        try:
            yield
        except BaseException:
            self.restore()
            raise


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: eval mode without gradients; restores the modes of all modules on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
