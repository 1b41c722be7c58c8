"""Launchers of products.cpp: C++ applies dropout, the BLAS multiplies."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, call
from leanstep.kernels.reference.lora.products import gain, seed_key, threshold

# elements of a chunk: a megabyte of fp32, which stays in the cache. 16-bit matrices are not cut into chunks: more calls
# of the BLAS cost more than the cache saves, and a sum over chunks would be rounded to 16 bits after each one.
CHUNK = 2**18


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """``x / (1 - p)`` where the mask is True, 0 elsewhere; x row-major."""
    out = torch.empty_like(x)
    _call("dropout", x, out, 0, p, seed)
    return out


def lora_down(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """``dropout(x) a^T``."""
    h = x.new_empty(x.shape[0], a.shape[0])
    for rows, dropped in _dropped(x, p, seed):
        torch.mm(dropped, a.t(), out=h[rows])
    return h


def lora_down_backward(x: Tensor, e: Tensor, a: Tensor | None, p: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """``e^T dropout(x)``; with ``a``, also ``dropout(x) a^T``."""
    gradient = x.new_zeros(e.shape[1], x.shape[1])
    h = None if a is None else x.new_empty(x.shape[0], a.shape[0])
    for rows, dropped in _dropped(x, p, seed):
        gradient.addmm_(e[rows].t(), dropped)
        if a is not None and h is not None:
            torch.mm(dropped, a.t(), out=h[rows])
    return gradient, h


def lora_up_(y: Tensor, h: Tensor, b: Tensor, scale: float, p: float, seed: int) -> None:
    """``y += dropout(scale h b)``, in place; y row-major, p > 0."""
    chunks = _chunks(y)
    memory = y.new_empty(chunks[0].stop, y.shape[1])
    for rows in chunks:
        product = torch.mm(h[rows], b, out=memory[: rows.stop - rows.start])
        _call("dropout_add", product, y[rows], rows.start * y.shape[1], p, seed, float(scale))


def _dropped(x: Tensor, p: float, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of rows and their dropout(x). A chunk overwrites the previous one."""
    chunks = _chunks(x)
    memory = x.new_empty(chunks[0].stop, x.shape[1])
    for rows in chunks:
        dropped = memory[: rows.stop - rows.start]
        _call("dropout", x[rows], dropped, rows.start * x.shape[1], p, seed)
        yield rows, dropped


def _chunks(x: Tensor) -> list[slice]:
    count = x.shape[0]
    step = max(1, CHUNK // x.shape[1]) if x.dtype == torch.float32 else count
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _call(name: str, x: Tensor, out: Tensor, first: int, p: float, seed: int, *more: float) -> None:
    # for p = 1, a uint32 threshold lets one hash of 2**32 survive, and the gain of 0 drops it
    limit = min(threshold(p), 2**32 - 1)
    hashed = (ctypes.c_uint32(seed_key(seed) & 0xFFFFFFFF), ctypes.c_uint32(limit))
    call("lora/products", name, {"VALUE": TYPES[x.dtype]}, first, x.numel(), x, out, *hashed, gain(p), *more)
