"""Rows of low rank for M-FAC's window: every gradient matrix as a product of two thin ones, with error feedback.

One step of subspace iteration per gradient, started from the last one's factor (Vogels, Karimireddy, Jaggi, "PowerSGD:
Practical Low-Rank Gradient Compression for Distributed Optimization", arXiv 1905.13727, Algorithm 1), as in the
low-rank variant of error-feedback M-FAC (arXiv 2306.06098). With the error e [R, C], 0 at first, and a basis b [C, r]::

    a = e + g
    P = orthonormal columns of a b
    Q = a^T P
    e = a - P Q^T
    b = Q

The window holds P [m, R, r] and Q [m, C, r]. Vectors, and matrices of rank at most r, are kept whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.mfac.columns import Columns
from leanstep.optimizers.mfac.sparse import error_dtype
from leanstep.optimizers.mfac.window import Part, storage_dtype


class LowRankPart(Part):
    """Pieces whose rows are products of two thin matrices."""

    def _open(self) -> None:
        states = [piece.state for piece in self.pieces]
        self.lefts = [s["window_left"] for s in states]
        self.rights = [s["window_right"] for s in states]
        self.errors = [s["error"] for s in states]
        self.bases = [s["basis"] for s in states]

    def take(self, vectors: Sequence[Tensor], largest: Tensor | None = None) -> None:
        self.sums, self.factors_of_rows, self.new_bases, self.rows = [], [], [], []
        for vector, error, basis, left in zip(vectors, self.errors, self.bases, self.lefts, strict=True):
            total = (error + vector.to(error.dtype).view(error.shape)).view(left.shape[1], -1)
            thin, _ = torch.linalg.qr(total @ basis)
            other = total.T @ thin
            kept = thin.to(left.dtype), other.to(left.dtype)
            self.sums.append(total)
            self.factors_of_rows.append(kept)
            # a basis that has lost a direction would never find it again
            self.new_bases.append(torch.where(other.square().sum(dim=0) > 0, other, basis))
            self.rows.append((kept[0].to(total.dtype) @ kept[1].to(total.dtype).T).view(-1))

    def dots(self, live: int) -> Tensor:
        found = []
        for lefts, rights, (left, right) in zip(self.lefts, self.rights, self.factors_of_rows, strict=True):
            a = torch.einsum("irk,rl->ikl", lefts[:live].double(), left.double())
            b = torch.einsum("ick,cl->ikl", rights[:live].double(), right.double())
            found.append((a * b).sum(dim=(1, 2)))
        return self._by_slot(found)

    def own(self) -> Tensor:
        # of the factors: their product is rounded, and its norm is not that of the row
        pairs = [(left.double(), right.double()) for left, right in self.factors_of_rows]
        found = [((left.T @ left) * (right.T @ right)).sum().view(1) for left, right in pairs]
        return self._by_slot(found).squeeze(1)

    def dots_with(self, vectors: Sequence[Tensor], live: int) -> Tensor:
        found = []
        for lefts, rights, vector in zip(self.lefts, self.rights, vectors, strict=True):
            matrix = vector.reshape(lefts.shape[1], -1).double()
            seen = torch.einsum("irk,rc->ick", lefts[:live].double(), matrix)
            found.append((seen * rights[:live].double()).sum(dim=(1, 2)))
        return self._by_slot(found)

    def write(self, index: int, slots: set[int]) -> None:
        for i, slot in enumerate(self.slots):
            if slot in slots:
                self.lefts[i][index], self.rights[i][index] = self.factors_of_rows[i]
                self.errors[i].copy_((self.sums[i] - self.rows[i].view_as(self.sums[i])).view_as(self.errors[i]))
                self.bases[i].copy_(self.new_bases[i])

    def combine(self, coefficients: Tensor, out: list[Tensor]) -> None:
        live = coefficients.shape[1]
        for result, lefts, rights, slot in zip(out, self.lefts, self.rights, self.slots, strict=True):
            # one product of [R, n r] and [n r, C]
            scaled = (lefts[:live].double() * coefficients[slot][:, None, None]).permute(1, 0, 2).flatten(1)
            others = rights[:live].double().permute(0, 2, 1).flatten(0, 1)
            result.view(lefts.shape[1], -1).copy_(scaled @ others)

    def _by_slot(self, dots: list[Tensor]) -> Tensor:
        total = dots[0].new_zeros(self.top, dots[0].shape[0])
        for slot, part in zip(self.slots, dots, strict=True):
            total[slot] += part
        return total


def is_low_rank(shape: Sequence[int], rank: int) -> bool:
    """Whether a parameter, flattened to (first, rest), has rows that rank r can shorten."""
    if len(shape) < 2 or not math.prod(shape):
        return False
    rows, columns = shape[0], math.prod(shape[1:])
    return rank < min(rows, columns)


def init_low_rank(state: dict[str, Any], param: Tensor, columns: Columns, settings: dict[str, Any]) -> None:
    """Create ``window_left`` [m, R, r], ``window_right`` [m, C, r], ``basis`` [C, r] and ``error``.

    Raises:
        ValueError: for a parameter of which this process holds a part.
    """
    if columns.groups or columns.cut:
        raise ValueError(
            f"MFAC: compression='lowrank' takes whole matrices, but a parameter of shape {tuple(param.shape)} is "
            f"sharded (this process holds {tuple(columns.shape)}). Use compression='topk' or None."
        )
    m, rank, dtype = settings["window"], settings["rank"], storage_dtype(settings, param)
    rows, rest = param.shape[0], math.prod(param.shape[1:])
    state["window_left"] = torch.zeros(m, rows, rank, dtype=dtype, device=param.device)
    state["window_right"] = torch.zeros(m, rest, rank, dtype=dtype, device=param.device)
    state["error"] = torch.zeros(param.shape, dtype=error_dtype(param), device=param.device)
    start = torch.randn(rest, rank, generator=torch.Generator().manual_seed(0), dtype=error_dtype(param))
    state["basis"] = start.to(param.device)


def low_rank_bytes(param: Tensor, columns: Columns, settings: dict[str, Any]) -> int:
    """Bytes of both factors, the basis and the error: m * r * (R + C) values and 4 (d + r C)."""
    rows, rest, rank = param.shape[0], math.prod(param.shape[1:]), settings["rank"]
    stored = settings["window"] * rank * (rows + rest) * storage_dtype(settings, param).itemsize
    return stored + (rows * rest + rest * rank) * error_dtype(param).itemsize
