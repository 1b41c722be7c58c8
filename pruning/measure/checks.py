"""Prune a model by an allocation, compare joint with summed distortion, and correct curves that do not add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from leanstep._checkpoint.mapped import Scratch
from leanstep.pruning.allocate.levels import level_count
from leanstep.pruning.config import ROUNDINGS, Progress
from leanstep.pruning.cost import Cost, Plan
from leanstep.pruning.measure.batches import evaluating
from leanstep.pruning.measure.curves import Curve, Levels, counts_and_patterns, curve_of
from leanstep.pruning.measure.fisher.second_order import SecondOrder, portions, second_order_cost
from leanstep.pruning.measure.joint import JointJudge, judge_cost
from leanstep.pruning.measure.measure import expected_method, points_seconds
from leanstep.pruning.measure.measurement import Measurement, stored_by_measurement
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.result import Additivity, Allocation
from leanstep.pruning.score.base import LayerPruner, NonFiniteInputsError
from leanstep.pruning.score.calibration import (
    Pruners,
    Pruning,
    all_pruners_bytes,
    all_statistics_bytes,
    prune_group,
    score_seconds,
)
from leanstep.pruning.score.in_files import GradientSums, PrunersInFiles
from leanstep.pruning.score.targets import Group, Target, WeightSnapshot
from leanstep.pruning.training.reconstruction import BlockReconstruction

# forward passes of a judge: its first comparison, the check of its cache, and a gradient, which computes activations
# again
_JUDGE_PASSES = 6
# what other weights [out, in] of some matrices do to the output
Measure = Callable[[Iterable[tuple[Target, Tensor]]], Distortion]


@dataclass
class Trial:
    """Prunes the matrices of a model by an allocation, and measures the distortion.

    Attributes:
        pruning: score and calibration data.
        snapshot: of the dense weights.
        inputs: of a block, on which it is pruned: "pruned", those that the pruned blocks before it produce; or "dense",
            those of the dense model.
        progress: called with (blocks done, blocks in all, "pruning") and (matrices measured, matrices in all,
            "comparison").
        encoded: of the allocation that was applied last, level of a menu of each matrix, with its bytes or scales.
    """

    groups: Sequence[Group]
    pruning: Pruning
    snapshot: WeightSnapshot
    inputs: str = "pruned"
    progress: Progress | None = None
    encoded: dict[str, tuple[str, Tensor]] = field(default_factory=dict)

    def apply(
        self,
        allocation: Allocation,
        used: dict[str, LayerPruner] | PrunersInFiles | None = None,
        reconstruction: BlockReconstruction | None = None,
    ) -> None:
        """Prune the model in place, block by block.

        With pruned inputs, the statistics of a block are collected after pruning those before it. With dense inputs,
        no matrix is written before all are pruned. ``used`` gets the pruners, by name of the matrix. Several processes
        prune a share of each block's matrices and exchange them. With a ``reconstruction``, each block is trained
        after it is pruned, and the next one is pruned on its outputs.
        """
        self.snapshot.take()
        cache, later = self.pruning.cache, list[tuple[Target, Any]]()
        cache.reset()
        with evaluating(cache.model):
            dense = self.inputs == "dense"
            blocks = cache.by_start(self.groups) if dense else cache.by_block(self.groups)
            for number, (start, block) in enumerate(blocks):
                if reconstruction is not None:
                    reconstruction.before(block)
                self._report(number, len(blocks))
                for changed in self._pruned(block, start, allocation, used):
                    if dense:
                        later += changed if cache.scratch is None else cache.scratch.store(changed)
                    else:
                        _write(changed)
                if reconstruction is not None:
                    reconstruction.after(block, self.encoded)
            self._report(len(blocks), len(blocks))
        _write(later)
        cache.reset()

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total, "rounding" if self.pruning.score in ROUNDINGS else "pruning")

    def _pruned(
        self,
        block: Sequence[Group],
        start: int,
        allocation: Allocation,
        used: dict[str, LayerPruner] | PrunersInFiles | None,
    ) -> Iterator[list[tuple[Target, Tensor]]]:
        processes = self.pruning.processes
        share: dict[str, list[Tensor]] = {}
        # pruners are wanted for all matrices: each process makes all of them
        alone = processes.size == 1 or used is not None
        for index, (group, pruners) in enumerate(self.pruning.each(block, start)):
            if not alone and index % processes.size != processes.rank:
                continue
            changed = list(prune_group(group, pruners, allocation.level(group.name)))
            for target in group.targets:
                if (encoded := pruners[target.name].encoded) is not None:
                    self.encoded[target.name] = encoded
            if isinstance(used, PrunersInFiles):
                used.add(group, pruners)
            elif used is not None:
                used |= {target.name: pruners[target.name] for target in group.targets}
            if alone:
                yield changed
            else:
                share[group.name] = [weight for _, weight in changed]
        for index, group in enumerate(() if alone else block):
            weights = share.pop(group.name, None) or [torch.empty_like(target.weight) for target in group.targets]
            owner = index % processes.size
            yield [(t, processes.broadcast(weight, owner)) for t, weight in zip(group.targets, weights, strict=True)]

    def joint(self, measurement: Measurement, allocation: Allocation, *, stay: bool = False) -> Distortion:
        """Distortion of an allocation. Restores the weights, or with ``stay`` leaves the model pruned.

        NaN where inputs of a matrix overflow after pruning those before it; with ``stay`` that is an error.

        Raises:
            NonFiniteInputsError: with ``stay``, which leaves the model pruned up to that matrix.
        """
        with evaluating(measurement.model), nullcontext() if stay else self.snapshot.restored():
            try:
                self.apply(allocation)
            except NonFiniteInputsError:
                self.pruning.cache.reset()
                if stay:
                    raise
                return Distortion(math.nan, math.nan)
            return measurement.joint()

    def summed(self, measurement: Measurement, allocation: Allocation, until: float) -> float:
        """Sum of the distortions with one matrix pruned at a time, on the measurement's data.

        They are pruned with the statistics of the dense model. NaN if a block begins after ``time.monotonic()`` has
        reached ``until``.
        """
        with evaluating(measurement.model):
            alone = measurement.singles(self.groups, allocation, self.pruning, until, self.progress)
        return math.nan if alone is None else sum(point.mean for point in alone)

    def additivity(self, measurement: Measurement, allocation: Allocation, summed: float, *, stay: bool) -> Additivity:
        """Joint and summed distortion of an allocation on the measurement's data.

        All matrices together are pruned as by :meth:`apply`. Restores the weights, or with ``stay`` leaves the model
        pruned.
        """
        joint = self.joint(measurement, allocation, stay=stay)
        return Additivity(allocation.method, joint.mean, joint.stderr, summed)

    def relinearised_curves(
        self,
        measurement: Measurement,
        levels: Levels,
        around: Allocation,
        progress: Progress | None = None,
        *,
        second_order: bool = False,
    ) -> dict[str, Curve]:
        """Curves around a pruned model: ``D_g(k) = D(g at level k) - D(g dense)``, all others at ``around``.

        The sum of these curves is right to first order near ``around``; that of :func:`measure_curves`, near the dense
        model. Masks use the dense model's statistics. Memory: a copy of the matrices, and their pruners; one of
        these where the cache is in files.

        Measured, or to second order in the change dW from the pruned matrix: ``<gradient of D, dW>`` and what
        :class:`SecondOrder` says of dW there. The second takes some passes in place of
        one for every matrix and level, and the memory of a gradient of all matrices, or the space in files. Curves of
        embedding and head are measured.

        Args:
            measurement: with the dense model's outputs as reference; the model has its dense weights now.
            levels: see :func:`leanstep.pruning.measure.curves.levels_of`.
            around: the allocation by which the others are pruned.
            progress: see :func:`measure_curves`.
            second_order: whether to compute them to second order, where the metric has a gradient.
        """
        total = sum(len(levels[group.name][0]) for group in self.groups)
        done = 0
        curves: dict[str, Curve] = {}
        with evaluating(measurement.model), self.snapshot.restored():
            self.pruning.cache.reset()
            pruners = self._dense_pruners()
            share = {group.name for group in self.pruning.processes.share(self.groups)}
            for group in self.groups:
                _write(prune_group(group, pruners, around.level(group.name)))
            estimates = self._estimated(measurement, around, pruners, share) if second_order else None
            for group, measure in self._measured(measurement) if estimates is None else estimates:
                points = []
                for k, (count, pattern) in enumerate(counts_and_patterns(levels[group.name])):
                    if group.name not in share:
                        break
                    dense = [(target, pruners[target.name].given) for target in group.targets] if k == 0 else None
                    points.append(measure(dense or prune_group(group, pruners, (count, pattern))))
                    done += 1
                    if progress is not None:
                        progress(done, total, group.name)
                pruners.release(group)
                if points:
                    base, name = points[0].mean, measurement.metric.identity
                    source = "measured" if estimates is None or group.is_end else "fisher"
                    curves[group.name] = curve_of(group, levels[group.name], points[1:], name, base, source)
            measurement.cache.reset()
        curves = self.pruning.processes.merged(curves)
        return {group.name: curves[group.name] for group in self.groups}

    def _dense_pruners(self) -> Pruners | PrunersInFiles:
        """Pruners of all groups with the dense model's statistics, made before they are pruned, or in files."""
        cache = self.pruning.cache
        if cache.scratch is None:
            return self.pruning.pruners(self.groups)
        in_files = PrunersInFiles(self.pruning, self.snapshot, cache.scratch)
        for start, block in cache.by_start(self.groups):
            for group, pruners in self.pruning.each(block, start):
                in_files.add(group, pruners)
        cache.reset()
        return in_files

    def _measured(self, measurement: Measurement) -> Iterator[tuple[Group, Measure]]:
        """Each group, with a function that runs the model with other weights of it."""
        for start, stage in measurement.cache.by_start(self.groups):
            measurement.cache.advance(start)
            yield from ((group, measurement.measure) for group in stage)

    def _estimated(
        self,
        measurement: Measurement,
        around: Allocation,
        pruners: Pruners | PrunersInFiles,
        share: Container[str],
    ) -> Iterator[tuple[Group, Measure]] | None:
        """Each group, with a function that gives D with other weights of it, less D now, to second order.

        None for a metric without a gradient.
        """
        processes = self.pruning.processes
        judge = JointJudge(self.groups, measurement, pruners, around.counts, around.patterns, processes)
        gradients = judge.gradients()
        return None if gradients is None else self._by_second_order(measurement, gradients, share)

    def _by_second_order(
        self, measurement: Measurement, gradients: GradientSums, share: Container[str]
    ) -> Iterator[tuple[Group, Measure]]:
        ends = [group for group in self.groups if group.is_end]
        measurement.cache.reset()
        yield from ((group, measurement.measure) for group in ends)
        second = SecondOrder(measurement.model, measurement.batches, measurement.metric)

        def estimate(changes: Iterable[tuple[Target, Tensor]]) -> Distortion:
            changed = list(changes)
            change = second.distortion(changed)
            return Distortion(gradients.first_order(changed) + change.mean, change.stderr)

        stages = measurement.cache.by_start([group for group in self.groups if not group.is_end])
        for portion in portions(second, stages, share, self.pruning):
            groups = [group for _, stage in portion for group in stage]
            if targets := [target for group in groups if group.name in share for target in group.targets]:
                second.collect(targets)
            yield from ((group, estimate) for group in groups)


def _write(changes: Iterable[tuple[Target, Any]]) -> None:
    for target, weight in changes:
        target.weight.copy_(Scratch.open(weight))


def correction_cost(plan: Plan) -> Cost:
    """What two corrections of curves take: :meth:`Trial.relinearised_curves`, and joint distortions.

    Measured points have the dense one besides. Curves to second order take a gradient of all matrices, and the passes
    of a judge.
    """
    config, samples, levels = plan.config, plan.workload.curve_samples, level_count(plan.config)
    planned, processes = score_seconds(plan, config.planning_score), plan.workload.processes
    compared = plan.pass_seconds(samples, compared=True)
    joint = planned.prune + compared
    # statistics, and the pruners of all matrices, which every process makes
    again = planned.statistics / 2 + processes * (planned.prune - planned.statistics)
    again += levels * planned.level / processes
    stored = {**stored_by_measurement(plan, samples), "statistics of all matrices": all_statistics_bytes(plan)}
    if not plan.in_files:
        stored["pruners of all matrices"] = all_pruners_bytes(plan)
    if expected_method(plan) == "measured":
        again += points_seconds(plan) * (levels + 1) / levels / processes
        passes, method = plan.groups * (levels + 1), Cost()
    else:
        second = second_order_cost(plan)
        again += sum(second.seconds.values()) + _JUDGE_PASSES * compared
        # whole batches, in place of the eighths of the samples that judge a search
        judge = judge_cost(plan, samples, max(1, min(config.batch_size, samples)))
        passes, method = 2 * _JUDGE_PASSES, judge + replace(second, seconds={})
    seconds = {"correction of curves, at most": joint + 2 * (again + joint)}
    return plan.cost(seconds, passes=passes, stored=stored) + method
