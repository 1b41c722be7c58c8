"""Bases in 4 and 8 bits, as bitsandbytes stores them: a dense matrix for the time of a product, never kept."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("Linear4bit", "Linear8bitLt")
# the forwards that compute x W^T + b and nothing else; a subclass with one of its own may do more
KNOWN_FORWARDS = frozenset(
    {
        "torch.nn.modules.linear.Linear.forward",
        "transformers.pytorch_utils.Conv1D.forward",
        "bitsandbytes.nn.modules.Linear4bit.forward",
        "bitsandbytes.nn.modules.Linear8bitLt.forward",
    }
)
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
    from bitsandbytes import functional

    codes, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        # an evaluation pass on a CPU rearranges the codes and transposes their scales; undo both on copies
        packed, state = state, copy.copy(state)
        # the scales stay as they are: quantising them again would change them
        state.original_nested = False
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = packed.absmax.t().reshape(-1).float()
    return functional.dequantize_4bit(codes, state)


def _dense_8bit(module: Any, weight: Any) -> Tensor:
    state = module.state
    codes = weight.data if state.CB is None else state.CB
    scales = weight.SCB if state.SCB is None else state.SCB
    return codes.to(torch.float32).mul_(scales.to(torch.float32).unsqueeze(1) / 127)


def why_own_forward(cls: type[nn.Module]) -> str | None:
    """Why the fast path cannot stand in for a class's forward: it is not one of :data:`KNOWN_FORWARDS`."""
    forward = cls.forward
    name = f"{getattr(forward, '__module__', None)}.{getattr(forward, '__qualname__', None)}"
    # a wrapper made with functools.wraps has the name of what it wraps
    if name in KNOWN_FORWARDS and not hasattr(forward, "__wrapped__"):
        return None
    return f"{cls.__name__} has a forward of its own, which may compute more than x W^T + b"


class _WithoutHooks(nn.Module):
    """Calls the forward of a module's class and none of its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        """What the class's forward returns."""
        return type(self.module).forward(self.module, x)


def why_no_tensor(module: nn.Module, width: int) -> str | None:
    """Why no adapter can be added to a layer's output: it is not one tensor. None where it is, or cannot be known.

    A forward that is not known is run once on tensors without data ("meta").
    """
    if why_own_forward(type(module)) is None:
        return None
    bare = _WithoutHooks(module)
    states = itertools.chain(bare.named_parameters(), bare.named_buffers())
    try:
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in states}
        dtype = next((tensor.dtype for tensor in meta.values() if tensor.is_floating_point()), torch.float32)
        x = torch.empty(2, width, dtype=dtype, device="meta")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = torch.func.functional_call(bare, meta, (x,))
    except Exception:  # what a foreign forward does with such tensors is its own affair
        return None
    if isinstance(output, Tensor):
        return None
    return f"{type(module).__name__} returns a {type(output).__name__}, and adapters are added to a tensor"


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
