"""Prune a model: check the settings, split the data, measure curves, allocate, compare on held-out data, prune."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanstep._mapped import Scratch
from leanstep._processes import Processes
from leanstep.pruning.allocate.allocation import Budget, BudgetConstraint, allocate
from leanstep.pruning.allocate.closed_form import atp_betas, in_blocks, snap
from leanstep.pruning.allocate.descent import Descent, Refinement
from leanstep.pruning.allocate.latency import LatencyTable
from leanstep.pruning.choices import check_choices, fixed_pattern
from leanstep.pruning.measure.activation_cache import ActivationCache
from leanstep.pruning.measure.batches import Batch, as_batches, batches_hash
from leanstep.pruning.measure.checks import Trial
from leanstep.pruning.measure.curves import Curve, Levels, levels_of
from leanstep.pruning.measure.measure import (
    Measurement,
    Stored,
    WeightSnapshot,
    evaluating,
    measure_curves,
)
from leanstep.pruning.measure.metrics import Metric, check_runs, metric_name
from leanstep.pruning.measure.points import Progress
from leanstep.pruning.refine import REFINED, judging_batches, refine_allocation
from leanstep.pruning.result import Additivity, Allocation, PruneResult
from leanstep.pruning.score.base import NEEDS
from leanstep.pruning.score.calibration import Pruning, leave_out
from leanstep.pruning.score.targets import Group, check_filled, count_uses, find_targets, make_groups
from leanstep.sparsity import NM

# most slopes of ATP to try
_SLOPES = 9


def prune(
    model: nn.Module,
    data: Any = None,
    *,
    sparsity: float | None = None,
    allocation: str = "dp",
    score: str = "wanda",
    pattern: str = "unstructured",
    metric: str | Metric | None = None,
    granularity: str = "matrix",
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    held_out: Any = None,
    curve_data: Any = None,
    curves: Mapping[str, Curve] | str | None = None,
    minutes: float = 30.0,
    correction: str = "none",
    inputs: str = "pruned",
    levels: Sequence[float] | None = None,
    budget: Budget | LatencyTable | str | None = None,
    score_options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    stored: Stored | None = None,
    refine: Refinement | None = None,
    scratch: str | Path | None = None,
    processes: Processes | None = None,
) -> PruneResult:
    """Prune a model in place, each matrix to the sparsity that an allocation gives it. Existing zeros stay zero.

    With ``allocation="dp"``, the distortion of each matrix is measured at some levels (:func:`measure_curves`), and
    dynamic programming finds the levels with the smallest sum of distortions under the budget (:func:`allocate`). This
    allocation and uniform sparsity are then measured on held-out data, and the better one is applied.

    Args:
        model: any module with linear layers, convolutions or transformers' expert weights.
        data: calibration data, see :func:`leanstep.pruning.measure.batches.as_batches`. May be None for
            ``score="magnitude"`` with ``uniform``, ``global``, ``lamp`` or ``erk``, which measure nothing.
        sparsity: fraction of zeros over all pruned matrices, in (0, 1). With a ``budget`` by name or a table, fraction
            of the dense cost to remove. None with a :class:`Budget` or a fixed pattern.
        allocation: ``dp``, ``uniform``, ``global``, ``lamp``, ``erk``, ``owl`` or ``atp``. For ``atp``, up to 9 slopes
            are tried; the one with the smallest joint distortion on ``curve_data`` is taken.
        score: ``magnitude``, ``wanda``, or one that updates the remaining weights: ``sparsegpt``, ``alps``, ``mfac``.
        pattern: ``unstructured``; ``N:8`` (any M), which chooses n for each matrix; or a fixed one such as ``2:4``.
        metric: distortion of the curves; see :func:`measure_curves`.
        granularity: ``matrix``, ``role`` or ``block``: which matrices share a level, with ``dp``.
        include, exclude: see :func:`find_targets`.
        held_out: data for the comparison. None sets aside the last fifth of ``data``. False skips the comparison and
            applies the allocation in any case.
        curve_data: data for the curves; None: ``data``. Curves need fewer samples than scores.
        curves: how curves are obtained with ``dp``: ``measured``, ``fisher`` (to second order, in the time of a few
            passes) or ``anchored`` (Fisher curves scaled to a few measurements); see :func:`measure_curves`. None:
            ``measured`` where that takes less than ``minutes``, else ``anchored``. Or curves measured earlier with the
            same score.
        minutes: time for measurements; see :func:`measure_curves`.
        correction: ``none``; or ``relinearise``, which measures curves again around the uniformly pruned model. The
            allocation with the smallest joint distortion on ``curve_data`` is taken.
        inputs: on which a block is pruned: ``pruned``, those that the pruned blocks before it produce; or ``dense``,
            those of the dense model. Curves are of one matrix in the dense model with either.
        levels: sparsities at which curves are measured; None: a grid around ``sparsity``.
        budget: with ``dp``, a constraint other than the number of weights. ``"flops"``, ``"bytes"`` or a
            :class:`leanstep.pruning.LatencyTable` limits that cost to ``1 - sparsity`` of the dense model's. A
            :class:`leanstep.pruning.Budget` has its own target. With a table, curves are measured at its levels.
        score_options: further arguments of :func:`leanstep.pruning.layer_pruner`.
        batch_size, resume, progress: see :func:`measure_curves`.
        stored: function from a parameter's name to its original values, or None. Parameters with such values are read
            again on restoring, not copied before pruning.
        refine: with ``dp``, limits of a search from its allocation: exchanges of weights between matrices within the
            budget, each judged by the joint distortion on data of its own. None: no search.
        scratch: see :func:`measure_curves`.
        processes: those that prune this model together, each with all of it and all data. The calibration batches, and
            the points of curves, exchanges and matrices of a block are spread over them. The result is that of one
            process: bit for bit, but for sums of Gram matrices, which are added in another order. None: this one.

    Returns:
        :class:`PruneResult`.

    Raises:
        ValueError: for unknown or contradictory settings, too little data, data that the model cannot take, or a target
            out of reach; the message gives the range in reach. The model is unchanged after any error.

    Notes:
        Memory besides the model: a copy of the pruned matrices that are not ``stored``, the statistics of one block,
        the pruner of one matrix, and the memory of :func:`measure_curves`. ``global`` with SparseGPT, ALPS or M-FAC
        keeps all scores, and ``correction="relinearise"`` keeps the pruners of all matrices.

        Layers whose inputs a score needs and the model does not show are left out: those that it never calls, such as
        depth-wise convolutions of state-space models, and convolutions with groups. Experts with fewer than 32
        calibration tokens are pruned by magnitude. The result's notes name both.

        ``refine`` keeps the pruners of all matrices, the gradient of each, and as many inputs of blocks as a quarter of
        the free memory holds. An exchange takes a pass over its data from the first changed block on, a round of
        exchanges one more with gradients. The refined allocation, the programme's and uniform sparsity are compared on
        held-out data, and the best is applied.

        ``inputs="dense"`` keeps all pruned matrices until the last one is pruned, which takes the memory of a copy.
        ``inputs="pruned"`` takes a pass over the data for every block of a model whose activations cannot be cached.

        Whole heads and channels are not pruned: transformers gives all layers of a model one width and could not open
        the result.
        Unstructured zeros make a model neither smaller nor faster in PyTorch.

    References:
        K. Xu et al., arXiv 2308.10438; for the baselines see :func:`allocate`.
    """
    check_choices(
        data=data,
        sparsity=sparsity,
        allocation=allocation,
        score=score,
        pattern=pattern,
        granularity=granularity,
        correction=correction,
        inputs=inputs,
        curves=curves,
        minutes=minutes,
        budget=budget,
        metric=metric,
        refine=refine,
    )
    targets = find_targets(model, include=include, exclude=exclude)
    fixed = fixed_pattern(pattern)
    if fixed is not None and sparsity is None:
        sparsity = fixed.sparsity
    data, held_out = _set_aside(model, data, held_out, batch_size)
    judging: list[Batch] = []
    if refine is not None:
        data, judging = judging_batches(model, data, refine, batch_size)
    batches, held_out_batches, curve_batches = _split_data(model, data, held_out, curve_data, batch_size)
    notes: list[str] = []
    if batches:
        with evaluating(model):
            check_runs(model, batches[0])
            if {"square_sum", "gram"} & {*NEEDS[score], *(NEEDS["wanda"] if allocation == "owl" else ())}:
                targets, notes = leave_out(model, targets, batches)
    if "flops" in (budget, getattr(budget, "kind", None)):
        with evaluating(model):
            targets = count_uses(model, targets, batches[0])
    if isinstance(budget, LatencyTable) and levels is None and pattern == "unstructured":
        levels = budget.levels[1:]
    planner = Planner(
        model=model,
        groups=make_groups(targets, granularity if allocation == "dp" else "matrix"),
        sparsity=sparsity,
        method=allocation,
        score=score,
        pattern=pattern,
        metric=metric,
        correction=correction,
        inputs=inputs,
        levels=levels,
        curve_method=curves if isinstance(curves, str) else None,
        minutes=minutes,
        budget=budget or "params",
        batches=batches,
        held_out=held_out_batches,
        curve_batches=curve_batches,
        score_options=dict(score_options or {}),
        resume=resume,
        progress=progress,
        snapshot=WeightSnapshot(targets, stored),
        notes=notes,
        refine=refine,
        judging=judging,
        scratch=None if scratch is None else Scratch(Path(scratch)),
        processes=processes or Processes(),
    )
    with planner.snapshot.restored_on_error(), evaluating(model):
        return planner.run(None if isinstance(curves, str) else curves, fixed)


def _set_aside(model: nn.Module, data: Any, held_out: Any, batch_size: int) -> tuple[Any, Any]:
    """Return calibration data and held-out data, by default the last fifth of all."""
    if data is None or held_out is not None:
        return data, held_out
    whole = data if isinstance(data, Tensor) else as_batches(data, model, batch_size=batch_size)
    if len(whole) < 2:
        unit = "sample" if isinstance(data, Tensor) else "batch"
        raise ValueError(f"data has one {unit}, and at least one is held out; give more, or held_out")
    first = len(whole) - max(1, len(whole) // 5)
    return whole[:first], whole[first:]


def _split_data(
    model: nn.Module, data: Any, held_out: Any, curve_data: Any, batch_size: int
) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """Return batches for the scores, for the held-out comparison, and for the curves."""
    if data is None:
        return [], [], []
    batches = as_batches(data, model, batch_size=batch_size)
    compared = [] if held_out is False else as_batches(held_out, model, batch_size=batch_size, what="held_out")
    if curve_data is None:
        return batches, compared, batches
    return batches, compared, as_batches(curve_data, model, batch_size=batch_size, what="curve_data")


@dataclass
class Planner:
    """One call of :func:`prune` after its checks; :meth:`run` is the order of events."""

    model: nn.Module
    groups: list[Group]
    sparsity: float | None
    method: str
    score: str
    pattern: str
    metric: str | Metric | None
    correction: str
    inputs: str
    levels: Sequence[float] | None
    curve_method: str | None
    minutes: float
    budget: Budget | LatencyTable | str
    batches: list[Batch]
    held_out: list[Batch]
    curve_batches: list[Batch]
    score_options: dict[str, Any]
    resume: str | Path | None
    progress: Progress | None
    snapshot: WeightSnapshot
    notes: list[str] = field(default_factory=list)
    refine: Refinement | None = None
    judging: list[Batch] = field(default_factory=list)
    scratch: Scratch | None = None
    processes: Processes = field(default_factory=Processes)

    def run(self, curves: Mapping[str, Curve] | None, fixed: NM | None) -> PruneResult:
        """Measure, allocate, compare, prune."""
        before = self._nonzero()
        self.constraint = self._constraint()
        measured: dict[str, Curve] = {}
        if fixed is not None:
            candidate = self._fixed(fixed)
        elif self.method == "dp":
            self.constraint.check_reach(self._levels(), before, self._target_sparsity())
            measured = self._measure() if curves is None else dict(curves)
            candidate = self._by_curves(measured)
        else:
            candidate = self._by_rule()
        programme, descent = candidate, None
        if self.refine is not None:
            candidate, descent = self._refined(programme, measured, self.refine)
        allocation, compared = self._compare_and_prune(candidate, programme)
        pruning = self.trial.pruning
        self.notes += [*filter(None, [pruning.cache.note]), *pruning.notes()]
        budget = self.constraint.budget
        return PruneResult(
            allocation=allocation,
            score=self.score,
            pattern=self.pattern,
            inputs=self.inputs,
            metric=metric_name(self.metric, self.model),
            groups=self.groups,
            curves=measured,
            held_out=next((one for one in compared if one.method == allocation.method), None),
            compared=compared,
            notes=self.notes,
            data=batches_hash(self.batches),
            refinement={} if descent is None else descent.to_dict(),
            budget={
                "kind": budget.kind,
                "target": budget.target if allocation.target is None else allocation.target,
                "dense": self.constraint.dense,
                "before": self.constraint.cost(before),
                "after": self.constraint.cost(self._nonzero()),
            },
        )

    @cached_property
    def trial(self) -> Trial:
        """The matrices with their score, and the calibration data for its statistics."""
        enabled = bool(self.batches)
        cache = ActivationCache(
            self.model, self.batches, enabled=enabled, scratch=self.scratch, processes=self.processes
        )
        return Trial(self.groups, Pruning(cache, self.score, self.score_options), self.snapshot, self.inputs)

    def _nonzero(self) -> dict[str, int]:
        return {group.name: group.nonzero() for group in self.groups}

    def _sizes(self) -> dict[str, int]:
        return {group.name: group.layer.numel for group in self.groups}

    def _constraint(self) -> BudgetConstraint:
        counts: dict[str, Sequence[int]] = {}
        if isinstance(self.budget, LatencyTable) or getattr(self.budget, "kind", None) == "latency":
            levels = levels_of(self.groups, 0.5, self.pattern, levels=self.levels)
            counts = {name: level_counts for name, (level_counts, _) in levels.items()}
        return BudgetConstraint.of(self.budget, self.groups, self.sparsity, counts)

    def _target_sparsity(self) -> float | None:
        """The target, if it is a number of weights that a sparsity gives, not a cost."""
        return self.sparsity if self.constraint.budget.kind == "params" else None

    def _around(self) -> float:
        """Sparsity at the center of the grid of levels."""
        target = self._target_sparsity()
        return self.constraint.uniform_sparsity if target is None else target

    def _levels(self) -> Levels:
        return levels_of(self.groups, self._around(), self.pattern, levels=self.levels)

    def _measure(self) -> dict[str, Curve]:
        return measure_curves(
            self.model,
            self.curve_batches,
            sparsity=self._around(),
            score=self.score,
            pattern=self.pattern,
            metric=self.metric,
            groups=self.groups,
            levels=self.levels,
            score_options=self.score_options,
            score_data=self.batches,
            resume=self.resume,
            progress=self.progress,
            method=self.curve_method,
            minutes=self.minutes,
            solve=lambda curves: self._allocate("dp", curves=curves),
            scratch=None if self.scratch is None else self.scratch.folder,
            processes=self.processes,
        )

    def _by_curves(self, curves: Mapping[str, Curve]) -> Allocation:
        """Minimize the summed distortion, or with a correction the joint distortion."""
        if self.correction == "none":
            return self._allocate("dp", curves=curves)
        measurement = self._measurement(self.curve_batches)

        def joint(allocation: Allocation) -> float:
            return self.trial.joint(measurement, allocation).mean

        best = self._allocate("dp", curves=curves)
        lowest = joint(best)
        # measure curves around the uniform allocation, then around the new one, while the joint distortion falls
        around = self._uniform() or best
        for _ in range(2):
            again = self.trial.relinearised_curves(measurement, self._levels(), around, self.progress)
            around = self._allocate("dp", curves=again)
            cost = joint(around)
            if cost >= lowest:
                break
            best, lowest = around, cost
        return best

    def _refined(
        self, programme: Allocation, curves: Mapping[str, Curve], settings: Refinement
    ) -> tuple[Allocation, Descent]:
        """Search from the programme's allocation."""
        measurement, budget = self._measurement(self.judging), self.constraint.budget
        return refine_allocation(
            programme, self.trial, self.batches, measurement, curves, budget, settings, self.progress
        )

    def _by_rule(self) -> Allocation:
        pruning = self.trial.pruning
        if self.method == "global":
            return self._allocate("global", scores=pruning.scores(self.groups))
        if self.method == "lamp":  # LAMP squares the weights
            return self._allocate("lamp", scores={group.name: group.targets[0].weight for group in self.groups})
        if self.method == "owl":
            return self._allocate("owl", outliers=Pruning(pruning.cache, "wanda").outliers(self.groups))
        if self.method != "atp":
            return self._allocate(self.method)
        # the slope with the smallest joint distortion on the curves' data
        assert self.sparsity is not None
        blocks = {layer.block for layer in in_blocks([group.layer for group in self.groups])}
        betas = atp_betas(self.sparsity, len(blocks))
        candidates = [self._allocate("atp", beta=beta) for beta in betas[:: -(-len(betas) // _SLOPES)]]
        measurement = self._measurement(self.curve_batches)
        return min(candidates, key=lambda one: self.trial.joint(measurement, one).mean)

    def _uniform(self) -> Allocation | None:
        """Uniform sparsity within the budget; None if no uniform sparsity meets it."""
        budget = self.constraint.budget
        if self._target_sparsity() is not None:
            return self._allocate("uniform")
        any_count = budget.kind != "latency" and not self.pattern.startswith("N:")
        uniform = self.constraint.uniform(self._nonzero(), None if any_count else self._levels())
        if uniform is None:
            return None
        counts, patterns = uniform
        cost = self.constraint.cost(counts)
        return Allocation("uniform", self._sizes(), counts, None, patterns, budget.kind, cost)

    def _allocate(self, method: str, **needed: Any) -> Allocation:
        """Allocate weights to the groups; existing zeros stay zero."""
        layers, sparsity = [group.layer for group in self.groups], self._target_sparsity()
        allocation = allocate(
            in_blocks(layers) if method == "atp" else layers,
            sparsity,
            method=method,
            budget=self.constraint.budget if sparsity is None else None,
            at_most=self._nonzero(),
            **needed,
        )
        if self.pattern.startswith("N:") and not allocation.patterns:
            allocation = snap(allocation, self._levels())
        return allocation

    def _fixed(self, pattern: NM) -> Allocation:
        check_filled(self.groups, pattern.m)
        numel = self._sizes()
        counts = {name: size // pattern.m * pattern.n for name, size in numel.items()}
        return Allocation("uniform", numel, counts, sum(counts.values()), dict.fromkeys(numel, str(pattern)))

    def _measurement(self, batches: list[Batch]) -> Measurement:
        return Measurement(self.model, batches, self.metric, like=self.trial.pruning.cache, scratch=self.scratch)

    def _compare_and_prune(self, candidate: Allocation, programme: Allocation) -> tuple[Allocation, list[Additivity]]:
        """Measure on held-out data, and prune; for allocations by curves, by the programme's or uniform sparsity if
        that is better.

        The candidate is measured last, so that the model is already pruned if it wins.
        """
        if not self.held_out:
            self.notes.append("there was no held-out data: the cost of pruning was not measured")
            self.trial.apply(candidate)
            return candidate, []
        by_curves = programme.method == "dp"
        uniform = self._uniform() if by_curves else None
        if by_curves and uniform is None:
            self.notes.append("no uniform sparsity meets the budget: the allocation was compared with nothing")
        measurement = self._measurement(self.held_out)
        others = [one for one in (programme if candidate is not programme else None, uniform) if one is not None]
        costs = [self.trial.additivity(measurement, one, stay=False) for one in others]
        cost = self.trial.additivity(measurement, candidate, stay=True)
        compared = [cost, *costs]
        # a pruned model that overflows is never the best
        best = min(
            zip(compared, (candidate, *others), strict=True),
            key=lambda pair: math.inf if math.isnan(pair[0].joint) else pair[0].joint,
        )
        if best[1] is candidate or not others:
            self.notes += filter(None, [cost.note() if others else ""])
            return candidate, compared
        self.notes += _why_not(candidate, cost, *best)
        self.snapshot.restore()
        self.trial.apply(best[1])
        return best[1], compared


def _why_not(candidate: Allocation, cost: Additivity, best: Additivity, other: Allocation) -> list[str]:
    """Notes on an allocation that another one beats on held-out data."""
    if candidate.method == REFINED and other.method == "dp":
        return [
            f"the refined allocation costs {cost.joint:.4g} on held-out data, the programme's {best.joint:.4g}: the "
            "model was pruned by the programme's"
        ]
    name = "refined allocation" if candidate.method == REFINED else "allocation by dynamic programming"
    return [
        f"the {name} costs {cost.joint:.4g} on held-out data, uniform sparsity {best.joint:.4g}: the model was pruned "
        f"uniformly. The summed distortion of the allocation is {1 / cost.ratio:.2f} times its joint distortion"
    ]
