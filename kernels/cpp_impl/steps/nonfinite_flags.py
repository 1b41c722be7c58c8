"""Launcher of nonfinite_flags.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, address, integers, library, pointers


def nonfinite_flags(tensors: list[Tensor]) -> Tensor:
    """int32 flags of dense tensors of one dtype."""
    flags = torch.zeros(len(tensors), dtype=torch.int32)
    library("steps/nonfinite_flags", {"TENSOR": TYPES[tensors[0].dtype]}).nonfinite_flags(
        ctypes.c_int64(len(tensors)),
        pointers(tensors),
        integers([t.numel() for t in tensors]),
        address(flags),
        torch.get_num_threads(),
    )
    return flags
