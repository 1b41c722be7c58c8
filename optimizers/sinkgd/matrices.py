"""The step of SinkGD on a list of matrices: momentum, masks, scales, operator norm, update."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import Scales, StepOptions, scaled_step, sinkhorn, sinkhorn_step, use_backend
from leanstep.kernels.matrices.sinkhorn import sinkhorn_of_columns, sinkhorn_of_rows
from leanstep.kernels.reference.rounding import hash32
from leanstep.kernels.reference.steps.scaled_step import scaled_update
from leanstep.kernels.steps.common import compute_dtype, nonfinite_flags
from leanstep.optimizers.common.base import count_nonfinite, local
from leanstep.optimizers.common.matrices import as_matrices, matrix_shape, oriented, write_back
from leanstep.optimizers.common.rounding import rounding_states, seeds_and_offsets
from leanstep.optimizers.common.sharding import Reduction, Shard, Steps, cut, like_rows, shard_of, together
from leanstep.optimizers.sinkgd.adamw import share_flags

# power iterations at the first usable gradient, when the vector is a guess, and at every later one
_FIRST_POWER_STEPS, _POWER_STEPS = 20, 1


def step(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    indices: list[int],
    *,
    group: dict[str, Any],
    algorithm: str,
    rounding: str,
    scalars: Tensor,
) -> Steps[None]:
    """Normalise and apply, for matrices of one device and dtype; parameters and state in place."""
    shards = [shard_of(p) for p in params]
    if group["foreach"] is not False:
        yield from _step(params, grads, states, indices, shards, group, algorithm, rounding, scalars)
        return
    for p, g, state, index, shard in zip(params, grads, states, indices, shards, strict=True):
        yield from _step([p], [g], [state], [index], [shard], group, algorithm, rounding, scalars)


def _backend(group: dict[str, Any]) -> AbstractContextManager[object]:
    """The backend a group asks for. Never held while a rule waits: others run meanwhile."""
    return use_backend("reference") if group["foreach"] is False else nullcontext()


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    indices: list[int],
    shards: list[Shard],
    group: dict[str, Any],
    algorithm: str,
    rounding: str,
    scalars: Tensor,
) -> Steps[None]:
    stored, transposed, flatten = shards, group["transposed"], group["flatten"]
    shards = [oriented(s, transposed, flatten) for s in stored]
    cuts = [cut(s) for s in shards]
    weights = [local(p) for p in params]
    gradients = [as_matrices(local(g), transposed, flatten) for g in grads]
    if group["maximize"]:
        gradients = [-g for g in gradients]
    bad = None
    mats = gradients
    if group["momentum"]:
        if group["nonfinite"] == "skip":
            bad = nonfinite_flags(gradients)
            yield from share_flags(bad, shards)
        if group["momentum_order"] == "pre" or algorithm == "balanced":
            mats = [
                _average(state, gradient, group, algorithm, _flag(bad, i))
                for i, (state, gradient) in enumerate(zip(states, gradients, strict=True))
            ]
    if group["row_mask_tau"] > 0:
        norms = [torch.linalg.vector_norm(mat, dim=-1, dtype=compute_dtype(mat.dtype)) for mat in mats]
        totals = [n.sum(dim=-1, keepdim=True) for n in norms]
        if any(cuts):
            yield from share_norms(norms, totals, shards, cuts)
        mats = mask_rows(mats, norms, totals, shards, group["row_mask_tau"])
    end_with_rows = algorithm == "balanced"
    plain = not (group["momentum"] or group["spectral"] or transposed) and group["base_width"] is None
    if plain and not any(cuts):
        flags = _apply(weights, mats, end_with_rows, states, indices, stored, group, rounding, scalars)
        count_nonfinite(group, flags)
        return
    if any(cuts):
        scales = yield from normalise(mats, shards, cuts, group, end_with_rows=end_with_rows)
    else:
        with _backend(group):
            scales = sinkhorn(mats, group["num_iters"], end_with_rows=end_with_rows)
    if group["spectral"] is not None:
        yield from pin_operator_norm(mats, scales, states, shards, cuts, group["spectral"])
    if group["base_width"] is not None:
        for rows, shard in zip(scales.rows, shards, strict=True):
            rows.mul_(group["base_width"] / matrix_shape(shard)[1])
    if bad is not None:
        for cols, flag in zip(scales.cols, bad, strict=True):
            cols.masked_fill_(flag > 0, math.nan)
    if group["momentum"] and group["momentum_order"] == "post" and algorithm != "balanced":
        mats, scales = _average_after(mats, scales, states, group, bad)
    if transposed:
        mats, scales = [m.mT for m in mats], _swapped(scales)
    count_nonfinite(group, _apply(weights, mats, scales, states, indices, stored, group, rounding, scalars))


def _swapped(scales: Scales) -> Scales:
    """Scales of the transposed matrices. A matrix that is not finite has NaN in all its columns: they keep that."""
    bad = [torch.isnan(cols).any(dim=-1, keepdim=True) for cols in scales.cols]
    for rows, flag in zip(scales.rows, bad, strict=True):
        rows.masked_fill_(flag, math.nan)
    return Scales(scales.cols, scales.rows, scales.flat_cols, scales.flat_rows)


def _flag(bad: Tensor | None, i: int) -> Tensor | None:
    return None if bad is None else bad[i] > 0


def _average(state: dict[str, Any], grad: Tensor, group: dict[str, Any], algorithm: str, bad: Tensor | None) -> Tensor:
    """Update the momentum with the gradient (not with a non-finite one) and return what is to be normalised."""
    buffer = as_matrices(local(state["momentum_buffer"]), group["transposed"], group["flatten"])
    wide = compute_dtype(buffer.dtype)  # rounded once, into the buffer; what is normalised is not rounded
    weight = 1.0 - group["momentum"]
    new = buffer.to(wide).lerp(grad.to(wide), weight)
    if bad is not None:
        new = torch.where(bad, buffer.to(wide), new)
    whole = local(state["momentum_buffer"])
    whole.copy_(new.mT if group["transposed"] else new.view_as(whole))
    if not (group["nesterov"] or algorithm == "balanced"):
        return new
    return new.lerp(grad.to(wide), weight)


def _average_after(
    mats: list[Tensor], scales: Scales, states: list[dict[str, Any]], group: dict[str, Any], bad: Tensor | None
) -> tuple[list[Tensor], Scales]:
    """Average the normalised gradients; the averages, with scales of 1 (NaN where the gradient was not finite)."""
    updates = []
    for i, (mat, rows, cols, state) in enumerate(zip(mats, scales.rows, scales.cols, states, strict=True)):
        normalised = scaled_update(mat, rows.unsqueeze(-1), cols.unsqueeze(-2))
        updates.append(_average(state, normalised, group, "sinkgd", _flag(bad, i)))
        keep = torch.isnan(cols).any(dim=-1, keepdim=True)
        rows.fill_(1.0)
        cols.copy_(torch.where(keep, math.nan, torch.ones_like(cols)))
    return updates, scales


def normalise(
    mats: list[Tensor], shards: list[Shard], cuts: list[str | None], group: dict[str, Any], *, end_with_rows: bool
) -> Steps[Scales]:
    """Row and column scales; matrices that are cut the same way share one reduction per iteration."""
    alike: dict[Any, list[int]] = {}
    for i, (how, shard) in enumerate(zip(cuts, shards, strict=True)):
        alike.setdefault((how, shard.groups if how else ()), []).append(i)
    parts = [
        _normalise_alike([mats[i] for i in members], [shards[i] for i in members], how, group, end_with_rows)
        for (how, _), members in alike.items()
    ]
    found = yield from together(parts)
    if len(found) == 1:
        return found[0]
    return _merge(list(zip(alike.values(), found, strict=True)), len(mats))


def _normalise_alike(
    mats: list[Tensor], shards: list[Shard], how: str | None, group: dict[str, Any], end_with_rows: bool
) -> Steps[Scales]:
    """Scales of matrices that are all whole, or all cut the same way over the same processes."""
    num_iters = group["num_iters"]
    if how is None:
        with _backend(group):
            return sinkhorn(mats, num_iters, end_with_rows=end_with_rows)
    if how == "rows":
        rows_total = [matrix_shape(s)[0] for s in shards]
        rule = sinkhorn_of_rows(mats, num_iters, end_with_rows=end_with_rows, rows_total=rows_total)
    else:
        cols_total = [matrix_shape(s)[1] for s in shards]
        rule = sinkhorn_of_columns(mats, num_iters, end_with_rows=end_with_rows, cols_total=cols_total)
    while True:
        try:
            with _backend(group):
                partial, op = next(rule)
        except StopIteration as end:
            return end.value
        yield [Reduction(partial, shards[0].groups[0], op)]


def _merge(parts: list[tuple[list[int], Scales]], count: int) -> Scales:
    """Scales of several calls in the order of the whole list, in flat buffers again."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for members, scales in parts:
        found.update(zip(members, zip(scales.rows, scales.cols, strict=True), strict=True))
    rows, cols = ([found[i][k] for i in range(count)] for k in (0, 1))
    flat_rows, flat_cols = (torch.cat([t.reshape(-1) for t in ts]) for ts in (rows, cols))
    views = [
        [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in ts]), ts, strict=True)]
        for flat, ts in ((flat_rows, rows), (flat_cols, cols))
    ]
    return Scales(views[0], views[1], flat_rows, flat_cols)


def share_norms(norms: list[Tensor], totals: list[Tensor], shards: list[Shard], cuts: list[str | None]) -> Steps[None]:
    """Make norms of rows and their totals those of the whole matrices, in place."""
    columns = [i for i, how in enumerate(cuts) if how == "columns"]
    if columns:
        for i in columns:
            norms[i].square_()
        yield [Reduction(norms[i], shards[i].groups[0]) for i in columns]
        for i in columns:
            norms[i].sqrt_()
            totals[i].copy_(norms[i].sum(dim=-1, keepdim=True))
    rows = [i for i, how in enumerate(cuts) if how == "rows"]
    if rows:
        yield [Reduction(totals[i], shards[i].groups[0]) for i in rows]


def mask_rows(
    mats: list[Tensor], norms: list[Tensor], totals: list[Tensor], shards: list[Shard], tau: float
) -> list[Tensor]:
    """Copies in which rows of norm at most tau * (mean row norm of the matrix) are zero."""
    masked = []
    for mat, norm, total, shard in zip(mats, norms, totals, shards, strict=True):
        keep = ~(norm <= tau * total / matrix_shape(shard)[0])  # NaN norms are kept: the matrix is skipped later
        masked.append(mat * keep.unsqueeze(-1))
    return masked


def init_power_vector(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    """Room for the vector of the power iteration; zero until a gradient was usable.

    Shape [n], or [e, n] for a stack of matrices, whole on every process; a stack that is cut along its matrices has
    its vectors cut with it.
    """
    if "power_vector" in state:
        return
    shard = oriented(shard_of(param), group["transposed"], group["flatten"])
    stacked = len(shard.shape) == 3
    size = (local(param).shape[0],) if stacked else ()
    vector = torch.zeros(*size, matrix_shape(shard)[1], device=local(param).device, dtype=compute_dtype(param.dtype))
    if stacked and shard.groups and shard.dim == 0:
        vector = like_rows(param, vector)
    state["power_vector"] = vector


def pin_operator_norm(
    mats: list[Tensor],
    scales: Scales,
    states: list[dict[str, Any]],
    shards: list[Shard],
    cuts: list[str | None],
    spectral: str,
) -> Steps[None]:
    """Multiply the row scales so that the operator norm of every update is 1 ("unit") or sqrt(m / n) ("muon").

    The norm is estimated from below by power iteration on diag(r) G diag(c), warm-started from the last step.
    """
    if "columns" in cuts:
        raise ValueError("SinkGD: spectral takes matrices that are whole or sharded along rows (dimension 0)")
    parts: list[Steps[None]] = []
    for i, (mat, rows, cols, state) in enumerate(zip(mats, scales.rows, scales.cols, states, strict=True)):
        if shards[i].shape.numel() == 0:
            continue
        group = shards[i].groups[0] if cuts[i] else None
        m, n = matrix_shape(shards[i])
        target = 1.0 if spectral == "unit" else math.sqrt(m / n)
        parts.append(_pin_one(mat, rows, cols, state, group, target))
    yield from together(parts)


def _pin_one(
    mat: Tensor, rows: Tensor, cols: Tensor, state: dict[str, Any], process_group: Any, target: float
) -> Steps[None]:
    """Multiply ``rows`` so that diag(rows) mat diag(cols) has norm ``target``; the state's vector is the iterate.

    ``process_group``: whose shards of rows make up the matrix; None when it is whole. A matrix of a stack is cold
    while its vector is zero. ``power_warm``, on the CPU, says that none is: then nothing is read from the device.
    A trace cannot look: it takes the first step for the one that warms up, whatever its gradient.
    """
    tracing = torch.compiler.is_compiling()
    cold = "power_warm" not in state or (not tracing and not state["power_warm"])
    vector = local(state["power_vector"])
    known = vector.any(dim=-1, keepdim=True)
    update = scaled_update(mat, rows.unsqueeze(-1), cols.unsqueeze(-2))
    new = torch.where(known, vector, _first_vector(vector))
    norm = usable = vector.new_zeros(())
    for done in range(_FIRST_POWER_STEPS if cold else _POWER_STEPS):
        # no matrix is cold and has a gradient that would warm it up
        if done == 1 and not tracing and not (usable & ~known).any():
            break
        unit = new / torch.linalg.vector_norm(new, dim=-1, keepdim=True).clamp_min(1e-30)
        image = (update @ unit.unsqueeze(-1)).squeeze(-1)
        new = (image.unsqueeze(-2) @ update).squeeze(-2)
        square = image.square().sum(dim=-1, keepdim=True)
        if process_group is not None:
            yield [Reduction(square, process_group), Reduction(new, process_group)]
        norm = square.sqrt()
        usable = torch.isfinite(new).all(dim=-1, keepdim=True) & (norm > 0)
    vector.copy_(torch.where(usable, new, vector))
    if cold:
        state["power_warm"] = (known | usable).all().cpu()
    rows.mul_(torch.where(norm > 0, target / norm, torch.ones_like(norm)))


def _first_vector(like: Tensor) -> Tensor:
    """Start of the power iteration: the same for every matrix, no direction favoured by sign patterns."""
    index = torch.arange(like.shape[-1], device=like.device)
    return (hash32(index, 0).to(like.dtype) / 2**31).expand_as(like)


def _apply(
    weights: list[Tensor],
    mats: list[Tensor],
    scales: Scales | bool,
    states: list[dict[str, Any]],
    indices: list[int],
    shards: list[Shard],
    group: dict[str, Any],
    rounding: str,
    scalars: Tensor,
) -> Tensor:
    """Write the update into the weights; returns the non-finite flags.

    ``scales``: those of the matrices, or, where they are still to be found, ``end_with_rows``.
    """
    seeds, offsets = seeds_and_offsets(rounding, states, indices, shards, group["seed"], scalars.device)
    options = StepOptions(scalars, rounding, skip_nonfinite=group["nonfinite"] != "pass", seeds=seeds, offsets=offsets)

    def step(matrices: list[Tensor], kept: list[Tensor]) -> Tensor:
        with _backend(group):
            if isinstance(scales, bool):
                return sinkhorn_step(matrices, mats, kept, options, num_iters=group["num_iters"], end_with_rows=scales)
            return scaled_step(matrices, mats, scales.rows, scales.cols, kept, options)

    return write_back(step, weights, rounding_states(states, rounding), [not group["flatten"]] * len(weights))
