"""Launchers of sparse_window.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import address, integers, library, pointers
from leanstep.kernels.cpp_impl.fisher.gradient_window import WINDOW_TYPES
from leanstep.kernels.reference.fisher.sparse_window import SparseLayout


def row_dots(
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    vectors: Sequence[Tensor],
    layouts: Sequence[SparseLayout],
    groups: Sequence[int],
    count: int,
) -> Tensor:
    """fp64 [count, m]: dots of the rows of sparse windows, of one dtype, with vectors [numel]."""
    values, indices = [v.contiguous() for v in values], [i.contiguous() for i in indices]
    wide = [v.to(torch.float32).contiguous() for v in vectors]
    dots = torch.zeros(count, values[0].shape[0], dtype=torch.float64)
    library("fisher/sparse_window", {"WINDOW": WINDOW_TYPES[values[0].dtype]}).row_dots(
        ctypes.c_int64(len(values)),
        pointers(values),
        pointers(indices),
        pointers(wide),
        *_numbers(layouts, groups),
        ctypes.c_int64(values[0].shape[0]),
        address(dots),
        torch.get_num_threads(),
    )
    return dots


def linear_combination(
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    coefficients: Tensor,
    layouts: Sequence[SparseLayout],
    groups: Sequence[int],
    out: Sequence[Tensor],
) -> None:
    """Write the combinations of the sparse rows with fp64 coefficients [G, m] to fp32 ``out``, [numel] each."""
    values, indices = [v.contiguous() for v in values], [i.contiguous() for i in indices]
    coefficients = coefficients.contiguous()
    library("fisher/sparse_window", {"WINDOW": WINDOW_TYPES[values[0].dtype]}).linear_combination(
        ctypes.c_int64(len(values)),
        pointers(values),
        pointers(indices),
        pointers(out),
        *_numbers(layouts, groups),
        ctypes.c_int64(values[0].shape[0]),
        address(coefficients),
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(list(out))


def _numbers(layouts: Sequence[SparseLayout], groups: Sequence[int]) -> list[ctypes.Array]:
    """Elements, block lengths, entries per block and row, and groups, as the kernels take them."""
    columns = zip(*((s.numel, s.block, s.per_block, s.k) for s in layouts), strict=True)
    return [integers(column) for column in (*columns, groups)]
