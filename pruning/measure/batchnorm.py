"""Statistics of batch norms, which belong to the weights that they were taken with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from leanstep.pruning.measure.batches import as_batches

__all__ = ["renew_batch_norms"]


@torch.no_grad()
def renew_batch_norms(model: nn.Module, data: Any, *, batch_size: int = 256) -> int:
    """Take the running means and variances of a pruned model's batch norms anew; nothing else of it changes.

    Pruned weights give smaller outputs than the statistics in the checkpoint are of, which costs a convolutional
    network much of its accuracy where it is not fine-tuned. :func:`leanstep.pruning.prune` leaves them as they are:
    they are no weights, and curves are measured with them.

    Args:
        model: pruned; in whatever mode, which it is in afterwards.
        data: see :func:`leanstep.pruning.measure.batches.as_batches`; no labels are needed.
        batch_size: samples at once, where ``data`` is one tensor. Statistics are the mean over batches.

    Returns:
        How many batch norms there were.

    Raises:
        ValueError: no data. The statistics are as before after any error.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return 0
    batches = as_batches(data, model, batch_size=batch_size)
    modes = {module: module.training for module in model.modules()}
    before = [(norm.momentum, {name: value.clone() for name, value in norm.named_buffers()}) for norm in norms]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            # the mean over all batches, instead of one that forgets
            norm.momentum = None
            norm.train()
        for batch in batches:
            batch.run(model)
    except BaseException:
        for norm, (_, buffers) in zip(norms, before, strict=True):
            for name, value in norm.named_buffers():
                value.copy_(buffers[name])
        raise
    finally:
        for norm, (momentum, _) in zip(norms, before, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
    return len(norms)
