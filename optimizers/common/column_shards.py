"""State of 8 bits on shards that cut rows: by columns, or by two mesh dimensions.

Codes, scales and random bits are those of the whole tensor, so the values are those of one process, and come back on
any mesh. The kernels know shards of whole rows. These shards go through the definition in plain torch:
:func:`decoded`, a step in fp32, :func:`encode`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels.reference import quantization
from leanstep.kernels.reference.quantization import BLOCK
from leanstep.optimizers.common.sharding import Cut, Reducer, Reduction, Shard, local


def cuts_rows(shard: Shard) -> bool:
    """Whether shards have parts of rows; a row is all that one index of the first dimension selects.

    The same on all processes, also where one of them has all columns and the others none.
    """
    return bool(_column_cuts(shard))


def divides_blocks(shard: Shard) -> bool:
    """Whether several processes hold entries of one block, and so of one scale.

    Otherwise scales are sharded as the parameter is. Only matrices are looked at, whose columns divide evenly: the
    answer must be the same on all processes.
    """
    columns, processes = shard.shape[-1], 1
    for cut in _column_cuts(shard):
        processes *= torch.distributed.get_world_size(cut.group)
    return len(shard.shape) != 2 or columns % (BLOCK * processes) != 0


class Entries(NamedTuple):
    """Where the entries of a row are, by their position in this process's part of it."""

    block: Tensor  # index of the scale, counted from the first scale that this process stores
    pair: Tensor  # index of the pair of neighbours, counted from the beginning of the row
    lower: Tensor  # whether the entry is the first of its pair
    first_row: int
    blocks: int  # in a row of the whole tensor
    stored: int  # scales of a row on this process


def entries_of(shard: Shard, device: torch.device) -> Entries:
    """Return the positions of a shard's entries in the rows of the whole tensor."""
    assert shard.ranges is not None  # LeanOptimizer._check_shard
    columns = torch.zeros((), dtype=torch.int64, device=device)
    for dim, indices in enumerate(shard.ranges[1:], start=1):
        here = torch.arange(indices.start, indices.stop, device=device)
        columns = columns.unsqueeze(-1) * shard.shape[dim] + here
    columns = columns.flatten()
    block, lane = columns // BLOCK, columns % BLOCK
    blocks, first = quantization.scale_shape(shard.shape)[1], 0
    stored = blocks
    if not divides_blocks(shard):
        first, stored = shard.ranges[1].start // BLOCK, len(shard.ranges[1]) // BLOCK
    pair = block * (BLOCK // 2) + lane // 2
    return Entries(block - first, pair, lane % 2 == 0, shard.ranges[0].start, blocks, stored)


def decoded(codes: Tensor, scales: Tensor, shard: Shard, dtype: torch.dtype) -> Tensor:
    """Return the values of this process's codes, in fp32 or fp64."""
    flat = _rows(codes)
    of_entries = scales.index_select(1, entries_of(shard, codes.device).block)
    return quantization.decode(flat, of_entries, dtype).view(codes.shape)


def encode(
    values: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    key: str,
    shards: Sequence[Shard],
    seeds: Iterable[Tensor | int],
    skip: Sequence[Tensor] | None = None,
) -> Reducer[None]:
    """Store values as codes and scales of the average ``key``. Reduces the largest entries of blocks that are divided.

    Args:
        values: this process's shards, in fp32 or fp64, one for each state.
        seeds: of the random bits, one for each state.
        skip: flags that broadcast to the first dimension: leave codes and scales where they are set. None: nowhere.
    """
    entries = [entries_of(shard, value.device) for shard, value in zip(shards, values, strict=True)]
    # patterns without signs are ordered: finite numbers, infinity, NaNs; a process without entries has zeros
    largest = [_largest(_rows(value), each) for value, each in zip(values, entries, strict=True)]
    yield from _maximum_over_columns(largest, shards)
    for i, (value, state, each, seed) in enumerate(zip(values, states, entries, seeds, strict=True)):
        flat, dtype = _rows(value), local(state[key]).dtype
        new_scales, inverses = quantization.scales_of(largest[i].view(torch.float32), dtype)
        rows = torch.arange(each.first_row, each.first_row + len(flat), device=flat.device)
        pairs = rows.unsqueeze(1) * (each.blocks * (BLOCK // 2)) + each.pair
        bits = quantization.random_bits(pairs, seed, dtype)
        random = torch.where(each.lower, bits, bits >> 16) & 0xFFFF
        new_codes = quantization.encode(flat, inverses.index_select(1, each.block), random, dtype)
        for tensor, new in ((local(state[key]), new_codes), (local(state[f"{key}_scale"]), new_scales)):
            new = new.view(tensor.shape)
            if skip is not None:
                new = torch.where(skip[i].view(-1, *[1] * (new.dim() - 1)) > 0, tensor, new)
            tensor.copy_(new)


def scale_placements(param: Any, shard: Shard) -> list[Any] | None:
    """Return the placements of the scales; None: the parameter's.

    Processes that divide blocks all have the scales of these rows.
    """
    if not cuts_rows(shard) or not divides_blocks(shard):
        return None
    from torch.distributed.tensor import Replicate

    return [p if getattr(p, "dim", 0) == 0 else Replicate() for p in param.placements]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], tensor.shape[1:].numel())


def _column_cuts(shard: Shard) -> list[Cut]:
    return [cut for cut in shard.cuts if cut.dim > 0]


def _largest(values: Tensor, entries: Entries) -> Tensor:
    """Return the patterns of the largest magnitude of every stored block, int32 [rows, stored]."""
    patterns = values.abs().float().view(torch.int32)
    largest = torch.zeros(len(values), entries.stored, dtype=torch.int32, device=values.device)
    return largest.scatter_reduce_(1, entries.block.expand(len(values), -1), patterns, "amax")


def _maximum_over_columns(largest: list[Tensor], shards: Sequence[Shard]) -> Reducer[None]:
    """Take the largest entries over all processes that divide a tensor's blocks, in place."""
    requests = [
        [Reduction(value, cut.group, "max") for cut in _column_cuts(shard)] if divides_blocks(shard) else []
        for value, shard in zip(largest, shards, strict=True)
    ]
    for level in range(max(map(len, requests), default=0)):
        yield [request[level] for request in requests if len(request) > level]
