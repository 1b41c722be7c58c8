"""A window of sparse gradients: a row holds a few entries of every block, as values and indices inside the block.

The layout of S-MFAC (Modoranu, Kalinov, Kurtic, Frantar, Alistarh, "Error Feedback Can Accurately Compress
Preconditioners", arXiv 2306.06098; code: github.com/IST-DASLab/ISTA-DASLab-Optimizers). A parameter of n elements has
``values`` [m, k] in bf16 or fp32 and ``indices`` [m, k] in int16, with k about density * n. At a density of 1 % in
bf16, 4 bytes replace 400 bytes of an fp32 window. A row consists of the rounded values. The error feedback takes the
rest of the gradient: ``e = a - scatter(*top_k(a, layout), layout)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import call
from leanstep.kernels.fisher import gradient_window as dense
from leanstep.kernels.fisher.gradient_window import as_list, check_coefficients, check_groups, check_out
from leanstep.kernels.op import EVERYWHERE, op
from leanstep.kernels.reference.fisher import sparse_window as reference
from leanstep.kernels.reference.fisher.gradient_window import wide_dtype
from leanstep.kernels.reference.fisher.sparse_window import SparseLayout

MAX_BLOCK = 1 << 15  # indices are int16


def sparse_layout(numel: int, density: float, block: int = 4096) -> SparseLayout:
    """Layout of rows that hold ``ceil(density * size)`` entries of every block, at least one.

    Args:
        numel: elements of a row.
        density: 0 < density <= 1.
        block: elements of a block, 1 to 2**15; the last one may be shorter.

    Raises:
        ValueError: for values out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"sparse_layout: expected 0 < density <= 1, got {density}")
    if not 1 <= block <= MAX_BLOCK:
        raise ValueError(f"sparse_layout: expected a block of 1 to {MAX_BLOCK} elements, got {block}")
    if numel < 0:
        raise ValueError(f"sparse_layout: expected numel >= 0, got {numel}")
    return SparseLayout(numel, block, _entries(block, density), _entries(numel % block, density))


def _entries(size: int, density: float) -> int:
    # rounded first: 0.07 * 100 is a little more than 7
    return min(size, math.ceil(round(size * density, 9)))


@torch.no_grad()
def top_k(vector: Tensor, layout: SparseLayout, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Make a sparse row of the entries of largest magnitude in every block.

    Args:
        vector: ``layout.numel`` elements of any floating dtype (magnitudes are compared in fp32); not written.
        layout: from :func:`sparse_layout`.
        dtype: dtype of the values, which are rounded to nearest.

    Returns:
        (values [k] in ``dtype``, indices int16 [k] inside the blocks, ascending). Of entries of equal magnitude the
        first are taken, on every device.

    Raises:
        ValueError: for a vector of another size.

    Notes:
        Reads the vector twice. Needs scratch memory of 8 bytes per element.
    """
    if vector.numel() != layout.numel:
        raise ValueError(f"top_k: the layout is of {layout.numel} elements, the vector has {vector.numel()}")
    vector = vector.detach().reshape(-1)
    if layout.is_dense:
        indices = torch.arange(layout.numel, device=vector.device) % layout.block
        return vector.to(dtype, copy=True), indices.to(torch.int16)
    return reference.top_k(vector, layout, dtype)


@torch.no_grad()
def scatter(values: Tensor, indices: Tensor, layout: SparseLayout, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Expand a sparse row, ``values`` and ``indices`` [k], to a dense row [numel] with zeros elsewhere.

    Raises:
        ValueError: unless there are ``layout.k`` values and indices.
    """
    if values.shape != (layout.k,) or indices.shape != (layout.k,):
        raise ValueError(
            f"scatter: expected {layout.k} values and indices, got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    out = torch.empty(layout.numel, dtype=dtype, device=values.device)
    reference.scatter(values, indices, layout, out)
    return out


@torch.no_grad()
def sparse_row_dots(
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    vectors: Sequence[Tensor],
    layouts: Sequence[SparseLayout],
    *,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """Dot product of every sparse row with a dense vector.

    Args:
        values: one [m, k_b] per parameter, of one device and dtype (bf16, fp16, fp32, fp64); not written.
        indices: one int16 [m, k_b] per parameter.
        vectors: one per parameter, of ``layouts[b].numel`` elements, any floating dtype.
        layouts: one per parameter.
        groups: as for :func:`leanstep.kernels.row_dots`.

    Returns:
        fp64 [m], or [G, m] with ``groups``.

    Raises:
        ValueError: for sizes or dtypes that do not match.
        BackendError: the requested backend cannot run here.

    Notes:
        Reads values and indices once, and gathers elements of the vectors. Products and sums run in fp64. Dense layouts
        run as :func:`leanstep.kernels.row_dots` of the values, and read no indices.
    """
    _check(values, indices, layouts, groups, "sparse_row_dots")
    for b, (vector, layout) in enumerate(zip(vectors, layouts, strict=True)):
        if vector.numel() != layout.numel:
            raise ValueError(
                f"sparse_row_dots: vectors[{b}] has {vector.numel()} elements, its layout is of {layout.numel}"
            )
    if all(layout.is_dense for layout in layouts):
        return dense.row_dots(values, vectors, groups=groups)
    return _run_dots(list(values), list(indices), list(vectors), list(chain(*layouts)), as_list(groups))


@torch.no_grad()
def sparse_linear_combination(
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    coefficients: Tensor,
    layouts: Sequence[SparseLayout],
    *,
    groups: Sequence[int] | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Linear combination of the sparse rows, as dense vectors.

    Args:
        values, indices, layouts, groups: as for :func:`sparse_row_dots`.
        coefficients: fp64 or fp32 [m]; [G, m] with ``groups``.
        out: contiguous fp32 tensors (fp64 for fp64 values) of ``numel`` elements, overwritten. None: new tensors.

    Returns:
        ``out``, [numel] per parameter; zero where no row has an entry.

    Raises:
        ValueError: for sizes or dtypes that do not match.
        BackendError: the requested backend cannot run here.

    Notes:
        Reads values and indices once and writes ``out`` once. Rows are added in order and in fp64, so results repeat
        bit for bit. A GPU needs scratch memory of 8 bytes per element. Dense layouts run as
        :func:`leanstep.kernels.linear_combination` of the values, and read no indices.
    """
    _check(values, indices, layouts, groups, "sparse_linear_combination")
    check_coefficients(coefficients, values[0].shape[0], groups, "sparse_linear_combination")
    wide = wide_dtype(values[0].dtype)
    if out is None:
        out = [torch.empty(layout.numel, dtype=wide, device=values[0].device) for layout in layouts]
    else:
        check_out(out, [(layout.numel,) for layout in layouts], wide, "sparse_linear_combination")
    if all(layout.is_dense for layout in layouts):
        return dense.linear_combination(values, coefficients, groups=groups, out=out)
    _run_combination(list(values), list(indices), coefficients, list(chain(*layouts)), as_list(groups), list(out))
    return list(out)


def _call_cpp(
    name: str, stored: tuple[list[Any], ...], vectors: list[Tensor], groups: list[int], table: Tensor
) -> None:
    values, indices = ([t.contiguous() for t in tensors] for tensors in stored[:2])
    columns = map(list, zip(*((s.numel, s.block, s.per_block, s.k) for s in stored[2]), strict=True))
    macros, rows = {"WINDOW": dense.WINDOW_TYPES[values[0].dtype]}, values[0].shape[0]
    call("fisher/sparse_window", name, macros, len(values), values, indices, vectors, *columns, groups, rows, table)


_SPARSE = dense.Format("sparse_", __name__, reference, _call_cpp)


@op("sparse_row_dots", EVERYWHERE, fake=lambda values, i, vectors, numbers, groups: dense.new_dots(values[0], groups))
def _run_dots(
    values: list[Tensor], indices: list[Tensor], vectors: list[Tensor], numbers: list[int], groups: list[int] | None
) -> Tensor:
    return dense.run_dots(_SPARSE, (values, indices, _layouts(numbers)), vectors, groups)


@op("sparse_linear_combination", EVERYWHERE, mutates=["out"])
def _run_combination(
    values: list[Tensor],
    indices: list[Tensor],
    coefficients: Tensor,
    numbers: list[int],
    groups: list[int] | None,
    out: list[Tensor],
) -> None:
    dense.run_combination(_SPARSE, (values, indices, _layouts(numbers)), coefficients, groups, out)


def _layouts(numbers: Sequence[int]) -> list[SparseLayout]:
    """Layouts from their numbers one after the other, as a registered op takes them."""
    return [SparseLayout(*numbers[i : i + 4]) for i in range(0, len(numbers), 4)]


def _check(
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    layouts: Sequence[SparseLayout],
    groups: Sequence[int] | None,
    name: str,
) -> None:
    if not values:
        raise ValueError(f"{name}: expected at least one window, got an empty list")
    if not len(values) == len(indices) == len(layouts):
        raise ValueError(
            f"{name}: expected one of indices and layouts per window, got {len(indices)} and {len(layouts)} for "
            f"{len(values)}"
        )
    m, dtype = values[0].shape[0], values[0].dtype
    if m == 0:
        raise ValueError(f"{name}: expected windows of at least one row, got shape {tuple(values[0].shape)}")
    for b, (v, i, layout) in enumerate(zip(values, indices, layouts, strict=True)):
        if v.shape != (m, layout.k) or v.dtype != dtype:
            raise ValueError(
                f"{name}: expected values[{b}] of shape {(m, layout.k)} and {dtype}, got {tuple(v.shape)} of {v.dtype}"
            )
        if i.shape != v.shape or i.dtype != torch.int16:
            raise ValueError(
                f"{name}: expected indices[{b}] of shape {(m, layout.k)} and torch.int16, got {tuple(i.shape)} of "
                f"{i.dtype}"
            )
    check_groups(groups, len(values), name)
