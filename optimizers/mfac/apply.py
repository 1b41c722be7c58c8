"""M-FAC's step around its direction: gradients become rows, directions become updates of the parameters."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from leanstep.kernels import StepOptions, scaled_step, use_backend
from leanstep.kernels.steps.common import compute_dtype, decay_factor, pack
from leanstep.optimizers.common.base import by_device_and_dtype, count_nonfinite
from leanstep.optimizers.common.matrices import as_written, write_back
from leanstep.optimizers.common.rounding import effective, rounding_states, seeds_and_offsets
from leanstep.optimizers.common.sharding import Steps, local, plain, shard_of
from leanstep.optimizers.mfac.bundle import Problem
from leanstep.optimizers.mfac.columns import gather
from leanstep.optimizers.mfac.compiled import directions_in_one, is_fake
from leanstep.optimizers.mfac.scopes import Member, Scope
from leanstep.optimizers.mfac.step import directions


def step(scopes: list[Scope]) -> Steps[None]:
    """Directions of all scopes, then the parameters."""
    problems = [_problem(scope) for scope in scopes]
    members = [m for scope in scopes for m in scope.members]
    if torch.compiler.is_compiling() or is_fake(problems[0].vectors[0]):
        by_scope, flags, went = directions_in_one(problems)
        found: list[Tensor | None] = [u for of_scope in by_scope for u in of_scope]
    else:
        results = yield from directions(problems)
        flags = torch.tensor([f for r in results for f in r.flags], dtype=torch.int32)
        went = None
        found = []
        for scope, result in zip(scopes, results, strict=True):
            found += [None] * len(scope.members) if result.updates is None else result.updates
        found = _gathered(members, found)
    made = {i: update for i, update in enumerate(found) if update is not None and members[i].grad is not None}
    for chosen in _by_group(members):
        count_nonfinite(members[chosen[0]].group, flags[chosen])
        moved = [i for i in chosen if i in made]
        params = [members[i].param for i in moved]
        for (device, dtype), places in by_device_and_dtype(params).items():
            part = [moved[i] for i in places]
            own, updates = [members[i] for i in part], [made[i] for i in part]
            _apply(own, updates, None if went is None else went[part], device, dtype)


def _by_group(members: list[Member]) -> list[list[int]]:
    """Places of the members of every group."""
    groups: dict[int, list[int]] = {}
    for i, member in enumerate(members):
        groups.setdefault(id(member.group), []).append(i)
    return list(groups.values())


def _problem(scope: Scope) -> Problem:
    """The scope's gradients as its new row takes them."""
    vectors = []
    for member in scope.members:
        group, held = member.group, member.columns.part(plain(member.param.detach()))
        if member.grad is None:
            vector = torch.zeros_like(held, memory_format=torch.contiguous_format)
        else:
            vector = member.columns.part(member.grad)
            vector = -vector if group["maximize"] else vector
            if group["decay"] == "coupled" and group["weight_decay"]:
                vector = vector.add(held, alpha=group["weight_decay"])
        if "mask" in member.state:
            vector = vector * member.columns.part(member.state["mask"])
        vectors.append(vector)
    return Problem(
        scope.settings,
        scope.home,
        [m.state for m in scope.members],
        [m.columns for m in scope.members],
        vectors,
        scope.members[0].group["lr"],
    )


def _gathered(members: list[Member], updates: list[Tensor | None]) -> list[Tensor | None]:
    """Whole updates where replicas hold parts of a window."""
    sets: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
    for i, (member, update) in enumerate(zip(members, updates, strict=True)):
        if update is not None and member.columns.cut is not None:
            sets.setdefault(update.dtype, []).append((i, update))
    for chosen in sets.values():
        whole = gather([update for _, update in chosen], [members[i].param for i, _ in chosen])
        for (i, _), update in zip(chosen, whole, strict=True):
            updates[i] = update
    return updates


def _apply(
    members: list[Member], updates: list[Tensor], went: Tensor | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Average the updates, where asked, and move the parameters of a group that share device and dtype."""
    group = members[0].group
    weights = [local(m.param) for m in members]
    updates = [u.view(w.shape) for u, w in zip(updates, weights, strict=True)]
    if "momentum_buffer" in members[0].state:
        buffers = [local(m.state["momentum_buffer"]) for m in members]
        for i, (buffer, update) in enumerate(zip(buffers, updates, strict=True)):
            wide, weight = update.to(buffer.dtype), 1.0 - group["momentum"]
            if went is None:
                buffer.lerp_(wide, weight)
            else:
                buffer.copy_(torch.where(went[i], buffer.lerp(wide, weight), buffer))
        updates = buffers
    rounding = effective("MFAC", group, members[0].position, members[0].param)
    decay = decay_factor(group["lr"], group["weight_decay"]) if group["decay"] == "decoupled" else 1.0
    scalars = pack([group["lr"], decay], device, compute_dtype(dtype))
    states = [m.state for m in members]
    seeds, offsets = seeds_and_offsets(
        rounding, states, [m.number for m in members], [shard_of(m.param) for m in members], group["seed"], device
    )
    options = StepOptions(scalars, rounding, skip_nonfinite=went is not None, seeds=seeds, offsets=offsets)
    directions = [as_written(u, stacked=False) for u in updates]
    ones = [torch.ones(sum(d.shape), dtype=scalars.dtype, device=device) for d in directions]
    if went is not None:
        ones = [torch.where(w, one, torch.nan) for w, one in zip(went, ones, strict=True)]
    scales = [one.split(list(d.shape)) for one, d in zip(ones, directions, strict=True)]

    def step(matrices: list[Tensor], kept: list[Tensor]) -> Tensor:
        with use_backend("reference") if group["foreach"] is False else nullcontext():
            return scaled_step(matrices, directions, [s[0] for s in scales], [s[1] for s in scales], kept, options)

    write_back(step, weights, rounding_states(states, rounding), [False] * len(weights))
