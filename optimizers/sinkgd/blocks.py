"""SinkGD's matrices whose rows are several matrices, such as heads of attention and fused weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.steps.common import constant
from leanstep.optimizers.common.base import Batch
from leanstep.optimizers.common.matrices import block_sizes
from leanstep.optimizers.common.rounding import STATE_KEY
from leanstep.optimizers.common.sharding import Shard, local, local_range

# entries of a parameter's state that have its shape
_SHAPED = ("momentum_buffer", *STATE_KEY.values())


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
        params = list(_views(weight, group, shard))
        result.params.extend(params)
        result.grads.extend(_views(local(grad), group, shard))
        result.shards.extend(_shards(group, shard))
        result.indices.extend([index] * len(params))
        result.states.extend({**state, **{key: views[k] for key, views in shaped.items()}} for k in range(len(params)))
    return result


def flags_of_parameters(flags: Tensor, indices: Sequence[int]) -> Tensor:
    """Return one flag per parameter, set if that of one of its blocks is; ``indices`` are the blocks' parameters."""
    position = {index: k for k, index in enumerate(dict.fromkeys(indices))}
    of_block = constant([position[index] for index in indices], flags.device, torch.int64)
    return flags.new_zeros(len(position)).index_add_(0, of_block, flags).clamp_max(1)


def _layout(group: dict[str, Any], shard: Shard) -> tuple[bool, int, list[int]]:
    """Return whether a parameter is a stack, the stored dimension of its matrices' rows, and the rows of the blocks."""
    dims = len(shard.shape)
    stack = dims == 3 and not group["flatten"]
    dim = dims - 1 if group["transposed"] else int(stack)
    return stack, dim, block_sizes(group["blocks"], shard.shape[dim])


def _views(tensor: Tensor, group: dict[str, Any], shard: Shard) -> Iterator[Tensor]:
    """Yield this process's part of every block, from its shard of a tensor with the parameter's shape."""
    stack, dim, sizes = _layout(group, shard)
    start, length = local_range(shard, dim)
    ends = [min(max(end - start, 0), length) for end in accumulate(sizes, initial=0)]
    for matrix in tensor.unbind() if stack else (tensor,):
        for first, end in pairwise(ends):
            yield matrix.narrow(dim - stack, first, end - first)


def _shards(group: dict[str, Any], shard: Shard) -> Iterator[Shard]:
    """Yield the metadata of every block that :func:`_views` yields."""
    stack, dim, sizes = _layout(group, shard)
    start, _ = local_range(shard, dim)
    first_matrix, count = local_range(shard, 0) if stack else (0, 1)
    cut = shard.dim if shard.dim is None or not stack else shard.dim - 1
    groups = shard.groups
    if cut == -1:  # a stack sharded between its matrices
        cut, groups = None, ()
    shape = list(shard.shape[int(stack) :])
    row_size = math.prod(shape) // max(1, shape[dim - stack])
    # rows of the stored matrix are a contiguous range, unless other dimensions are sharded
    contiguous = not group["transposed"] and (not groups or cut == 0)
    for matrix in range(first_matrix, first_matrix + count):
        row = 0
        for size in sizes:
            shape[dim - stack] = size
            offset = (matrix * shard.shape[dim] + max(row, start)) * row_size if contiguous else None
            yield Shard(torch.Size(shape), cut, offset, groups, shard.placements)
            row += size
