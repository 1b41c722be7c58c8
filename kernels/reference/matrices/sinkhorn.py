"""Square-root Sinkhorn iterations on one matrix, as plain torch: the definition.

Only the row scales r and the column scales c are computed, not the iterate X = diag(r) G diag(c). With
H = (diag(r0) G)**2 elementwise and r0 = 1 / max|row|, every half-iteration is a matrix-vector product::

    r = r0 / sqrt(H c^2 / n)          row i of diag(r) G diag(c) has mean square 1
    c = 1 / sqrt(H^T (r / r0)^2 / m)  column j has mean square 1
"""

from __future__ import annotations

import torch
from torch import Tensor


def reciprocal_or_zero(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0. NaN stays NaN."""
    return torch.where(x == 0, 0.0, x.reciprocal())


def row_prescale(mat: Tensor) -> Tensor:
    """1 / max|row| of ``mat`` [B, m, n] as [B, m] in fp32 (or fp64): 0 for a zero row, NaN for a row with a NaN.

    The scaled entries are at most 1, so squares neither overflow nor all vanish, for gradients of any size.
    """
    wide = torch.float64 if mat.dtype == torch.float64 else torch.float32
    return inverse_of_largest(mat.abs().amax(dim=-1).to(wide))


def inverse_of_largest(largest: Tensor) -> Tensor:
    """1 / largest, finite for subnormal entries too; 0 for 0. NaN stays NaN."""
    # half the smallest normal number is the smallest whose inverse is finite
    smallest = torch.finfo(largest.dtype).tiny / 2
    return torch.where(largest == 0, 0.0, largest.clamp(min=smallest).reciprocal())


def finish_rows(prescale: Tensor, inverse: Tensor) -> Tensor:
    """r = r0 * sqrt(inverse), clamped to finite values, which a row of subnormal entries may exceed."""
    return (prescale * inverse.sqrt()).clamp(max=torch.finfo(prescale.dtype).max)


def scaled_squares(mat: Tensor, rows: Tensor) -> Tensor:
    """H = (diag(rows) mat)**2, [B, m, n], in the dtype of ``rows``. An infinite entry gives inf * 0 = NaN."""
    return (mat.to(rows.dtype) * rows.unsqueeze(-1)).square()


def row_half(squares: Tensor, cols: Tensor, cols_total: int) -> Tensor:
    """Mean square of every row of diag(r0) G diag(c): [B, m]."""
    return torch.matmul(squares, cols.square().unsqueeze(-1)).squeeze(-1) / cols_total


def column_half(squares: Tensor, inverse: Tensor, rows_total: int) -> Tensor:
    """Mean square of every column of diag(r) G, where inverse = (r / r0)**2: [B, n]. Partial, for a shard of rows."""
    return torch.matmul(inverse.unsqueeze(-2), squares).squeeze(-2) / rows_total


def finish_columns(colmeans: Tensor) -> Tensor:
    """c = 1 / sqrt(mean square of the column); 0 for a zero column; NaN stays NaN."""
    return reciprocal_or_zero(colmeans.sqrt())


def sinkhorn_pass(mat: Tensor, rows: Tensor, cols: Tensor, *, rows_total: int, first: bool) -> tuple[Tensor, Tensor]:
    """One iteration up to the column means: new row scales [B, m] and colmeans [B, n] (see ``kernels.sinkhorn``)."""
    if first:
        rows, cols = row_prescale(mat), torch.ones_like(cols)
    squares = scaled_squares(mat, rows)
    inverse = reciprocal_or_zero(row_half(squares, cols, mat.shape[-1]))
    return finish_rows(rows, inverse), column_half(squares, inverse, rows_total)


def sinkhorn(mat: Tensor, num_iters: int, *, end_with_rows: bool = False) -> tuple[Tensor, Tensor]:
    """``num_iters`` iterations on a whole matrix [B, m, n]: (r [B, m], c [B, n]). H is formed once.

    ``end_with_rows`` appends one more row half-iteration.
    """
    prescale = row_prescale(mat)
    squares = scaled_squares(mat, prescale)
    m, n = squares.shape[-2:]
    cols = squares.new_ones((*squares.shape[:-2], n))
    inverse = torch.ones_like(prescale)
    for _ in range(num_iters):
        inverse = reciprocal_or_zero(row_half(squares, cols, n))
        cols = finish_columns(column_half(squares, inverse, m))
    if end_with_rows:
        inverse = reciprocal_or_zero(row_half(squares, cols, n))
    return finish_rows(prescale, inverse), cols
