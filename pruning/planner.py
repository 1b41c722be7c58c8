"""One call of prune after its checks: measure curves, allocate, compare on held-out data, prune."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from leanstep._checkpoint.mapped import Scratch
from leanstep._processes import Processes
from leanstep.pruning.allocate.allocation import allocate
from leanstep.pruning.allocate.budgets import BudgetConstraint
from leanstep.pruning.allocate.closed_form import atp_betas_tried, in_blocks, snap
from leanstep.pruning.allocate.latency import LatencyTable
from leanstep.pruning.allocate.levels import levels_of
from leanstep.pruning.allocate.refine import REFINED, refine_allocation, search_cost
from leanstep.pruning.config import Execution, PruneConfig, Refinement, begin
from leanstep.pruning.cost import Cost, Plan
from leanstep.pruning.measure.activation_cache import ActivationCache, cut_points_cost, take_note
from leanstep.pruning.measure.batches import Batch, batches_hash
from leanstep.pruning.measure.checks import Trial, correction_cost
from leanstep.pruning.measure.curves import Curve, Levels
from leanstep.pruning.measure.measure import curves_cost, measure_curves
from leanstep.pruning.measure.measurement import Measurement, stored_by_measurement
from leanstep.pruning.measure.metrics import Distortion, metric_name
from leanstep.pruning.result import Additivity, Allocation, PruneResult
from leanstep.pruning.score.base import NonFiniteInputsError
from leanstep.pruning.score.calibration import Pruning, score_seconds, statistics_cost
from leanstep.pruning.score.targets import (
    Group,
    Target,
    WeightSnapshot,
    abbreviate,
    check_filled,
    empty_targets,
    find_targets,
    make_groups,
)
from leanstep.pruning.training.reconstruction import BlockReconstruction, check_blocks, reconstruction_cost


def targets_of(model: nn.Module, config: PruneConfig, *, empty: bool = False) -> list[Target]:
    """The matrices that the settings name; with a menu the embedding and the head too, as one if they are tied.

    Args:
        model: with its weights; or on the meta device, if ``empty``.
    """
    find = empty_targets if empty else find_targets
    targets = find(model, include=config.include, exclude=config.exclude)
    if config.menu is None or config.include is not None:
        return targets
    from leanstep.pruning.compress.menu import ends_of

    return targets + ends_of(model, {target.parameter for target in targets}, config.exclude)


def groups_of(targets: Sequence[Target], config: PruneConfig) -> list[Group]:
    """The groups of matrices that share a level; with a menu each matrix alone, sized in bytes."""
    if config.menu is None:
        return make_groups(targets, config.granularity)
    from leanstep.pruning.compress.menu import menu_group

    return [menu_group(target, config.menu) for target in targets]


def check_target(
    groups: Sequence[Group], config: PruneConfig, nonzero: dict[str, int] | None = None
) -> BudgetConstraint:
    """The constraint of a budget, for groups whose levels meet it.

    Args:
        groups: of a model with its weights, or without values, which counts all weights as nonzero.
        nonzero: number of nonzero weights of each group; None: they are counted.

    Raises:
        ValueError: for a target that no levels meet, matrices that do not fill the groups of a pattern, more zeros than
            asked for, or a table without a layer or a level.
    """
    counts: dict[str, Sequence[int]] = {}
    sparsity, budget = config.requested_sparsity, config.budget or "params"
    if isinstance(budget, LatencyTable) or getattr(budget, "kind", None) == "latency":
        counts = {name: row for name, (row, _) in levels_of(groups, config, 0.5).items()}
    constraint = BudgetConstraint.of(budget, groups, sparsity, counts)
    if (fixed := config.fixed) is not None:
        check_filled(groups, fixed.m)
        return constraint
    target, by_curves = _target_sparsity(constraint, sparsity), config.method == "dp"
    if nonzero is None:
        nonzero = {group.name: group.nonzero() for group in groups}
    constraint.check_sparsity(target, nonzero, may_keep_none=by_curves)
    if by_curves or config.pattern != "unstructured":
        by_group = levels_of(groups, config, _around(constraint, sparsity))
        if by_curves:
            constraint.check_reach(by_group, nonzero, target)
    return constraint


def _target_sparsity(constraint: BudgetConstraint, sparsity: float | None) -> float | None:
    """The target, if it is a number of weights that a sparsity gives, not a cost."""
    return sparsity if constraint.budget.kind == "params" else None


def _around(constraint: BudgetConstraint, sparsity: float | None) -> float:
    target = _target_sparsity(constraint, sparsity)
    return constraint.uniform_sparsity if target is None else target


@dataclass(frozen=True)
class Samples:
    """Batches by use: for the scores, for the comparison, for the curves, and those that judge a search."""

    batches: list[Batch]
    held_out: list[Batch]
    curves: list[Batch]
    judging: list[Batch] = field(default_factory=list)


@dataclass
class Planner:
    """One call of :func:`prune` after its checks; :meth:`run` is the order of events."""

    model: nn.Module
    config: PruneConfig
    execution: Execution
    groups: list[Group]
    samples: Samples
    snapshot: WeightSnapshot
    notes: list[str]

    def __post_init__(self) -> None:
        self.processes = self.execution.processes or Processes()
        self.scratch = Scratch.of(self.execution.scratch)
        self.progress = self.execution.progress

    def run(self) -> PruneResult:
        """Measure, allocate, compare, prune."""
        if self.config.reconstruct is not None:
            check_blocks(self.trial.pruning.cache)
        config, curves = self.config, self.config.given_curves
        before = self._nonzero()
        self.constraint = check_target(self.groups, config, before)
        measured: dict[str, Curve] = {}
        if config.fixed is not None:
            candidate = self._fixed()
        elif config.method == "dp":
            measured = self._by_effect(self._measure() if curves is None else curves, note=True)
            candidate = self._by_curves(measured)
        else:
            candidate = self._by_rule()
        planned, search = candidate, dict[str, Any]()
        if config.refine is not None:
            candidate, search = self._refined(planned, measured, config.refine)
        allocation, compared = self._compare_and_prune(candidate, planned)
        reconstruction = {} if config.reconstruct is None else self._reconstructed(allocation)
        pruning = self.trial.pruning
        curve_score = config.planning_score if config.plans else None
        self.notes += [*filter(None, [take_note(self.model)]), *pruning.notes(curve_score)]
        budget = self.constraint.budget
        return PruneResult(
            allocation=allocation,
            score=config.score,
            curve_score=curve_score,
            pattern=config.pattern,
            inputs=config.inputs,
            metric=metric_name(config.metric, self.model),
            groups=self.groups,
            curves=measured,
            held_out=next((one for one in compared if one.method == allocation.method), None),
            compared=compared,
            notes=self.notes,
            data=batches_hash(self.samples.batches),
            refinement=search,
            encoded=self.trial.encoded,
            reconstruction=reconstruction,
            budget={
                "kind": budget.kind,
                "target": budget.target if allocation.target is None else allocation.target,
                "dense": self.constraint.dense,
                "before": self.constraint.cost(before),
                "after": self.constraint.cost(allocation.counts if config.menu else self._nonzero()),
            },
        )

    @cached_property
    def trial(self) -> Trial:
        """The matrices with their score, and the calibration data for its statistics."""
        batches = self.samples.batches
        cache = ActivationCache(
            self.model, batches, enabled=bool(batches), scratch=self.scratch, processes=self.processes
        )
        pruning = Pruning(cache, self.config.score, dict(self.config.score_options or {}))
        return Trial(self.groups, pruning, self.snapshot, self.config.inputs, self.progress)

    @cached_property
    def planning(self) -> Trial:
        """:attr:`trial` with the score of curves, by which slopes of ATP and exchanges are judged, too."""
        if self.config.planning_score == self.config.score:
            return self.trial
        return replace(self.trial, pruning=self.trial.pruning.by(self.config.planning_score))

    def _nonzero(self) -> dict[str, int]:
        return {group.name: group.nonzero() for group in self.groups}

    def _sizes(self) -> dict[str, int]:
        return {group.name: group.layer.numel for group in self.groups}

    def _target_sparsity(self) -> float | None:
        return _target_sparsity(self.constraint, self.config.requested_sparsity)

    def _around(self) -> float:
        return _around(self.constraint, self.config.requested_sparsity)

    def _levels(self) -> Levels:
        return levels_of(self.groups, self.config, self._around())

    def _measure(self) -> dict[str, Curve]:
        begin(self.progress, "curves")
        config, budget = self.config, self.constraint.budget
        is_final = config.planning_score == config.score
        curves = measure_curves(
            self.model,
            self.samples.curves,
            replace(
                config,
                sparsity=self._around(),
                score=config.planning_score,
                levels=config.effective_levels,
                score_options=config.score_options if is_final else self.planning.pruning.options,
            ),
            groups=self.groups,
            score_data=self.samples.batches,
            method=config.curve_method,
            solve=lambda curves: self._allocate("dp", curves=self._by_effect(curves)),
            target=(budget.kind, budget.target),
            **vars(replace(self.execution, scratch=self.scratch)),
        )
        levels = self._levels()
        if ended := [name for name, curve in curves.items() if len(curve.counts) < len(levels[name][0])]:
            self.notes.append(
                f"the pruned model's outputs are not finite at the sparsest levels of {abbreviate(ended)}: these "
                "matrices were not pruned that far; computing in fp32 or bf16 may help"
            )
        sources = Counter(curve.source for curve in curves.values())
        if self.config.curve_method != "fisher" and sources["fisher"]:
            limit = f"within {self.config.minutes:g} minutes"
            how = f"that no measurement scales: none was made {limit}"
            if sources["anchored"]:
                how = f"not measured {limit}, but scaled as those of their kind that were: the largest distortions"
            self.notes.append(f"{sources['fisher']} of {len(curves)} curves are Fisher curves {how}")
        if samples := next((curve.samples for curve in curves.values() if curve.samples), 0):
            total = sum(batch.size for batch in self.samples.curves)
            self.notes.append(
                f"curves are scaled to measurements on the first {samples} of {total} samples: to measure all matrices "
                "on all of them would take longer than four fifths of the minutes for measurements"
            )
        return curves

    def _by_effect(self, curves: Mapping[str, Curve], *, note: bool = False) -> dict[str, Curve]:
        """End the curves without any distortion at uniform sparsity, or at the densest level that the budget needs.

        Their zeros say that the data never used these matrices, as where no token reached an expert, and not that they
        can be spared. Dynamic programming would take their sparsest levels. The budget needs sparser ones than uniform
        sparsity where curves of others end before it, because the pruned model overflows.
        """
        levels = dict[str, int]()
        for group in self.groups:
            curve, most = curves.get(group.name), math.ceil((1 - self._around()) * group.layer.numel)
            if curve is None or any(curve.distortion):
                continue
            level = next((k for k, count in enumerate(curve.counts) if count <= most), None)
            if level is not None and curve.counts[level] < group.nonzero():
                levels[group.name] = level
        if not levels:
            return dict(curves)
        limit, nonzero = "to uniform sparsity at most", self._nonzero()
        for beyond in range(max(len(curves[name].counts) for name in levels)):
            ended = {name: curves[name].until(level + 1 + beyond) for name, level in levels.items()}
            by_effect = {**curves, **ended}
            least, _ = self.constraint.reach({n: (c.counts, c.patterns) for n, c in by_effect.items()}, nonzero)
            if least <= self.constraint.budget.target:
                break
            limit = "beyond uniform sparsity, because the others cannot be pruned far enough"
        if note:
            self.notes.append(
                f"{len(ended)} of {len(curves)} curves are zero: no output for the curves' data depends on "
                f"{abbreviate(list(ended))}. These matrices were pruned {limit}; more samples, or text of other kinds, "
                "may use them"
            )
        return by_effect

    def _by_curves(self, curves: Mapping[str, Curve]) -> Allocation:
        """Minimize the summed distortion, or with a correction the joint distortion."""
        if not self.config.corrects:
            return self._allocate("dp", curves=curves)
        measurement = self._measurement(self.samples.curves)

        best = self._allocate("dp", curves=curves)
        lowest = self._joint(measurement, best)
        # curves around the uniform allocation, then around the new one, while the joint distortion falls
        around = self._uniform() or best
        second_order = any(curve.source != "measured" for curve in curves.values())
        for _ in range(2):
            again = self.planning.relinearised_curves(
                measurement, self._levels(), around, self.progress, second_order=second_order
            )
            around = self._allocate("dp", curves=self._by_effect(again))
            cost = self._joint(measurement, around)
            if cost >= lowest:
                break
            best, lowest = around, cost
        return best

    def _refined(
        self, planned: Allocation, curves: Mapping[str, Curve], settings: Refinement
    ) -> tuple[Allocation, dict[str, Any]]:
        """Search from an allocation; returns the better of the two, and how the search went.

        The search prunes on the inputs that its start gives. Its result is therefore pruned anew, as the returned model
        is, and measured on the data of the search.
        """
        begin(self.progress, "refinement" if settings.minutes is None else "refinement time")
        measurement, budget = self._measurement(self.samples.judging), self.constraint.budget
        refined, descent = refine_allocation(
            planned, self.planning, self.samples.batches, measurement, curves, budget, settings, self.progress
        )
        if descent is None:
            self.notes.append(
                "not refined: with DP's allocation the model's outputs are not finite, so that no exchange "
                "can be compared with it; a lower sparsity, or computing in fp32 or bf16, may help"
            )
            return planned, {}
        start = Distortion(*descent.points[0][2:])
        if self.planning is not self.trial:
            start = self.trial.joint(measurement, planned)
        final = start if refined.counts == planned.counts else self.trial.joint(measurement, refined)
        is_lower = final.mean < start.mean or (final.is_finite and not start.is_finite)
        if not is_lower and refined.counts != planned.counts:
            self.notes.append(
                f"the refined allocation was not taken: pruned anew, it costs {final.mean:.4g} on the data of the "
                f"search, and DP's {start.mean:.4g}"
            )
        return refined if is_lower else planned, descent.to_dict(start, final)

    def _by_rule(self) -> Allocation:
        method, sparsity = self.config.method, self.config.requested_sparsity
        if method in ("global", "owl"):
            begin(self.progress, "statistics")
        pruning = self.trial.pruning
        if method == "global":
            return self._allocate("global", scores=pruning.scores(self.groups))
        if method == "lamp":  # LAMP squares the weights
            return self._allocate("lamp", scores={group.name: group.targets[0].weight for group in self.groups})
        if method == "owl":
            return self._allocate("owl", outliers=Pruning(pruning.cache, "wanda").outliers(self.groups))
        if method != "atp":
            return self._allocate(method)
        # the slope with the smallest joint distortion on the curves' data
        assert sparsity is not None
        blocks = {layer.block for layer in in_blocks([group.layer for group in self.groups])}
        candidates = [self._allocate("atp", beta=beta) for beta in atp_betas_tried(sparsity, len(blocks))]
        measurement = self._measurement(self.samples.curves)
        return min(candidates, key=lambda one: self._joint(measurement, one))

    def _joint(self, measurement: Measurement, allocation: Allocation) -> float:
        """Joint distortion of an allocation; infinity where the pruned model overflows."""
        joint = self.planning.joint(measurement, allocation).mean
        return math.inf if math.isnan(joint) else joint

    def _uniform(self) -> Allocation | None:
        """Uniform sparsity within the budget; None if no uniform sparsity meets it."""
        budget = self.constraint.budget
        if self._target_sparsity() is not None:
            return self._allocate("uniform")
        any_count = budget.kind != "latency" and self.config.pattern == "unstructured"
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
        if self.config.pattern.startswith("N:") and not allocation.patterns:
            allocation = snap(allocation, self._levels())
        return allocation

    def _fixed(self) -> Allocation:
        fixed, numel = self.config.fixed, self._sizes()
        assert fixed is not None
        check_filled(self.groups, fixed.m)
        counts = {name: size // fixed.m * fixed.n for name, size in numel.items()}
        return Allocation("uniform", numel, counts, sum(counts.values()), dict.fromkeys(numel, str(fixed)))

    def _measurement(self, batches: list[Batch]) -> Measurement:
        return Measurement(self.model, batches, self.config.metric, like=self.trial.pruning.cache, scratch=self.scratch)

    @cached_property
    def held_out(self) -> Measurement:
        """The dense outputs on held-out data: first used while the weights are dense."""
        return self._measurement(self.samples.held_out)

    def _reconstructed(self, allocation: Allocation) -> dict[str, Any]:
        """Prune anew, each block trained to its dense outputs before the next is pruned; returns how it went."""
        begin(self.progress, "reconstruction")
        self.snapshot.restore()
        cache = self.trial.pruning.cache
        cache.reset()
        training = BlockReconstruction(cache, self.config, len(cache.by_block(self.groups)), self.progress)
        replace(self.trial, progress=None).apply(allocation, reconstruction=training)
        self.notes += training.notes()
        return training.to_dict(self.held_out.joint() if self.samples.held_out else None)

    def _compare_and_prune(self, candidate: Allocation, planned: Allocation) -> tuple[Allocation, list[Additivity]]:
        """Measure on held-out data, and prune; for allocations by curves, by the one before refinement or uniform
        sparsity if that is better.

        The candidate is measured last, so that the model is already pruned if it wins.
        """
        if not self.samples.held_out:
            self.notes.append("there was no held-out data: the cost of pruning was not measured")
            if self.config.reconstruct is None:
                self.trial.apply(candidate)
            return candidate, []
        begin(self.progress, "comparison")
        by_curves = planned.method == "dp"
        uniform = self._uniform() if by_curves else None
        if by_curves and uniform is None:
            self.notes.append("no uniform sparsity meets the budget: the allocation was compared with nothing")
        measurement = self.held_out
        others = [one for one in (planned if candidate is not planned else None, uniform) if one is not None]
        summed, *sums = self._sums(measurement, [candidate, *others])
        costs = [self.trial.additivity(measurement, *pair, stay=False) for pair in zip(others, sums, strict=True)]
        overflow: NonFiniteInputsError | None = None
        try:
            cost = self.trial.additivity(measurement, candidate, summed, stay=True)
        except NonFiniteInputsError as error:
            overflow, cost = error, Additivity(candidate.method, math.nan, math.nan, summed)
        compared = [cost, *costs]
        # a pruned model that overflows is never the best
        best = min(
            zip(compared, (candidate, *others), strict=True),
            key=lambda pair: math.inf if math.isnan(pair[0].joint) else pair[0].joint,
        )
        if best[1] is candidate or not others:
            if overflow is not None:
                raise overflow
            self.notes += filter(None, [cost.note() if others else ""])
            return candidate, compared
        self.notes += _why_not(candidate, cost, *best, "one format for all" if self.config.menu else "uniform sparsity")
        self.snapshot.restore()
        self.trial.apply(best[1])
        return best[1], compared

    def _sums(self, measurement: Measurement, allocations: Sequence[Allocation]) -> list[float]:
        """For each allocation, the sum of distortions with one matrix pruned at a time; NaN from where that takes, in
        passes alone or by the clock, longer than ``minutes``. A note names the first.
        """
        seconds = measurement.seconds_of_singles(self.groups) / self.processes.size
        limit, sums = 60 * self.config.minutes, [math.nan] * len(allocations)
        until = time.monotonic() + limit
        for number, allocation in enumerate(allocations):
            # by the clock of the first process
            if not self.processes.all_gather((number + 1) * seconds <= limit)[0]:
                break
            sums[number] = self.trial.summed(measurement, allocation, until)
            if math.isnan(sums[number]):
                break
        if math.isnan(sums[0]):
            self.notes.append(
                "whether distortions add up was not measured: to prune matrices one by one on held-out data takes "
                f"longer than {self.config.minutes:g} minutes"
            )
        return sums


def _why_not(candidate: Allocation, cost: Additivity, best: Additivity, other: Allocation, uniform: str) -> list[str]:
    """Notes on an allocation that another one beats on held-out data, or ``uniform`` does."""
    if candidate.method == REFINED and other.method == "dp":
        return [
            f"the refined allocation costs {cost.joint:.4g} on held-out data, DP's {best.joint:.4g}: DP's was applied"
        ]
    name = "refined allocation" if candidate.method == REFINED else "allocation by dynamic programming"
    note = f"the {name} costs {cost.joint:.4g} on held-out data, {uniform} {best.joint:.4g}: the latter was applied"
    if not math.isnan(cost.ratio):
        note += f". The summed distortion of the allocation is {1 / cost.ratio:.2f} times its joint distortion"
    return [note]


def phase_costs(plan: Plan) -> dict[str, Cost]:
    """What each phase of :meth:`Planner.run` takes, by name, in their order."""
    config = plan.config
    costs = {"cut points": cut_points_cost(plan), "statistics": statistics_cost(plan)}
    if config.method == "dp":
        costs["curves"] = curves_cost(plan)
    if config.corrects:
        costs["correction"] = correction_cost(plan)
    if config.method == "atp":
        costs["slopes"] = _slopes_cost(plan)
    if plan.workload.refine_samples:
        costs["search"] = search_cost(plan)
    costs["comparison"] = _comparison_cost(plan)
    return costs if config.reconstruct is None else costs | {"reconstruction": reconstruction_cost(plan)}


def _slopes_cost(plan: Plan) -> Cost:
    """Of :meth:`Planner._by_rule` with ATP, which prunes by each slope and compares."""
    samples = plan.workload.curve_samples
    slopes = len(atp_betas_tried(plan.workload.sparsity, max(2, len(plan.shapes.blocks))))
    joint = plan.pass_seconds(samples, compared=True)
    seconds = 2 * joint + slopes * (score_seconds(plan, plan.config.planning_score).prune + joint)
    return plan.cost(
        {f"slopes of ATP, {slopes}": seconds},
        passes=slopes * 2 * plan.workload.samples / plan.config.batch_size,
        stored=stored_by_measurement(plan, samples),
    )


def _comparison_cost(plan: Plan) -> Cost:
    """Of :meth:`Planner._compare_and_prune`."""
    config, workload, blocks = plan.config, plan.workload, len(plan.shapes.blocks)
    stored = stored_by_measurement(plan, workload.held_out)
    if config.inputs == "dense":
        stored["pruned matrices"] = plan.shapes.pruned * plan.shapes.itemsize
    if not workload.held_out:
        return plan.cost(stored=stored)
    allocations = (2 if config.method == "dp" else 1) + bool(workload.refine_samples)
    once, prune = plan.pass_seconds(workload.held_out, compared=True), score_seconds(plan, config.score).prune
    # from each block on to check the cache, which every process does, and with each matrix pruned
    single = (blocks / 2 + plan.groups / 2 / workload.processes) * once + prune
    # single matrices are pruned only within the minutes
    alone = int(min(allocations, 60 * config.minutes / single)) if single else allocations
    # the dense outputs, whether they are reproducible, and those of each allocation
    together = (2 + allocations) * once + allocations * prune
    return plan.cost(
        {"comparison on held-out data": together + alone * single},
        passes=2 + allocations + alone * (blocks + plan.groups) / 2,
        stored=stored,
    )
