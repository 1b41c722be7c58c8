"""Fisher curves: what a change of a matrix does to the output, to second order, from one pass over the data.

At the dense model the distortion D has no first-order term. With u, the root of the metric, ``D = |change of u|^2 / 2``
to second order. A change dW of a matrix W whose rows of inputs x give the outputs ``y = W x`` then costs

    D = mean over tokens of E[(sum over rows of g^T dW x)^2] / 2,    g = gradient of <xi, u> at y,

with random directions xi, E[xi xi^T] = 1. For the KL, E[g g^T] is the Fisher matrix at y. x and g do not depend on dW:
one forward pass and some backward passes serve all matrices and levels, updates of the remaining weights included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from leanstep._processes import Processes
from leanstep._torch import device_of
from leanstep.pruning.measure.batches import Batch
from leanstep.pruning.measure.blocks import whole_on_device
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.metrics import Distortion, Metric, summarise, values_of
from leanstep.pruning.measure.points import Points
from leanstep.pruning.score.calibration import Pruning, first_input, input_rows, prune_group
from leanstep.pruning.score.experts import ExpertWeights, one_expert_at_a_time
from leanstep.pruning.score.targets import Group, Target, as_matrix

# rows of each matrix, over all sequences, whose x and g are stored
_ROWS = 4096
# directions xi for each sequence of a language model
_DRAWS = 2
# directions for each sample of a model with one output per sample, at most
_SAMPLE_DRAWS = 8
# bytes of x and g at once, where the system does not report its free memory
_BYTES = 1 << 30


@dataclass
class Pairs:
    """Rows x and g of one matrix, drawn from all sequences.

    Attributes:
        inputs: x, [rows, in].
        gradients: g, [draws, rows, out].
        token: int64 [rows], the token of each row. A matrix that is called several times has several rows for each.
        sample: int64 [tokens], the sequence of each token.
        weight: fp64 [tokens], how many tokens each stands for.
        key: equal for matrices whose rows belong to the same tokens.
    """

    inputs: Tensor
    gradients: Tensor
    token: Tensor
    sample: Tensor
    weight: Tensor
    key: Any

    def response(self, change: Tensor) -> Tensor:
        """The sum over a token's rows of ``g^T dW x``, [draws, tokens]."""
        outputs = self.inputs.to(change.dtype) @ change.T
        rows = torch.stack([(outputs * gradient).sum(-1) for gradient in self.gradients])
        sums = rows.new_zeros(len(rows), len(self.sample))
        return sums.index_add_(1, self.token.to(rows.device), rows)


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
        Memory, for each collected matrix [out, in] and in its dtype: 4,096 (in + 2 out) values for each call of a pass;
        for one output per sample, up to 8 out * in values of every sample.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], metric: Metric) -> None:
        self.model, self.metric = model, metric
        self.samples = [batch.sample(row) for batch in batches for row in range(batch.size)]
        with torch.no_grad(), _counting(model) as self._calls:
            output = self.samples[0].run(model)
            # outputs of all samples have one form; a metric without a root is refused here
            self._classes = metric.root(output, self.samples[0])[0].shape[-1]
            self.one_output = values_of(output).dim() == 2
        self._collected: dict[str, Pairs | SampleGradients] = {}
        self._counts = torch.zeros(len(self.samples), dtype=torch.float64)

    def bytes_of(self, target: Target) -> int:
        """Memory of a collected matrix."""
        rows, columns = target.weight.shape
        values = _ROWS * (columns + _DRAWS * rows) * max(1, sum(self._calls[module] for module in target.modules))
        if self.one_output:
            values = min(_SAMPLE_DRAWS, self._classes) * len(self.samples) * rows * columns
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

    @torch.no_grad()
    def distortion(self, changed: Iterable[tuple[Target, Tensor]]) -> Distortion:
        """Distortion if collected matrices get these weights [out, in], all together."""
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
        return summarise([(sums, self._counts)])

    def _roots(self, index: int) -> Tensor:
        """u of a sample, [tokens, k]; its tokens are counted."""
        sample = self.samples[index]
        roots = self.metric.root(sample.run(self.model), sample)[0]
        self._counts[index] = len(roots)
        return roots

    def _sample_gradients(self, targets: Sequence[Target]) -> dict[str, Pairs | SampleGradients]:
        parameters = {target.parameter: getattr(target.module, target.attribute) for target in targets}
        draws, count = min(_SAMPLE_DRAWS, self._classes), len(self.samples)
        device = device_of(self.model)
        by_name = {t.name: t.weight.new_empty(draws, count, t.layer.numel, device=device) for t in targets}
        with _only_gradients_of(self.model, list(parameters.values())), whole_on_device(self.model):
            for index in range(count):
                roots = self._roots(index)
                for draw, direction in enumerate(_orthogonal_directions(roots, draws, index)):
                    gradients = torch.autograd.grad(
                        (roots * direction).sum(), list(parameters.values()), retain_graph=True, allow_unused=True
                    )
                    by_parameter = dict(zip(parameters, gradients, strict=True))
                    for target in targets:
                        gradient = by_parameter[target.parameter]
                        if gradient is None:
                            raise _unused(target)
                        matrix = gradient if target.expert is None else gradient[target.expert]
                        by_name[target.name][draw, index] = as_matrix(matrix.contiguous(), target.layout).flatten()
        sample, weight = torch.arange(count), torch.ones(count, dtype=torch.float64)
        return {name: SampleGradients(gradients, sample, weight) for name, gradients in by_name.items()}

    def _pairs(self, targets: Sequence[Target]) -> dict[str, Pairs | SampleGradients]:
        each = -(-_ROWS // len(self.samples))
        calls: dict[str, list[tuple[int, _Call, list[Tensor]]]] = {target.name: [] for target in targets}
        with _only_gradients_of(self.model, []):
            for index in range(len(self.samples)):
                recorded: list[_Call] = []
                with _recording(self.model, targets, recorded, each, index):
                    roots = self._roots(index)
                if not roots.requires_grad:
                    continue  # no row of these matrices ran
                gradients: list[list[Tensor]] = [[] for _ in recorded]
                for draw in range(_DRAWS):
                    grads = torch.autograd.grad(
                        (roots * _signs(roots, index, draw)).sum(),
                        [call.output for call in recorded],
                        retain_graph=draw + 1 < _DRAWS,
                        allow_unused=True,
                    )
                    for call, gradient, rows in zip(recorded, grads, gradients, strict=True):
                        rows.append(call.rows_of(torch.zeros_like(call.output) if gradient is None else gradient))
                for call, rows in zip(recorded, gradients, strict=True):
                    call.output = None  # holds the graph
                    calls[call.target.name].append((index, call, rows))
        return {target.name: _joined(target, calls[target.name], device_of(self.model)) for target in targets}


def fisher_curves(second: SecondOrder, points: Points, pruning: Pruning) -> dict[str, Curve]:
    """The curves of all groups of ``points``, to second order; adds the missing points.

    Matrices are collected together as far as half of the free memory goes, and at least those of one stage. Each
    process collects its share of the matrices.
    """
    missing = [group for group in points.groups if points.missing[group.name]]
    share = {group.name for group in pruning.processes.share(missing)}
    for stages in _portions(second, pruning.cache.by_start(missing), share, pruning.processes):
        if targets := [t for _, groups in stages for group in groups if group.name in share for t in group.targets]:
            second.collect(targets)
        for start, groups in stages:
            for group, pruners in pruning.each(groups, start):
                for count, pattern in points.missing[group.name] if group.name in share else ():
                    points.add(group.name, count, second.distortion(prune_group(group, pruners, count, pattern)))
            points.exchange(pruning.processes)
    second.release()
    pruning.cache.reset()
    return points.curves(second.metric.identity, "fisher")


def _portions(
    second: SecondOrder, stages: Sequence[tuple[int, list[Group]]], share: Container[str], processes: Processes
) -> Iterator[Sequence[tuple[int, list[Group]]]]:
    """Split stages so that what is collected of a portion, of the named groups, fits into memory."""
    free = processes.free_memory(device_of(second.model))
    limit = _BYTES if free is None else free // 2
    portion: list[tuple[int, list[Group]]] = []
    size = 0
    for start, groups in stages:
        needed = sum(second.bytes_of(t) for group in groups if group.name in share for t in group.targets)
        if portion and size + needed > limit:
            yield portion
            portion, size = [], 0
        portion.append((start, groups))
        size += needed
    if portion:
        yield portion


@dataclass
class _Call:
    """One product of a matrix and its inputs: the drawn rows of the inputs, and the output with its graph."""

    target: Target
    rows: Tensor
    total: int
    inputs: Tensor
    output: Any

    def rows_of(self, gradient: Tensor) -> Tensor:
        """The drawn rows [rows, out] of a gradient like the output."""
        if isinstance(self.target.module, (nn.Conv1d, nn.Conv2d)):
            gradient = gradient.flatten(2).transpose(1, 2)
        return gradient.reshape(-1, gradient.shape[-1])[self.rows]


def _joined(target: Target, calls: Sequence[tuple[int, _Call, list[Tensor]]], device: torch.device) -> Pairs:
    """The pairs of a matrix from all its calls."""
    if not calls:
        if target.expert is None:
            raise _unused(target)
        weight, none = target.weight, torch.zeros(0, dtype=torch.int64)  # an expert without a token
        rows, columns = weight.shape
        inputs, gradients = (weight.new_empty(shape, device=device) for shape in ((0, columns), (_DRAWS, 0, rows)))
        return Pairs(inputs, gradients, none, none, none.double(), target.name)
    # rows are drawn by their number: the calls of a sample with equal numbers of rows have the same tokens
    drawn = {(index, call.total): len(call.rows) for index, call, _ in calls}
    sizes = torch.tensor(list(drawn.values()))
    firsts = dict(zip(drawn, (sizes.cumsum(0) - sizes).tolist(), strict=True))
    weights = torch.tensor([total for _, total in drawn], dtype=torch.float64) / sizes
    return Pairs(
        inputs=torch.cat([call.inputs for _, call, _ in calls]),
        gradients=torch.stack([torch.cat([rows[draw] for *_, rows in calls]) for draw in range(_DRAWS)]),
        token=torch.cat([firsts[index, call.total] + torch.arange(len(call.rows)) for index, call, _ in calls]),
        sample=torch.tensor([index for index, _ in drawn]).repeat_interleave(sizes),
        weight=weights.repeat_interleave(sizes),
        key=target.name if target.expert is not None else tuple(drawn),
    )


@contextmanager
def _counting(model: nn.Module) -> Iterator[Counter[nn.Module]]:
    """Context manager: gives a count of the calls of every module."""
    calls: Counter[nn.Module] = Counter()
    with ExitStack() as stack:
        for module in model.modules():
            handle = module.register_forward_pre_hook(lambda module, _: calls.update([module]))
            stack.callback(handle.remove)
        yield calls


@contextmanager
def _recording(
    model: nn.Module, targets: Sequence[Target], calls: list[_Call], each: int, index: int
) -> Iterator[None]:
    """Context manager: every product with one of the matrices is added to ``calls``, with ``each`` drawn rows."""

    def record(target: Target, inputs: Tensor, output: Tensor) -> Tensor:
        rows = input_rows(target.module, inputs)
        drawn = torch.randperm(len(rows), generator=_generator(index, len(rows)))[:each].sort().values.to(rows.device)
        output = output if output.requires_grad else output.detach().requires_grad_()
        if len(rows):
            calls.append(_Call(target, drawn, len(rows), rows[drawn].detach(), output))
        # a copy goes on: the model may write into it, as nn.ReLU(inplace=True) does
        return output.clone()

    with ExitStack() as stack:
        for target in targets:
            for module in target.modules if target.expert is None else ():
                handle = module.register_forward_hook(
                    lambda _, args, kwargs, output, target=target: record(target, first_input(args, kwargs), output),
                    with_kwargs=True,
                )
                stack.callback(handle.remove)
        experts = [target for target in targets if target.expert is not None]
        if experts:
            stack.enter_context(one_expert_at_a_time(model))
            stack.enter_context(_ExpertProducts(ExpertWeights(experts), record))
        yield


class _ExpertProducts(TorchFunctionMode):
    """Passes every product with the weight of one expert to ``record``, and goes on with the output it returns."""

    def __init__(self, experts: ExpertWeights, record: Callable[[Target, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.experts, self.record = experts, record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        products = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
        if func in products and len(args) > 1 and isinstance(args[1], Tensor):
            target = self.experts.get(args[1])
            if target is not None and args[0].shape[-1] == target.weight.shape[1]:
                return self.record(target, args[0], output)
        if func in (torch.bmm, Tensor.bmm) and len(args) > 1:  # of all experts at once
            each = zip(args[0], args[1], output, strict=True)
            targets = [self.experts.get(weight) for weight in args[1]]
            if any(target is not None for target in targets):
                outputs = [
                    part if target is None else self.record(target, inputs, part)
                    for target, (inputs, _, part) in zip(targets, each, strict=True)
                ]
                return torch.stack(outputs)
        return output


@contextmanager
def _only_gradients_of(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Context manager: these parameters require gradients, and no others."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _generator(*numbers: int) -> torch.Generator:
    """A generator that depends on these numbers only: matrices collected in portions get the same draws."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    return torch.Generator().manual_seed(seed)


def _signs(roots: Tensor, index: int, draw: int) -> Tensor:
    """Random signs of the shape of the roots."""
    signs = torch.randint(0, 2, roots.shape, generator=_generator(index, draw), dtype=torch.int8)
    return (signs.to(roots.device) * 2 - 1).to(roots.dtype)


def _orthogonal_directions(roots: Tensor, draws: int, index: int) -> Tensor:
    """Random orthogonal directions, [draws, 1, k]; with k of them, their second moment is 1 exactly."""
    k = roots.shape[-1]
    gaussian = torch.randn(k, draws, generator=_generator(index), dtype=torch.float64)
    return (torch.linalg.qr(gaussian).Q.T * k**0.5)[:, None].to(roots)


def _unused(target: Target) -> ValueError:
    return ValueError(f"the model's output does not depend on {target.name}; leave it out with exclude")
