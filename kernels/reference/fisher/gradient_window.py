"""Dot products with the rows of a window of gradients, and combinations of its rows, as plain torch.

All sums run in fp64, where products of fp32 numbers are exact. If gradients change slowly, the rows hardly differ: only
the last bits of their dot products distinguish them, and in a combination they cancel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# elements that are widened at a time, so that a window is never copied whole
_CHUNK_ELEMENTS = 1 << 22


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of combinations of rows in ``dtype``: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def column_chunks(window: Tensor) -> Iterator[slice]:
    """Slices of columns of a window [m, n], with about ``_CHUNK_ELEMENTS`` elements each."""
    m, n = window.shape
    width = max(1, _CHUNK_ELEMENTS // max(m, 1))
    return (slice(start, min(start + width, n)) for start in range(0, n, width))


def row_dots(window: Tensor, vector: Tensor) -> Tensor:
    """Dot products of the rows of a window [m, n] with a vector [n], fp64 [m]."""
    total = torch.zeros(window.shape[0], dtype=torch.float64, device=window.device)
    for chunk in column_chunks(window):
        total += (window[:, chunk].double() * vector[chunk].double()).sum(dim=1)
    return total


def linear_combination(window: Tensor, coefficients: Tensor, out: Tensor) -> None:
    """Write the sum over i of ``coefficients[i] * window[i]`` to ``out`` [n], rounded once."""
    for chunk in column_chunks(window):
        out[chunk] = coefficients.double() @ window[:, chunk].double()
