"""Launchers of gradient_window.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, address, integers, library, pointers

WINDOW_TYPES = TYPES | {torch.float16: "fp16"}


def row_dots(windows: Sequence[Tensor], vectors: Sequence[Tensor], groups: Sequence[int], count: int) -> Tensor:
    """fp64 [count, m]: dots of the rows of windows [m, n], of one dtype, with vectors [n]."""
    windows = [_dense_rows(w) for w in windows]
    wide = [v.to(torch.float32).contiguous() for v in vectors]
    dots = torch.zeros(count, windows[0].shape[0], dtype=torch.float64)
    _library(windows).row_dots(
        ctypes.c_int64(len(windows)),
        pointers(windows),
        pointers(wide),
        *_layout(windows, groups),
        address(dots),
        torch.get_num_threads(),
    )
    return dots


def linear_combination(
    windows: Sequence[Tensor], coefficients: Tensor, groups: Sequence[int], out: Sequence[Tensor]
) -> None:
    """Write the combinations of the rows of windows [m, n] with fp64 coefficients [G, m] to fp32 ``out``, [n] each."""
    windows = [_dense_rows(w) for w in windows]
    coefficients = coefficients.contiguous()
    _library(windows).linear_combination(
        ctypes.c_int64(len(windows)),
        pointers(windows),
        pointers(out),
        *_layout(windows, groups),
        address(coefficients),
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(list(out))


def _library(windows: Sequence[Tensor]) -> ctypes.CDLL:
    return library("fisher/gradient_window", {"WINDOW": WINDOW_TYPES[windows[0].dtype]})


def _dense_rows(window: Tensor) -> Tensor:
    """A window whose rows are dense: itself, whatever their distance, such as some columns of another one."""
    return window if window.stride(1) == 1 or window.shape[1] <= 1 else window.contiguous()


def _layout(windows: Sequence[Tensor], groups: Sequence[int]) -> tuple:
    """Sizes, pitches, groups and the number of rows, as the kernels take them."""
    sizes, pitches = [w.shape[1] for w in windows], [w.stride(0) for w in windows]
    return integers(sizes), integers(pitches), integers(list(groups)), ctypes.c_int64(windows[0].shape[0])
