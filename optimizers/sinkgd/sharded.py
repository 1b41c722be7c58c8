"""SinkGD's scales and row norms of matrices whose rows, columns or both are sharded."""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels import Scales
from leanstep.kernels.matrices.sinkhorn import sinkhorn_of_blocks, sinkhorn_of_rows
from leanstep.optimizers.common.matrices import Sides, matrix_shape
from leanstep.optimizers.common.sharding import Reducer, Reduction, Shard, together
from leanstep.optimizers.sinkgd import rule


def normalize(
    matrices: list[Tensor], shards: list[Shard], sides: list[Sides], num_iters: int, *, end_with_rows: bool
) -> Reducer[Scales]:
    """Compute the scales of :func:`leanstep.optimizers.sinkgd.rule.normalize` for unsharded and sharded matrices.

    Args:
        matrices: this process's shards.
        shards: their metadata.
        sides: the groups that shard the rows and columns of each matrix.
        num_iters, end_with_rows: as for the rule.
    """
    sets: dict[Sides, list[int]] = {}
    for i, side in enumerate(sides):
        sets.setdefault(side, []).append(i)
    results = yield from together(
        [
            _normalize_alike(
                [matrices[i] for i in indices], [shards[i] for i in indices], side, num_iters, end_with_rows
            )
            for side, indices in sets.items()
        ]
    )
    if len(results) == 1:
        return results[0]
    by_index: dict[int, tuple[Tensor, Tensor]] = {}
    for indices, scales in zip(sets.values(), results, strict=True):
        by_index.update(zip(indices, zip(scales.rows, scales.cols, strict=True), strict=True))
    (rows, flat_rows), (cols, flat_cols) = (
        _in_one_buffer([by_index[i][k] for i in range(len(matrices))]) for k in (0, 1)
    )
    return Scales(rows, cols, flat_rows, flat_cols)


def _normalize_alike(
    matrices: list[Tensor], shards: list[Shard], sides: Sides, num_iters: int, end_with_rows: bool
) -> Reducer[Scales]:
    """Compute the scales of matrices whose rows and columns are sharded over the same processes, or unsharded."""
    rows, columns = ([matrix_shape(s)[axis] for s in shards] for axis in (0, 1))
    if sides.columns:
        iteration = sinkhorn_of_blocks(matrices, num_iters, rows, columns, end_with_rows=end_with_rows)
    elif sides.rows:
        iteration = sinkhorn_of_rows(matrices, num_iters, rows, end_with_rows=end_with_rows)
    else:
        return rule.normalize(matrices, num_iters, end_with_rows=end_with_rows)
    while True:
        try:
            partial, op, sharded = next(iteration)
        except StopIteration as end:
            return end.value
        for group in sides.rows if sharded == "rows" else sides.columns:
            yield [Reduction(partial, group, op)]


def _in_one_buffer(tensors: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    flat = torch.cat([t.reshape(-1) for t in tensors])
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)], flat


def all_reduce_row_norms(
    norms: list[Tensor], means: list[Tensor], rows: list[int], sides: list[Sides]
) -> Reducer[None]:
    """Turn row norms of shards, and their means over ``rows`` rows, into those of the whole matrices, in place."""
    yield from together([_all_reduce_norms(*each) for each in zip(norms, means, rows, sides, strict=True)])


def _all_reduce_norms(norms: Tensor, mean: Tensor, rows: int, sides: Sides) -> Reducer[None]:
    if sides.columns:
        norms.square_()
        for group in sides.columns:
            yield [Reduction(norms, group)]
        norms.sqrt_()
        mean.copy_(rule.mean_norm(norms, rows))
    for group in sides.rows:
        yield [Reduction(mean, group)]
