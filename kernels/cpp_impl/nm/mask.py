"""Launcher of nm_mask.cpp."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import integers, library, pointers

WORDS = {4: "uint32_t", 2: "uint16_t"}
# bits of the infinite; those of every NaN are more
INFINITE = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def nm_mask(scores: list[Tensor], n: int, m: int, dim: int, out: list[Tensor]) -> None:
    """Masks of contiguous scores of one dtype, into contiguous bool tensors."""
    library("nm/mask", {"WORD": WORDS[scores[0].itemsize]}).nm_mask(
        ctypes.c_int64(len(scores)),
        pointers(scores),
        pointers(out),
        integers([s.numel() // m for s in scores]),
        integers([math.prod(s.shape[dim % s.dim() + 1 :]) for s in scores]),
        ctypes.c_int64(n),
        ctypes.c_int64(m),
        ctypes.c_int32(INFINITE[scores[0].dtype]),
        torch.get_num_threads(),
    )
