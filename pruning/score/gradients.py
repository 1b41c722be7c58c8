"""Collect gradients of the loss, sample by sample, for M-FAC."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from leanstep.pruning.measure.batches import Batch
from leanstep.pruning.measure.blocks import whole_on_device
from leanstep.pruning.measure.metrics import logits_of
from leanstep.pruning.score.base import GRADIENTS
from leanstep.pruning.score.targets import Target, as_matrix


def collect_gradients(model: nn.Module, batches: Sequence[Batch], targets: Sequence[Target]) -> dict[str, Tensor]:
    """Gradients of the loss of the first 128 single samples, fp32 [samples, out * in] per layer.

    The loss is the mean cross-entropy over a sample's labels; without labels, over classes drawn from the model's own
    predictions, as in the definition of the Fisher matrix.
    """
    parameters = {target.parameter: getattr(target.module, target.attribute) for target in targets}
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    rows: dict[str, list[Tensor]] = {target.name: [] for target in targets}
    generator = torch.Generator().manual_seed(0)
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with whole_on_device(model):
            singles = (batch.sample(row) for batch in batches for row in range(batch.size))
            for single in islice(singles, GRADIENTS):
                with torch.enable_grad():
                    loss = _loss(model, single, generator)
                    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                by_name = dict(zip(parameters, gradients, strict=True))
                for target in targets:
                    gradient = by_name[target.parameter]
                    if gradient is None:
                        if not target.is_expert:
                            raise ValueError(
                                f"the model's output does not depend on {target.name}; leave it out with exclude"
                            )
                        gradient = torch.zeros_like(parameters[target.parameter])
                    matrix = gradient if target.expert is None else gradient[target.expert]
                    rows[target.name].append(as_matrix(matrix.contiguous(), target.layout).reshape(-1).float())
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return {name: torch.stack(per_sample) for name, per_sample in rows.items()}


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
