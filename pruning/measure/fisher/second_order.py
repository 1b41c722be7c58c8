"""Fisher curves: what a change of a matrix does to the output, to second order, from one pass over the data.

At the dense model the distortion D has no first-order term. With u, the root of the metric, ``D = |change of u|^2 / 2``
to second order. A change dW of a matrix W whose rows of inputs x give the outputs ``y = W x`` then costs

    D = mean over tokens of E[(sum over rows of g^T dW x)^2] / 2,    g = gradient of <xi, u> at y,

with random directions xi, E[xi xi^T] = 1. For the KL, E[g g^T] is the Fisher matrix at y. x and g do not depend on dW:
one forward pass and some backward passes serve all matrices and levels, updates of the remaining weights included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from leanstep._torch import device_of
from leanstep.pruning.allocate.levels import level_count
from leanstep.pruning.cost import Cost, Plan
from leanstep.pruning.measure.batches import Batch, hooked, without_cache
from leanstep.pruning.measure.blocks import is_out_of_memory, recomputed_blocks, whole_on_device
from leanstep.pruning.measure.curve_file import Points
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.fisher.recording import PairRows, Pairs, Recorder, generator_of
from leanstep.pruning.measure.metrics import ROOTS_TOGETHER, Distortion, Metric, summarise, values_of
from leanstep.pruning.score.calibration import Pruning, prune_group
from leanstep.pruning.score.gradients import matrix_gradients, only_gradients_of
from leanstep.pruning.score.targets import Group, Target, parameters_of

# rows of each matrix, over all sequences, whose x and g are stored
ROWS = 4096
# directions xi for each sequence of a language model
DRAWS = 2
# directions for each sample of a model with one output per sample, at most
SAMPLE_DRAWS = 8
# most bytes of x and g at once, where those of two stages take less
COLLECTED_BYTES = 1 << 30
# bytes of each root that is computed together with others
_ROOT_BYTES = 30
# forward passes that a pass of Fisher curves is worth: one, and two times two from the first block of a portion on
_PASSES = 3


@dataclass
class SampleGradients:
    """Gradients of single samples at one matrix: sums over its rows of ``g x^T``, [draws, samples, out * in]."""

    gradients: Tensor
    sample: Tensor
    weight: Tensor
    key: Any = None

    def response(self, change: Tensor) -> Tensor:
        """The sum over a sample's rows of ``g^T dW x``, [draws, samples]."""
        return self.gradients.to(change.dtype) @ change.flatten()


class SecondOrder:
    """Distortion of changed matrices to second order.

    Outputs of shape [batch, classes] count once per sample: its rows are summed before the square, and the expectation
    is exact. Other outputs count per token, as a language model's: the rows of a sequence count as independent, as in
    K-FAC, and 4,096 of them are drawn. Matrices that change together are summed before the square. So are the calls of
    a matrix that the model uses several times for a token; those with equal numbers of rows have the same tokens.

    Args:
        model: run in its current mode, with its current weights.
        batches: the data, run sample by sample.
        metric: with a :meth:`Metric.root`.

    Raises:
        ValueError: for a metric without a root.

    Notes:
        Memory, for each collected matrix [out, in] and in its dtype: at most 4,096 (in + 2 out) values for each call of
        a pass; for one output per sample, up to 8 out * in values of every sample. While it collects: the inputs of all
        blocks for one sample, and the activations of one block, which the backward pass computes again. The activations
        of all blocks for one output per sample, where a block writes into its inputs or does not compute the same
        again, and on a device that does not hold the model.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], metric: Metric) -> None:
        self.model, self.metric = model, metric
        self.samples = [without_cache(batch.sample(row), model) for batch in batches for row in range(batch.size)]
        longest = max(self.samples, key=lambda sample: sample.numel)
        with torch.no_grad(), _counting(model) as (self._calls, self._rows):
            output = longest.run(model)
            # outputs of all samples have one form; a metric without a root is refused here
            self._classes = metric.root_shape(output, longest)[1]
            self.one_output = values_of(output).dim() == 2
        self._collected: dict[str, Pairs | SampleGradients] = {}
        self._recomputes = True
        self._counts = torch.zeros(len(self.samples), dtype=torch.float64)

    def bytes_of(self, target: Target) -> int:
        """Memory of a collected matrix."""
        rows, columns = target.weight.shape
        drawn = min(self._each, max((self._rows.get(module, self._each) for module in target.modules), default=0))
        values = drawn * len(self.samples) * (columns + DRAWS * rows) * self._calls_of(target)
        if self.one_output:
            values = min(SAMPLE_DRAWS, self._classes) * len(self.samples) * rows * columns
        return values * target.layer.itemsize

    def collect(self, targets: Sequence[Target]) -> None:
        """Run all samples, and replace what was collected by x and g of these matrices.

        Raises:
            ValueError: for a matrix that the output does not depend on, or a convolution without one matrix of inputs.
        """
        self.release()
        with torch.enable_grad():
            self._collected = self._sample_gradients(targets) if self.one_output else self._pairs(targets)

    def release(self) -> None:
        """Free what was collected."""
        self._collected = {}

    def distortion(self, changed: Iterable[tuple[Target, Tensor]]) -> Distortion:
        """Distortion if collected matrices get these weights [out, in], all together."""
        return self.summary(self.sums(changed))

    def summary(self, sums: Tensor, samples: int | None = None) -> Distortion:
        """The distortion of :meth:`sums`, of all samples or the first ones."""
        return summarise([(sums[:samples], self._counts[:samples])])

    @torch.no_grad()
    def sums(self, changed: Iterable[tuple[Target, Tensor]]) -> Tensor:
        """Sums over the outputs of each sample, [samples], if collected matrices get these weights [out, in]."""
        responses: dict[Any, tuple[Any, Tensor]] = {}
        for target, weight in changed:
            part = self._collected[target.name]
            dtype = torch.promote_types(weight.dtype, torch.float32)
            response = part.response(weight.to(dtype) - target.weight.to(weight.device, dtype))
            before = responses.get(part.key)
            responses[part.key] = part, response if before is None else before[1] + response
        sums = torch.zeros(len(self.samples), dtype=torch.float64)
        for part, response in responses.values():
            sums.index_add_(0, part.sample, response.double().square().mean(0).cpu() * part.weight / 2)
        return sums

    def _roots(self, index: int) -> Tensor:
        """u of a sample, [tokens, k]; its tokens are counted."""
        sample = self.samples[index]
        roots = self.metric.root(sample.run(self.model), sample)[0]
        self._counts[index] = len(roots)
        return roots

    def _sample_gradients(self, targets: Sequence[Target]) -> dict[str, Pairs | SampleGradients]:
        draws, count = min(SAMPLE_DRAWS, self._classes), len(self.samples)
        device = device_of(self.model)
        by_name = {t.name: t.weight.new_empty(draws, count, t.layer.numel, device=device) for t in targets}
        with only_gradients_of(self.model, parameters_of(targets).values()), whole_on_device(self.model):
            for index in range(count):
                roots = self._roots(index)
                for draw, direction in enumerate(_orthogonal_directions(roots, draws, index)):
                    for target, gradient in matrix_gradients((roots * direction).sum(), targets, retain_graph=True):
                        by_name[target.name][draw, index] = gradient.flatten()
        sample, weight = torch.arange(count), torch.ones(count, dtype=torch.float64)
        return {name: SampleGradients(gradients, sample, weight) for name, gradients in by_name.items()}

    def _pairs(self, targets: Sequence[Target]) -> dict[str, Pairs | SampleGradients]:
        if self._recomputes:
            try:
                return self._recorded_pairs(targets)
            except RuntimeError as error:  # a block writes into its inputs, or does not compute the same again
                if is_out_of_memory(error):
                    raise
                self._recomputes = False
        return self._recorded_pairs(targets)

    def _recorded_pairs(self, targets: Sequence[Target]) -> dict[str, Pairs | SampleGradients]:
        count = len(self.samples)
        rows = {target.name: PairRows(target, DRAWS, count * self._calls_of(target)) for target in targets}
        with only_gradients_of(self.model, []):
            for index, sample in enumerate(self.samples):
                recorder = Recorder(self.model, rows, self._each, index)
                stored = recomputed_blocks(self.model, recorder.again) if self._recomputes else nullcontext()
                with recorder.hooked(), stored:
                    output = sample.run(self.model)
                    self._counts[index] = self.metric.root_shape(output, sample)[0]
                    for draw in range(DRAWS):
                        total = self.metric.projected_root(output, sample, partial(_signs, index, draw))
                        if not total.requires_grad:  # no row of these matrices ran
                            recorder.discard()
                            break
                        recorder.differentiate(total, draw, last=draw + 1 == DRAWS)
        return {name: collected.joined(device_of(self.model)) for name, collected in rows.items()}

    @property
    def _each(self) -> int:
        """Most rows of a call that are drawn."""
        return -(-ROWS // len(self.samples))

    def _calls_of(self, target: Target) -> int:
        """Number of calls of a matrix in a pass, at least 1."""
        return max(1, sum(self._calls[module] for module in target.modules))


def fisher_curves(second: SecondOrder, points: Mapping[int, Points], pruning: Pruning) -> dict[int, dict[str, Curve]]:
    """The curves of all groups to second order, on one or several numbers of the first samples; adds missing points.

    Matrices are collected together up to 1 GiB of x and g, or those of two stages if they take more, but no more than
    half of the free memory where several stages do. Each process collects its share of the matrices.

    Args:
        second: of all samples.
        points: number of samples -> points of the same groups and levels on them.
        pruning: makes the pruners.

    Returns:
        number of samples -> name of the group -> its curve.
    """
    of_all = next(iter(points.values())).groups
    missing = [group for group in of_all if any(part.missing[group.name] for part in points.values())]
    share = {group.name for group in pruning.processes.share(missing)}
    for stages in portions(second, pruning.cache.by_start(missing), share, pruning):
        if targets := [t for _, groups in stages for group in groups if group.name in share for t in group.targets]:
            second.collect(targets)
        for start, groups in stages:
            for group, pruners in pruning.each(groups, start):
                levels = dict.fromkeys(level for part in points.values() for level in part.missing[group.name])
                for level in levels if group.name in share else ():
                    sums = second.sums(prune_group(group, pruners, level))
                    for samples, part in points.items():
                        if level in part.missing[group.name]:
                            part.add(group.name, level[0], second.summary(sums, samples))
            for part in points.values():
                part.exchange(pruning.processes)
    second.release()
    pruning.cache.reset()
    return {samples: part.curves(second.metric.identity, "fisher") for samples, part in points.items()}


def portions(
    second: SecondOrder, stages: Sequence[tuple[int, list[Group]]], share: Container[str], pruning: Pruning
) -> Iterator[Sequence[tuple[int, list[Group]]]]:
    """Split stages so that what is collected of a portion, of the named groups, fits into memory.

    Processes may split them otherwise: they exchange what they have after each stage.
    """
    free = pruning.processes.free_memory(device_of(second.model))
    sizes = [
        sum(second.bytes_of(target) for group in groups if group.name in share for target in group.targets)
        for _, groups in stages
    ]
    limit = max(COLLECTED_BYTES, 2 * max(sizes, default=0))
    if free is not None:
        limit = min(limit, free // 2)
    for numbers in runs_within(sizes, limit):
        yield [stages[number] for number in numbers]


def runs_within(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Numbers of consecutive items whose sizes add up to the limit at most, or of one item that is larger."""
    runs: list[list[int]] = []
    taken = 0
    for number, size in enumerate(sizes):
        if not runs or taken + size > limit:
            runs.append([])
            taken = 0
        runs[-1].append(number)
        taken += size
    return runs


@contextmanager
def _counting(model: nn.Module) -> Iterator[tuple[Counter[nn.Module], dict[nn.Module, int]]]:
    """Context manager: gives a count of the calls of every module, and the most rows of one call of a layer."""
    calls: Counter[nn.Module] = Counter()
    rows: dict[nn.Module, int] = {}

    def count(module: nn.Module, _: Any, output: Any) -> None:
        calls[module] += 1
        if isinstance(output, Tensor) and output.dim() > 1:
            width = output.shape[1 if isinstance(module, (nn.Conv1d, nn.Conv2d)) else -1]
            rows[module] = max(rows.get(module, 0), output.numel() // max(width, 1))

    with hooked(module.register_forward_hook(count) for module in model.modules()):
        yield calls, rows


def _signs(index: int, draw: int, shape: tuple[int, int]) -> Tensor:
    """Random signs, int8."""
    signs = torch.randint(0, 2, shape, generator=generator_of(index, draw), dtype=torch.int8)
    return signs.mul_(2).sub_(1)


def _orthogonal_directions(roots: Tensor, draws: int, index: int) -> Tensor:
    """Random orthogonal directions, [draws, 1, k]; with k of them, their second moment is 1 exactly."""
    k = roots.shape[-1]
    gaussian = torch.randn(k, draws, generator=generator_of(index), dtype=torch.float64)
    return (torch.linalg.qr(gaussian).Q.T * k**0.5)[:, None].to(roots)


def second_order_cost(plan: Plan) -> Cost:
    """What :class:`SecondOrder` and the levels of :func:`fisher_curves` take, besides the pruners."""
    shapes, blocks, processes = plan.shapes, plan.shapes.blocks, plan.workload.processes
    samples, tokens = plan.workload.curve_samples, plan.shapes.tokens
    # another device stores the activations of all blocks
    recomputed = plan.on_cpu and not shapes.one_output

    def values(rows: int, columns: int) -> int:
        if shapes.one_output:
            return min(SAMPLE_DRAWS, shapes.outputs) * samples * rows * columns
        return min(ROWS, samples * tokens) * (columns + DRAWS * rows)

    sizes = [shapes.itemsize * sum(values(*matrix) for matrix in block) for block in blocks]
    runs = runs_within(sizes, max(COLLECTED_BYTES, 2 * max(sizes)))
    inside = max(sum(columns + 2 * rows for rows, columns in block) for block in blocks)
    gradients = max(sum(rows for number in run for rows, _ in blocks[number]) for run in runs)
    stored = 2 * inside * (1 if recomputed else len(blocks))
    in_a_pass = tokens * (len(blocks) * shapes.width + stored + gradients * 3 // 2 + 4 * shapes.outputs)
    graph = shapes.itemsize * in_a_pass + _ROOT_BYTES * min(tokens * shapes.outputs, ROOTS_TOGETHER)
    # each process collects its share of the matrices
    passes = _PASSES * math.ceil(len(runs) / processes)
    seconds = passes * plan.pass_seconds(samples, compared=True, batch_size=1)
    products = 2 * min(ROWS, samples * tokens) * level_count(plan.config) * shapes.pruned
    seconds += products * plan.rates.operation / processes
    return Cost(
        {"second order": seconds},
        memory={"x and g of Fisher curves": max(sum(sizes[number] for number in run) for run in runs)},
        working={"activations of a batch": graph},
    )
