"""Launchers of nm_apply.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, address, library

FLOWS = {"ste": 0, "decay": 1, "fixed": 2}


def nm_apply(weight: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    """The masked weight; both tensors dense and of one layout."""
    out = torch.empty_like(weight, requires_grad=False)
    _library(weight, weight).nm_apply(
        ctypes.c_int64(weight.numel()),
        address(weight),
        address(mask),
        ctypes.c_float(alpha.to(torch.float32).item()),
        address(out),
        torch.get_num_threads(),
    )
    return out


def nm_apply_backward(
    grad: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, grad_flow: str, srste_lambda: float
) -> Tensor:
    """The gradient of the weight; all tensors dense and of one layout."""
    out = torch.empty_like(weight, requires_grad=False)
    _library(weight, grad).nm_apply_backward(
        ctypes.c_int64(weight.numel()),
        address(grad),
        address(weight),
        address(mask),
        ctypes.c_float(alpha.to(torch.float32).item()),
        FLOWS[grad_flow],
        ctypes.c_float(srste_lambda),
        address(out),
        torch.get_num_threads(),
    )
    return out


def _library(weight: Tensor, grad: Tensor) -> ctypes.CDLL:
    return library("nm/apply", {"WEIGHT": TYPES[weight.dtype], "GRAD": TYPES[grad.dtype]})
