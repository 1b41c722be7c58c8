"""Judge exchanges of weights between matrices by what all pruned matrices together do to the model's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leanstep._checkpoint.mapped import Scratch
from leanstep._processes import Processes
from leanstep._torch import device_of
from leanstep.pruning.cost import Cost, Plan
from leanstep.pruning.measure.activation_cache import BlockCache, activation_bytes
from leanstep.pruning.measure.batches import without_cache
from leanstep.pruning.measure.blocks import is_out_of_memory, recomputed_blocks, whole_on_device
from leanstep.pruning.measure.measurement import Measurement
from leanstep.pruning.measure.metrics import LOGITS_TOGETHER, Distortion, summarise
from leanstep.pruning.measure.products import computing_products_again
from leanstep.pruning.score.base import LayerPruner
from leanstep.pruning.score.calibration import Pruners, prune_group
from leanstep.pruning.score.gradients import only_gradients_of
from leanstep.pruning.score.in_files import GradientSums, gradients_to
from leanstep.pruning.score.targets import Group, Target, parameters_of

Counts = Mapping[str, int]
# largest tolerated change of the output by a cached input
_NOISE = 1e-9
# parts of the data after which a change that seems to do harm is rejected
_PARTS = (0.25, 0.5)
# part of the free memory for the inputs of blocks
_CACHED = 0.25
# bytes of each logit whose divergence is computed again together with others
_LOGIT_BYTES = 40
INPUTS = "inputs of blocks"


class JointJudge:
    """Measures the joint distortion of a pruned model, and of changes of the levels of a few of its matrices.

    Every matrix has one pruner, whose statistics stay as they are. A pass runs from the first changed block on.

    Args:
        measurement: of the dense model, on the data that decides.
        pruners: of each matrix by name, made of the dense weights.
        counts, patterns: the levels to which the model is pruned now.
        processes: of the run. Each runs its share of the batches; all take the same decisions.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        measurement: Measurement,
        pruners: Pruners | Mapping[str, LayerPruner],
        counts: Counts,
        patterns: Mapping[str, str],
        processes: Processes | None = None,
    ) -> None:
        self._processes = processes or Processes()
        self.model, self.metric = measurement.model, measurement.metric
        self._groups, self._pruners = {group.name: group for group in groups}, pruners
        self._batches, self._reference = measurement.batches, measurement.reference
        limit = _CACHED * (self._processes.free_memory(device_of(self.model)) or 0)
        self._cache = BlockCache(measurement.cache, self._batches, limit)
        self._scratch = measurement.cache.scratch
        self.counts, self.patterns = dict(counts), dict(patterns)
        # passes over all data, in batches of which each counts by the stages that it ran
        self.passes = 0.0
        self._current = self._compare_all(0, range(len(self._batches)))
        # gradients, and the levels at which they were computed
        self._gradient: GradientSums | None = None
        self._slopes_of: dict[str, int] | None = None
        self._recomputes = True
        self._check_cache()

    @property
    def distortion(self) -> Distortion:
        """Joint distortion of the current levels."""
        return summarise(self._current)

    def go_to(self, counts: Counts, patterns: Mapping[str, str], *, measured: bool = True) -> None:
        """Prune the model to other levels, and measure these; without, ``distortion`` and ``judge`` mean earlier ones.

        From there on, :meth:`at` prunes and runs only what differs from these levels.
        """
        groups = self._differing(counts, patterns)
        if not groups:
            return
        for target, weight in self._pruned(groups, counts, patterns):
            target.weight.copy_(weight)
        self._cache.forget(self._cache.start_of(groups))
        self.counts, self.patterns = dict(counts), dict(patterns)
        if measured:
            self._current = self._compare_all(0, range(len(self._batches)))

    def judge(self, counts: Counts, patterns: Mapping[str, str], noise: float) -> Distortion | None:
        """Take other levels if they are better than the current ones by more than their noise.

        The samples of both are compared pair by pair. The change must be below ``-noise`` standard errors of its mean.
        After a quarter and half of the data, a change above 0 ends the comparison.

        Returns:
            the change of the distortion, from the data until the decision; None if no matrix changes.
        """
        groups = self._differing(counts, patterns)
        if not groups:
            return None
        before, start = list[tuple[Target, Any]](), self._cache.start_of(groups)
        measured, accepted = list[tuple[Tensor, Tensor]](), False
        checks = {math.ceil(part * len(self._batches)) for part in _PARTS}
        try:
            self._replace(groups, counts, patterns, before)
            for end in sorted(checks | {len(self._batches)}):
                measured += self._compare_all(start, range(len(measured), end))
                change = self._change(measured)
                if end in checks and change.mean > 0:
                    break
            accepted = len(measured) == len(self._current) and change.mean < -noise * _error(change)
        finally:
            if not accepted:
                _restore(before)
        if accepted:
            self._cache.forget(start)
            self.counts, self.patterns, self._current = dict(counts), dict(patterns), measured
        return change

    def at(self, counts: Counts, batches: int | None = None) -> float:
        """Joint distortion of other levels on the first batches; unstructured ones. The current levels stay."""
        groups = self._differing(counts, {})
        before, start = list[tuple[Target, Any]](), self._cache.start_of(groups) if groups else 0
        try:
            self._replace(groups, counts, {}, before)
            measured = self._compare_all(start, range(batches or len(self._batches)))
        finally:
            _restore(before)
        return summarise(measured).mean

    def slopes(self, levels: Mapping[str, tuple[int, str]]) -> dict[str, float] | None:
        """First-order change of the joint distortion if one group alone goes to another level: <gradient, change of W>.

        Args:
            levels: (count, pattern) by group.

        Returns:
            changes by group; None for a metric that gives no gradient.
        """
        if self._slopes_of != self.counts:
            self._gradient = None  # not two of each at the same time
            self._slopes_of, self._gradient = dict(self.counts), self.gradients()
        gradients = self._gradient
        if gradients is None:
            return None
        slopes = {}
        for name, level in levels.items():
            pruned = prune_group(self._groups[name], self._pruners, level)
            slopes[name] = gradients.first_order(pruned)
        return slopes

    def gradients(self) -> GradientSums | None:
        """Gradient of the joint distortion by each matrix, fp32 [out, in]; None if the metric gives none."""
        targets = [target for group in self._groups.values() for target in group.targets]
        parameters = parameters_of(targets)
        with only_gradients_of(self.model, parameters.values()), whole_on_device(self.model):
            sums = self._gradient_sums(parameters)
        is_half = any(parameter.dtype == torch.float16 for parameter in parameters.values())
        if sums is None or (is_half and not sums.is_finite):
            return None  # the curves order the exchanges
        self.passes += 4 if self._recomputes else 3  # a backward pass takes the work of two
        return sums

    def _gradient_sums(self, parameters: Mapping[str, Tensor]) -> GradientSums | None:
        """Sums of the gradients of all batches; None if the metric gives none.

        Autograd stores the inputs of blocks and computes their activations again, unless a block does not allow that.
        """
        if self._recomputes:
            try:
                return self._sums(parameters, lambda: recomputed_blocks(self.model, self._again))
            except RuntimeError as error:  # a block writes into its inputs, or does not compute the same again
                if is_out_of_memory(error):
                    raise
                self._recomputes = False
        return self._sums(parameters, nullcontext)

    def _again(self) -> AbstractContextManager[None]:
        return computing_products_again(self.model)

    def _sums(
        self, parameters: Mapping[str, Tensor], stored: Callable[[], AbstractContextManager[None]]
    ) -> GradientSums | None:
        total = sum(float(counts.sum()) for _, counts in self._current)
        # the gradient of a mean over all tokens is below fp16's smallest number, 6e-8
        is_half = any(parameter.dtype == torch.float16 for parameter in parameters.values())
        targets = [target for group in self._groups.values() for target in group.targets]
        sums = GradientSums(targets, device_of(self.model), self._scratch)

        def add(name: str, gradient: Tensor) -> None:
            sums.add(name, gradient.float() / total if is_half else gradient)

        for batch, reference in zip(self._batches, self._reference, strict=True):
            # one by one: no second copy of them all
            with torch.enable_grad(), stored(), gradients_to(add, parameters):
                output = without_cache(batch, self.model).run(self.model)
                per_token, _ = self.metric.compare(Scratch.open(reference), output, batch)
                distortion = per_token.sum() / (1.0 if is_half else total)
                del output, per_token
                if not distortion.requires_grad:
                    return None
                distortion.backward(inputs=list(parameters.values()))
        return sums

    def _differing(self, counts: Counts, patterns: Mapping[str, str]) -> list[Group]:
        return [
            group
            for name, group in self._groups.items()
            if (counts[name], patterns.get(name, "")) != (self.counts[name], self.patterns.get(name, ""))
        ]

    def _pruned(
        self, groups: Sequence[Group], counts: Counts, patterns: Mapping[str, str]
    ) -> Iterator[tuple[Target, Tensor]]:
        for group in groups:
            yield from prune_group(group, self._pruners, (counts[group.name], patterns.get(group.name, "")))

    def _replace(
        self, groups: Sequence[Group], counts: Counts, patterns: Mapping[str, str], before: list[tuple[Target, Any]]
    ) -> None:
        """Prune groups to other levels; ``before`` gets the weights until then, in memory or in files."""
        for target, weight in self._pruned(groups, counts, patterns):
            here = target.weight
            before.append((target, here.clone() if self._scratch is None else self._scratch.store(here)))
            here.copy_(weight)

    def _compare_all(self, start: int, indices: range) -> list[tuple[Tensor, Tensor]]:
        """(sums, counts) per sample of each batch, with passes from a start on."""
        # a batch is always the same process's, which has its cached inputs
        share = set(self._processes.share(range(len(self._batches))))
        compared = {index: self._compare(start, index) for index in indices if index in share}
        compared = {index: pair for part in self._processes.all_gather(compared) for index, pair in part.items()}
        for _ in indices:
            self.passes += (1 - start / max(len(self._cache.stages), 1)) / len(self._batches)
        return [compared[index] for index in indices]

    def _compare(self, start: int, index: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            output = self._cache.run_from(start, index)
            return self.metric.compare(Scratch.open(self._reference[index]), output, self._batches[index])

    def _change(self, measured: Sequence[tuple[Tensor, Tensor]]) -> Distortion:
        pairs = zip(measured, self._current, strict=False)
        return summarise((new - old, counts) for (new, counts), (old, _) in pairs)

    def _check_cache(self) -> None:
        """Run every pass from the first stage if a cached input changes an output."""
        for start in self._cache.starts[1:]:
            [(sums, counts)] = self._compare_all(start, range(1))
            change = summarise([(sums - self._current[0][0], counts)]).mean
            if not abs(change) <= _NOISE:
                self._cache.disable(f"from {self._cache.stages[start][0]} on, they change the output")
                return


def _restore(before: Sequence[tuple[Target, Any]]) -> None:
    for target, weight in before:
        target.weight.copy_(Scratch.open(weight))


def _error(change: Distortion) -> float:
    """Standard error of a change; infinite for a single sample, of which none is known."""
    return math.inf if math.isnan(change.stderr) else change.stderr


def judge_cost(plan: Plan, samples: int, together: int) -> Cost:
    """What :class:`JointJudge` takes with gradients, on samples of which a pass has some together.

    In files, the gradient of one matrix is in memory, with fp32 copies of it, of dW and W.
    """
    shapes, memory = plan.shapes, dict[str, int]()
    if plan.in_files:
        memory["gradient of a matrix"] = 16 * max(rows * columns for rows, columns in shapes.matrices)
    if not plan.on_cpu:  # gradients need all weights there
        memory["all weights"] = shapes.size
    inside = max(sum(columns + 2 * rows for rows, columns in block) for block in shapes.blocks)
    # inputs of all blocks, activations of one and their gradients, logits and theirs
    values = len(shapes.blocks) * shapes.width + 2 * inside + 3 * shapes.outputs
    compared = shapes.tokens * shapes.outputs
    if plan.config.metric != "kl_topk":
        compared = min(compared, LOGITS_TOGETHER)
    graph = shapes.itemsize * together * shapes.tokens * values + _LOGIT_BYTES * compared
    share = -(-samples // plan.workload.processes)
    stored = {
        "gradients of all matrices": shapes.pruned * max(4, shapes.itemsize),  # of fp16 in fp32
        INPUTS: activation_bytes(plan, len(shapes.blocks) * share),
    }
    return plan.cost(stored=stored, memory=memory, working={"activations of a batch": graph})


def with_cached_inputs(cost: Cost, free: int | None) -> Cost:
    """A phase with a judge that caches as many inputs of blocks as the memory holds; none where that is not known."""
    later = (INPUTS, "gradients of all matrices", "replaced weights")
    left = (free or 0) - sum(size for use, size in cost.memory.items() if use not in later)
    inputs = int(min(cost.memory.get(INPUTS, 0), _CACHED * max(0, left)))
    return replace(cost, memory={**cost.memory, INPUTS: inputs})
