"""LANTON's hidden matrices: nuclear norms of differences and polar factors of momenta, each matrix on one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.matrices.newton_schulz import compute_dtype, flops, newton_schulz, nuclear_norm
from leanstep.optimizers.common.base import dtype_of, local
from leanstep.optimizers.common.matrices import as_matrices
from leanstep.optimizers.common.whole_matrices import Unit, gather, place, scatter
from leanstep.optimizers.lanton.routing import is_stack, matrix_shape
from leanstep.optimizers.lanton.update import (
    Found,
    Member,
    Update,
    apply,
    backend,
    difference,
    difference_size,
    extra_of,
    here,
    look_ahead,
    matrix_view,
)

# elements of the matrices that are worked on at a time (unless one is larger): bounds the memory of a step
_AT_A_TIME = 2**24


def lmo_size(group: dict[str, Any], shape: torch.Size) -> float:
    """What the polar factor is multiplied by to have norm 1, and the nuclear norm to be the dual norm."""
    m, n = matrix_shape(group, shape)
    return math.sqrt(m / n) if group["scaling"] == "scion" else 0.2 * math.sqrt(max(m, n))


def units_of(members: Sequence[Member]) -> list[Unit]:
    """The whole matrices of parameters, with the processes that work on them."""

    def cost(i: int, shape: torch.Size) -> float:
        group = members[i].group
        count = shape[0] if is_stack(group, "rms", len(shape)) else 1
        return count * flops(matrix_shape(group, shape), group["ns_steps"])

    stacks = [is_stack(m.group, m.norm, m.param.dim()) for m in members]
    return place([m.shard for m in members], stacks, cost)


def dual_norms(members: list[Member]) -> Iterator[tuple[int, int, Tensor]]:
    """(place in ``members``, first matrix, dual norms of the differences) of the matrices this process works on."""
    units = units_of(members)
    for chunk in _wholes(units, members, lambda i: difference(members[i])):
        member = members[units[chunk[0][0]].member]
        group = member.group
        with backend(group):
            norms = nuclear_norm(
                [whole for _, whole in chunk],
                estimator=group["nuclear"],
                steps=group["nuclear_steps"],
                coefficients=group["nuclear_coefficients"],
                dtype=dtype_of(group["ns_dtype"]),
            )
        counts = [whole.shape[0] if whole.dim() == 3 else 1 for _, whole in chunk]
        for (k, _), values in zip(chunk, norms.split(counts), strict=True):
            member = members[units[k].member]
            size = lmo_size(member.group, member.shard.shape) * difference_size(member)
            yield units[k].member, units[k].first, values.double() * size


def step_matrices(found: list[Found]) -> None:
    """Move hidden matrices along the polar factors of their momenta."""
    members = [x.member for x in found]
    units = units_of(members)
    polars: list[Tensor | None] = [None] * len(units)

    def form(i: int) -> Tensor:
        return look_ahead(members[i], local(members[i].state["momentum_buffer"]))

    for chunk in _wholes(units, members, form):
        group = members[units[chunk[0][0]].member].group
        with backend(group):
            results = newton_schulz(
                [matrix for _, matrix in chunk],
                steps=group["ns_steps"],
                coefficients=group["ns_coefficients"],
                dtype=dtype_of(group["ns_dtype"]),
            )
        updates = []
        for (k, _), polar in zip(chunk, results, strict=True):
            stored = polar.mT if members[units[k].member].group["transposed"] else polar
            if units[k].group is None:
                updates.append(_update(found[units[k].member], units[k], stored))
            else:
                polars[k] = stored.reshape(units[k].shape)
        apply(updates)
    cut = [k for k, unit in enumerate(units) if unit.group is not None]
    if cut:
        like = [_polar_like(members[units[k].member]) for k in cut]
        pieces = scatter([units[k] for k in cut], [polars[k] for k in cut], like)
        updates = []
        for k, piece in zip(cut, pieces, strict=True):
            x = found[units[k].member]
            updates.append(_update(x, units[k], matrix_view(piece, x.member)))
        apply(updates)


def _polar_like(member: Member) -> Tensor:
    """Nothing, in the dtype and on the device of the member's polar factor."""
    buffer = local(member.state["momentum_buffer"])
    return torch.empty(0, dtype=compute_dtype(dtype_of(member.group["ns_dtype"]), buffer), device=buffer.device)


def _update(x: Found, unit: Unit, direction: Tensor) -> Update:
    member = x.member
    extra = extra_of(member)
    factor = here(member, x.factor) if unit.matrix is None else x.factor[unit.matrix : unit.matrix + 1]
    return Update(
        x,
        unit.piece(local(member.param)),
        None if extra is None else unit.piece(extra),
        direction,
        factor,
        member.group["radius"] * lmo_size(member.group, member.shard.shape),
        member.shard.offset or 0,
    )


def _wholes(
    units: list[Unit], members: list[Member], form: Callable[[int], Tensor]
) -> Iterator[list[tuple[int, Tensor]]]:
    """(place of the unit, matrix (out, in) or stack) of what this process works on, a few of one kind at a time.

    ``form`` makes this process's part for the parameter at a place of ``members``.
    """
    cut = [k for k, unit in enumerate(units) if unit.group is not None]
    arrived: dict[int, Tensor | None] = {}
    if cut:
        formed = {units[k].member: form(units[k].member) for k in cut}
        pieces = [units[k].piece(formed[units[k].member]) for k in cut]
        arrived = dict(zip(cut, gather([units[k] for k in cut], pieces), strict=True))
        del formed, pieces
    for places in _alike(units, members):
        alone = members[units[places[0]].member].group["foreach"] is False
        count = 1 if alone else max(1, _AT_A_TIME // math.prod(units[places[0]].shape))
        for start in range(0, len(places), count):
            chunk = []
            for k in places[start : start + count]:
                stored = form(units[k].member) if units[k].group is None else arrived.pop(k)
                assert stored is not None
                group = members[units[k].member].group
                chunk.append((k, as_matrices(stored, group["transposed"], group["flatten"])))
            yield chunk


# settings that must be the same for matrices to be worked on together
_SETTINGS = ("foreach", "ns_steps", "ns_coefficients", "ns_dtype", "nuclear", "nuclear_steps", "nuclear_coefficients")


def _alike(units: list[Unit], members: list[Member]) -> Iterator[list[int]]:
    """Places of the units that this process works on, by kind."""
    sets: dict[Any, list[int]] = {}
    for k, unit in enumerate(units):
        if unit.mine and math.prod(unit.shape) > 0:
            member = members[unit.member]
            settings = tuple(member.group[name] for name in _SETTINGS)
            shape = (len(unit.shape), *matrix_shape(member.group, unit.shape))
            kind = (member.param.device, member.param.dtype, shape)
            sets.setdefault((settings, kind), []).append(k)
    yield from sets.values()
