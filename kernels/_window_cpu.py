"""The fast path of windows of gradients on a CPU: what reads a window at the speed of its memory.

fp32 windows are two calls of the BLAS. 16-bit ones go through compiled loops that take ``ROWS`` rows at a time: their
sums do not wait for one another, and a combination reads and writes its result once for all of them. What does not fill
such a loop is widened to fp32 piece by piece and handed to the BLAS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels._compile import alias, variant
from leanstep.kernels.reference.gradient_window import column_chunks

ROWS = 16
# elements that are added up in fp32 before fp64 takes over; the compiled loops' inner length, which the compiler knows
LANES = 1024
# shorter rows cost more in calls than the compiled loops save
_MIN_LANES = 16
# the same for the BLAS, which adds up several partial sums; more in one call would be less exact and no faster
_BLAS_COLUMNS = 1 << 14
_PIECE = 1 << 20


def row_dots(window: Tensor, vector: Tensor) -> Tensor:
    """:func:`leanstep.kernels.reference.gradient_window.row_dots`, [m, n] and [n] to fp64 [m]."""
    vector = vector.to(torch.float32).contiguous()
    total = torch.zeros(window.shape[0], dtype=torch.float64)
    if window.dtype == torch.float32:
        for start in range(0, window.shape[1], _BLAS_COLUMNS):
            stop = start + _BLAS_COLUMNS
            total += torch.mv(window[:, start:stop], vector[start:stop])
        return total
    groups, lanes = _whole_loops(window)
    if groups:
        pieces = _varying(alias(vector, (lanes, LANES)), 0)
        rows = _varying(_rows(window, 0, groups, lanes), 1, 2)
        sums = variant(_dots_of_rows, window.dtype, [])(rows, pieces)
        total[: groups * ROWS] = sums.sum(dim=2, dtype=torch.float64).view(-1)
    for rest, columns in _rests(window, groups, lanes):
        for chunk in column_chunks(rest, _PIECE):
            part = torch.mv(rest[:, chunk].to(torch.float32), vector[columns][chunk])
            total[window.shape[0] - rest.shape[0] :] += part
    return total


def linear_combination(window: Tensor, coefficients: Tensor, out: Tensor) -> None:
    """:func:`leanstep.kernels.reference.gradient_window.linear_combination`, [m, n] and [m] to ``out`` [n]."""
    coefficients = coefficients.to(torch.float32)
    if window.dtype == torch.float32:
        torch.mv(window.t(), coefficients, out=out)
        return
    out.zero_()
    groups, lanes = _whole_loops(window)
    if groups:
        pieces = _varying(alias(out, (lanes, LANES)), 0)
        for start in range(0, groups * ROWS, ROWS):
            rows = _varying(_rows(window, start, 1, lanes).squeeze(1), 1)
            variant(_add_rows, window.dtype, [])(rows, coefficients[start : start + ROWS].clone(), pieces)
        torch.autograd.graph.increment_version([out])
    for rest, columns in _rests(window, groups, lanes):
        for chunk in column_chunks(rest, _PIECE):
            part = out[columns][chunk]
            wide = rest[:, chunk].to(torch.float32)
            torch.addmv(part, wide.t(), coefficients[window.shape[0] - rest.shape[0] :], out=part)


def _dots_of_rows(rows: Tensor, vector: Tensor) -> Tensor:
    """Sums of every LANES products, [ROWS, G, lanes] of rows [ROWS, G, lanes, LANES]; one loop for ROWS rows."""
    wide = vector.dtype
    return torch.stack([(rows[i].to(wide) * vector).sum(dim=2) for i in range(ROWS)])


def _add_rows(rows: Tensor, coefficients: Tensor, out: Tensor) -> None:
    """Add ROWS rows [ROWS, lanes, LANES] to ``out`` [lanes, LANES], one after the other."""
    total = out
    for i in range(ROWS):
        total = total + coefficients[i] * rows[i].to(out.dtype)
    out.copy_(total)


def _whole_loops(window: Tensor) -> tuple[int, int]:
    """Groups of ROWS rows and stretches of LANES columns that the compiled loops take; (0, 0) where they do not pay."""
    groups, lanes = window.shape[0] // ROWS, window.shape[1] // LANES
    return (groups, lanes) if groups > 1 and lanes >= _MIN_LANES and window.stride(1) == 1 else (0, 0)


def _rests(window: Tensor, groups: int, lanes: int) -> list[tuple[Tensor, slice]]:
    """What the loops leave: the last columns of all rows, and the other columns of the last rows."""
    done = lanes * LANES
    return [(window[:, done:], slice(done, None)), (window[groups * ROWS :, :done], slice(0, done))]


def _rows(window: Tensor, start: int, groups: int, lanes: int) -> Tensor:
    """Rows from ``start`` on as [ROWS, groups, lanes, LANES], without the columns that fill no LANES."""
    pitch = window.stride(0)
    # not a torch view, see `alias`
    rows, offset = torch.empty(0, dtype=window.dtype), window.storage_offset() + start * pitch
    return rows.set_(window.untyped_storage(), offset, (ROWS, groups, lanes, LANES), (groups * pitch, pitch, LANES, 1))


def _varying(tensor: Tensor, *dims: int) -> Tensor:
    for dim in dims:
        torch._dynamo.mark_dynamic(tensor, dim)
    return tensor
