"""Launchers of swiglu.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, address, library


def swiglu(e: Tensor, u: Tensor) -> Tensor:
    """``silu(e) * u``; both dense, row-major."""
    out = torch.empty_like(e)
    _call("swiglu", e, e, u, out)
    return out


def swiglu_backward_(grad: Tensor, e: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``silu(e) * u`` again, and the gradients of e and, in the memory of ``grad``, of u; all dense, row-major."""
    out, de = torch.empty_like(e), torch.empty_like(e)
    _call("swiglu_backward", e, grad, e, u, out, de)
    return out, de, grad


def _call(name: str, like: Tensor, *tensors: Tensor) -> None:
    getattr(library("lora/swiglu", {"VALUE": TYPES[like.dtype]}), name)(
        ctypes.c_int64(like.numel()), *map(address, tensors), torch.get_num_threads()
    )
