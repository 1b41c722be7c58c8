"""Sparse rows for M-FAC's window: the largest entries of every row of a matrix, the rest fed back into the next one.

With the error e of a parameter starting at 0, a gradient g becomes the row c::

    a = e + g
    c = the ceil(density * n) entries of largest magnitude of every row of a (n long), rounded to the stored dtype
    e = a - c

so that nothing is lost: the sum of all rows and the error is the sum of all gradients. What has few elements a row
(vectors, scalars), and everything at density 1, is kept whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import row_dots, scatter, sparse_layout, sparse_linear_combination, sparse_row_dots, top_k
from leanstep.kernels.fisher.sparse_window import MAX_BLOCK
from leanstep.optimizers.common.sharding import local
from leanstep.optimizers.mfac.columns import Columns, new_columns
from leanstep.optimizers.mfac.window import Part, storage_dtype


class SparsePart(Part):
    """Pieces whose rows are kept as values and the places of these inside blocks."""

    def _open(self) -> None:
        window, density = self.settings["window"], self.settings["density"]
        states = [piece.state for piece in self.pieces]
        self.values = [local(s["window_values"]).reshape(window, -1) for s in states]
        self.indices = [local(s["window_indices"]).view(torch.int16).reshape(window, -1) for s in states]
        self.errors = [local(s["error"]) for s in states]
        blocks = [block_size(s["error"].shape) for s in states]
        self.layouts = [sparse_layout(e.numel(), density, b) for e, b in zip(self.errors, blocks, strict=True)]

    def take(self, vectors: Sequence[Tensor], largest: Tensor | None = None) -> None:
        dtype = self.values[0].dtype
        self.sums = [e + v.to(e.dtype).view(e.shape) for e, v in zip(self.errors, vectors, strict=True)]
        self.kept = [top_k(a, layout, dtype) for a, layout in zip(self.sums, self.layouts, strict=True)]
        self.rows = [
            scatter(*kept, layout, dtype=e.dtype)
            for kept, layout, e in zip(self.kept, self.layouts, self.errors, strict=True)
        ]

    def dots(self, live: int) -> Tensor:
        return self.dots_with(self.rows, live)

    def own(self) -> Tensor:
        return row_dots([r.unsqueeze(0) for r in self.rows], self.rows, groups=self.slots).squeeze(1)

    def dots_with(self, vectors: Sequence[Tensor], live: int) -> Tensor:
        values, indices = [v[:live] for v in self.values], [i[:live] for i in self.indices]
        return sparse_row_dots(values, indices, vectors, self.layouts, groups=self.slots)

    def write(self, index: int, slots: set[int]) -> None:
        for i, slot in enumerate(self.slots):
            if slot in slots:
                self.values[i][index], self.indices[i][index] = self.kept[i]
                self.errors[i].copy_(self.sums[i] - self.rows[i].view(self.sums[i].shape))

    def combine(self, coefficients: Tensor, out: list[Tensor]) -> None:
        live = coefficients.shape[1]
        values, indices = [v[:live] for v in self.values], [i[:live] for i in self.indices]
        chosen = coefficients[: self.top]
        sparse_linear_combination(values, indices, chosen, self.layouts, groups=self.slots, out=out)


def lead_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Sizes of a parameter that count its rows: all but the last, of convolutions the first."""
    return tuple(shape[:-1] if len(shape) <= 3 else shape[:1])


def row_length(shape: Sequence[int]) -> int:
    """Elements of a row of a parameter."""
    return math.prod(shape[len(lead_of(shape)) :])


def block_size(shape: Sequence[int]) -> int:
    """Elements of a block: a row of a parameter, or the largest equal part of it whose places fit int16."""
    length = max(row_length(shape), 1)
    parts = next(n for n in range(1, length + 1) if length % n == 0 and length // n <= MAX_BLOCK)
    return length // parts


def kept_per_row(shape: Sequence[int], density: float) -> int:
    """Entries that a row of a parameter keeps."""
    return sparse_layout(row_length(shape), density, block_size(shape)).k


def is_sparse(shape: Sequence[int], density: float) -> bool:
    """Whether keeping fewer entries than all is possible: matrices with rows long enough for the density."""
    if len(shape) < 2 or not math.prod(shape):
        return False
    return kept_per_row(shape, density) < row_length(shape)


def init_sparse(state: dict[str, Any], param: Tensor, columns: Columns, settings: dict[str, Any]) -> None:
    """Create ``window_values`` [m, *lead, k], ``window_indices`` [m, *lead, 2 k] and ``error``, like the parameter.

    The indices are int16, kept as pairs of bytes: neither gloo nor NCCL can gather int16 for a whole state dict.

    Raises:
        ValueError: for a parameter cut inside its rows.
    """
    check_whole_rows(param, columns)
    lead, kept = lead_of(param.shape), kept_per_row(param.shape, settings["density"])
    rows = settings["window"]
    state["window_values"] = new_columns(param, columns, (*lead, kept), storage_dtype(settings, param), window=rows)
    state["window_indices"] = new_columns(param, columns, (*lead, 2 * kept), torch.uint8, window=rows)
    state["error"] = new_columns(param, columns, param.shape, error_dtype(param), window=None)


def sparse_bytes(param: Tensor, columns: Columns, settings: dict[str, Any]) -> int:
    """Bytes of values, places and error of the columns held here: m * k * (value + 2) + 4 d."""
    rows = math.prod(lead_of(columns.shape)) * settings["window"]
    stored = rows * kept_per_row(param.shape, settings["density"]) * (storage_dtype(settings, param).itemsize + 2)
    return stored + math.prod(columns.shape) * error_dtype(param).itemsize


def error_dtype(param: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 parameters."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def check_whole_rows(param: Tensor, columns: Columns) -> None:
    """Raise ValueError where a parameter is cut along a dimension that its rows run over."""
    lead = lead_of(param.shape)
    if tuple(columns.shape[len(lead) :]) != tuple(param.shape[len(lead) :]):
        raise ValueError(
            f"MFAC: compression='topk' keeps the largest entries of every row, but a parameter of shape "
            f"{tuple(param.shape)} is cut inside its rows (this process holds {tuple(columns.shape)}). Shard it along "
            f"dimension 0 (fully_shard does), or use compression=None."
        )
