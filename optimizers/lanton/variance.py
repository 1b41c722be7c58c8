"""LANTON's variance="rows": rows of polar factors divided by their running root mean squares, as in NorMuon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.steps.common import compute_dtype
from leanstep.optimizers.common.matrices import row_dim
from leanstep.optimizers.common.saved_tensors import StateRule
from leanstep.optimizers.common.sharding import Reducer, Reduction, local, local_range
from leanstep.optimizers.lanton import rule
from leanstep.optimizers.lanton.exchange import MatrixTask
from leanstep.optimizers.lanton.layers import GradientInfo, LayerStep, form_of

VARIANCES = (None, "rows")

# state entry with one number per row: [m], or [e, m] for a stack
KEY = "row_mean_sq"
KEY_RULE = StateRule((torch.float32, torch.float64), cast=True, finite=True, least=0)


def rows_shape(group: dict[str, Any], param: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter's row mean squares before sharding."""
    form = form_of(group, param)
    return (param.shape[0], form.shape[0]) if form.stacked else (form.shape[0],)


def normalize_rows(batch: Sequence[tuple[GradientInfo, MatrixTask, Tensor]]) -> Reducer[None]:
    """Scale the rows of this process's shards of polar factors, and update their mean squares, in place.

    A sharded matrix needs one all-reduce of m numbers per mesh dimension that shards it.

    Args:
        batch: parameters with their matrices and directions, which are shaped as the optimizer writes them.
    """
    rows = [_rows_of(info.layer, direction) for info, _, direction in batch]
    squares = [_mean_squares(info.layer, *each) for (info, *_), each in zip(batch, rows, strict=True)]
    groups = [_groups_inside(info.layer) for info, *_ in batch]
    for level in range(max([0, *map(len, groups)])):
        yield [Reduction(s, inside[level]) for s, inside in zip(squares, groups, strict=True) if level < len(inside)]
    for (info, task, _), (matrix, first), square in zip(batch, rows, squares, strict=True):
        stored = local(info.layer.state[KEY])
        stored = stored if task.matrix is None else stored[task.matrix]
        variance = rule.row_variance(stored, square)
        stored.copy_(torch.where(info.nonfinite, stored, variance))
        matrix.mul_(_scales(info.layer, variance, square).narrow(-1, first, matrix.shape[-2]).unsqueeze(-1))


def _groups_inside(layer: LayerStep) -> list[Any]:
    return [cut.group for cut in layer.shard.cuts if cut.dim > 0 or not layer.form.stacked]


def _rows_of(layer: LayerStep, direction: Tensor) -> tuple[Tensor, int]:
    """Return a view of a direction as (..., rows, columns), and the index of its first row in the unsharded matrix."""
    group, shard = layer.group, layer.shard
    first, _ = local_range(shard, row_dim(shard.shape, group["transposed"], group["flatten"]))
    return direction.mT if group["transposed"] else direction, first


def _mean_squares(layer: LayerStep, matrix: Tensor, first: int) -> Tensor:
    """Return this process's contribution to the mean squares of the rows of the unsharded matrix, [m] or [e, m]."""
    m, n = layer.form.shape
    sums = torch.linalg.vector_norm(matrix, dim=-1, dtype=compute_dtype(layer.weight.dtype)).square() / n
    if sums.shape[-1] == m:
        return sums
    whole = sums.new_zeros(*sums.shape[:-1], m)
    whole.narrow(-1, first, sums.shape[-1]).copy_(sums)
    return whole


def _scales(layer: LayerStep, variance: Tensor, squares: Tensor) -> Tensor:
    rows = layer.form.block_rows
    blocks = zip(variance.split(rows, dim=-1), squares.split(rows, dim=-1), strict=True)
    return torch.cat([rule.row_scales(*block) for block in blocks], dim=-1)
