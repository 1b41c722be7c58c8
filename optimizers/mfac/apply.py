"""M-FAC's step around its direction: gradients become rows, directions become updates of the parameters."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from leanstep._torch import local_part
from leanstep.kernels import scaled_step, use_backend
from leanstep.kernels._hyper import compute_dtype, decay_factor, pack
from leanstep.optimizers.common.base import by_device_and_dtype, count_nonfinite
from leanstep.optimizers.common.rounding import STATE_KEY, effective, seeds_for
from leanstep.optimizers.common.sharding import Steps, offsets_of, shard_of
from leanstep.optimizers.mfac import rule
from leanstep.optimizers.mfac.compiled import directions_in_one
from leanstep.optimizers.mfac.direction import Problem, directions
from leanstep.optimizers.mfac.scopes import Member, Scope, form_of
from leanstep.optimizers.mfac.window import gather, is_fake


def step(scopes: list[Scope]) -> Steps[None]:
    """Compute the directions of all scopes, then move the parameters."""
    problems = [_problem(scope) for scope in scopes]
    members = [member for scope in scopes for member in scope.members]
    updates: list[Tensor | None] = []
    updated = None  # bool [members], only if the host does not know which members have an update
    if torch.compiler.is_compiling() or is_fake(problems[0].vectors[0]):
        in_one, flags, updated = directions_in_one(problems)
        updates += in_one
    else:
        results = yield from directions(problems)
        flags = torch.tensor([flag for result in results for flag in result.flags], dtype=torch.int32)
        for scope, result in zip(scopes, results, strict=True):
            updates += result.updates or [None] * len(scope.members)
        updates = _gathered(members, updates)
    groups: dict[int, list[int]] = {}
    for i, member in enumerate(members):
        groups.setdefault(id(member.group), []).append(i)
    for indices in groups.values():
        count_nonfinite(members[indices[0]].group, flags[indices])
        moved = [(i, u) for i in indices if (u := updates[i]) is not None and members[i].grad is not None]
        sets = by_device_and_dtype([members[i].param for i, _ in moved])
        for (device, dtype), positions in sets.items():
            chosen, own_updates = zip(*[moved[k] for k in positions], strict=True)
            own_updated = None if updated is None else updated[list(chosen)]
            _move([members[i] for i in chosen], list(own_updates), own_updated, device, dtype)


def _problem(scope: Scope) -> Problem:
    """The scope's gradients as its new row takes them."""
    members, vectors = scope.members, []
    for member in members:
        group, weight = member.group, member.columns.part(member.param.detach())
        if member.grad is None:
            vector = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        else:
            vector = member.columns.part(member.grad)
            vector = -vector if group["maximize"] else vector
            if group["decay"] == "coupled" and group["weight_decay"]:
                vector = vector.add(weight, alpha=group["weight_decay"])
        if "mask" in member.state:
            vector = vector * member.columns.part(member.state["mask"])
        vectors.append(vector)
    forms = [form_of(m.state, scope.settings["scope"]) for m in members]
    columns = [m.columns for m in members]
    states, lr = [m.state for m in members], members[0].group["lr"]
    return Problem(scope.settings, scope.scope_state, states, forms, columns, vectors, lr)


def _gathered(members: list[Member], updates: list[Tensor | None]) -> list[Tensor | None]:
    """Whole updates of parameters whose window is spread over replicas."""
    sets: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
    for i, (member, update) in enumerate(zip(members, updates, strict=True)):
        if update is not None and member.columns.cut is not None:
            sets.setdefault(update.dtype, []).append((i, update))
    for parts in sets.values():
        whole = gather([update for _, update in parts], [members[i].param for i, _ in parts])
        for (i, _), update in zip(parts, whole, strict=True):
            updates[i] = update
    return updates


def _move(
    members: list[Member], updates: list[Tensor], updated: Tensor | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Average the updates, if asked to, and move the parameters of a group that share device and dtype."""
    group = members[0].group
    weights = [local_part(m.param) for m in members]
    updates = [u.view(w.shape) for u, w in zip(updates, weights, strict=True)]
    if "momentum_buffer" in members[0].state:
        buffers = [local_part(m.state["momentum_buffer"]) for m in members]
        for i, (buffer, update) in enumerate(zip(buffers, updates, strict=True)):
            averaged = rule.average(buffer, update, group["momentum"])
            buffer.copy_(averaged if updated is None else torch.where(updated[i], averaged, buffer))
        updates = buffers
    rounding = effective("MFAC", group, members[0].position, members[0].param)
    decay = decay_factor(group["lr"], group["weight_decay"]) if group["decay"] == "decoupled" else 1.0
    hyper = pack([group["lr"], decay], device, compute_dtype(dtype))
    seeds = offsets = None
    if rounding == "stochastic":
        steps = [m.state["step"] for m in members]
        torch._foreach_add_(steps, 1)
        seeds = seeds_for(steps, [m.number for m in members], group["seed"], device)
        offsets = offsets_of([shard_of(m.param) for m in members], device)
    extras = [local_part(m.state[STATE_KEY[rounding]]) for m in members] if rounding in STATE_KEY else []
    matrices, thin = [_matrix(w) for w in weights], [_matrix(e) for e in extras]
    ones = [torch.ones(sum(m.shape), dtype=hyper.dtype, device=device) for m in matrices]
    if updated is not None:  # a step with a scale of NaN is skipped
        ones = [torch.where(u, one, torch.nan) for u, one in zip(updated, ones, strict=True)]
    scales = [one.split(list(m.shape)) for one, m in zip(ones, matrices, strict=True)]
    with use_backend("reference") if group["foreach"] is False else nullcontext():
        scaled_step(
            matrices, [_matrix(u) for u in updates], [s[0] for s in scales], [s[1] for s in scales],
            thin, hyper=hyper, rounding=rounding, skip_nonfinite=updated is not None, seeds=seeds, offsets=offsets,
        )  # fmt: skip
    for whole, matrix in zip([*weights, *extras], [*matrices, *thin], strict=True):
        if whole.dim() > 2 and not whole.is_contiguous():  # flattening had to copy (a permuted convolution)
            whole.copy_(matrix.view(whole.shape))


def _matrix(tensor: Tensor) -> Tensor:
    """A view of a tensor with two dimensions (a copy of permuted convolutions, which have none)."""
    if tensor.dim() == 2:
        return tensor
    if tensor.dim() < 2:
        return tensor.view(-1, 1) if tensor.is_contiguous() else tensor.unsqueeze(1)
    return tensor.flatten(1)
