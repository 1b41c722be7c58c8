"""A window of gradients, one block of columns at a time, as plain torch: dots with its rows, and sums of its rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# elements that are widened at a time: a window is never copied whole
_CHUNK_ELEMENTS = 1 << 22


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products and sums of windows of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def column_chunks(window: Tensor, elements: int = _CHUNK_ELEMENTS) -> Iterator[slice]:
    """Stretches of columns of a window [m, n] with about ``elements`` elements each."""
    m, n = window.shape
    width = max(1, elements // max(m, 1))
    return (slice(start, min(start + width, n)) for start in range(0, n, width))


def row_dots(window: Tensor, vector: Tensor) -> Tensor:
    """Dot products of the rows of a window [m, n] with a vector [n]: products and chunks' sums in fp32, total in fp64.

    Returns:
        fp64 [m].
    """
    wide = wide_dtype(window.dtype)
    total = torch.zeros(window.shape[0], dtype=torch.float64, device=window.device)
    for chunk in column_chunks(window):
        total += (window[:, chunk].to(wide) * vector[chunk].to(wide)).sum(dim=1)
    return total


def linear_combination(window: Tensor, coefficients: Tensor, out: Tensor) -> None:
    """Write the sum over i of ``coefficients[i] * window[i]`` to ``out`` [n], in fp32 (fp64 for fp64 windows)."""
    wide = wide_dtype(window.dtype)
    for chunk in column_chunks(window):
        out[chunk] = (window[:, chunk].to(wide) * coefficients.to(wide).unsqueeze(1)).sum(dim=0)


def row_scale(largest: Tensor) -> Tensor:
    """The power of two by which a row is divided before it is stored: its largest magnitude becomes 2**14 to 2**15.

    In fp16 that leaves a factor 2 of headroom, and 28 binary orders of magnitude in full precision below it. Dividing
    by it is exact. ``largest``: fp32, any shape.
    """
    exponent = torch.frexp(largest.to(torch.float32)).exponent
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float32), (exponent - 15).clamp_min(-126))
