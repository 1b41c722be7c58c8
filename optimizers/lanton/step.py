"""The step of LANTON over all groups: noise first, then the factors of the layers, then momentum and update."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from leanstep.kernels._hyper import compute_dtype, constant
from leanstep.optimizers.common.base import by_device_and_dtype, count_nonfinite, local
from leanstep.optimizers.common.sharding import Shard, Steps, sum_over_shards
from leanstep.optimizers.lanton.matrices import dual_norms, step_matrices
from leanstep.optimizers.lanton.noise import (
    Layer,
    estimate_dtype,
    joined,
    layer_factors,
    new_estimates,
    write_back,
)
from leanstep.optimizers.lanton.routing import matrix_count
from leanstep.optimizers.lanton.update import (
    Found,
    Member,
    Update,
    apply,
    average,
    averaged,
    difference,
    difference_size,
    extra_of,
    here,
    keep_gradient,
    look_ahead,
    matrix_view,
    on_host,
)
from leanstep.optimizers.sinkgd.adamw import nonfinite_flags

# what is known of a matrix once its parts are summed over processes: the dual norm of the difference (of a vector, its
# square), whether the gradient is not finite, whether it has a nonzero entry, the square of a vector's new momentum
_DUAL, _BAD, _ACTIVE, _SQUARE = range(4)


def step(members: list[Member], layers: list[Layer]) -> Steps[None]:
    """Update all parameters that have a gradient; parameters and state in place.

    One reduction of a few numbers a matrix is all that the processes tell one another beside the matrices themselves:
    all of them then know every estimate, and find the same maxima.

    Args:
        members: the parameters that have a gradient.
        layers: every parameter with an estimate, whether it has a gradient now or not.
    """
    members = [m for m in members if m.param.numel() > 0]
    if not members:
        return
    device = local(members[0].param).device
    rows: list[slice] = []
    shards: list[Shard] = []
    for m in members:
        rows.append(slice(len(shards), len(shards) + matrix_count(m.group, m.norm, m.param)))
        shards += [m.shard] * matrix_count(m.group, m.norm, m.param)
    known = torch.zeros(len(shards), 4, dtype=estimate_dtype(device), device=device)
    _look(members, rows, known)
    if any(s.groups for s in shards):
        yield from sum_over_shards(known, shards)
    bad = known[constant([r.start for r in rows], device, torch.int64), _BAD] > 0
    _count(members, bad)
    _update_noise(members, rows, known, bad)
    factors = _factors(members, layers, device)
    found: list[Found] = []
    for m, r, factor, flag in zip(members, rows, factors, bad.unbind(), strict=True):
        there = local(m.param).device
        active = (known[r, _ACTIVE] > 0).to(there)
        found.append(Found(m, factor, flag.to(there), active, known[r.start, _SQUARE]))
    rounded = [m.state["step"] for m in members if m.rounding == "stochastic"]
    if rounded:
        torch._foreach_add_(rounded, 1)
    if on_host(known):
        found = [x for x in found if not x.bad]  # to read it is free here: nothing of them is touched
    for x in found:
        keep_gradient(x)
        average(x)
    _step_elementwise([x for x in found if x.member.norm != "rms"])
    step_matrices([x for x in found if x.member.norm == "rms"])


def _look(members: list[Member], rows: list[slice], known: Tensor) -> None:
    """Fill in this process's part of what is to be known."""
    checked = [i for i, m in enumerate(members) if m.group["nonfinite"] == "skip"]
    for places in by_device_and_dtype([members[i].param for i in checked]).values():
        flags = nonfinite_flags([local(members[checked[k]].grad) for k in places])
        starts = constant([rows[checked[k]].start for k in places], known.device, torch.int64)
        known[starts, _BAD] = flags.to(known)
    for member, r in zip(members, rows, strict=True):
        if member.layer >= 0 and (member.measures or member.keeps):
            grad = local(member.grad)
            active = grad.flatten(1).any(dim=1) if r.stop - r.start > 1 else _any(grad).view(1)
            here(member, known[r, _ACTIVE]).copy_(active)
        if member.norm == "vector":
            momentum = look_ahead(member, averaged(member))
            known[r.start, _SQUARE] = torch.linalg.vector_norm(momentum, dtype=known.dtype).square()
        if member.measures and member.norm != "rms":
            known[r.start, _DUAL] = _partial_dual(member, known.dtype)
    hidden = [i for i, m in enumerate(members) if m.measures and m.norm == "rms"]
    for place, first, norms in dual_norms([members[i] for i in hidden]):
        start = rows[hidden[place]].start + first
        known[start : start + norms.numel(), _DUAL] = norms.to(known)


def _any(grad: Tensor) -> Tensor:
    """Whether a gradient has a nonzero entry. On a CPU one among the first saves reading the rest."""
    start = grad.flatten()[:64] if on_host(grad) and grad.is_contiguous() else grad
    return start.any() if start is grad or bool(start.any()) else grad.any()


def _partial_dual(member: Member, dtype: torch.dtype) -> Tensor:
    """What this process's part adds to the sum of entries ("sign") or of squares ("vector") of the difference."""
    delta = difference(member)
    if member.norm == "sign":
        return torch.linalg.vector_norm(delta, 1, dtype=compute_dtype(delta.dtype)).to(dtype)
    return torch.linalg.vector_norm(delta, dtype=dtype).square()


def _count(members: list[Member], bad: Tensor) -> None:
    """Add tensors with a non-finite gradient to the counts of their groups."""
    places: dict[int, list[int]] = {}
    for i, m in enumerate(members):
        if m.group["nonfinite"] == "skip":
            places.setdefault(id(m.group), []).append(i)
    for chosen in places.values():
        count_nonfinite(members[chosen[0]].group, bad[constant(chosen, bad.device, torch.int64)])


def _update_noise(members: list[Member], rows: list[slice], known: Tensor, bad: Tensor) -> None:
    """Take the dual norms of this step's differences into the estimates."""
    chosen = [i for i, m in enumerate(members) if m.layer >= 0 and (m.measures or m.keeps)]
    if not chosen:
        return
    at = [(i, r) for i in chosen for r in range(rows[i].start, rows[i].stop)]
    place = constant([r for _, r in at], known.device, torch.int64)
    states = [members[i].state for i in chosen]
    noise, counts = (joined(states, name, known.device) for name in ("noise", "noise_steps"))

    def each(value: Callable[[Member], float]) -> Tensor:
        return constant([float(value(members[i])) for i, _ in at], known.device, known.dtype)

    values = known[place]
    usable = (values[:, _ACTIVE] > 0) & ~bad[constant([i for i, _ in at], known.device, torch.int64)]
    vector = each(lambda m: m.norm == "vector") > 0
    duals = torch.where(vector, values[:, _DUAL].sqrt(), values[:, _DUAL]) * each(_dual_size)
    measured = usable & (counts >= 0) & (each(lambda m: m.measures) > 0)
    kept = usable & (each(lambda m: m.keeps) > 0)
    beta2 = each(lambda m: m.group["betas"][1])
    noise, counts = new_estimates(noise, counts, duals, beta2, measured, kept)
    write_back(states, "noise", noise)
    write_back(states, "noise_steps", counts)


def _dual_size(member: Member) -> float:
    """What the norm of the difference is still to be multiplied by; hidden matrices have theirs already."""
    if not member.measures or member.norm == "rms":
        return 1.0
    return difference_size(member) * (math.sqrt(member.param.numel()) if member.norm == "vector" else 1.0)


def _factors(members: list[Member], layers: list[Layer], device: torch.device) -> list[Tensor]:
    """f of every matrix of every member: [1] or [e]."""
    one = torch.ones(1, dtype=estimate_dtype(device), device=device)
    found: tuple[Tensor, ...] = ()
    if layers:
        factors = layer_factors(layers, device)[0]
        found = factors.split([matrix_count(layer.group, layer.norm, layer.param) for layer in layers])
    return [found[m.layer] if m.layer >= 0 else one.expand(matrix_count(m.group, m.norm, m.param)) for m in members]


def _step_elementwise(found: list[Found]) -> None:
    """Embeddings and heads along the sign of their momenta, vectors along the momenta at root mean square 1."""
    updates = []
    for x in found:
        member = x.member
        direction = matrix_view(look_ahead(member, local(member.state["momentum_buffer"])), member)
        if member.norm == "sign":
            direction = direction.sign()
        else:  # in double precision: one over the norm of a tiny vector is more than fp32 holds
            scale = torch.where(x.square > 0, math.sqrt(member.param.numel()) / x.square.sqrt(), 0.0).to(
                direction.device
            )
            direction = (direction.to(scale.dtype) * scale).to(compute_dtype(direction.dtype))
        updates.append(
            Update(
                x,
                local(member.param),
                extra_of(member),
                direction,
                x.factor,
                member.group["radius"],
                member.shard.offset or 0,
            )
        )
    apply(updates)
