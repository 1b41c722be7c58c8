"""Round a matrix to a ggml type: by ggml alone, or with the rounding errors compensated by the columns that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leanstep._gguf.ggml import TYPES, dequantize, quantize
from leanstep.pruning.compress.grids import Grid, grid_of


def rounded(weight: Tensor, type: str, importance: Tensor | None, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """A matrix in a type, with the least squared error of the layer's output that a sweep over its columns finds.

    GPTQ's sweep (arXiv 2210.17323, algorithm 1) on ggml's own grids: ggml chooses the scales of a block of columns for
    their current values, each column is rounded to the nearest value of its grid, and its error ``e = (w_:j - q_:j) /
    U_jj`` is pushed to the columns that follow, ``W_:k -= e U_jk``. Of a type whose codes are those of several values
    together, ggml rounds the whole block, and the errors ``E = (W_:B - Q_:B) U_BB^-1`` are pushed to the blocks that
    follow.

    Args:
        weight: [out, in], fp32.
        type: a name of :data:`leanstep._gguf.ggml.TYPES`, whose blocks fill a row.
        importance: [in], mean squares of the inputs, by which ggml weighs errors; None: all are equal.
        factor: U, upper triangular [in, in], with U^T U the inverse of the inputs' Gram matrix; None: ggml rounds the
            matrix, and nothing is compensated.

    Returns:
        the values, fp32 [out, in], and their bytes, uint8 [out, bytes of a row].

    Raises:
        ValueError: for weights that ggml refuses.

    Notes:
        About ``out * in^2`` multiply-adds, and two copies of the matrix.
    """
    if factor is None:
        data = quantize(weight, type, importance)
        return dequantize(data, type, weight.shape[1]), data
    block, grid = TYPES[type].block, grid_of(type)
    current, pieces = weight.clone(), list[Tensor]()
    for start in range(0, weight.shape[1], block):
        columns = slice(start, start + block)
        inside = factor[columns, columns]
        data = quantize(current[:, columns], type, None if importance is None else importance[columns])
        if grid is None:
            difference = current[:, columns] - dequantize(data, type, block)
            errors = torch.linalg.solve_triangular(inside, difference, upper=True, left=False)
        else:
            levels, errors = _sweep(current[:, columns], inside, grid, *grid.ends(data))
            data = grid.filled(data, grid.codes[levels])
        pieces.append(data)
        current[:, start + block :].addmm_(errors, factor[columns, start + block :], alpha=-1)
    data = torch.cat(pieces, dim=1)
    return dequantize(data, type, weight.shape[1]), data


def _sweep(block: Tensor, factor: Tensor, grid: Grid, low: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
    """Round the columns of a block one by one to ``low + span * grid.shares``.

    Returns:
        the level of every weight, int64 [out, block], and the errors [out, block] to push to later blocks.
    """
    # transposed, so that a column is contiguous
    current, low, span = (one.t().contiguous() for one in (block, low, span))
    levels, errors = torch.empty_like(current, dtype=torch.int64), torch.empty_like(current)
    for j, column in enumerate(current):
        levels[j] = grid.nearest(column, low[j], span[j])
        errors[j] = (column - low[j] - span[j] * grid.shares[levels[j]]) / factor[j, j]
        current[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return levels.t(), errors.t()


@dataclass(frozen=True)
class OnGrid:
    """The constraint of a weight in training that its values stay on the grid which their scales give.

    Gradients pass as if nothing were rounded (a straight-through estimator).

    Attributes:
        data: uint8 [blocks, bytes], with the scales.
        low, span: fp32 [out, in], those of :meth:`Grid.ends`.
        is_transposed: whether the parameter is [in, out].
    """

    grid: Grid
    data: Tensor
    low: Tensor
    span: Tensor
    is_transposed: bool

    @classmethod
    def of(cls, type: str, data: Tensor, *, is_transposed: bool) -> OnGrid | None:
        """The constraint of a matrix with these bytes, uint8 [out, bytes of a row]; None for a type without a grid."""
        if TYPES[type].block == 1 or (grid := grid_of(type)) is None:
            return None
        blocks = data.reshape(-1, TYPES[type].size)
        low, span = (end.view(len(data), -1) for end in grid.ends(blocks))
        return cls(grid, blocks, low, span, is_transposed)

    def __call__(self, trained: Tensor) -> Tensor:
        """The weights, rounded; gradients pass."""
        matrix = (trained.detach().T if self.is_transposed else trained.detach()).to(self.low)
        values = self.low + self.span * self.grid.shares[self.grid.nearest(matrix, self.low, self.span)]
        return trained + ((values.T if self.is_transposed else values).to(trained) - trained.detach())

    @torch.no_grad()
    def write(self, weight: Tensor) -> tuple[str, Tensor]:
        """Round a matrix [out, in] in place; returns its type and bytes, uint8 [out, bytes of a row]."""
        levels = self.grid.nearest(weight.to(self.low), self.low, self.span).view(len(self.data), -1)
        data = self.grid.filled(self.data, self.grid.codes[levels]).view(len(self.low), -1)
        weight.copy_(dequantize(data, self.grid.type, self.low.shape[1]))
        return self.grid.type, data
