"""SinkGD's scales and row norms of matrices whose rows or columns are sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import Scales
from leanstep.kernels.matrices.sinkhorn import sinkhorn_of_columns, sinkhorn_of_rows
from leanstep.optimizers.common.matrices import matrix_shape
from leanstep.optimizers.common.sharding import Reducer, Reduction, Shard, together
from leanstep.optimizers.sinkgd import rule


def normalize(
    matrices: list[Tensor], shards: list[Shard], sides: list[str | None], num_iters: int, *, end_with_rows: bool
) -> Reducer[Scales]:
    """Compute the scales of :func:`leanstep.optimizers.sinkgd.rule.normalize` for unsharded and sharded matrices.

    Args:
        matrices: this process's shards.
        shards: their metadata.
        sides: the sharded side of each matrix, "rows" or "columns"; None for unsharded matrices.
        num_iters, end_with_rows: as for the rule.
    """
    sets: dict[Any, list[int]] = {}
    for i, (side, shard) in enumerate(zip(sides, shards, strict=True)):
        sets.setdefault((side, shard.groups if side else ()), []).append(i)
    results = yield from together(
        [
            _normalize_alike(
                [matrices[i] for i in indices], [shards[i] for i in indices], side, num_iters, end_with_rows
            )
            for (side, _), indices in sets.items()
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
    matrices: list[Tensor], shards: list[Shard], side: str | None, num_iters: int, end_with_rows: bool
) -> Reducer[Scales]:
    """Compute the scales of matrices that are sharded along the same side over the same processes, or unsharded."""
    if side is None:
        return rule.normalize(matrices, num_iters, end_with_rows=end_with_rows)
    axis, sinkhorn_of_shards = (0, sinkhorn_of_rows) if side == "rows" else (1, sinkhorn_of_columns)
    lengths = [matrix_shape(s)[axis] for s in shards]
    iteration = sinkhorn_of_shards(matrices, num_iters, lengths, end_with_rows=end_with_rows)
    while True:
        try:
            partial, op = next(iteration)
        except StopIteration as end:
            return end.value
        yield [Reduction(partial, shards[0].groups[0], op)]


def _in_one_buffer(tensors: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Copy tensors into one flat buffer; return their views and the buffer."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)], flat


def all_reduce_row_norms(
    norms: list[Tensor], totals: list[Tensor], shards: list[Shard], sides: list[str | None]
) -> Reducer[None]:
    """Turn row norms of shards, and their sums, into those of the unsharded matrices, in place."""
    by_columns = [i for i, side in enumerate(sides) if side == "columns"]
    if by_columns:
        for i in by_columns:
            norms[i].square_()
        yield [Reduction(norms[i], shards[i].groups[0]) for i in by_columns]
        for i in by_columns:
            norms[i].sqrt_()
            totals[i].copy_(norms[i].sum(dim=-1, keepdim=True))
    by_rows = [i for i, side in enumerate(sides) if side == "rows"]
    if by_rows:
        yield [Reduction(totals[i], shards[i].groups[0]) for i in by_rows]
