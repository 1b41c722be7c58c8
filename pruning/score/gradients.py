"""Collect gradients of the loss, sample by sample, for M-FAC."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from leanstep.pruning.measure.batches import Batch
from leanstep.pruning.measure.blocks import whole_on_device
from leanstep.pruning.measure.metrics import logits_of
from leanstep.pruning.score.base import GRADIENTS
from leanstep.pruning.score.targets import Target, parameters_of


def collect_gradients(model: nn.Module, batches: Sequence[Batch], targets: Sequence[Target]) -> dict[str, Tensor]:
    """Gradients of the loss of the first 128 single samples, fp32 [samples, out * in] per layer.

    The loss is the mean cross-entropy over a sample's labels; without labels, over classes drawn from the model's own
    predictions, as in the definition of the Fisher matrix.
    """
    parameters = parameters_of(targets)
    rows: dict[str, list[Tensor]] = {target.name: [] for target in targets}
    generator = torch.Generator().manual_seed(0)
    with only_gradients_of(model, parameters.values()), whole_on_device(model):
        singles = (batch.sample(row) for batch in batches for row in range(batch.size))
        for single in islice(singles, GRADIENTS):
            with torch.enable_grad():
                loss = _loss(model, single, generator)
            for target, gradient in matrix_gradients(loss, targets):
                rows[target.name].append(gradient.reshape(-1).float())
    return {name: torch.stack(per_sample) for name, per_sample in rows.items()}


@contextmanager
def only_gradients_of(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context manager: of a model, these parameters alone require gradients."""
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


def matrix_gradients(
    total: Tensor, targets: Sequence[Target], *, retain_graph: bool = False
) -> Iterator[tuple[Target, Tensor]]:
    """Each target with the gradient [out, in] of a number; zeros for an expert without a token.

    Raises:
        ValueError: for another target on which the number does not depend.
    """
    parameters = parameters_of(targets)
    gradients = torch.autograd.grad(total, list(parameters.values()), retain_graph=retain_graph, allow_unused=True)
    by_name = dict(zip(parameters, gradients, strict=True))
    for target in targets:
        if (gradient := by_name[target.parameter]) is None:
            if not target.is_expert:
                raise unused(target)
            gradient = torch.zeros_like(target.owned)
        yield target, target.matrix_in(gradient.contiguous())


def unused(target: Target) -> ValueError:
    """The error for a matrix on which the output does not depend."""
    return ValueError(f"the model's output does not depend on {target.name}; leave it out with exclude")


def _loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    output, labels = batch.run(model), batch.labels
    try:
        logits = logits_of(output).float()
    except TypeError:
        raise ValueError(
            f"score='mfac' needs the loss of a model with a head, and {type(model).__name__} gives no logits; use "
            "another score"
        ) from None
    if logits.dim() == 3 and labels is not None:
        if batch.mask is not None:
            labels = labels.masked_fill(~batch.mask, -100)
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    if labels is None:
        predicted = logits.detach().softmax(-1).cpu()
        labels = torch.multinomial(predicted.flatten(0, -2), 1, generator=generator).squeeze(-1).to(logits.device)
    return cross_entropy(logits.flatten(0, -2), labels.flatten())
