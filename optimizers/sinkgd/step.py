"""The step of SinkGD's matrices: momentum, masked rows, normalization, update."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from leanstep.kernels import Scales, StepOptions, scaled_step, sinkhorn_step
from leanstep.kernels.steps.average_int8 import average_step_int8
from leanstep.kernels.steps.common import compute_dtype, nonfinite_flags
from leanstep.optimizers.common.base import Batch, count_nonfinite, step_decoded
from leanstep.optimizers.common.matrices import WHOLE, as_matrices, matrix_shape, oriented, sides_of, write_back
from leanstep.optimizers.common.quantized import average_codes, average_options, scale_key
from leanstep.optimizers.common.sharding import Reducer, all_reduce_flags, local, locals_of, readables, store
from leanstep.optimizers.sinkgd import rule
from leanstep.optimizers.sinkgd.blocks import flags_of_parameters, in_blocks, in_parts, parameters_of
from leanstep.optimizers.sinkgd.sharded import all_reduce_row_norms, normalize
from leanstep.optimizers.sinkgd.spectral import pin_operator_norms


def step_matrices(batch: Batch, *, balanced: bool, wide: bool) -> Reducer[None]:
    """Update the matrices of a batch, and their state, in place; ``wide``: with momenta of 8 bits in fp32 meanwhile."""
    if not wide:
        yield from _step_blocks(batch, balanced=balanced)
        return
    for part in in_parts(batch):
        yield from step_decoded(part, "momentum_buffer", partial(_step_blocks, balanced=balanced))


def _step_blocks(batch: Batch, *, balanced: bool) -> Reducer[None]:
    """Update the matrices of a batch, and their state, in place; each block of a matrix as a matrix."""
    if batch.group["blocks"] is None:
        for part in in_parts(batch):
            yield from _step_whole(part, balanced=balanced)
        return
    weights = readables(batch.params)
    blocks = in_blocks(batch, weights)
    if blocks.params:
        yield from _step_whole(blocks, balanced=balanced)
    if batch.rounding == "stochastic":
        # a saved state has one count for all processes, also those without a matrix of a stack
        stepped = parameters_of(blocks.indices)
        idle = [s["step"] for s, index in zip(batch.states, batch.indices, strict=True) if index not in stepped]
        if idle:
            torch._foreach_add_(idle, 1)
    store(weights, batch.params)


def _step_whole(batch: Batch, *, balanced: bool) -> Reducer[None]:
    """Update matrices, each normalized as a whole, and their state, in place, in the order of SinkGD's docstring."""
    group, states = batch.group, batch.states
    transposed, flatten, momentum = group["transposed"], group["flatten"], group["momentum"]
    shards = [oriented(s, transposed, flatten) for s in batch.shards] if transposed or flatten else batch.shards
    sides = [sides_of(s) if s.cuts else WHOLE for s in shards]
    split = any([side.rows or side.columns for side in sides])
    matrices = [as_matrices(g, transposed, flatten) for g in locals_of(batch.grads)]
    if group["maximize"]:
        matrices = [-g for g in matrices]
    weights = locals_of(batch.params)
    scalars = rule.step_scalars(group["lr"], group["scale"], group["weight_decay"], weights[0])
    seeded = scale_key("momentum_buffer") in states[0]
    options = batch.options(scalars, seeded=seeded, decay_where_aligned=group["cautious_decay"])
    momentum_last = group["momentum_order"] == "post" and not balanced
    nonfinite = None
    if momentum:
        if group["nonfinite"] == "skip":
            nonfinite = nonfinite_flags(matrices)
            yield from all_reduce_flags(nonfinite, shards)
        if not momentum_last:
            matrices = _average(matrices, batch, nonfinite, options, nesterov=balanced or group["nesterov"])
    if balanced:
        norms = [rule.row_norms(g) for g in matrices]
        heights = [matrix_shape(shard)[0] for shard in shards]
        means = [rule.mean_norm(*each) for each in zip(norms, heights, strict=True)]
        yield from all_reduce_row_norms(norms, means, heights, sides)
        matrices = [rule.mask_rows(*each, rule.QUIET) for each in zip(matrices, norms, means, strict=True)]
    if not (momentum or group["spectral"] or transposed or group["base_width"] or split):
        _write(batch, matrices, None, options, end_with_rows=balanced)
        return
    if split:  # not by a generator otherwise: torch.compile loses its return value
        scales = yield from normalize(matrices, shards, sides, group["num_iters"], end_with_rows=balanced)
    else:
        scales = rule.normalize(matrices, group["num_iters"], end_with_rows=balanced)
    if group["spectral"] is not None:
        yield from pin_operator_norms(matrices, scales, states, shards, sides, group["spectral"])
    if group["base_width"] is not None:
        for row_scales, shard in zip(scales.rows, shards, strict=True):
            row_scales.mul_(group["base_width"] / max(matrix_shape(shard)[1], 1))
    if nonfinite is not None:
        for cols, flag in zip(scales.cols, nonfinite, strict=True):
            cols.masked_fill_(flag > 0, math.nan)
    if momentum and momentum_last:
        normalized = [rule.scaled(*each) for each in zip(matrices, scales.rows, scales.cols, strict=True)]
        matrices = _average(normalized, batch, nonfinite, options, nesterov=group["nesterov"])
        _reset(scales)
    if transposed:
        matrices, scales = [g.mT for g in matrices], _transposed(scales)
    _write(batch, matrices, scales, options, end_with_rows=balanced)


def _average(
    matrices: list[Tensor], batch: Batch, nonfinite: Tensor | None, options: StepOptions, *, nesterov: bool
) -> list[Tensor]:
    group, averages = batch.group, []
    if scale_key("momentum_buffer") in batch.states[0]:
        return _average_int8(matrices, batch, nonfinite, options, nesterov=nesterov)
    for i, (matrix, state) in enumerate(zip(matrices, batch.states, strict=True)):
        stored = local(state["momentum_buffer"])
        buffer = as_matrices(stored, group["transposed"], group["flatten"])
        average = rule.momentum_average(buffer, matrix, group["momentum"])
        if nonfinite is not None:
            average = torch.where(nonfinite[i] > 0, buffer.to(average.dtype), average)
        stored.copy_(average.mT if group["transposed"] else average.view_as(stored))
        averages.append(rule.momentum_average(average, matrix, group["momentum"]) if nesterov else average)
    return averages


def _average_int8(
    matrices: list[Tensor], batch: Batch, nonfinite: Tensor | None, options: StepOptions, *, nesterov: bool
) -> list[Tensor]:
    """Do the same for momenta in 8 bits: :func:`rule.momentum_average` in one pass over gradients and codes."""
    group = batch.group
    codes, scales = average_codes(batch.states, "momentum_buffer")
    layouts = [g.mT if group["transposed"] else g.view_as(c) for g, c in zip(matrices, codes, strict=True)]
    averages = [
        torch.empty_like(c, dtype=compute_dtype(w.dtype)) for c, w in zip(codes, map(local, batch.params), strict=True)
    ]
    numbers = average_options(group["momentum"], averages[0], options.seeds, options.offsets)
    average_step_int8(layouts, codes, scales, averages, numbers, skip=nonfinite, nesterov=nesterov)
    return [as_matrices(average, group["transposed"], group["flatten"]) for average in averages]


def _reset(scales: Scales) -> None:
    """Set all scales to 1, for matrices that are already normalized; keep the NaN of non-finite matrices."""
    for rows, cols in zip(scales.rows, scales.cols, strict=True):
        nonfinite = torch.isnan(cols).any(dim=-1, keepdim=True)
        rows.fill_(1.0)
        cols.copy_(torch.where(nonfinite, math.nan, torch.ones_like(cols)))


def _transposed(scales: Scales) -> Scales:
    """Return the scales of the transposed matrices. All column scales of a non-finite matrix stay NaN."""
    for rows, cols in zip(scales.rows, scales.cols, strict=True):
        rows.masked_fill_(torch.isnan(cols).any(dim=-1, keepdim=True), math.nan)
    return Scales(scales.cols, scales.rows, scales.flat_cols, scales.flat_rows)


def _write(
    batch: Batch, matrices: list[Tensor], scales: Scales | None, options: StepOptions, *, end_with_rows: bool
) -> None:
    """Compute p = p * (1 - lr * scale * weight_decay) - lr * scale * X, and count non-finite matrices.

    Without ``scales`` one fused kernel normalizes the matrices and updates the parameters.
    """
    group = batch.group
    weights = locals_of(batch.params)

    def step(targets: list[Tensor], rounding_state: list[Tensor]) -> Tensor:
        if scales is not None:
            return scaled_step(targets, matrices, scales.rows, scales.cols, rounding_state, options)
        iterations = {"num_iters": group["num_iters"], "end_with_rows": end_with_rows}
        return sinkhorn_step(targets, matrices, rounding_state, options, **iterations)

    flags = write_back(step, weights, batch.rounding_state(), [not group["flatten"]] * len(weights))
    count_nonfinite(group, flags if group["blocks"] is None else flags_of_parameters(flags, batch.indices))
