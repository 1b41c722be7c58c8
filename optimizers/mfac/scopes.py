"""M-FAC's scopes: the parameters that share a window, the state of a scope, and the step of all scopes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep._torch import local_part
from leanstep.kernels import StepOptions, scaled_step
from leanstep.kernels.steps.common import compute_dtype, decay_factor, pack
from leanstep.optimizers.common.base import by_device_and_dtype, count_nonfinite
from leanstep.optimizers.common.matrices import as_written, write_back
from leanstep.optimizers.common.rounding import effective, rounding_states, seeds_and_offsets
from leanstep.optimizers.common.sharding import Steps, plain, shard_of
from leanstep.optimizers.mfac import rule
from leanstep.optimizers.mfac.compiled import directions_in_one
from leanstep.optimizers.mfac.compressed import LowRankRows, SparseRows
from leanstep.optimizers.mfac.direction import STATS, Problem, directions
from leanstep.optimizers.mfac.settings import SHARED
from leanstep.optimizers.mfac.window import BlockRows, Columns, DenseRows, columns_of, gather, is_fake

# formats of rows; the first one that accepts a parameter stores its rows
FORMS: tuple[type[DenseRows], ...] = (SparseRows, LowRankRows, DenseRows)


class Member(NamedTuple):
    """A parameter of a scope. ``grad`` is None if it has none at this step."""

    group: dict[str, Any]
    position: int
    number: int  # among the parameters of all groups
    param: Tensor
    grad: Tensor | None
    state: dict[str, Any]
    columns: Columns


class Scope(NamedTuple):
    """Parameters whose gradients form the rows of one window (of several, with blocks).

    Attributes:
        members: those that have state.
        settings: the shared ones.
        scope_state: the state of the first member, which also holds ``gram``, ``counters``, ``stats`` and
            ``window_scale``.
    """

    members: list[Member]
    settings: dict[str, Any]
    scope_state: dict[str, Any]


def scope_key(group: dict[str, Any], number: int, position: int, index: int) -> tuple[Any, ...]:
    """Return the key that is equal for all parameters of a scope."""
    scope = group["scope"]
    if scope == "model":
        return ("model",)
    if scope == "group":
        return ("group", number)
    names = group.get("param_names")
    if scope == "layer" and names:
        return ("layer", names[position].rpartition(".")[0])
    return ("parameter", index)


def shared_settings(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings :data:`SHARED` of a scope's groups.

    Raises:
        ValueError: the groups differ in one of them.
    """
    first = groups[0]
    for group in groups[1:]:
        for key in SHARED:
            if group[key] != first[key]:
                raise ValueError(
                    f"MFAC: groups that share a window (scope={first['scope']!r}) need one {key}, got {first[key]!r} "
                    f"and {group[key]!r}. Give them the same, or build them with scope='group'."
                )
    return {key: first[key] for key in SHARED}


def init_window(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    """Create the window of a parameter, with rows of zeros, if it is missing."""
    if not any(form.key in state for form in FORMS):
        columns = columns_of(param, spread=group["shard_window"])
        _new_form(param, group).init_state(state, param, columns, group)


def window_bytes(param: Tensor, group: dict[str, Any]) -> int:
    """Return the bytes that :func:`init_window` allocates on this process."""
    return _new_form(param, group).state_bytes(param, columns_of(param, spread=group["shard_window"]), group)


def _new_form(param: Tensor, group: dict[str, Any]) -> type[DenseRows]:
    return next(form for form in FORMS if form.accepts(param, group))


def _form_of(state: dict[str, Any], scope: str | int) -> type[DenseRows]:
    """Return the format of a parameter's window."""
    return BlockRows if isinstance(scope, int) else next(form for form in FORMS if form.key in state)


def init_scope_state(state: dict[str, Any], param: Tensor, settings: dict[str, Any]) -> None:
    """Create a scope's Gram matrices, counters, statistics and (for fp16) scales of rows."""
    m, device = settings["window"], local_part(param).device
    blocks = _block_count(param, settings["scope"])
    state["gram"] = torch.zeros(blocks, m, m, dtype=torch.float64, device=device)
    state["counters"] = torch.zeros(2, dtype=torch.int64)  # steps, rows; on the CPU, which computes indices from them
    state["stats"] = torch.zeros(blocks, len(STATS), dtype=torch.float64, device=device)
    if settings["storage"] == "fp16":
        state["window_scale"] = torch.ones(blocks, m, dtype=torch.float32, device=device)


def scope_state_bytes(param: Tensor, group: dict[str, Any]) -> int:
    """Return the bytes that :func:`init_scope_state` allocates on the device."""
    m, scale = group["window"], 4 if group["storage"] == "fp16" else 0
    return _block_count(param, group["scope"]) * (8 * m * m + scale * m + 8 * len(STATS))


def _block_count(param: Tensor, scope: str | int) -> int:
    """Return the number of Gram matrices of a parameter's scope."""
    return max(1, -(-param.numel() // scope)) if isinstance(scope, int) else 1


def step_scopes(scopes: list[Scope]) -> Steps[None]:
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
        params = [members[i].param for i, _ in moved]
        for positions in by_device_and_dtype(params, alone=members[indices[0]].group["foreach"] is False):
            device, dtype = params[positions[0]].device, params[positions[0]].dtype
            batch = [moved[k] for k in positions]
            in_batch = None if updated is None else updated[[i for i, _ in batch]]
            _move([members[i] for i, _ in batch], [u for _, u in batch], in_batch, device, dtype)


def _problem(scope: Scope) -> Problem:
    """Apply sign, decay and masks to a scope's gradients, and return the inputs of its direction."""
    members, vectors = scope.members, []
    for member in members:
        group, weight = member.group, member.columns.part(plain(member.param.detach()))
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
    forms = [_form_of(m.state, scope.settings["scope"]) for m in members]
    states, columns, lr = [m.state for m in members], [m.columns for m in members], members[0].group["lr"]
    return Problem(scope.settings, scope.scope_state, states, forms, columns, vectors, lr)


def _gathered(members: list[Member], updates: list[Tensor | None]) -> list[Tensor | None]:
    """All-gather the updates of parameters with ``shard_window``."""
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
    """Apply momentum to updates, and write them to parameters of one group, device and dtype."""
    group, states = members[0].group, [m.state for m in members]
    weights = [local_part(m.param) for m in members]
    updates = [u.view(w.shape) for u, w in zip(updates, weights, strict=True)]
    if "momentum_buffer" in states[0]:
        buffers = [local_part(state["momentum_buffer"]) for state in states]
        for i, (buffer, update) in enumerate(zip(buffers, updates, strict=True)):
            averaged = rule.average(buffer, update, group["momentum"])
            buffer.copy_(averaged if updated is None else torch.where(updated[i], averaged, buffer))
        updates = buffers
    rounding = effective("MFAC", group, members[0].position, members[0].param)
    decay = decay_factor(group["lr"], group["weight_decay"]) if group["decay"] == "decoupled" else 1.0
    scalars = pack([group["lr"], decay], device, compute_dtype(dtype))
    seeds, offsets = seeds_and_offsets(
        rounding, states, [m.number for m in members], [shard_of(m.param) for m in members], group["seed"], device
    )
    options = StepOptions(scalars, rounding, skip_nonfinite=updated is not None, seeds=seeds, offsets=offsets)
    matrices = [as_written(u, stacked=False) for u in updates]
    ones = [torch.ones(sum(m.shape), dtype=scalars.dtype, device=device) for m in matrices]
    if updated is not None:  # the kernel skips matrices with NaN in their scales
        ones = [torch.where(u, one, torch.nan) for u, one in zip(updated, ones, strict=True)]
    scales = [one.split(list(m.shape)) for one, m in zip(ones, matrices, strict=True)]
    rows, columns = [s[0] for s in scales], [s[1] for s in scales]

    def write(parameters: list[Tensor], rounding_state: list[Tensor]) -> Tensor:
        return scaled_step(parameters, matrices, rows, columns, rounding_state, options)

    write_back(write, weights, rounding_states(states, rounding), [False] * len(weights))
