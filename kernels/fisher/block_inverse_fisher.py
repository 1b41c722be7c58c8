"""The inverse of a block-diagonal damped empirical Fisher matrix of fixed gradients, for pruning.

The rows of G [m, d] are gradients. Its columns are cut into consecutive blocks G_b, and F is zero between blocks. In
block b, F = damping * I + G_b^T G_b / m (Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of
Second-Order Information", arXiv 2107.03356). The paper's static recursion computes the same inverse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# elements of the rows that are widened to float64 at a time
_TILE = 1 << 22


class BlockInverseFisher:
    """Inverse of F, block by block, by Cholesky factors in float64.

    A block of B columns uses the smaller of two forms. *Dual* (m < B): with damping * I + G_b G_b^T / m = L L^T and
    W = L^-1 G_b / sqrt(m), F^-1 = (I - W^T W) / damping. Only L [m, m] is stored; each query forms W again, some
    columns at a time. *Primal* (m >= B): the inverse [B, B] is stored.

    Args:
        rows: G [m, d], any floating dtype and strides. Neither copied nor written.
        damping: > 0, in units of a squared gradient. Averaging b samples in a gradient scales F by about 1 / b.
        block_size: B, 1 <= B <= d; the last block may be shorter. None: one block of all columns.

    Raises:
        ValueError: for arguments out of range, rows that are not finite, or a block that has no Cholesky factor.

    Notes:
        Memory besides ``rows``, in bytes per column: 8 m^2 / B (dual), 8 B (primal). Operations per column: about m^2
        (dual), m B + B^2 (primal). On a GPU, construction and checks wait for the device.
    """

    def __init__(self, rows: Tensor, *, damping: float, block_size: int | None = None) -> None:
        if rows.dim() != 2 or not rows.shape[0] or not rows.shape[1] or not rows.is_floating_point():
            raise ValueError(
                f"BlockInverseFisher: expected rows [m, d] of floating dtype, m and d >= 1; got {tuple(rows.shape)} of "
                f"{rows.dtype}"
            )
        m, d = rows.shape
        block_size = d if block_size is None else block_size
        for name, value, accepted in (
            ("damping", damping, 0 < damping < math.inf),
            ("block_size", block_size, 1 <= block_size <= d),
        ):
            if not accepted:
                raise ValueError(f"BlockInverseFisher: {name} = {value!r} is out of range for rows [{m}, {d}]")
        self.damping, self.block_size = damping, block_size
        self.rows = rows.detach()
        split = d // block_size * block_size
        self._runs = []
        for start, stop, width in ((0, split, block_size), (split, d, d - split)):
            if stop > start:
                blocks = self.rows[:, start:stop].unflatten(1, (-1, width)).transpose(0, 1)
                self._runs.append(_factorize(blocks, start, damping))

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """Return the diagonal of F^-1, fp64 [d]. Raise ValueError if an entry is outside (0, 1 / damping]."""
        diagonal = torch.empty(self.rows.shape[1], dtype=torch.float64, device=self.rows.device)
        for run in self._runs:
            out = diagonal[run.start : run.stop].view(run.count, run.width)
            if run.dual:
                for b, c, whitened in self._whitened(run):
                    out[b, c] = (1 - whitened.square().sum(dim=1)) / self.damping
            else:
                out.copy_(run.factor.diagonal(dim1=1, dim2=2))
        self._check_diagonal(diagonal)
        return diagonal

    @torch.no_grad()
    def sub_blocks(self, size: int) -> Tensor:
        """Return the diagonal blocks of F^-1 for consecutive groups of ``size`` columns, fp64 [d / size, size, size].

        Raises:
            ValueError: if ``size`` does not divide every block, or for a reason of :meth:`diagonal`.
        """
        d = self.rows.shape[1]
        if size < 1 or any(run.width % size for run in self._runs):
            widths = [run.width for run in self._runs]
            raise ValueError(f"BlockInverseFisher.sub_blocks: size {size} does not divide blocks of {widths} columns")
        inverses = torch.empty(d // size, size, size, dtype=torch.float64, device=self.rows.device)
        identity = torch.eye(size, dtype=torch.float64, device=self.rows.device)
        for run in self._runs:
            out = inverses[run.start // size : run.stop // size].view(run.count, run.width // size, size, size)
            if run.dual:
                for b, c, whitened in self._whitened(run, size):
                    grouped = whitened.unflatten(2, (-1, size)).transpose(1, 2)
                    out[b, c.start // size : c.stop // size] = (identity - grouped.mT @ grouped) / self.damping
            else:
                grouped = run.factor.unflatten(2, (-1, size)).unflatten(1, (-1, size))
                out.copy_(grouped.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2))
        self._check_diagonal(inverses.diagonal(dim1=1, dim2=2))
        return inverses

    @torch.no_grad()
    def solve(self, x: Tensor) -> Tensor:
        """Return F^-1 x for x [d], or for every column of x [d, r], in fp64 and of the same shape.

        Notes:
            Reads ``rows`` twice. A unit vector gives a column of F^-1.
        """
        d = self.rows.shape[1]
        if x.dim() not in (1, 2) or x.shape[0] != d:
            raise ValueError(f"BlockInverseFisher.solve: expected x [{d}] or [{d}, r], got {tuple(x.shape)}")
        right = x.detach().reshape(d, -1).to(torch.float64)
        solution = torch.empty_like(right)
        for run in self._runs:
            old, new = (t[run.start : run.stop].view(run.count, run.width, -1) for t in (right, solution))
            if not run.dual:
                torch.bmm(run.factor, old, out=new)
                continue
            dots = right.new_zeros(run.count, self.rows.shape[0], right.shape[1])
            for b, c, tile in _tiles(run.blocks):
                dots[b] += tile @ old[b, c]
            coefficients = torch.cholesky_solve(dots, run.factor) / len(self.rows)
            for b, c, tile in _tiles(run.blocks):
                new[b, c] = (old[b, c] - tile.mT @ coefficients[b]) / self.damping
        return solution.view(x.shape)

    def _whitened(self, run: _Run, multiple: int = 1) -> Iterator[tuple[slice, slice, Tensor]]:
        """W of dual blocks, tile by tile; a tile's columns are a multiple of ``multiple``."""
        for b, c, tile in _tiles(run.blocks, multiple):
            whitened = torch.linalg.solve_triangular(run.factor[b], tile, upper=False)
            yield b, c, whitened / math.sqrt(len(self.rows))

    def _check_diagonal(self, diagonal: Tensor) -> None:
        largest = 1 / self.damping
        # a column without gradients has exactly 1 / damping, up to rounding
        wrong = ~((diagonal > 0) & (diagonal <= largest * (1 + 1e-9)))
        count = int(wrong.sum())
        if count:
            raise ValueError(
                f"BlockInverseFisher: {count} of {diagonal.numel()} diagonal entries of the inverse are not in "
                f"(0, 1 / damping = {largest:.3g}], the first is {float(diagonal[wrong][0]):.3g}: rounding errors "
                f"dominate. Raise the damping ({self.damping:.3g}) or use smaller blocks."
            )


@dataclass(frozen=True)
class _Run:
    """Consecutive blocks of one width: their gradients [count, m, width], and L (dual) or the inverses (primal)."""

    blocks: Tensor
    start: int
    dual: bool
    factor: Tensor

    @property
    def count(self) -> int:
        return self.blocks.shape[0]

    @property
    def width(self) -> int:
        return self.blocks.shape[2]

    @property
    def stop(self) -> int:
        return self.start + self.count * self.width


def _tiles(blocks: Tensor, multiple: int = 1) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (blocks, columns, gradients in float64 [b, m, c]), about ``_TILE`` elements at a time."""
    count, m, width = blocks.shape
    columns = min(width, max(1, _TILE // (m * multiple)) * multiple)
    height = max(1, _TILE // (m * columns)) if columns == width else 1
    for b in range(0, count, height):
        for c in range(0, width, columns):
            block_range, column_range = slice(b, min(b + height, count)), slice(c, min(c + columns, width))
            yield block_range, column_range, blocks[block_range, :, column_range].to(torch.float64)


@torch.no_grad()
def _factorize(blocks: Tensor, start: int, damping: float) -> _Run:
    """Compute Cholesky factors [m, m] (dual) or inverses [width, width] (primal)."""
    count, m, width = blocks.shape
    dual, size = m < width, min(m, width)
    factors = torch.empty(count, size, size, dtype=torch.float64, device=blocks.device)
    height = max(1, _TILE // (size * max(size, m)))
    for b in range(0, count, height):
        tile = blocks[b : b + height]
        matrices = _damped(tile, damping, dual)
        factor, info = torch.linalg.cholesky_ex(matrices)
        if info.any():
            bad = int((info != 0).nonzero()[0])
            _explain(tile[bad], start + (b + bad) * width, damping, matrices[bad])
        factors[b : b + height] = factor if dual else torch.cholesky_inverse(factor)
    return _Run(blocks, start, dual, factors)


def _damped(blocks: Tensor, damping: float, dual: bool) -> Tensor:
    """damping * I + G G^T / m (dual) or damping * I + G^T G / m of some blocks, in float64."""
    if dual:
        matrices = torch.zeros(len(blocks), *[blocks.shape[1]] * 2, dtype=torch.float64, device=blocks.device)
        for b, _, tile in _tiles(blocks):
            matrices[b].baddbmm_(tile, tile.mT)
    else:
        wide = blocks.to(torch.float64)
        matrices = wide.mT @ wide
    matrices /= blocks.shape[1]
    matrices.diagonal(dim1=1, dim2=2).add_(damping)
    return matrices


def _explain(block: Tensor, first: int, damping: float, matrix: Tensor) -> None:
    """Raise for a block that has no Cholesky factor."""
    columns = f"columns {first} to {first + block.shape[1] - 1}"
    if not block.isfinite().all():
        raise ValueError(f"BlockInverseFisher: the gradients of {columns} are not finite")
    raise ValueError(
        f"BlockInverseFisher: the block of {columns} is not positive definite in float64: a damping of {damping:.3g} "
        f"vanishes beside squared gradients of up to {float(matrix.diagonal().max()):.3g}. Raise the damping."
    )
