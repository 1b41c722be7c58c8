"""A window of gradients: writing a row, dots of all rows with a vector, and linear combinations of rows.

The window of M-FAC (Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
Information", arXiv 2107.03356) is the m x d matrix G of the last m gradients. It is kept as one block of columns per
parameter, ``[m, *parameter.shape]``, so that it is saved, moved and sharded like any other state. A step reads it
twice: once for the new row of G G^T, once for the combination c^T G.

Rows may be stored in bf16 or fp16, with one fp32 scale s_i per row: the window's row is then s_i * stored_i, and every
function here means that rounded row. Only so do G G^T, the gradient and the combination belong to one matrix: with the
unrounded gradient in its place, the error of the inverse is not bounded by that of the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl.fisher import gradient_window as cpp_window
from leanstep.kernels.reference.fisher import gradient_window as reference


def row_dots(
    windows: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    scales: Tensor | None = None,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """Dot products of every row with a vector: ``out[i] = scales[i] * sum_b sum_k windows[b][i, k] * vectors[b][k]``.

    Args:
        windows: blocks of columns ``[m, *shape_b]`` of one device and dtype (fp32, bf16, fp16, fp64); not written.
            Live rows of a window that is not full are a view, ``window[:n]``.
        vectors: one per block, of its ``shape_b`` (or as many elements), any floating dtype; not written.
        scales: fp32 [m], the factors of the stored rows; [G, m] with ``groups``. None: 1.
        groups: for every block the number 0 .. G-1 of the matrix that it belongs to, where ``windows`` holds the
            columns of several; None: of one.

    Returns:
        fp64 [m], or [G, m] with ``groups``.

    Raises:
        ValueError: for no blocks, blocks of unequal m, or sizes that do not match.
        BackendError: when a backend was asked for that cannot run here.

    Notes:
        Reads every window once. Products and sums run in fp64: of gradients that change slowly, the last bits of the
        dots tell the rows apart. No copy of a window, in any dtype.
    """
    _check(windows, vectors, scales, groups, "row_dots", "vectors")
    if torch.compiler.is_compiling():
        return torch.ops.leanstep.row_dots(list(windows), list(vectors), scales, _listed(groups))
    return _run_dots(windows, vectors, 0, scales, groups)


def gram_row(
    windows: Sequence[Tensor], index: int, *, scales: Tensor | None = None, groups: Sequence[int] | None = None
) -> Tensor:
    """Row ``index`` of the Gram matrix G G^T, from the rows as they are stored.

    Args:
        windows, scales, groups: as for :func:`row_dots`.
        index: the row, 0 <= index < m.

    Returns:
        fp64 [m], or [G, m] with ``groups``: ``out[i] = row_i . row_index``.

    Raises:
        ValueError: as for :func:`row_dots`, and for an index outside the window.

    Notes:
        Reads every window once.
    """
    _check(windows, None, scales, groups, "gram_row", "")
    _check_index(windows, index, "gram_row")
    if torch.compiler.is_compiling():
        return torch.ops.leanstep.gram_row(list(windows), index, scales, _listed(groups))
    return _run_dots(windows, None, index, scales, groups)


def linear_combination(
    windows: Sequence[Tensor],
    coefficients: Tensor,
    *,
    scales: Tensor | None = None,
    groups: Sequence[int] | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Linear combination of the rows: ``out[b] = sum_i coefficients[i] * scales[i] * windows[b][i]``.

    Args:
        windows, scales, groups: as for :func:`row_dots`.
        coefficients: fp64 or fp32 [m]; [G, m] with ``groups``.
        out: contiguous fp32 tensors (fp64 for fp64 windows) of the blocks' shapes, to be overwritten. None: new ones.

    Returns:
        ``out``, one ``shape_b`` per block.

    Raises:
        ValueError: for no blocks, blocks of unequal m, or sizes or dtypes that do not match.
        BackendError: when a backend was asked for that cannot run here.

    Notes:
        Reads every window once and writes ``out`` once. Sums run in fp64 and are rounded once: rows that hardly differ
        cancel in a combination.
    """
    _check(windows, None, scales, groups, "linear_combination", "")
    check_coefficients(coefficients, windows[0].shape[0], groups, "linear_combination")
    if out is None:
        wide = reference.wide_dtype(windows[0].dtype)
        out = [torch.empty(w.shape[1:], dtype=wide, device=w.device) for w in windows]
    else:
        check_out(out, [w.shape[1:] for w in windows], reference.wide_dtype(windows[0].dtype), "linear_combination")
    if torch.compiler.is_compiling():
        torch.ops.leanstep.linear_combination(list(windows), coefficients, scales, _listed(groups), list(out))
    else:
        _run_combination(windows, coefficients, scales, groups, out)
    return list(out)


@torch.no_grad()
def write_row(
    windows: Sequence[Tensor],
    index: int,
    vectors: Sequence[Tensor],
    *,
    scales: Tensor | None = None,
    groups: Sequence[int] | None = None,
    largest: Tensor | None = None,
) -> None:
    """Store a row: ``windows[b][index] = vectors[b] / s``, rounded to nearest in the window's dtype.

    With ``scales``, s is the power of two that brings the row's largest magnitude to between 2**14 and 2**15, which
    keeps fp16 from overflowing and costs no precision; it goes to ``scales[index]``. Without, s = 1.

    Args:
        windows: as for :func:`row_dots`; row ``index`` is overwritten.
        index: the row, 0 <= index < m.
        vectors: one per block, any floating dtype; not written. Finite: see to that before.
        scales: fp32 [m] ([G, m] with ``groups``), element ``index`` of which is overwritten.
        groups: as for :func:`row_dots`.
        largest: fp32 0-d ([G] with ``groups``): largest magnitude in the row, where ``windows`` are shards of it.
            None: that of ``vectors``.

    Raises:
        ValueError: for no blocks, blocks of unequal m, an index outside the window, or sizes that do not match.

    Notes:
        Reads ``vectors`` and writes one row, once each. With ``scales`` reads ``vectors`` twice, and needs scratch
        memory of their size.
    """
    _check(windows, vectors, scales, groups, "write_row", "vectors")
    _check_index(windows, index, "write_row")
    rows = [w[index] for w in windows]
    sources = [v.detach().reshape(r.shape) for v, r in zip(vectors, rows, strict=True)]
    if scales is None:
        torch._foreach_copy_(rows, sources)
        return
    count = 1 if groups is None else scales.shape[0]
    owners = [0] * len(rows) if groups is None else list(groups)
    members = [[b for b, owner in enumerate(owners) if owner == g] for g in range(count)]
    if largest is None:
        largest = torch.stack([largest_magnitude([sources[b] for b in owned], scales) for owned in members])
    scale = reference.row_scale(largest.reshape(count))
    scales[..., index] = scale if groups is not None else scale[0]
    for owned, inverse in zip(members, scale.reciprocal().unbind(), strict=True):
        if owned:
            wide = [sources[b].to(reference.wide_dtype(sources[b].dtype)) for b in owned]
            torch._foreach_copy_([rows[b] for b in owned], torch._foreach_mul(wide, inverse))


def largest_magnitude(vectors: Sequence[Tensor], like: Tensor) -> Tensor:
    """0-d fp32: the largest magnitude in all the vectors, 0 for none; on the device of ``like``."""
    present = [v for v in vectors if v.numel()]
    if not present:
        return torch.zeros((), device=like.device)
    return torch.stack([n.to(torch.float32) for n in torch._foreach_norm(present, math.inf)]).amax()


def flat(window: Tensor) -> Tensor:
    """[m, *shape] as [m, n]; a view of contiguous windows."""
    return window.detach().reshape(window.shape[0], math.prod(window.shape[1:]))


def scaled_coefficients(coefficients: Tensor, scales: Tensor | None) -> Tensor:
    """Coefficients of the stored rows, [G, m] in fp64."""
    wide = coefficients.detach().to(torch.float64)
    if scales is not None:
        wide = wide * scales
    return wide if wide.dim() == 2 else wide.unsqueeze(0)


def total_by_group(dots: Iterable[Tensor], groups: Sequence[int]) -> Tensor:
    """Sum fp64 [m] of every block over the blocks of each group, in their order: [G, m]."""
    totals: dict[int, Tensor] = {}
    for part, group in zip(dots, groups, strict=True):
        totals[group] = totals[group] + part if group in totals else part
    zero = torch.zeros_like(next(iter(totals.values())))
    return torch.stack([totals.get(group, zero) for group in range(max(groups) + 1)])


def backend_of(op: str, window: Tensor) -> str:
    """The backend of an op on windows: all of them take fp32, bf16 and fp16."""
    wide = [window.dtype] if window.dtype == torch.float64 else []
    return choose(op, window.device, *wide).backend


@torch.no_grad()
def _run_dots(
    windows: Sequence[Tensor],
    vectors: Sequence[Tensor] | None,
    index: int,
    scales: Tensor | None,
    groups: Sequence[int] | None,
) -> Tensor:
    """Dots with the vectors, or with the windows' own row ``index`` where there are none."""
    flat_windows = [flat(w) for w in windows]
    others = None if vectors is None else [v.detach().reshape(-1) for v in vectors]
    owners = [0] * len(windows) if groups is None else groups
    backend = backend_of("row_dots", windows[0])
    if backend == "triton":
        from leanstep.kernels.triton_impl.fisher import gradient_window as triton_window

        dots = triton_window.row_dots(flat_windows, others, index, owners, max(owners) + 1)
    elif backend == "cpp":
        others = others or [w[index] for w in flat_windows]
        dots = cpp_window.row_dots(flat_windows, others, owners, max(owners) + 1)
    else:
        others = others or [w[index] for w in flat_windows]
        dots = total_by_group(map(reference.row_dots, flat_windows, others), owners)
    dots = dots[0] if groups is None else dots
    if scales is None:
        return dots
    return dots * scales if vectors is not None else dots * scales * scales[..., index : index + 1]


@torch.no_grad()
def _run_combination(
    windows: Sequence[Tensor],
    coefficients: Tensor,
    scales: Tensor | None,
    groups: Sequence[int] | None,
    out: Sequence[Tensor],
) -> None:
    stored = scaled_coefficients(coefficients, scales)
    flat_windows, flat_out = [flat(w) for w in windows], [o.view(-1) for o in out]
    owners = [0] * len(windows) if groups is None else groups
    backend = backend_of("linear_combination", windows[0])
    if backend == "triton":
        from leanstep.kernels.triton_impl.fisher import gradient_window as triton_window

        triton_window.linear_combination(flat_windows, stored, owners, flat_out)
    elif backend == "cpp":
        cpp_window.linear_combination(flat_windows, stored, owners, flat_out)
    else:
        for window, result, group in zip(flat_windows, flat_out, owners, strict=True):
            reference.linear_combination(window, stored[group], result)


def _listed(groups: Sequence[int] | None) -> list[int] | None:
    return None if groups is None else list(groups)


def _check(
    windows: Sequence[Tensor],
    vectors: Sequence[Tensor] | None,
    scales: Tensor | None,
    groups: Sequence[int] | None,
    name: str,
    what: str,
) -> None:
    if not windows:
        raise ValueError(f"{name}: expected at least one window, got an empty list")
    m = windows[0].shape[0]
    if m == 0:
        raise ValueError(f"{name}: expected windows of at least one row, got shape {tuple(windows[0].shape)}")
    for b, window in enumerate(windows):
        if window.shape[0] != m or window.dtype != windows[0].dtype:
            raise ValueError(
                f"{name}: expected windows of one number of rows and one dtype; windows[0] has {m} of "
                f"{windows[0].dtype}, windows[{b}] has {window.shape[0]} of {window.dtype}"
            )
    if vectors is not None:
        if len(vectors) != len(windows):
            raise ValueError(f"{name}: expected one of {what} per window, got {len(vectors)} for {len(windows)}")
        for b, (window, vector) in enumerate(zip(windows, vectors, strict=True)):
            if vector.numel() != math.prod(window.shape[1:]):
                raise ValueError(
                    f"{name}: {what}[{b}] has shape {tuple(vector.shape)}, but the rows of windows[{b}] have "
                    f"{tuple(window.shape[1:])}"
                )
    check_groups(groups, len(windows), name)
    expected = (m,) if groups is None else (max(groups) + 1, m)
    if scales is not None and tuple(scales.shape) != expected:
        raise ValueError(f"{name}: expected scales of shape {expected}, got {tuple(scales.shape)}")


def check_groups(groups: Sequence[int] | None, count: int, name: str) -> None:
    """Raise unless there is one non-negative number for each of ``count`` blocks."""
    if groups is not None and (len(groups) != count or min(groups) < 0):
        raise ValueError(f"{name}: expected groups with a number >= 0 for each of {count} blocks, got {list(groups)}")


def _check_index(windows: Sequence[Tensor], index: int, name: str) -> None:
    if windows and not 0 <= index < windows[0].shape[0]:
        raise ValueError(f"{name}: index {index} is outside the window of {windows[0].shape[0]} rows")


def check_coefficients(coefficients: Tensor, m: int, groups: Sequence[int] | None, name: str) -> None:
    """Raise unless there is a coefficient for each of m rows (of each group)."""
    expected = (m,) if groups is None else (max(groups) + 1, m)
    if tuple(coefficients.shape) != expected:
        raise ValueError(f"{name}: expected coefficients of shape {expected}, got {tuple(coefficients.shape)}")


def check_out(out: Sequence[Tensor], shapes: Sequence[Sequence[int]], wide: torch.dtype, name: str) -> None:
    """Raise unless ``out`` are contiguous tensors of these sizes in dtype ``wide``."""
    if len(out) != len(shapes):
        raise ValueError(f"{name}: expected one of out per window, got {len(out)} for {len(shapes)}")
    for b, (tensor, shape) in enumerate(zip(out, shapes, strict=True)):
        if tensor.numel() != math.prod(shape) or tensor.dtype != wide or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected out[{b}] contiguous, of shape {tuple(shape)} and {wide}; got "
                f"{tuple(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}"
            )


def _dots_op(windows: list[Tensor], vectors: list[Tensor], scales: Tensor | None, groups: list[int] | None) -> Tensor:
    return _run_dots(windows, vectors, 0, scales, groups)


def _gram_op(windows: list[Tensor], index: int, scales: Tensor | None, groups: list[int] | None) -> Tensor:
    return _run_dots(windows, None, index, scales, groups)


def _combination_op(
    windows: list[Tensor],
    coefficients: Tensor,
    scales: Tensor | None,
    groups: list[int] | None,
    out: list[Tensor],
) -> None:
    _run_combination(windows, coefficients, scales, groups, out)


_row_dots_op = torch.library.custom_op("leanstep::row_dots", _dots_op, mutates_args=())
_gram_row_op = torch.library.custom_op("leanstep::gram_row", _gram_op, mutates_args=())
_linear_combination_op = torch.library.custom_op("leanstep::linear_combination", _combination_op, mutates_args=("out",))


@_row_dots_op.register_fake
@_gram_row_op.register_fake
def _(windows, other, scales, groups):
    m = windows[0].shape[0]
    shape = (m,) if groups is None else (max(groups) + 1, m)
    return windows[0].new_empty(shape, dtype=torch.float64)


@_linear_combination_op.register_fake
def _(windows, coefficients, scales, groups, out):
    return None
