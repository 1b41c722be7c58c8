"""Clipping of AdamW's updates by their root mean square (Shazeer and Stern, arXiv 1804.04235, section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.reference.quantization import dequantize
from leanstep.kernels.steps.common import compute_dtype, constant
from leanstep.optimizers.common.base import Batch
from leanstep.optimizers.common.column_shards import cuts_rows
from leanstep.optimizers.common.quantized import average_values, scale_key
from leanstep.optimizers.common.sharding import Reducer, Shard, local, sum_over_shards

# entries that are looked at together: temporaries have this size, not that of a tensor. In a CPU's caches; a GPU's
# kernels take longer to launch.
_PIECE = {"cpu": 2**15}
_LARGE_PIECE = 2**24


def adamw_update(
    average: Tensor, square: Tensor, gradient: Tensor, step: Tensor, betas: tuple[float, float], eps: float
) -> Tensor:
    """Return U = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps), with m and v updated by the gradient.

    Args:
        average, square, gradient: of one dtype, fp32 or fp64; ``average`` and ``square`` before the step.
        step: t, with this step.
    """
    beta1, beta2 = betas
    average = beta1 * average + (1.0 - beta1) * gradient
    square = beta2 * square + (1.0 - beta2) * gradient.square()
    first, second = ((1.0 - beta**step).to(average.dtype) for beta in betas)
    return (average / first) / ((square / second).sqrt() + eps)


def clip_factor(mean_square: Tensor, threshold: float) -> Tensor:
    """Return 1 / max(1, RMS(U) / threshold); 1 for NaN."""
    rms = mean_square.sqrt()
    return torch.where(rms > threshold, threshold / rms, 1.0)


def clip_factors(grads: list[Tensor], batch: Batch, factors: Tensor) -> Reducer[None]:
    """Write the factors of the updates of a batch, by their root mean squares in the whole parameters.

    Args:
        grads: this process's shards.
        factors: [n], fp64; fp32 where the device has no fp64.
    """
    group = batch.group
    for i, (grad, state, shard) in enumerate(zip(grads, batch.states, batch.shards, strict=True)):
        step = state["step"].to(factors.device, factors.dtype) + 1
        factors[i] = 0.0
        for average, square, gradient in _pieces(grad, state, shard):
            gradient = -gradient if group["maximize"] else gradient
            update = adamw_update(average, square, gradient, step, group["betas"], group["eps"])
            factors[i] += update.square().sum(dtype=factors.dtype)
    yield from sum_over_shards(factors, batch.shards)
    sizes = constant([max(param.numel(), 1) for param in batch.params], factors.device, factors.dtype)
    factors.copy_(clip_factor(factors / sizes, group["clip_threshold"]))


def _pieces(grad: Tensor, state: dict[str, Any], shard: Shard) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Iterate over rows of (average, square, gradient), in fp32 or fp64."""
    dtype, keys = compute_dtype(grad.dtype), ("exp_avg", "exp_avg_sq")
    moments = [local(state[key]) for key in keys]
    scales: list[Tensor | None] = [None, None]
    if scale_key("exp_avg") in state:
        if cuts_rows(shard):
            moments = [average_values(state, key, shard, dtype) for key in keys]
        else:
            scales = [local(state[scale_key(key)]) for key in keys]
    if grad.dim() == 0:
        grad, moments = grad.unsqueeze(0), [moment.unsqueeze(0) for moment in moments]
    count = max(_PIECE.get(grad.device.type, _LARGE_PIECE) // max(grad.shape[1:].numel(), 1), 1)
    for first in range(0, len(grad), count):
        rows = slice(first, first + count)
        average, square = (
            moment[rows].to(dtype) if scale is None else dequantize(moment[rows], scale[rows], dtype)
            for moment, scale in zip(moments, scales, strict=True)
        )
        yield average, square, grad[rows].to(dtype)
