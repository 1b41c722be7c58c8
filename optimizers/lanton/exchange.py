"""Gather sharded matrices on their owners, and scatter results back: one all-to-all each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from leanstep.optimizers.common.sharding import chunk_of

if TYPE_CHECKING:
    from leanstep.optimizers.lanton.matrices import MatrixTask


def gather(tasks: Sequence[MatrixTask], pieces: Sequence[Tensor]) -> list[Tensor | None]:
    """Gather every matrix on its owner, from this process's shards; None for matrices of other owners."""
    wholes: list[Tensor | None] = [None] * len(tasks)
    for group, like, rank, owned in _exchanges(tasks, pieces):
        world = len(owned)
        shapes = [[_shard_shape(tasks[k], world, r) for k in owned[rank]] for r in range(world)]
        parts = _all_to_all([[pieces[k] for k in ks] for ks in owned], shapes, group, like)
        for i, k in enumerate(owned[rank]):
            wholes[k] = torch.cat([row[i] for row in parts], dim=tasks[k].dim)
    return wholes


def scatter(tasks: Sequence[MatrixTask], wholes: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Scatter matrices from their owners, and return this process's shards; the inverse of :func:`gather`.

    Args:
        tasks: sharded matrices.
        wholes: the unsharded matrices; None for matrices of other owners.
        like: per task, a tensor with the dtype and device of the result.
    """
    pieces: dict[int, Tensor] = {}
    for group, example, rank, owned in _exchanges(tasks, like):
        world, mine = len(owned), [(k, tasks[k]) for k in owned[rank]]
        sent = [
            [cast("Tensor", wholes[k]).narrow(t.dim, *chunk_of(t.shape[t.dim], world, r)) for k, t in mine]
            for r in range(world)
        ]
        shapes = [[_shard_shape(tasks[k], world, rank) for k in ks] for ks in owned]
        for ks, row in zip(owned, _all_to_all(sent, shapes, group, example), strict=True):
            pieces.update(zip(ks, row, strict=True))
    return [pieces[k] for k in range(len(tasks))]


def _exchanges(
    tasks: Sequence[MatrixTask], like: Sequence[Tensor]
) -> Iterator[tuple[Any, Tensor, int, list[list[int]]]]:
    """Yield every all-to-all: process group, tensor of the dtype and device, own rank, task indices by owner."""
    sets: dict[Any, list[int]] = {}
    for k, (task, tensor) in enumerate(zip(tasks, like, strict=True)):
        sets.setdefault((task.group, tensor.dtype, tensor.device), []).append(k)
    for (group, *_), indices in sets.items():
        owned = [[k for k in indices if tasks[k].owner == r] for r in range(torch.distributed.get_world_size(group))]
        yield group, like[indices[0]], torch.distributed.get_rank(group), owned


def _shard_shape(task: MatrixTask, world: int, rank: int) -> tuple[int, ...]:
    _, size = chunk_of(task.shape[task.dim], world, rank)
    return (*task.shape[: task.dim], size, *task.shape[task.dim + 1 :])


def _all_to_all(
    sent: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], group: Any, like: Tensor
) -> list[list[Tensor]]:
    """Send the tensors ``sent[r]`` to rank r, and receive tensors of ``shapes[r]`` from it."""
    flat = torch.cat([like.new_empty(0), *(t.reshape(-1) for row in sent for t in row)])
    counts = [sum(t.numel() for t in row) for row in sent]
    expected = [[math.prod(shape) for shape in row] for row in shapes]
    received = like.new_empty(sum(map(sum, expected)))
    torch.distributed.all_to_all_single(received, flat, [sum(row) for row in expected], counts, group=group)
    parts = iter(received.split([n for row in expected for n in row]))
    return [[next(parts).view(shape) for shape in row] for row in shapes]
