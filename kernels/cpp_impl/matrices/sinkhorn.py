"""Launcher of sinkhorn.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, integers, library, pointers


def sinkhorn(mats: list[Tensor], rows: list[Tensor], cols: list[Tensor], num_iters: int, end_with_rows: bool) -> None:
    """Fill ``rows`` [m] and ``cols`` [n] with the scales of matrices [m, n] of one dtype with adjacent columns."""
    kernels = library("matrices/sinkhorn", {"MAT": TYPES[mats[0].dtype]})
    kernels.sinkhorn(
        ctypes.c_int64(len(mats)),
        pointers(mats),
        integers([m.shape[0] for m in mats]),
        integers([m.shape[1] for m in mats]),
        integers([m.stride(0) for m in mats]),
        pointers(rows),
        pointers(cols),
        ctypes.c_int64(num_iters),
        int(end_with_rows),
        torch.get_num_threads(),
    )
