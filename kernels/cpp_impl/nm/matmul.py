"""Launcher of nm_matmul.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, address, library


def nm_matmul(x: Tensor, values: Tensor, indices: Tensor, m: int) -> Tensor:
    """``x W^T`` for x [t, in] and W compressed, all of one dtype."""
    x, values, indices = x.contiguous(), values.contiguous(), indices.contiguous()
    rows, groups, n = values.shape
    out = x.new_empty(x.shape[0], rows)
    library("nm/matmul", {"VALUE": TYPES[x.dtype]}).nm_matmul(
        address(x),
        address(values),
        address(indices),
        address(out),
        *map(ctypes.c_int64, (x.shape[0], rows, groups, n, m)),
        torch.get_num_threads(),
    )
    return out
