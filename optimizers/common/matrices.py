"""Matrix views of parameters, and updates through such views."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.optimizers.common.sharding import Shard, readables, store


def as_matrices(tensor: Tensor, transposed: bool = False, flatten: bool = False) -> Tensor:
    """Return a tensor as a matrix (m, n) or a stack (e, m, n); flatten four and more dimensions to (m, rest).

    Args:
        tensor: of two or more dimensions.
        transposed: the matrices are stored (n, m), as in transformers' ``Conv1D``; return their transposes.
        flatten: flatten three dimensions to (m, rest), too.
    """
    if transposed:
        return tensor.mT
    return tensor.flatten(1) if flatten or tensor.dim() > 3 else tensor


def oriented(shard: Shard, transposed: bool, flatten: bool = False) -> Shard:
    """Return a parameter's shard with shape and cuts in the coordinates of :func:`as_matrices`."""
    if flatten and len(shard.shape) == 3:
        shape = torch.Size((shard.shape[0], shard.shape[1] * shard.shape[2]))
        return shard._replace(shape=shape, cuts=tuple(cut._replace(dim=min(cut.dim, 1)) for cut in shard.cuts))
    if not transposed:
        return shard
    *stack, n, m = shard.shape
    swapped = {len(stack): len(stack) + 1, len(stack) + 1: len(stack)}
    cuts = tuple(cut._replace(dim=swapped.get(cut.dim, cut.dim)) for cut in shard.cuts)
    return shard._replace(shape=torch.Size((*stack, m, n)), cuts=cuts)


def matrix_shape(shard: Shard) -> tuple[int, int]:
    """Return (m, n) of a parameter's matrices before sharding."""
    shape = shard.shape
    return (shape[1], shape[2]) if len(shape) == 3 else (shape[0], math.prod(shape[1:]))


class Sides(NamedTuple):
    """Process groups that shard the rows and the columns of a parameter's matrices; both empty: no matrix is split."""

    rows: tuple[Any, ...]
    columns: tuple[Any, ...]


WHOLE = Sides((), ())


def sides_of(shard: Shard) -> Sides:
    """Return the groups of a shard in the coordinates of the matrices; those that divide a stack split no matrix."""
    rows = len(shard.shape) - 2 if len(shard.shape) == 3 else 0
    return Sides(
        tuple(cut.group for cut in shard.cuts if cut.dim == rows),
        tuple(cut.group for cut in shard.cuts if cut.dim > rows),
    )


def row_dim(shape: Sequence[int], transposed: bool, flatten: bool = False) -> int:
    """Return the dimension of a parameter, as it is stored, that has the rows of its matrices (out, in)."""
    return len(shape) - 1 if transposed else int(len(shape) == 3 and not flatten)


def block_sizes(blocks: int | Sequence[int] | None, rows: int) -> list[int]:
    """Return the rows of every block of a matrix, by the setting ``blocks`` of its group; None is one block."""
    if blocks is None:
        return [rows]
    return [blocks] * (rows // blocks) if isinstance(blocks, int) else list(blocks)


def as_written(tensor: Tensor, stacked: bool) -> Tensor:
    """Return a parameter as the matrix or stack that :func:`leanstep.kernels.scaled_step` writes.

    Scalars and vectors become one row. Three dimensions become a stack if ``stacked``, else one matrix (m, rest), as
    four and more do. The result is a view, or a copy where flattening needs one (a permuted convolution).
    """
    if tensor.dim() < 2:
        return tensor.reshape(1, -1)
    return as_matrices(tensor, flatten=not stacked)


def write_back(
    step: Callable[[list[Tensor], list[Tensor]], Tensor],
    weights: Sequence[Tensor],
    rounding_states: Sequence[Tensor],
    stacked: Sequence[bool],
) -> Tensor:
    """Update parameters and their rounding states in place by a step on matrices, for any memory layout.

    Args:
        step: takes matrices and their rounding states, updates both in place, and returns one flag per parameter.
        weights: this process's shards of the parameters.
        rounding_states: empty, or one tensor per weight, of its shape.
        stacked: per weight, whether three dimensions are a stack of matrices; see :func:`as_written`.

    Returns:
        The flags of ``step``.
    """
    plain_weights = readables(weights)
    matrices = [w if w.dim() == 2 else as_written(w, s) for w, s in zip(plain_weights, stacked, strict=True)]
    states = [as_written(t, s) for t, s in zip(rounding_states, stacked, strict=True)] if rounding_states else []
    flags = step(matrices, states)
    for stored, matrix in zip([*plain_weights, *rounding_states], [*matrices, *states], strict=True):
        if stored.dim() > matrix.dim() and not stored.is_contiguous():  # flattening may have copied it
            stored.copy_(matrix.view_as(stored))
    store(plain_weights, weights)
    return flags
