"""Matrices that are cut over processes: each is brought whole to one of them, worked on there, and taken back in parts.

A rule that mixes all entries of a matrix (Newton-Schulz, a nuclear norm) needs it whole. Every matrix gets one owner,
so that the work is done once and in equal shares; all matrices travel together, in one all-to-all each way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.optimizers.common.sharding import Shard


class Unit(NamedTuple):
    """What one process works on: a matrix, or the stack of matrices that it holds whole."""

    member: int  # place of its parameter in the caller's list
    shape: torch.Size  # of the whole unit, as it is stored
    matrix: int | None = None  # which matrix of a stack; None for the parameter as it is held
    first: int = 0  # index of its first matrix within the whole parameter
    dim: int = 0  # the dimension that is cut
    group: Any = None  # the processes that hold the parts; None when this process holds all
    owner: int = 0  # the rank in the group that works on it

    @property
    def mine(self) -> bool:
        """Whether this process works on it."""
        return self.group is None or torch.distributed.get_rank(self.group) == self.owner

    def piece(self, held: Tensor) -> Tensor:
        """This process's part of the unit, from its part of the parameter."""
        return held if self.matrix is None else held[self.matrix]


def place(shards: Sequence[Shard], stacks: Sequence[bool], cost: Callable[[int, torch.Size], float]) -> list[Unit]:
    """The units of parameters that are matrices [m, n], stacks [e, m, n] or convolutions [m, ...], with their owners.

    Stacks that are cut along their matrices stay where they are. The rest goes, most expensive first, to the process
    that has least to do so far: a function of the shapes alone, so that all processes agree without a word.

    Args:
        shards: this process's part of every parameter, in the order in which it is stored.
        stacks: which of them are stacks.
        cost: of the matrices of a shape, for the parameter at a place of the list.

    Raises:
        ValueError: for parameters that are cut along several dimensions, or in strides.
    """
    units: list[Unit] = []
    loads: dict[Any, list[float]] = {}
    for i, (shard, stack) in enumerate(zip(shards, stacks, strict=True)):
        if not shard.groups:
            units.append(Unit(i, shard.shape))
            continue
        if shard.dim is None:
            raise ValueError(
                "a matrix must be whole or sharded along one dimension over one mesh dimension (fully_shard's way); "
                f"got placements {shard.placements} for shape {tuple(shard.shape)}. Shard it by fully_shard alone, or "
                "put it in a group with norm='sign', whose rule is elementwise."
            )
        group = shard.groups[0]
        world = torch.distributed.get_world_size(group)
        load = loads.setdefault(group, [0.0] * world)
        if stack and shard.dim == 0:
            sizes = part_sizes(shard.shape[0], world)
            rank = torch.distributed.get_rank(group)
            units.append(Unit(i, torch.Size((sizes[rank], *shard.shape[1:])), first=sum(sizes[:rank])))
            for r, size in enumerate(sizes):
                load[r] += cost(i, torch.Size((size, *shard.shape[1:])))
        elif stack:
            units += [Unit(i, torch.Size(shard.shape[1:]), k, k, shard.dim - 1, group) for k in range(shard.shape[0])]
        else:
            units.append(Unit(i, shard.shape, dim=shard.dim, group=group))
    return _with_owners(units, loads, cost) if loads else units


def _with_owners(
    units: list[Unit], loads: dict[Any, list[float]], cost: Callable[[int, torch.Size], float]
) -> list[Unit]:
    costs = [cost(u.member, u.shape) for u in units]
    placed = list(units)
    for k in sorted((k for k, u in enumerate(units) if u.group is not None), key=lambda k: (-costs[k], k)):
        load = loads[units[k].group]
        owner = load.index(min(load))
        load[owner] += costs[k]
        placed[k] = units[k]._replace(owner=owner)
    return placed


def part_sizes(length: int, world: int) -> list[int]:
    """How many of ``length`` rows each process holds: DTensor cuts like torch.chunk."""
    chunk = -(-length // world)
    return [max(0, min(chunk, length - r * chunk)) for r in range(world)]


def gather(units: Sequence[Unit], pieces: Sequence[Tensor]) -> list[Tensor | None]:
    """Every unit whole on its owner, from this process's parts: one all-to-all for a process group and dtype.

    Returns:
        The units in order; None for those that others own.
    """
    wholes: list[Tensor | None] = [
        piece if unit.group is None else None for unit, piece in zip(units, pieces, strict=True)
    ]
    for (group, dtype, device), members in _exchanges(
        units, [p.dtype for p in pieces], [p.device for p in pieces]
    ).items():
        world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        by_owner = [[k for k in members if units[k].owner == r] for r in range(world)]
        sent = [pieces[k].reshape(-1) for ks in by_owner for k in ks]
        shapes = [[_part_shape(units[k], world, r) for k in by_owner[rank]] for r in range(world)]
        parts = _all_to_all(sent, [sum(pieces[k].numel() for k in ks) for ks in by_owner], shapes, group, dtype, device)
        for position, k in enumerate(by_owner[rank]):
            wholes[k] = torch.cat([parts[r][position] for r in range(world)], dim=units[k].dim)
    return wholes


def scatter(units: Sequence[Unit], wholes: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """This process's part of every unit, from the whole ones on their owners; the way back of :func:`gather`.

    Args:
        wholes: in the units' order, of the dtypes and on the devices of ``like``; None for units that others own.
    """
    pieces: list[Tensor | None] = list(wholes)
    for (group, dtype, device), members in _exchanges(units, [t.dtype for t in like], [t.device for t in like]).items():
        world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        by_owner = [[k for k in members if units[k].owner == r] for r in range(world)]
        sent, counts = [], [0] * world
        for r in range(world):
            for k in by_owner[rank]:
                whole = wholes[k]
                assert whole is not None
                sizes = part_sizes(units[k].shape[units[k].dim], world)
                part = whole.narrow(units[k].dim, sum(sizes[:r]), sizes[r])
                sent.append(part.reshape(-1))
                counts[r] += part.numel()
        shapes = [[_part_shape(units[k], world, rank) for k in ks] for ks in by_owner]
        parts = _all_to_all(sent, counts, shapes, group, dtype, device)
        for ks, found in zip(by_owner, parts, strict=True):
            for k, part in zip(ks, found, strict=True):
                pieces[k] = part
    return [p for p in pieces if p is not None]


def _exchanges(
    units: Sequence[Unit], dtypes: Sequence[torch.dtype], devices: Sequence[torch.device]
) -> dict[tuple[Any, torch.dtype, torch.device], list[int]]:
    """Places of the units that are cut, by what travels together."""
    sets: dict[Any, list[int]] = {}
    for k, (unit, dtype, device) in enumerate(zip(units, dtypes, devices, strict=True)):
        if unit.group is not None:
            sets.setdefault((unit.group, dtype, device), []).append(k)
    return sets


def _part_shape(unit: Unit, world: int, rank: int) -> tuple[int, ...]:
    shape = list(unit.shape)
    shape[unit.dim] = part_sizes(shape[unit.dim], world)[rank]
    return tuple(shape)


def _all_to_all(
    sent: list[Tensor],
    counts: list[int],
    shapes: list[list[tuple[int, ...]]],
    group: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> list[list[Tensor]]:
    """Send ``counts[r]`` elements to every rank r, receive tensors of ``shapes[r]`` from it."""
    flat = torch.cat(sent) if sent else torch.empty(0, dtype=dtype, device=device)
    expected = [[math.prod(shape) for shape in row] for row in shapes]
    arrived = torch.empty(sum(map(sum, expected)), dtype=dtype, device=device)
    torch.distributed.all_to_all_single(arrived, flat, [sum(row) for row in expected], counts, group=group)
    split = iter(arrived.split([n for row in expected for n in row]))
    return [[next(split).view(shape) for shape in row] for row in shapes]
