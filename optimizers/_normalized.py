"""The step of SinkGD on a list of matrices: momentum, masks, scales, operator norm, update."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import Scales, scaled_step, sinkhorn, use_backend
from leanstep.kernels.reference.scaled_step import scaled_update
from leanstep.optimizers._adamw import nonfinite_flags
from leanstep.optimizers._base import count_nonfinite, local
from leanstep.optimizers._rounding import STATE_KEY, seeds_for
from leanstep.optimizers._sharding import Shard, all_reduce_sum, shard_of

# power iterations at the first step, when the vector is a guess, and at every later one
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
    hyper: Tensor,
) -> None:
    """Normalise and apply, for matrices of one device and dtype; parameters and state in place."""
    shards = [shard_of(p) for p in params]
    if group["foreach"] is False and len(params) > 1:
        for i in range(len(params)):
            step(
                [params[i]], [grads[i]], [states[i]], [indices[i]],
                group=group, algorithm=algorithm, rounding=rounding, hyper=hyper,
            )  # fmt: skip
        return
    if group["foreach"] is False:
        with use_backend("reference"):
            _step(params, grads, states, indices, shards, group, algorithm, rounding, hyper)
        return
    _step(params, grads, states, indices, shards, group, algorithm, rounding, hyper)


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    indices: list[int],
    shards: list[Shard],
    group: dict[str, Any],
    algorithm: str,
    rounding: str,
    hyper: Tensor,
) -> None:
    weights = [local(p) for p in params]
    gradients = [as_matrices(local(g)) for g in grads]
    if group["maximize"]:
        gradients = [-g for g in gradients]
    bad = None
    mats = gradients
    if group["momentum"]:
        if group["nonfinite"] == "skip":
            bad = nonfinite_flags(gradients, [s.process_group for s in shards])
        if group["momentum_order"] == "pre" or algorithm == "balanced":
            mats = [
                _average(state, gradient, group, algorithm, _flag(bad, i))
                for i, (state, gradient) in enumerate(zip(states, gradients, strict=True))
            ]
    if group["row_mask_tau"] > 0:
        mats = mask_rows(mats, params, shards, group["row_mask_tau"])
    scales = normalise(mats, params, shards, group["num_iters"], end_with_rows=algorithm == "balanced")
    if group["spectral"] is not None:
        scales = pin_operator_norm(mats, scales, states, params, shards, group["spectral"])
    if group["base_width"] is not None:
        for rows, mat in zip(scales.rows, mats, strict=True):
            rows.mul_(group["base_width"] / mat.shape[-1])
    if bad is not None:
        for cols, flag in zip(scales.cols, bad, strict=True):
            cols.masked_fill_(flag > 0, math.nan)
    if group["momentum"] and group["momentum_order"] == "post" and algorithm != "balanced":
        mats, scales = _average_after(mats, scales, states, group, bad)
    count_nonfinite(group, _apply(weights, mats, scales, states, indices, shards, group, rounding, hyper))


def as_matrices(tensor: Tensor) -> Tensor:
    """(m, n) and stacks (e, m, n) as they are; four and more dimensions (convolutions) as (m, rest)."""
    return tensor.flatten(1) if tensor.dim() > 3 else tensor


def _flag(bad: Tensor | None, i: int) -> Tensor | None:
    return None if bad is None else bad[i] > 0


def _average(state: dict[str, Any], grad: Tensor, group: dict[str, Any], algorithm: str, bad: Tensor | None) -> Tensor:
    """Update the momentum with the gradient (not with a non-finite one) and return what is to be normalised."""
    buffer = as_matrices(local(state["momentum_buffer"]))
    weight = 1.0 - group["momentum"]
    new = buffer.lerp(grad.to(buffer.dtype), weight)
    if bad is not None:
        new = torch.where(bad, buffer, new)
    local(state["momentum_buffer"]).copy_(new.view_as(local(state["momentum_buffer"])))
    if not (group["nesterov"] or algorithm == "balanced"):
        return new
    return new.lerp(grad.to(new.dtype), weight)


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


def rows_shared(param: Tensor, shard: Shard) -> bool:
    """Whether the matrices of a shard are cut: rows of one matrix lie on several processes."""
    return shard.process_group is not None and param.dim() != 3


def normalise(
    mats: list[Tensor], params: list[Tensor], shards: list[Shard], num_iters: int, *, end_with_rows: bool
) -> Scales:
    """Row and column scales; matrices whose rows are spread over processes share one all-reduce per iteration."""
    cut = [i for i, (p, s) in enumerate(zip(params, shards, strict=True)) if rows_shared(p, s)]
    if not cut:
        return sinkhorn(mats, num_iters, end_with_rows=end_with_rows)
    whole = [i for i in range(len(mats)) if i not in set(cut)]
    parts: list[tuple[list[int], Scales]] = []
    if whole:
        parts.append((whole, sinkhorn([mats[i] for i in whole], num_iters, end_with_rows=end_with_rows)))
    groups = {id(shards[i].process_group): shards[i].process_group for i in cut}
    for key, process_group in groups.items():
        members = [i for i in cut if id(shards[i].process_group) == key]

        def reduce(flat: Tensor, process_group: Any = process_group) -> None:
            all_reduce_sum(flat, process_group)

        scales = sinkhorn(
            [mats[i] for i in members],
            num_iters,
            end_with_rows=end_with_rows,
            rows_total=[shards[i].rows_total for i in members],
            cols_total=[mats[i].shape[-1] for i in members],
            all_reduce=reduce,
        )
        parts.append((members, scales))
    if len(parts) == 1:
        return parts[0][1]
    return _merge(parts, len(mats))


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


def mask_rows(mats: list[Tensor], params: list[Tensor], shards: list[Shard], tau: float) -> list[Tensor]:
    """Copies in which rows of norm at most tau * (mean row norm of the matrix) are zero."""
    masked = []
    for mat, param, shard in zip(mats, params, shards, strict=True):
        norms = torch.linalg.vector_norm(mat, dim=-1, dtype=torch.float32)
        total = norms.sum(dim=-1, keepdim=True)
        count = mat.shape[-2]
        if rows_shared(param, shard):
            all_reduce_sum(total, shard.process_group)
            count = shard.rows_total
        keep = ~(norms <= tau * total / count)  # NaN norms are kept: the matrix is skipped later
        masked.append(mat * keep.unsqueeze(-1))
    return masked


def init_power_vector(state: dict[str, Any], param: Tensor) -> None:
    """Start of the power iteration: the same for every matrix, no direction favoured by sign patterns."""
    if "power_vector" in state:
        return
    like = as_matrices(local(param))
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(like.shape[-1], generator=generator).to(like.device)
    state["power_vector"] = vector.expand(*like.shape[:-2], like.shape[-1]).clone()


def pin_operator_norm(
    mats: list[Tensor],
    scales: Scales,
    states: list[dict[str, Any]],
    params: list[Tensor],
    shards: list[Shard],
    spectral: str,
) -> Scales:
    """Multiply the row scales so that the operator norm of every update is 1 ("unit") or sqrt(m / n) ("muon").

    The norm is estimated from below by power iteration on diag(r) G diag(c), warm-started from the last step.
    """
    for i, (mat, rows, cols, state) in enumerate(zip(mats, scales.rows, scales.cols, states, strict=True)):
        cut = rows_shared(params[i], shards[i])
        first = "power_steps" not in state
        state.setdefault("power_steps", torch.zeros((), dtype=torch.float32))
        state["power_steps"] += 1
        vector = state["power_vector"]
        update = scaled_update(mat, rows.unsqueeze(-1), cols.unsqueeze(-2))
        norm = vector.new_zeros(())
        new = vector
        for _ in range(_FIRST_POWER_STEPS if first else _POWER_STEPS):
            unit = new / torch.linalg.vector_norm(new, dim=-1, keepdim=True).clamp_min(1e-30)
            image = (update @ unit.unsqueeze(-1)).squeeze(-1)
            square = image.square().sum(dim=-1, keepdim=True)
            new = (image.unsqueeze(-2) @ update).squeeze(-2)
            if cut:
                both = torch.cat([square, new])
                all_reduce_sum(both, shards[i].process_group)
                square, new = both[:1], both[1:]
            norm = square.sqrt()
        finite = torch.isfinite(new).all(dim=-1, keepdim=True) & (norm > 0)
        vector.copy_(torch.where(finite, new, vector))
        m = shards[i].rows_total if mat.dim() == 2 else mat.shape[-2]
        target = 1.0 if spectral == "unit" else math.sqrt(m / mat.shape[-1])
        rows.mul_(torch.where(norm > 0, target / norm, torch.ones_like(norm)))
    return scales


def _apply(
    weights: list[Tensor],
    mats: list[Tensor],
    scales: Scales,
    states: list[dict[str, Any]],
    indices: list[int],
    shards: list[Shard],
    group: dict[str, Any],
    rounding: str,
    hyper: Tensor,
) -> Tensor:
    """Write the update into the weights; returns the non-finite flags."""
    matrices = [as_matrices(w) for w in weights]
    extras = [as_matrices(local(s[STATE_KEY[rounding]])) for s in states] if rounding in STATE_KEY else []
    seeds = offsets = None
    if rounding == "stochastic":
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1)
        seeds = seeds_for(steps, indices, group["seed"], weights[0].device)
        offsets = torch.tensor([s.offset for s in shards], device=weights[0].device)
    flags = scaled_step(
        matrices, mats, scales.rows, scales.cols, extras,
        hyper=hyper, rounding=rounding, skip_nonfinite=group["nonfinite"] != "pass", seeds=seeds, offsets=offsets,
    )  # fmt: skip
    for weight, matrix in zip(weights, matrices, strict=True):
        if matrix.data_ptr() != weight.data_ptr():  # flattening had to copy (a permuted convolution)
            weight.copy_(matrix.view_as(weight))
    for i, extra in enumerate(extras):
        kept = local(states[i][STATE_KEY[rounding]])
        if extra.data_ptr() != kept.data_ptr():
            kept.copy_(extra.view_as(kept))
    return flags
