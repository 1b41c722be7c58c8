"""Launchers of lora_products.cpp: dropout in C++, products by the BLAS."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, address, library
from leanstep.kernels.reference.lora_products import gain, seed_key, threshold


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """``x / (1 - p)`` where the mask keeps, 0 elsewhere; x dense, row-major."""
    if p == 0:
        return x
    out = torch.empty_like(x)
    _call("dropout", x, out, p, seed)
    return out


def lora_down(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """``dropout(x) a^T``."""
    return dropout(x, p, seed) @ a.t()


def lora_down_backward(x: Tensor, e: Tensor, a: Tensor | None, p: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """``e^T dropout(x)``, and ``dropout(x) a^T`` where ``a`` is given."""
    kept = dropout(x, p, seed)
    return e.t() @ kept, None if a is None else kept @ a.t()


def lora_up_(y: Tensor, h: Tensor, b: Tensor, scale: float, p: float, seed: int) -> None:
    """``y += dropout(scale h b)``, in place; y dense, row-major, where p > 0."""
    if p == 0:
        y.addmm_(h, b, alpha=scale)
    else:
        _call("dropout_add", torch.mm(h, b), y, p, seed, ctypes.c_float(scale))


def _call(name: str, x: Tensor, out: Tensor, p: float, seed: int, *more: ctypes.c_float) -> None:
    # the largest 32-bit threshold drops all but 2**-32 of the elements, and a gain of 0 the rest
    limit = min(threshold(p), 2**32 - 1)
    getattr(library("lora_products", {"VALUE": TYPES[x.dtype]}), name)(
        ctypes.c_int64(x.numel()),
        address(x),
        address(out),
        ctypes.c_uint32(seed_key(seed) & 0xFFFFFFFF),
        ctypes.c_uint32(limit),
        ctypes.c_float(gain(p)),
        *more,
        torch.get_num_threads(),
    )
