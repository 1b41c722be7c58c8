"""Gather sharded matrices on their owners, and scatter results back: one all-to-all each per mesh dimension.

A matrix that several mesh dimensions shard is gathered over one after the other. After each, fewer processes hold
larger blocks, and after the last the owner holds the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from leanstep.optimizers.common.sharding import Cut, chunk_of


class MatrixTask(NamedTuple):
    """A sharded matrix with its owner, or a matrix or stack that needs no gathering."""

    layer_index: int  # index of the parameter in the caller's list
    shape: torch.Size  # of the unsharded matrix, or of this process's part of a stack, as stored
    matrix: int | None = None  # index in this process's part of a stack sharded inside its matrices; None otherwise
    first: int = 0  # index of the first matrix in the parameter's stack
    cuts: tuple[Cut, ...] = ()  # of the matrix, in the order of gathering; empty if it needs none
    owner: tuple[int, ...] = ()  # rank of the owner in the group of each cut

    def is_held(self, level: int) -> bool:
        """Whether this process holds a block of the matrix after ``level`` cuts have been undone by gathering."""
        pairs = zip(self.cuts[:level], self.owner, strict=False)
        return all(torch.distributed.get_rank(cut.group) == rank for cut, rank in pairs)


def gather(tasks: Sequence[MatrixTask], pieces: Sequence[Tensor]) -> list[Tensor | None]:
    """Gather every matrix on its owner, from this process's shards; None for matrices of other owners."""
    blocks: list[Tensor | None] = list(pieces)
    for level in range(_levels(tasks)):
        for group, like, rank, owned in _exchanges(tasks, pieces, level):
            sent = [[cast("Tensor", blocks[k]) for k in ks] for ks in owned]
            shapes = [[_block_shape(tasks[k], level, r) for k in owned[rank]] for r in range(len(owned))]
            parts = _all_to_all(sent, shapes, group, like)
            for k in (k for ks in owned for k in ks):
                blocks[k] = None
            for i, k in enumerate(owned[rank]):
                blocks[k] = torch.cat([row[i] for row in parts], dim=tasks[k].cuts[level].dim)
    return blocks


def scatter(tasks: Sequence[MatrixTask], wholes: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Scatter matrices from their owners, and return this process's shards; the inverse of :func:`gather`.

    Args:
        tasks: sharded matrices.
        wholes: the unsharded matrices; None for matrices of other owners.
        like: per task, a tensor with the dtype and device of the result.
    """
    blocks: list[Tensor | None] = list(wholes)
    for level in reversed(range(_levels(tasks))):
        for group, example, rank, owned in _exchanges(tasks, like, level):
            mine = [(cast("Tensor", blocks[k]), tasks[k].cuts[level]) for k in owned[rank]]
            sent = [[_chunk(block, cut, r) for block, cut in mine] for r in range(len(owned))]
            shapes = [[_block_shape(tasks[k], level, rank) for k in ks] for ks in owned]
            for ks, row in zip(owned, _all_to_all(sent, shapes, group, example), strict=True):
                for k, piece in zip(ks, row, strict=True):
                    blocks[k] = piece
    return [cast("Tensor", block) for block in blocks]


def _levels(tasks: Sequence[MatrixTask]) -> int:
    return max((len(task.cuts) for task in tasks), default=0)


def _exchanges(
    tasks: Sequence[MatrixTask], like: Sequence[Tensor], level: int
) -> Iterator[tuple[Any, Tensor, int, list[list[int]]]]:
    """Yield every all-to-all of a level: process group, tensor of the dtype and device, own rank, tasks by owner.

    The tasks are given by index: those whose blocks the processes of the group hold before the level's gathering.
    """
    sets: dict[Any, list[int]] = {}
    for k, (task, tensor) in enumerate(zip(tasks, like, strict=True)):
        if len(task.cuts) > level and task.is_held(level):
            sets.setdefault((task.cuts[level].group, tensor.dtype, tensor.device), []).append(k)
    for (group, *_), indices in sets.items():
        ranks = range(torch.distributed.get_world_size(group))
        owned = [[k for k in indices if tasks[k].owner[level] == r] for r in ranks]
        yield group, like[indices[0]], torch.distributed.get_rank(group), owned


def block_shape(shape: Sequence[int], cuts: Sequence[Cut], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the block of a tensor that the process with these ranks in the groups of the cuts holds."""
    sizes = list(shape)
    for cut, rank in zip(reversed(cuts), reversed(ranks), strict=True):
        sizes[cut.dim] = chunk_of(sizes[cut.dim], torch.distributed.get_world_size(cut.group), rank)[1]
    return tuple(sizes)


def _block_shape(task: MatrixTask, level: int, rank: int) -> tuple[int, ...]:
    """Return the shape of a block before the gathering of a level, on the process with this rank in its group."""
    cuts = task.cuts[level:]
    return block_shape(task.shape, cuts, [rank, *(torch.distributed.get_rank(cut.group) for cut in cuts[1:])])


def _chunk(block: Tensor, cut: Cut, rank: int) -> Tensor:
    world = torch.distributed.get_world_size(cut.group)
    return block.narrow(cut.dim, *chunk_of(block.shape[cut.dim], world, rank))


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
