"""Compressed rows of M-FAC's window: the largest entries of a matrix's rows (S-MFAC).

The rows have error feedback. The compression error e starts at 0 and is added to the next gradient g. The stored rows
and e therefore sum to all gradients so far. For matrices with rows of length n::

    a = e + g
    c = a with all but the ceil(density * n) entries of largest magnitude of every row set to 0, in the stored dtype
    e = a - c

From Modoranu, Kalinov, Kurtic, Frantar, Alistarh, "Error Feedback Can Accurately Compress Preconditioners",
arXiv 2306.06098. Vectors, and matrices too small to compress, have dense rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from leanstep._torch import local_part
from leanstep.kernels import row_dots, scatter, sparse_layout, sparse_linear_combination, sparse_row_dots, top_k
from leanstep.kernels.fisher.sparse_window import MAX_BLOCK
from leanstep.optimizers.mfac.window import DenseRows


def lead_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes whose product is the number of rows: all but the last, or the first of a convolution."""
    return tuple(shape[:-1] if len(shape) <= 3 else shape[:1])


def row_length(shape: Sequence[int]) -> int:
    """Return the number of elements in a parameter's row."""
    return math.prod(shape[len(lead_of(shape)) :])


def block_size(shape: Sequence[int]) -> int:
    """Return the elements per block: a parameter's row, or its largest equal division whose indices fit int16."""
    length = max(row_length(shape), 1)
    parts = next(n for n in range(1, length + 1) if length % n == 0 and length // n <= MAX_BLOCK)
    return length // parts


def entries_per_row(shape: Sequence[int], density: float) -> int:
    """Return the number of stored entries per row."""
    return sparse_layout(row_length(shape), density, block_size(shape)).k


class SparseRows(DenseRows):
    """Rows stored as values and indices inside blocks: ``compression="topk"``."""

    key = "window_values"

    @staticmethod
    def accepts(param: Tensor, settings: dict[str, Any]) -> bool:
        """Whether the parameter is a matrix whose rows are long enough for the density."""
        shape = param.shape
        if settings["compression"] != "topk" or len(shape) < 2 or not math.prod(shape):
            return False
        return entries_per_row(shape, settings["density"]) < row_length(shape)

    @staticmethod
    def check_indices(name: str, state: Mapping[str, Any], settings: dict[str, Any]) -> None:
        """Refuse loaded indices outside of their blocks, by which kernels would write. Raises ValueError."""
        error, raw = local_part(state["error"]), local_part(state["window_indices"]).contiguous()
        layout = sparse_layout(error.numel(), settings["density"], block_size(state["error"].shape))
        rows = settings["window"]
        fits = raw.numel() * raw.itemsize == rows * layout.k * 2
        if fits:
            blocks = torch.arange(layout.k, device=raw.device) // layout.per_block
            ends = (layout.numel - blocks * layout.block).clamp(max=layout.block)
            indices = raw.view(torch.int16).reshape(rows, layout.k)
            fits = bool(((indices >= 0) & (indices < ends)).all())
        if not fits:
            raise ValueError(f"MFAC: the saved window of {name} has indices outside of its rows. Nothing was changed")

    @override
    def _bind_state(self) -> None:
        window, density = self.settings["window"], self.settings["density"]
        states = [piece.state for piece in self.pieces]
        self.values = [local_part(s["window_values"]).reshape(window, -1) for s in states]
        self.indices = [local_part(s["window_indices"]).view(torch.int16).reshape(window, -1) for s in states]
        self.errors = [local_part(s["error"]) for s in states]
        blocks = [block_size(s["error"].shape) for s in states]
        self.layouts = [sparse_layout(e.numel(), density, b) for e, b in zip(self.errors, blocks, strict=True)]

    @override
    def encode(self, vectors: Sequence[Tensor]) -> None:
        dtype = self.values[0].dtype
        self.sums = [e + v.to(e.dtype).view(e.shape) for e, v in zip(self.errors, vectors, strict=True)]
        self.entries = [top_k(a, layout, dtype) for a, layout in zip(self.sums, self.layouts, strict=True)]
        self.rows = [
            scatter(*entries, layout, dtype=e.dtype)
            for entries, layout, e in zip(self.entries, self.layouts, self.errors, strict=True)
        ]

    @override
    def dots(self, n: int) -> Tensor:
        return sparse_row_dots(*self._stored(n), self.rows, self.layouts, groups=self.grams)

    @override
    def squared_norms(self) -> Tensor:
        return row_dots([r.unsqueeze(0) for r in self.rows], self.rows, groups=self.grams).squeeze(1)

    @override
    def write(self, index: int, grams: set[int]) -> None:
        for i, gram in enumerate(self.grams):
            if gram in grams:
                self.values[i][index], self.indices[i][index] = self.entries[i]
                self.errors[i].copy_(self.sums[i] - self.rows[i].view(self.sums[i].shape))

    @override
    def combine(self, coefficients: Tensor, out: list[Tensor]) -> None:
        values, indices = self._stored(coefficients.shape[1])
        coefficients = coefficients[: self.gram_count]
        sparse_linear_combination(values, indices, coefficients, self.layouts, groups=self.grams, out=out)

    def _stored(self, n: int) -> tuple[list[Tensor], list[Tensor]]:
        return [v[:n] for v in self.values], [i[:n] for i in self.indices]
