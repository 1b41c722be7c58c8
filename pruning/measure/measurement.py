"""Measure what changed weights do to the model's output, from the first changed block on."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanstep._checkpoint.mapped import Scratch
from leanstep.pruning.config import Progress
from leanstep.pruning.cost import Plan
from leanstep.pruning.measure.activation_cache import ActivationCache, activation_bytes, score_samples
from leanstep.pruning.measure.batches import Batch, evaluating, first_samples
from leanstep.pruning.measure.curve_file import Points
from leanstep.pruning.measure.metrics import TOP_LOGITS, Distortion, Metric, make_metric, summarise
from leanstep.pruning.measure.products import rounding_unit
from leanstep.pruning.result import Allocation
from leanstep.pruning.score.calibration import Pruning, prune_group
from leanstep.pruning.score.targets import Group, Target

# largest tolerated change of the output of unchanged weights
_NOISE = 1e-9


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
                    changed = prune_group(group, pruners, (count, pattern))
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
            weights += sum(weight.numel() for _, weight in prune_group(group, pruners, (count, pattern)))
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
                    changed = prune_group(group, pruners, allocation.level(group.name))
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


def rounded_anew(weight: Tensor, unit: float) -> Tensor:
    """The weights times ``1 + unit / 2`` or ``1 - unit / 2``, at random, always the same; zeros stay."""
    generator = torch.Generator().manual_seed(weight.numel())
    signs = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    largest = torch.finfo(weight.dtype).max
    changed = weight * (1 + signs.to(weight.device, torch.float32) * (unit / 2))
    return changed.clamp_(-largest, largest).to(weight.dtype)


class Roundings:
    """What a change does by rounding 16-bit activations otherwise, whatever its size.

    It is about the same for all changes of one module, or of an expert, which not all tokens reach; less for those so
    small that many activations stay as they were. The distortion of a change alone has it, and that of all together has
    it once. It is measured with the largest group of the module, whose weights change in their last digits.

    Args:
        unit: of :func:`rounding_unit`; 0: there is none, and nothing is measured.
        stage_of: the index of a group's first stage.
    """

    def __init__(self, unit: float, stage_of: Callable[[Group], int]) -> None:
        self._unit, self._stage_of = unit, stage_of
        self._distortion: dict[tuple[Any, ...], float] = {}

    def of(self, group: Group, groups: Sequence[Group], measure: Callable[[Any], Distortion]) -> float:
        """The part of a distortion of this group, one of ``groups``; the cache is at its start."""
        key = self._key(group)
        if self._unit and key not in self._distortion:
            largest = max((one for one in groups if self._key(one) == key), key=lambda one: one.layer.numel)
            distortion = measure((target, rounded_anew(target.weight, self._unit)) for target in largest.targets).mean
            self._distortion[key] = distortion if math.isfinite(distortion) else 0.0
        return self._distortion.get(key, 0.0)

    def are_new(self, groups: Sequence[Group]) -> list[bool]:
        """Of each group, whether it is the first of these to need a measurement."""
        new, known = [], set(self._distortion)
        for one in groups if self._unit else ():
            new.append((key := self._key(one)) not in known)
            known.add(key)
        return new or [False] * len(groups)

    def _key(self, group: Group) -> tuple[Any, ...]:
        return self._stage_of(group), *sorted({target.origin for target in group.targets})


def stored_by_measurement(plan: Plan, samples: int) -> dict[str, int]:
    """Bytes by use that a measurement on samples stores: with the activations for scores, and the dense outputs."""
    shapes = plan.shapes
    outputs = min(shapes.outputs, 3 * TOP_LOGITS) if plan.config.metric == "kl_topk" else shapes.outputs
    return {
        # the next position's are computed while those of the last are there
        "activations before a block": activation_bytes(plan, 2 * (score_samples(plan) + samples)),
        "dense outputs": 4 * samples * shapes.tokens * outputs,
    }
