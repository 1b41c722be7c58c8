"""Which matrices SinkGD steps together: blocks of rows as matrices of their own, and parts that bound the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.steps.common import constant
from leanstep.optimizers.common.base import Batch
from leanstep.optimizers.common.matrices import block_sizes, row_dim
from leanstep.optimizers.common.rounding import STATE_KEY
from leanstep.optimizers.common.sharding import Shard, local, local_range

# entries of a parameter's state that have its shape
_SHAPED = ("momentum_buffer", *STATE_KEY.values())

# Block k of parameter i has the index i + k * _STRIDE, which seeds its stochastic rounding.
_STRIDE = 2**20

# Averages at a time, 64 MB in fp32: they keep an accelerator busy. On a CPU, parts of 4 and 16 MB took up to 1.5 and
# 1.12 of the time of a whole batch, because the allocator returns their memory to the system after each.
_ENTRIES_TOGETHER = 2**24


def in_blocks(batch: Batch, weights: Sequence[Tensor]) -> Batch:
    """Return a batch of the blocks of a batch's matrices: weights, gradients and states as views.

    A stack gives the blocks of each matrix on this process. A block whose rows are on several processes is sharded
    along its rows; on a process without any of them it is empty.

    Args:
        batch: whole matrices.
        weights: this process's shards of the parameters, as tensors that kernels can address.
    """
    group = batch.group
    result = batch._replace(params=[], grads=[], states=[], indices=[], shards=[])
    for weight, grad, state, index, shard in zip(
        weights, batch.grads, batch.states, batch.indices, batch.shards, strict=True
    ):
        shaped = {key: list(_views(local(state[key]), group, shard)) for key in _SHAPED if key in state}
        stack, _, parts = _cuts_of_rows(group, shard)
        before = local_range(shard, 0)[0] * len(parts) if stack else 0  # blocks of matrices on other processes
        for k, view in enumerate(_views(weight, group, shard)):
            of_block = {key: views[k] for key, views in shaped.items()}
            if k and "step" in state:  # the first block counts the steps of the parameter
                of_block["step"] = state["step"].clone()
            result.params.append(view)
            result.states.append({**state, **of_block})
            result.indices.append(index + (before + k) * _STRIDE)
        result.grads.extend(_views(local(grad), group, shard))
        result.shards.extend(_shards(group, shard))
    return result


def flags_of_parameters(flags: Tensor, indices: Sequence[int]) -> Tensor:
    """Return one flag per parameter, set if that of one of its blocks is; ``indices`` are those of the blocks."""
    parameters = parameters_of(indices)
    position = {index: k for k, index in enumerate(dict.fromkeys(parameters))}
    of_block = constant([position[index] for index in parameters], flags.device, torch.int64)
    return flags.new_zeros(len(position)).index_add_(0, of_block, flags).clamp_max(1)


def parameters_of(indices: Sequence[int]) -> list[int]:
    """Return the index of the parameter of every block."""
    return [index % _STRIDE for index in indices]


def _cuts_of_rows(group: dict[str, Any], shard: Shard) -> tuple[int, int, list[tuple[int, int]]]:
    """Return 1 for a stack (else 0), the stored dimension of the rows, and (first, end) of every block here.

    (first, end) count from this process's first row; an empty block has first = end.
    """
    dim = row_dim(shard.shape, group["transposed"], group["flatten"])
    start, length = local_range(shard, dim)
    sizes = block_sizes(group["blocks"], shard.shape[dim])
    ends = [min(max(end - start, 0), length) for end in accumulate(sizes, initial=0)]
    return int(len(shard.shape) == 3 and not group["flatten"]), dim, list(pairwise(ends))


def _views(tensor: Tensor, group: dict[str, Any], shard: Shard) -> Iterator[Tensor]:
    """Yield this process's part of every block, from its shard of a tensor with the parameter's shape."""
    stack, dim, parts = _cuts_of_rows(group, shard)
    for matrix in tensor.unbind() if stack else (tensor,):
        for first, end in parts:
            yield matrix.narrow(dim - stack, first, end - first)


def _shards(group: dict[str, Any], shard: Shard) -> Iterator[Shard]:
    """Yield the metadata of every block that :func:`_views` yields, with the block in the place of the parameter."""
    stack, dim, parts = _cuts_of_rows(group, shard)
    start, _ = local_range(shard, dim)
    _, count = local_range(shard, 0) if stack else (0, 1)
    # processes that divide the matrices of a stack share no matrix
    cuts = tuple(cut._replace(dim=cut.dim - stack) for cut in shard.cuts if cut.dim >= stack)
    sizes = block_sizes(group["blocks"], shard.shape[dim])
    blocks = []
    for row, size, (first, end) in zip(accumulate(sizes, initial=0), sizes, parts, strict=False):
        shape, ranges = list(shard.shape), list(shard.ranges or map(range, shard.shape))
        shape[dim], ranges[dim] = size, range(max(start - row, 0), max(start - row, 0) + end - first)
        placed = tuple(ranges[stack:]) if cuts else None
        blocks.append(Shard(torch.Size(shape[stack:]), cuts, placed, shard.placements))
    for _ in range(count):
        yield from blocks


def in_parts(batch: Batch) -> list[Batch]:
    """Return the batch in parts of as many matrices as have 64 MB of fp32 averages, or of one that has more.

    A step with momentum would otherwise take the memory of all gradients once more. Sharded matrices stay together and
    share their all-reduces.
    """
    group = batch.group
    if not (group["momentum"] or group["algorithm"] == "balanced") or any(shard.cuts for shard in batch.shards):
        return [batch]
    ranges, start, entries = [], 0, 0
    for position, param in enumerate(batch.params):
        if position > start and entries + param.numel() > _ENTRIES_TOGETHER:
            ranges.append(slice(start, position))
            start, entries = position, 0
        entries += param.numel()
    ranges.append(slice(start, len(batch.params)))
    return [batch.part(span) for span in ranges]
