"""Parameters as matrices: the views that matrix rules read, and the write of an update through such views."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from leanstep.optimizers.common.sharding import Shard, readable, store


def as_matrices(tensor: Tensor, transposed: bool = False, flatten: bool = False) -> Tensor:
    """(m, n) and stacks (e, m, n) as they are; four and more dimensions (convolutions) as (m, rest).

    ``transposed``: the matrices are stored (n, m), as transformers' ``Conv1D`` does; returns their (m, n) view.
    ``flatten``: three dimensions are a convolution, too.
    """
    if transposed:
        return tensor.mT
    return tensor.flatten(1) if flatten or tensor.dim() > 3 else tensor


def oriented(shard: Shard, transposed: bool, flatten: bool = False) -> Shard:
    """The shard of the matrices that :func:`as_matrices` makes of a parameter of up to three dimensions."""
    if flatten and len(shard.shape) == 3:
        shape = torch.Size((shard.shape[0], shard.shape[1] * shard.shape[2]))
        return shard._replace(shape=shape, dim=None if shard.dim is None else min(shard.dim, 1))
    if not transposed:
        return shard
    *stack, n, m = shard.shape
    first, second = len(stack), len(stack) + 1
    dim = {first: second, second: first}.get(shard.dim, shard.dim) if shard.dim is not None else None
    return shard._replace(shape=torch.Size((*stack, m, n)), dim=dim)


def matrix_shape(shard: Shard) -> tuple[int, int]:
    """(m, n) of the whole matrices of a parameter."""
    shape = shard.shape
    return (shape[1], shape[2]) if len(shape) == 3 else (shape[0], math.prod(shape[1:]))


def as_written(tensor: Tensor, stacked: bool) -> Tensor:
    """The matrices that an update of a parameter is written into, as the parameter is stored.

    Scalars and vectors are one row, tensors of three dimensions a stack (``stacked``) or, as those of four and more,
    one matrix (m, rest). A view, but for a permuted convolution, whose rows are no stretches of memory: a copy.
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
    """Update parameters and their rounding state in place by a step on matrices, whatever their memory layout.

    Args:
        step: updates the matrices it is given, and their rounding states, in place, and returns one flag a parameter
            (:func:`leanstep.kernels.steps.scaled_step` with the updates and options bound).
        weights: this process's shards of the parameters.
        rounding_states: empty, or one for each of the weights, of the same shape.
        stacked: which of the weights of three dimensions are stacks of matrices; see :func:`as_written`.

    Returns:
        What ``step`` returned.
    """
    parts = [readable(w) for w in weights]
    matrices = [as_written(w, s) for w, s in zip(parts, stacked, strict=True)]
    states = [as_written(t, s) for t, s in zip(rounding_states, stacked, strict=True)] if rounding_states else []
    flags = step(matrices, states)
    for stored, matrix in zip([*parts, *rounding_states], [*matrices, *states], strict=True):
        if stored.dim() > matrix.dim() and not stored.is_contiguous():  # flattening may have copied it
            stored.copy_(matrix.view_as(stored))
    store(parts, weights)
    return flags
