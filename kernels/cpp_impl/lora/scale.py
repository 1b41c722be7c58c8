"""Launchers of scale.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, address, library

# rows that are summed together; the same constant is in scale.cpp
ROWS = 64


def lora_scale_(y: Tensor, c: Tensor, bias: Tensor | None) -> None:
    """``y = y * c + bias``, in place; y row-major, c fp32, the bias of y's dtype."""
    _call("lora_scale", y, y, c, bias)


def lora_scale_backward(g: Tensor, y: Tensor | None, c: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """``g * c`` in ``inner``, and the sums over rows of ``g * y``, in fp32; matrices row-major."""
    sums = g.new_empty(-(-g.shape[0] // ROWS), g.shape[1], dtype=torch.float32)
    # without y, sums of squares are computed and not used
    _call("lora_scale_backward", g, g, g if y is None else y, c, inner, sums)
    return inner, sums.sum(0)


def _call(name: str, like: Tensor, *tensors: Tensor | None) -> None:
    getattr(library("lora/scale", {"VALUE": TYPES[like.dtype]}), name)(
        *map(ctypes.c_int64, like.shape), *map(address, tensors), torch.get_num_threads()
    )
