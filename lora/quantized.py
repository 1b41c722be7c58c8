"""Bases in 4 and 8 bits, as bitsandbytes stores them: a dense matrix for the time of a product, never kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("Linear4bit", "Linear8bitLt")
# dtypes that linear layers can be adapted in
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kind(module: nn.Module) -> str | None:
    """``"Linear4bit"``, ``"Linear8bitLt"`` or None, by the class's name: bitsandbytes need not be there."""
    for cls in type(module).__mro__:
        if cls.__module__.split(".")[0] == "bitsandbytes" and cls.__name__ in KINDS:
            return cls.__name__
    return None


def dequantizer(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What makes the dense (out, in) matrix of a quantised layer's weight; None for a dense layer."""
    found = kind(module)
    if found is None:
        return None
    return _dense_4bit if found == "Linear4bit" else functools.partial(_dense_8bit, module)


def _dense_4bit(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def _dense_8bit(module: Any, weight: Any) -> Tensor:
    state = module.state
    codes = weight.data if state.CB is None else state.CB
    scales = weight.SCB if state.SCB is None else state.SCB
    return codes.to(torch.float32).mul_(scales.to(torch.float32).unsqueeze(1) / 127)


def why_unsupported(module: nn.Module, weight: Tensor) -> str | None:
    """Why a layer with this weight cannot be adapted; None when it can."""
    if weight.dtype in FLOATS:
        return None
    if kind(module) is None:
        found, *known = (str(dtype).removeprefix("torch.") for dtype in (weight.dtype, *FLOATS))
        return f"its weight is {found}; adapted are layers in {', '.join(known)}, and bitsandbytes' in 4 and 8 bits"
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        return f"it is a {kind(module)} of bitsandbytes, which cannot be imported here: {error}"
    return None
