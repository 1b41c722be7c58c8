"""Record the inputs of matrices in a forward pass, and the gradients at their outputs in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from leanstep.pruning.measure.products import computing_products_again
from leanstep.pruning.score.calibration import first_input, input_rows
from leanstep.pruning.score.experts import ExpertProducts, one_expert_at_a_time
from leanstep.pruning.score.gradients import unused
from leanstep.pruning.score.targets import Target


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


class PairRows:
    """Collects the rows x and g of a matrix, sample by sample.

    Args:
        draws: number of directions.
        calls: expected in all samples. Memory is reserved for so many calls of the first one's length. An expert, whose
            calls differ in length, reserves memory as its rows come.
    """

    def __init__(self, target: Target, draws: int, calls: int) -> None:
        self.target, self._draws, self._capacity = target, draws, 0
        self._expected_calls = 1 if target.is_expert else calls
        self._inputs, self._gradients = torch.empty(0), torch.empty(0)
        # of each call: index of the sample, rows of its output, rows that were drawn
        self._calls: list[tuple[int, int, int]] = []
        self._end = 0

    def add(self, index: int, total: int, inputs: Tensor) -> slice:
        """Add the drawn rows x of a call for a sample, of ``total``; returns their range among all rows."""
        row_range = slice(self._end, self._end + len(inputs))
        self._capacity = self._capacity or self._expected_calls * len(inputs)
        if row_range.stop > len(self._inputs):
            self._inputs = _grown(self._inputs, inputs, self._capacity_for(row_range.stop), dim=0)
        self._inputs[row_range] = inputs
        self._calls.append((index, total, len(inputs)))
        self._end = row_range.stop
        return row_range

    def add_gradients(self, row_range: slice, draw: int, gradients: Tensor | None) -> None:
        """Add the rows g of a call, for a direction; zeros for None."""
        if gradients is None:
            gradients = self._inputs.new_zeros(row_range.stop - row_range.start, self.target.weight.shape[0])
        if self._gradients.dim() < 3 or row_range.stop > self._gradients.shape[1]:
            like = gradients.expand(self._draws, *gradients.shape)
            self._gradients = _grown(self._gradients, like, self._capacity_for(row_range.stop), dim=1)
        self._gradients[draw, row_range] = gradients

    def remove(self, index: int) -> None:
        """Remove the rows of a sample, which were added last."""
        while self._calls and self._calls[-1][0] == index:
            self._end -= self._calls.pop()[2]

    def _capacity_for(self, rows: int) -> int:
        return self._capacity if rows <= self._capacity else 2 * rows

    def joined(self, device: torch.device) -> Pairs:
        """All rows. Raises ValueError if the matrix, not of an expert, got none."""
        target = self.target
        if not self._calls:
            if not target.is_expert:
                raise unused(target)
            weight, none = target.weight, torch.zeros(0, dtype=torch.int64)  # an expert without a token
            rows, columns = weight.shape
            shapes = ((0, columns), (self._draws, 0, rows))
            inputs, gradients = (weight.new_empty(shape, device=device) for shape in shapes)
            return Pairs(inputs, gradients, none, none, none.double(), target.name)
        # rows are drawn by their number: the calls of a sample with equal numbers of rows have the same tokens
        drawn = {(index, total): count for index, total, count in self._calls}
        sizes = torch.tensor(list(drawn.values()))
        firsts = dict(zip(drawn, (sizes.cumsum(0) - sizes).tolist(), strict=True))
        weights = torch.tensor([total for _, total in drawn], dtype=torch.float64) / sizes
        return Pairs(
            inputs=self._inputs[: self._end],
            gradients=self._gradients[:, : self._end],
            token=torch.cat([firsts[index, total] + torch.arange(count) for index, total, count in self._calls]),
            sample=torch.tensor([index for index, _ in drawn]).repeat_interleave(sizes),
            weight=weights.repeat_interleave(sizes),
            key=target.name if target.is_expert else tuple(drawn),
        )


def _grown(before: Tensor, like: Tensor, capacity: int, dim: int) -> Tensor:
    """An uninitialised tensor of the shape of ``like``, longer in one dimension, that begins with ``before``."""
    shape = list(like.shape)
    shape[dim] = capacity
    after = like.new_empty(shape)
    if before.numel():
        after.narrow(dim, 0, before.shape[dim]).copy_(before)
    return after


@dataclass
class Call:
    """One product of a matrix and its inputs.

    Attributes:
        drawn: numbers of the drawn rows, int64.
        row_range: of these rows among all rows of the matrix.
        edge: the output's place in the graph; None once the graph is freed.
    """

    target: Target
    drawn: Tensor
    row_range: slice
    edge: GradientEdge | None

    def rows_of(self, gradient: Tensor | None) -> Tensor | None:
        """The drawn rows [rows, out] of a gradient like the output."""
        if gradient is None:
            return None
        if isinstance(self.target.module, (nn.Conv1d, nn.Conv2d)):
            gradient = gradient.flatten(2).transpose(1, 2)
        return gradient.reshape(-1, gradient.shape[-1])[self.drawn]


class Recorder:
    """Records the products with some matrices in a pass of one sample, and the gradients at their outputs.

    Args:
        rows: receive what is recorded, by name of the matrix.
        each: most rows of a call to draw.
    """

    def __init__(self, model: nn.Module, rows: Mapping[str, PairRows], each: int, index: int) -> None:
        self._model, self._rows, self._each, self._index = model, rows, each, index
        self._targets = [collected.target for collected in rows.values()]
        self._calls: list[Call] = []
        self._is_again = False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Context manager: the products of a pass are recorded."""
        with ExitStack() as stack:
            for target in self._targets:
                for module in target.modules if target.expert is None else ():
                    handle = module.register_forward_hook(
                        lambda _, args, kwargs, output, target=target: self._record(
                            target, first_input(args, kwargs), output
                        ),
                        with_kwargs=True,
                    )
                    stack.callback(handle.remove)
            stack.enter_context(self._experts())
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """Context manager: a block runs in a backward pass, and was recorded before.

        A backward pass runs without torch's function modes, and of a GPU in another thread.
        """
        before, self._is_again = self._is_again, True
        try:
            with computing_products_again(self._model), self._experts():
                yield
        finally:
            self._is_again = before

    @contextmanager
    def _experts(self) -> Iterator[None]:
        experts = [target for target in self._targets if target.expert is not None]
        if not experts:
            yield
            return
        with one_expert_at_a_time(self._model), ExpertProducts(experts, self._record):
            yield

    def _record(self, target: Target, inputs: Tensor, output: Tensor, of_all: bool = False) -> Tensor:
        rows = input_rows(target.module, inputs.detach())  # refuses modules whose output is no tensor
        output = output if output.requires_grad else output.detach().requires_grad_()
        if len(rows) and not self._is_again:
            order = torch.randperm(len(rows), generator=generator_of(self._index, len(rows)))
            drawn = order[: self._each].sort().values.to(rows.device)
            row_range = self._rows[target.name].add(self._index, len(rows), rows[drawn])
            self._calls.append(Call(target, drawn, row_range, get_gradient_edge(output)))
        # a copy goes on: the model may write into it, as nn.ReLU(inplace=True) does
        return output.clone()

    def differentiate(self, total: Tensor, draw: int, *, last: bool) -> None:
        """Record the gradients of a number, for a direction; ``last`` frees the graph."""
        edges = [call.edge for call in self._calls if call.edge is not None]
        gradients = torch.autograd.grad(total, edges, retain_graph=not last, allow_unused=True)
        for call, gradient in zip(self._calls, gradients, strict=True):
            self._rows[call.target.name].add_gradients(call.row_range, draw, call.rows_of(gradient))
            if last:
                call.edge = None

    def discard(self) -> None:
        """Remove what was recorded, on which the output does not depend."""
        for rows in self._rows.values():
            rows.remove(self._index)


def generator_of(*numbers: int) -> torch.Generator:
    """A generator that depends on these numbers only: matrices collected in portions get the same draws."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    return torch.Generator().manual_seed(seed)
