"""M-FAC's scopes: the parameters that share a window, the state of a scope, and the step of all scopes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep._torch import local_part
from leanstep.kernels import scaled_step
from leanstep.kernels.steps.common import compute_dtype, decay_factor, pack
from leanstep.optimizers.common.base import Batch, by_device_and_dtype, count_nonfinite
from leanstep.optimizers.common.matrices import as_written, write_back
from leanstep.optimizers.common.rounding import effective
from leanstep.optimizers.common.sharding import Reducer, Shard, local, locals_of, plain
from leanstep.optimizers.mfac import rule
from leanstep.optimizers.mfac.compiled import directions_by_op
from leanstep.optimizers.mfac.compressed import SparseRows
from leanstep.optimizers.mfac.direction import Problem, directions
from leanstep.optimizers.mfac.settings import SHARED
from leanstep.optimizers.mfac.state import SCOPE_KEYS
from leanstep.optimizers.mfac.window import BlockRows, Columns, DenseRows, is_fake


class ScopeParam(NamedTuple):
    """A parameter of a scope. ``grad`` is None if it has none at this step."""

    group: dict[str, Any]
    position: int
    param_index: int  # counted over all groups
    param: Tensor
    grad: Tensor | None
    state: dict[str, Any]
    columns: Columns
    shard: Shard


class Scope(NamedTuple):
    """Parameters whose gradients form the rows of one window (of several, with blocks)."""

    entries: list[ScopeParam]  # the parameters that have state
    settings: dict[str, Any]  # that the groups of the scope share
    # the state of the scope's first trainable parameter, with ``gram``, ``counters`` and ``stats``
    scope_state: dict[str, Any]


def scope_key(group: dict[str, Any], group_index: int, position: int, param_index: int) -> tuple[Any, ...]:
    """Return the key that is equal for all parameters of a scope."""
    scope = group["scope"]
    if scope == "model":
        return ("model",)
    if scope == "group":
        return ("group", group_index)
    names = group.get("param_names")
    if scope == "layer" and names:
        return ("layer", names[position].rpartition(".")[0])
    return ("parameter", param_index)


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


def move_scope_state(source: dict[str, Any], target: dict[str, Any], param: Tensor) -> None:
    """Move the state of a scope from one parameter's state to that of ``param``."""
    for key in SCOPE_KEYS:
        if key in source:
            value = source.pop(key)
            target[key] = value if key == "counters" else value.to(local_part(param).device)


def step_scopes(scopes: list[Scope]) -> Reducer[None]:
    """Compute the directions of all scopes, then move the parameters."""
    problems = [_problem(scope) for scope in scopes]
    entries = [entry for scope in scopes for entry in scope.entries]
    updates: list[Tensor | None] = []
    updated = None  # bool per entry; None if the host knows which entries have an update
    if torch.compiler.is_compiling() or is_fake(problems[0].vectors[0]):
        computed, flags, updated = directions_by_op(problems)
        updates += computed
    else:
        results = yield from directions(problems)
        values = [flag for result in results for flag in result.flags]
        flags = torch.tensor(values, dtype=torch.int32, device="cpu")
        for scope, result in zip(scopes, results, strict=True):
            updates += result.updates or [None] * len(scope.entries)
    groups: dict[int, list[int]] = {}
    for i, entry in enumerate(entries):
        groups.setdefault(id(entry.group), []).append(i)
    for indices in groups.values():
        group = entries[indices[0]].group
        if group["nonfinite"] == "skip":
            count_nonfinite(group, flags[indices])
        moved = [(i, u) for i in indices if (u := updates[i]) is not None and entries[i].grad is not None]
        params = [entries[i].param for i, _ in moved]
        for positions in by_device_and_dtype(params, alone=group["foreach"] is False):
            batch = [moved[k] for k in positions]
            in_batch = None if updated is None else updated[[i for i, _ in batch]]
            _move([entries[i] for i, _ in batch], [u for _, u in batch], in_batch)


def _problem(scope: Scope) -> Problem:
    entries, vectors = scope.entries, []
    for entry in entries:
        group = entry.group
        if entry.grad is None:
            weight = local(plain(entry.param.detach()))
            vector = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        else:
            (vector,) = locals_of([entry.grad])
            vector = -vector if group["maximize"] else vector
            if group["decay"] == "coupled" and group["weight_decay"]:
                vector = vector.add(local(plain(entry.param.detach())), alpha=float(group["weight_decay"]))
        if "mask" in entry.state:
            vector = vector * local_part(entry.state["mask"])
        vectors.append(vector)
    states, columns = [e.state for e in entries], [e.columns for e in entries]
    blocks = isinstance(scope.settings["scope"], int)
    formats = [BlockRows if blocks else SparseRows if SparseRows.key in state else DenseRows for state in states]
    weights = _weights_of(entries, scope.settings["scope"])
    return Problem(scope.settings, scope.scope_state, states, formats, columns, vectors, weights)


def _weights_of(entries: list[ScopeParam], scope: str | int) -> list[int]:
    """Return the number of weights of every Gram matrix of a scope, with those that masks exclude."""
    total = sum([entry.param.numel() for entry in entries])
    if not isinstance(scope, int):
        return [total]
    return [min(scope, total - start) for start in range(0, total, scope)]


def _move(entries: list[ScopeParam], updates: list[Tensor], updated: Tensor | None) -> None:
    """Apply momentum to updates, and write them to parameters of one group, device and dtype."""
    first, group, states = entries[0].param, entries[0].group, [e.state for e in entries]
    weights = locals_of([e.param for e in entries])
    updates = [u.view(w.shape) for u, w in zip(updates, weights, strict=True)]
    if "momentum_buffer" in states[0]:
        buffers = locals_of([state["momentum_buffer"] for state in states])
        for i, (buffer, update) in enumerate(zip(buffers, updates, strict=True)):
            averaged = rule.average(buffer, update, group["momentum"])
            buffer.copy_(averaged if updated is None else torch.where(updated[i], averaged, buffer))
        updates = buffers
    rounding = effective("MFAC", group, entries[0].position, first)
    decay = decay_factor(group["lr"], group["weight_decay"]) if group["decay"] == "decoupled" else 1.0
    scalars = pack([group["lr"], decay], first.device, compute_dtype(first.dtype))
    params, shards = [e.param for e in entries], [e.shard for e in entries]
    batch = Batch(group, rounding, params, updates, states, [e.param_index for e in entries], shards)
    options = batch.options(scalars, skip_nonfinite=updated is not None)
    matrices = [u if u.dim() == 2 else as_written(u, stacked=False) for u in updates]
    ones = [torch.ones(sum(m.shape), dtype=scalars.dtype, device=first.device) for m in matrices]
    if updated is not None:  # the kernel skips matrices with NaN in their scales
        ones = [torch.where(u, one, torch.nan) for u, one in zip(updated, ones, strict=True)]
    scales = [one.split(list(m.shape)) for one, m in zip(ones, matrices, strict=True)]
    rows, columns = [s[0] for s in scales], [s[1] for s in scales]

    def write(parameters: list[Tensor], rounding_state: list[Tensor]) -> Tensor:
        return scaled_step(parameters, matrices, rows, columns, rounding_state, options)

    write_back(write, weights, batch.rounding_state(), [False] * len(weights))
