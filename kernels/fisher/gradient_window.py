"""A window of gradients: dot products of its rows with a vector, and linear combinations of its rows.

The window of M-FAC (Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
Information", arXiv 2107.03356) is the m x d matrix G of the last m gradients. Each parameter stores its block of
columns, ``[m, *parameter.shape]``, which is saved, moved and sharded like any other state. A step reads the window
twice: once for the new row of G G^T, once for the combination c^T G.

Rows may be stored in bf16 or fp16. All functions use the rounded row, so G G^T, the gradient and the combination belong
to one matrix. With the unrounded gradient, a small rounding error could cause an error of any size in the inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import TYPES, call
from leanstep.kernels.op import EVERYWHERE, op, triton_module
from leanstep.kernels.reference.fisher import gradient_window as reference

WINDOW_TYPES = TYPES | {torch.float16: "fp16"}  # of the C++ kernels


@torch.no_grad()
def row_dots(
    windows: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """Dot product of every row with a vector: ``out[i] = sum_b sum_k windows[b][i, k] * vectors[b][k]``.

    Args:
        windows: blocks of columns ``[m, *shape_b]`` of one device and dtype (fp32, bf16, fp16, fp64); not written. Pass
            a view ``window[:n]`` if only n rows are in use.
        vectors: one per block, with as many elements as ``shape_b``, any floating dtype; not written.
        groups: the number 0 .. G-1 of each block's matrix, if the blocks belong to G matrices. None: all blocks belong
            to one matrix.

    Returns:
        fp64 [m], or [G, m] with ``groups``.

    Raises:
        ValueError: for no blocks, blocks of unequal m, or sizes that do not match.
        BackendError: the requested backend cannot run here.

    Notes:
        Reads every window and vector once, and copies no window. Products and sums run in fp64: if gradients change
        slowly, only the last bits of the dot products distinguish their rows.
    """
    _check(windows, vectors, groups, "row_dots")
    return _run_dots(list(windows), list(vectors), as_list(groups))


@torch.no_grad()
def linear_combination(
    windows: Sequence[Tensor],
    coefficients: Tensor,
    *,
    groups: Sequence[int] | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Linear combination of the rows: ``out[b] = sum_i coefficients[i] * windows[b][i]``.

    Args:
        windows, groups: as for :func:`row_dots`.
        coefficients: fp64 or fp32 [m]; [G, m] with ``groups``.
        out: contiguous fp32 tensors (fp64 for fp64 windows) of the blocks' shapes, overwritten. None: new tensors.

    Returns:
        ``out``, one ``shape_b`` per block.

    Raises:
        ValueError: for no blocks, blocks of unequal m, or sizes or dtypes that do not match.
        BackendError: the requested backend cannot run here.

    Notes:
        Reads every window once and writes ``out`` once. Sums run in fp64 and are rounded once, because rows that hardly
        differ cancel in a combination.
    """
    _check(windows, None, groups, "linear_combination")
    check_coefficients(coefficients, windows[0].shape[0], groups, "linear_combination")
    if out is None:
        wide = reference.wide_dtype(windows[0].dtype)
        out = [torch.empty(w.shape[1:], dtype=wide, device=w.device) for w in windows]
    else:
        check_out(out, [w.shape[1:] for w in windows], reference.wide_dtype(windows[0].dtype), "linear_combination")
    _run_combination(list(windows), coefficients, as_list(groups), list(out))
    return list(out)


def flat(window: Tensor) -> Tensor:
    """Reshape a window [m, *shape] to [m, n]; a view if it is contiguous."""
    return window.detach().reshape(window.shape[0], math.prod(window.shape[1:]))


def total_by_group(dots: Iterable[Tensor], groups: Sequence[int]) -> Tensor:
    """Sum the blocks' dot products, fp64 [m] each, over each group, in order: [G, m]."""
    totals: dict[int, Tensor] = {}
    for values, group in zip(dots, groups, strict=True):
        totals[group] = totals[group] + values if group in totals else values
    zero = torch.zeros_like(next(iter(totals.values())))
    return torch.stack([totals.get(group, zero) for group in range(max(groups) + 1)])


def backend_of(op: str, window: Tensor, vectors: Sequence[Tensor] = ()) -> str:
    """Choose the backend of an op on windows. All backends take fp32, bf16 and fp16; the definition takes fp64."""
    is_wide = any(t.dtype == torch.float64 for t in (window, *vectors))
    return choose(op, window.device, *([torch.float64] if is_wide else [])).backend


class Format(NamedTuple):
    """How windows are stored: the ops' prefix and module, the definition, and the C++ launcher.

    ``cpp`` calls the C++ function of a name with the lists that
    store the windows, the vectors or results, the groups, and the dots or coefficients, fp64 [G, m].
    """

    prefix: str
    module: str
    reference: ModuleType
    cpp: Callable[..., None]


def run_dots(
    windows: Format, stored: tuple[list[Any], ...], vectors: Sequence[Tensor], groups: Sequence[int] | None
) -> Tensor:
    """Dot products of the rows of windows ``stored`` in a format with vectors: fp64 [m], or [G, m] with ``groups``."""
    values = stored[0]
    flat_vectors = [v.detach().reshape(-1) for v in vectors]
    owners = [0] * len(values) if groups is None else list(groups)
    backend = backend_of(f"{windows.prefix}row_dots", values[0], vectors)
    if backend == "triton":
        dots = triton_module(windows.module).row_dots(*stored, flat_vectors, owners, max(owners) + 1)
    elif backend == "cpp":
        dots = torch.zeros(max(owners) + 1, values[0].shape[0], dtype=torch.float64, device="cpu")
        windows.cpp("row_dots", stored, [v.to(torch.float32).contiguous() for v in flat_vectors], owners, dots)
    else:
        dots = total_by_group(map(windows.reference.row_dots, *stored, flat_vectors), owners)
    return dots[0] if groups is None else dots


def run_combination(
    windows: Format,
    stored: tuple[list[Any], ...],
    coefficients: Tensor,
    groups: Sequence[int] | None,
    out: list[Tensor],
) -> None:
    """Write combinations of the rows of windows ``stored`` in a format to ``out``."""
    values, flat_out = stored[0], [o.view(-1) for o in out]
    owners = [0] * len(values) if groups is None else list(groups)
    wide = coefficients.detach().to(torch.float64).reshape(-1, values[0].shape[0])
    backend = backend_of(f"{windows.prefix}linear_combination", values[0])
    if backend == "triton":
        triton_module(windows.module).linear_combination(*stored, wide, owners, flat_out)
    elif backend == "cpp":
        windows.cpp("linear_combination", stored, flat_out, owners, wide.contiguous())
    else:
        for *block, group, result in zip(*stored, owners, flat_out, strict=True):
            windows.reference.linear_combination(*block, wide[group], result)


def _call_cpp(name: str, stored: tuple[list[Tensor]], vectors: list[Tensor], groups: list[int], table: Tensor) -> None:
    # the kernels take rows at any distance, such as some columns of a wider window
    windows = [w if w.stride(1) == 1 or w.shape[1] <= 1 else w.contiguous() for w in stored[0]]
    columns, pitches = [w.shape[1] for w in windows], [w.stride(0) for w in windows]
    macros = {"WINDOW": WINDOW_TYPES[windows[0].dtype]}
    rows = windows[0].shape[0]
    call("fisher/gradient_window", name, macros, len(windows), windows, vectors, columns, pitches, groups, rows, table)


_DENSE = Format("", __name__, reference, _call_cpp)


@op("row_dots", EVERYWHERE, fake=lambda windows, vectors, groups: new_dots(windows[0], groups))
def _run_dots(windows: list[Tensor], vectors: list[Tensor], groups: list[int] | None) -> Tensor:
    return run_dots(_DENSE, ([flat(w) for w in windows],), vectors, groups)


@op("linear_combination", EVERYWHERE, mutates=["out"])
def _run_combination(windows: list[Tensor], coefficients: Tensor, groups: list[int] | None, out: list[Tensor]) -> None:
    run_combination(_DENSE, ([flat(w) for w in windows],), coefficients, groups, out)


def as_list(groups: Sequence[int] | None) -> list[int] | None:
    """Convert groups to the type that a registered op takes."""
    return None if groups is None else list(groups)


def _check(
    windows: Sequence[Tensor],
    vectors: Sequence[Tensor] | None,
    groups: Sequence[int] | None,
    name: str,
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
            raise ValueError(f"{name}: expected one of vectors per window, got {len(vectors)} for {len(windows)}")
        for b, (window, vector) in enumerate(zip(windows, vectors, strict=True)):
            if vector.numel() != math.prod(window.shape[1:]):
                raise ValueError(
                    f"{name}: vectors[{b}] has shape {tuple(vector.shape)}, but the rows of windows[{b}] have "
                    f"{tuple(window.shape[1:])}"
                )
    check_groups(groups, len(windows), name)


def _table_shape(m: int, groups: Sequence[int] | None) -> tuple[int, ...]:
    """Shape of numbers per row, of each group if there are groups."""
    return (m,) if groups is None else (max(groups) + 1, m)


def new_dots(window: Tensor, groups: Sequence[int] | None) -> Tensor:
    """Allocate the result of :func:`row_dots`."""
    return window.new_empty(_table_shape(window.shape[0], groups), dtype=torch.float64)


def check_groups(groups: Sequence[int] | None, count: int, name: str) -> None:
    """Raise ValueError unless ``groups`` has a number >= 0 for each of ``count`` blocks."""
    if groups is not None and (len(groups) != count or min(groups) < 0):
        raise ValueError(f"{name}: expected groups with a number >= 0 for each of {count} blocks, got {list(groups)}")


def check_coefficients(coefficients: Tensor, m: int, groups: Sequence[int] | None, name: str) -> None:
    """Raise ValueError unless each of m rows has a coefficient, in each group."""
    expected = _table_shape(m, groups)
    if tuple(coefficients.shape) != expected:
        raise ValueError(f"{name}: expected coefficients of shape {expected}, got {tuple(coefficients.shape)}")


def check_out(out: Sequence[Tensor], shapes: Sequence[Sequence[int]], wide: torch.dtype, name: str) -> None:
    """Raise ValueError unless ``out`` holds contiguous tensors of these sizes in dtype ``wide``."""
    if len(out) != len(shapes):
        raise ValueError(f"{name}: expected one of out per window, got {len(out)} for {len(shapes)}")
    for b, (tensor, shape) in enumerate(zip(out, shapes, strict=True)):
        if tensor.numel() != math.prod(shape) or tensor.dtype != wide or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected out[{b}] contiguous, of shape {tuple(shape)} and {wide}; got "
                f"{tuple(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}"
            )
