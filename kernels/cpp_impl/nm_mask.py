"""Launcher of nm_mask.cpp."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import integers, library, pointers
from leanstep.kernels.cpp_impl.gradient_window import WINDOW_TYPES


def nm_mask(scores: list[Tensor], n: int, m: int, dim: int, out: list[Tensor]) -> None:
    """Masks of contiguous scores of one dtype, into contiguous bool tensors."""
    library("nm_mask", {"SCORE": WINDOW_TYPES[scores[0].dtype]}).nm_mask(
        ctypes.c_int64(len(scores)),
        pointers(scores),
        pointers(out),
        integers([s.numel() // m for s in scores]),
        integers([math.prod(s.shape[dim % s.dim() + 1 :]) for s in scores]),
        ctypes.c_int64(n),
        ctypes.c_int64(m),
        torch.get_num_threads(),
    )
