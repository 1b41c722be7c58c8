"""Launchers of lora_scale.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, address, library

# rows whose sums are taken together; the number in lora_scale.cpp
ROWS = 64


def lora_scale_(y: Tensor, c: Tensor, bias: Tensor | None) -> None:
    """``y = y * c + bias``, in place; y row-major, c fp32, the bias of y's dtype."""
    _call("lora_scale", y, y, c, bias)


def lora_scale_backward(g: Tensor, y: Tensor | None, c: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``g * c`` in ``inner``, and the sums over rows of ``g * y`` and of g, in fp32; matrices row-major."""
    products, sums = (g.new_empty(-(-g.shape[0] // ROWS), g.shape[1], dtype=torch.float32) for _ in range(2))
    # without y, sums of squares are formed and not used
    _call("lora_scale_backward", g, g, g if y is None else y, c, inner, products, sums)
    return inner, products.sum(0), sums.sum(0)


def _call(name: str, like: Tensor, *tensors: Tensor | None) -> None:
    getattr(library("lora/scale", {"VALUE": TYPES[like.dtype]}), name)(
        *map(ctypes.c_int64, like.shape), *map(address, tensors), torch.get_num_threads()
    )
