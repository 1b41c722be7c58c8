"""The inverse of a damped empirical Fisher matrix whose gradients do not change: diagonal, sub-blocks, solutions.

What pruning asks for. Rows of G [m, d] are gradients; d is cut into consecutive blocks of columns, and between blocks
F is taken as zero: F = damping * I + G_b^T G_b / s in block b (Frantar, Kurtic, Alistarh, "M-FAC: Efficient
Matrix-Free Approximations of Second-Order Information", arXiv 2107.03356; the paper's static recursion, which
:mod:`leanstep.kernels.reference.fisher.inverse_fisher` spells out, computes the same).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# float64 elements of a window that are at hand at a time
_TILE = 1 << 22


class BlockInverseFisher:
    """Inverse of F, block by block, by Cholesky factors in float64.

    A block of B columns takes the smaller of two forms. *Dual* (m < B): with A = damping * I + G_b G_b^T / s = L L^T
    and W = L^-1 G_b / sqrt(s), F^-1 = (I - W^T W) / damping. Only L [m, m] is kept; W is formed again for what is
    asked, a stretch of columns at a time. *Primal* (m >= B): the inverse [B, B] itself.

    Args:
        rows: G [m, d], any floating dtype and strides. Kept, neither copied nor written.
        damping: > 0, in units of a squared gradient. Averaging b samples in a gradient scales F by about 1 / b.
        block_size: B, 1 <= B <= d; the last block may be shorter. None: one block, F whole.
        denominator: s > 0; None: m.
        form: "dual", "primal", or "auto" for the smaller one, block by block.
        check: what happens when a diagonal entry of F^-1 is not in (0, 1 / damping], as exact ones are: "raise",
            "warn" or "ignore". Nothing is ever clamped.

    Raises:
        ValueError: for arguments out of range, rows that are not finite, or a block that has no Cholesky factor.

    Notes:
        Memory kept beside ``rows``, in bytes per column: 8 m^2 / B (dual), 8 B (primal). Operations per column:
        about m^2 (dual), m B + B^2 (primal). On a GPU, construction and checks wait for the device.
    """

    def __init__(
        self,
        rows: Tensor,
        *,
        damping: float,
        block_size: int | None = None,
        denominator: float | None = None,
        form: str = "auto",
        check: str = "raise",
    ):
        if rows.dim() != 2 or not rows.shape[0] or not rows.shape[1] or not rows.is_floating_point():
            raise ValueError(
                f"BlockInverseFisher: expected rows [m, d] of floating dtype, m and d >= 1; got {tuple(rows.shape)} of "
                f"{rows.dtype}"
            )
        m, d = rows.shape
        block_size = d if block_size is None else block_size
        denominator = m if denominator is None else denominator
        for name, value, accepted in (
            ("damping", damping, 0 < damping < math.inf),
            ("block_size", block_size, 1 <= block_size <= d),
            ("denominator", denominator, 0 < denominator < math.inf),
            ("form", form, form in ("auto", "dual", "primal")),
            ("check", check, check in ("raise", "warn", "ignore")),
        ):
            if not accepted:
                raise ValueError(f"BlockInverseFisher: {name} = {value!r} is out of range for rows [{m}, {d}]")
        self.damping, self.block_size, self.denominator, self.check = damping, block_size, denominator, check
        self.rows = rows.detach()
        split = d // block_size * block_size
        self._parts = []
        for start, stop, width in ((0, split, block_size), (split, d, d - split)):
            if stop > start:
                blocks = self.rows[:, start:stop].unflatten(1, (-1, width)).transpose(0, 1)
                dual = form == "dual" or (form == "auto" and m < width)
                self._parts.append(_factorize(blocks, start, damping, denominator, dual))

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """The diagonal of F^-1, fp64 [d]. Raises ValueError, or warns, for entries outside (0, 1 / damping]."""
        found = torch.empty(self.rows.shape[1], dtype=torch.float64, device=self.rows.device)
        for part in self._parts:
            out = found[part.start : part.stop].view(part.count, part.width)
            if part.dual:
                for b, c, whitened in self._whitened(part):
                    out[b, c] = (1 - whitened.square().sum(dim=1)) / self.damping
            else:
                out.copy_(part.factor.diagonal(dim1=1, dim2=2))
        self._check_diagonal(found)
        return found

    @torch.no_grad()
    def sub_blocks(self, size: int) -> Tensor:
        """The blocks of F^-1 for consecutive groups of ``size`` columns, fp64 [d / size, size, size].

        Raises:
            ValueError: where ``size`` does not divide every block; as :meth:`diagonal`.
        """
        d = self.rows.shape[1]
        if size < 1 or any(part.width % size for part in self._parts):
            widths = [part.width for part in self._parts]
            raise ValueError(f"BlockInverseFisher.sub_blocks: size {size} does not divide blocks of {widths} columns")
        found = torch.empty(d // size, size, size, dtype=torch.float64, device=self.rows.device)
        identity = torch.eye(size, dtype=torch.float64, device=self.rows.device)
        for part in self._parts:
            out = found[part.start // size : part.stop // size].view(part.count, part.width // size, size, size)
            if part.dual:
                for b, c, whitened in self._whitened(part, size):
                    grouped = whitened.unflatten(2, (-1, size)).transpose(1, 2)
                    out[b, c.start // size : c.stop // size] = (identity - grouped.mT @ grouped) / self.damping
            else:
                grouped = part.factor.unflatten(2, (-1, size)).unflatten(1, (-1, size))
                out.copy_(grouped.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2))
        self._check_diagonal(found.diagonal(dim1=1, dim2=2))
        return found

    @torch.no_grad()
    def submatrix(self, columns: Tensor) -> Tensor:
        """The rows and columns of F^-1 with the numbers ``columns`` (int64 [k]), fp64 [k, k].

        Notes:
            The host looks at which blocks they lie in.
        """
        columns = self._as_columns(columns, "submatrix")
        found = torch.zeros(len(columns), len(columns), dtype=torch.float64, device=self.rows.device)
        owners = columns // self.block_size
        for owner in owners.unique().tolist():
            members = (owners == owner).nonzero().squeeze(1)
            part, block = self._locate(owner)
            places = columns[members] - owner * self.block_size
            if part.dual:
                chosen = part.blocks[block].index_select(1, places).to(torch.float64)
                whitened = self._whiten(part.factor[block], chosen)
                same = (places.unsqueeze(1) == places).to(torch.float64)
                block_of_inverse = (same - whitened.T @ whitened) / self.damping
            else:
                block_of_inverse = part.factor[block][places][:, places]
            found[members.unsqueeze(1), members] = block_of_inverse
        return found

    def elements(self, first: Tensor, second: Tensor) -> Tensor:
        """The elements [F^-1]_ab for pairs of columns a, b (int64 [k] each), fp64 [k]; 0 between blocks.

        Notes:
            Forms the sub-matrix of all columns that occur.
        """
        first, second = self._as_columns(first, "elements"), self._as_columns(second, "elements")
        columns, places = torch.cat([first, second]).unique(return_inverse=True)
        matrix = self.submatrix(columns)
        return matrix[places[: len(first)], places[len(first) :]]

    @torch.no_grad()
    def solve(self, x: Tensor) -> Tensor:
        """F^-1 x for x [d], or for every column of x [d, r]; fp64 of the same shape.

        Notes:
            Reads ``rows`` twice. Columns of F^-1 are solutions for unit vectors.
        """
        d = self.rows.shape[1]
        if x.dim() not in (1, 2) or x.shape[0] != d:
            raise ValueError(f"BlockInverseFisher.solve: expected x [{d}] or [{d}, r], got {tuple(x.shape)}")
        given = x.detach().reshape(d, -1).to(torch.float64)
        found = torch.empty_like(given)
        for part in self._parts:
            old, new = (t[part.start : part.stop].view(part.count, part.width, -1) for t in (given, found))
            if not part.dual:
                torch.bmm(part.factor, old, out=new)
                continue
            dots = given.new_zeros(part.count, self.rows.shape[0], given.shape[1])
            for b, c, tile in _tiles(part.blocks):
                dots[b] += tile @ old[b, c]
            solved = torch.cholesky_solve(dots, part.factor) / self.denominator
            for b, c, tile in _tiles(part.blocks):
                new[b, c] = (old[b, c] - tile.mT @ solved[b]) / self.damping
        return found.view(x.shape)

    def logdet(self) -> Tensor:
        """log det F, fp64, 0-d."""
        return torch.stack([part.logdet for part in self._parts]).sum()

    def _whitened(self, part: _Part, multiple: int = 1) -> Iterator[tuple[slice, slice, Tensor]]:
        """W of a dual part, some blocks and columns at a time, in stretches of a multiple of so many columns."""
        for b, c, tile in _tiles(part.blocks, multiple):
            yield b, c, self._whiten(part.factor[b], tile)

    def _whiten(self, factor: Tensor, columns: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, columns, upper=False) / math.sqrt(self.denominator)

    def _locate(self, owner: int) -> tuple[_Part, int]:
        """The part that holds the block of this number, and which of its blocks it is."""
        first = self._parts[0]
        return (first, owner) if owner < first.count else (self._parts[1], owner - first.count)

    def _as_columns(self, columns: Tensor, name: str) -> Tensor:
        d = self.rows.shape[1]
        columns = columns.to(self.rows.device)
        if columns.dim() != 1 or columns.is_floating_point() or ((columns < 0) | (columns >= d)).any():
            raise ValueError(f"BlockInverseFisher.{name}: expected a 1-D tensor of columns 0 to {d - 1}, got {columns}")
        return columns.to(torch.int64)

    def _check_diagonal(self, diagonal: Tensor) -> None:
        if self.check == "ignore":
            return
        largest = 1 / self.damping
        # a gradient that is zero in a column leaves exactly 1 / damping, up to rounding
        wrong = ~((diagonal > 0) & (diagonal <= largest * (1 + 1e-9)))
        count = int(wrong.sum())
        if not count:
            return
        message = (
            f"BlockInverseFisher: {count} of {diagonal.numel()} diagonal entries of the inverse are not in "
            f"(0, 1 / damping = {largest:.3g}], the first is {float(diagonal[wrong][0]):.3g}: rounding has taken over. "
            f"Raise the damping ({self.damping:.3g}) or use smaller blocks."
        )
        if self.check == "raise":
            raise ValueError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


@dataclass(frozen=True)
class _Part:
    """Consecutive blocks of one width: their gradients [count, m, width], and their factors L or their inverses."""

    blocks: Tensor
    start: int
    dual: bool
    factor: Tensor
    logdet: Tensor

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
    """(blocks, columns, their gradients in float64 [b, m, c]), about ``_TILE`` elements at a time."""
    count, m, width = blocks.shape
    columns = min(width, max(1, _TILE // (m * multiple)) * multiple)
    height = max(1, _TILE // (m * columns)) if columns == width else 1
    for b in range(0, count, height):
        for c in range(0, width, columns):
            these, those = slice(b, min(b + height, count)), slice(c, min(c + columns, width))
            yield these, those, blocks[these, :, those].to(torch.float64)


@torch.no_grad()
def _factorize(blocks: Tensor, start: int, damping: float, denominator: float, dual: bool) -> _Part:
    """Cholesky factors of the m x m matrices (dual), or inverses of the width x width ones (primal)."""
    count, m, width = blocks.shape
    size = m if dual else width
    kept = torch.empty(count, size, size, dtype=torch.float64, device=blocks.device)
    logdet = kept.new_zeros(())
    height = max(1, _TILE // (size * max(size, m)))
    for b in range(0, count, height):
        some = blocks[b : b + height]
        matrices = _damped(some, damping, denominator, dual)
        factor, info = torch.linalg.cholesky_ex(matrices)
        if info.any():
            bad = int((info != 0).nonzero()[0])
            _explain(some[bad], start + (b + bad) * width, damping, matrices[bad])
        logdet += 2 * factor.diagonal(dim1=1, dim2=2).log().sum()
        kept[b : b + height] = factor if dual else torch.cholesky_inverse(factor)
    if dual:
        logdet += count * (width - m) * math.log(damping)
    return _Part(blocks, start, dual, kept, logdet)


def _damped(blocks: Tensor, damping: float, denominator: float, dual: bool) -> Tensor:
    """damping * I + G G^T / s (dual) or damping * I + G^T G / s of some blocks, in float64."""
    if dual:
        matrices = torch.zeros(len(blocks), *[blocks.shape[1]] * 2, dtype=torch.float64, device=blocks.device)
        for b, _, tile in _tiles(blocks):
            matrices[b].baddbmm_(tile, tile.mT)
    else:
        wide = blocks.to(torch.float64)
        matrices = wide.mT @ wide
    matrices /= denominator
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
