"""Properties of the frozen layer under an adapter: its widths, its forward, and the dequantisation of its weight."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from leanstep._torch import is_conv1d

# forwards that compute exactly x W^T + b
KNOWN_FORWARDS = frozenset(
    {
        "torch.nn.modules.linear.Linear.forward",
        "leanstep.sparsity.inference.dense.FewTokenLinear.forward",
        "transformers.pytorch_utils.Conv1D.forward",
        "bitsandbytes.nn.modules.Linear4bit.forward",
        "bitsandbytes.nn.modules.Linear8bitLt.forward",
    }
)
QUANTIZED = ("Linear4bit", "Linear8bitLt")
# dtypes of dense base weights that can be adapted
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that can be adapted: nn.Linear, Conv1D, or a subclass."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def widths(module: Any) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    n, m = module.weight.shape
    return n, m


def is_watched(module: nn.Module) -> bool:
    """Whether calling a module runs more than its class's forward: hooks, or a forward set on the instance."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def why_custom_forward(cls: type[nn.Module]) -> str | None:
    """The reason why the fast path cannot replace a class's forward; None for :data:`KNOWN_FORWARDS`."""
    forward = cls.forward
    name = f"{getattr(forward, '__module__', None)}.{getattr(forward, '__qualname__', None)}"
    # functools.wraps copies the name of the wrapped function
    if name in KNOWN_FORWARDS and not hasattr(forward, "__wrapped__"):
        return None
    return f"{cls.__name__} has a custom forward, which may compute more than x W^T + b"


class _WithoutHooks(nn.Module):
    """Calls the forward of a module's class without the module's hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return type(self.module).forward(self.module, x)


def why_no_tensor(module: nn.Module, width: int) -> str | None:
    """The reason why a layer's output is not a tensor, to which an adapter can be added; None if it is, or if unknown.

    Runs a custom forward once on meta tensors, which hold no data.
    """
    if why_custom_forward(type(module)) is None:
        return None
    bare = _WithoutHooks(module)
    tensors = itertools.chain(bare.named_parameters(), bare.named_buffers())
    try:
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
        dtype = next((tensor.dtype for tensor in meta.values() if tensor.is_floating_point()), torch.float32)
        x = torch.empty(2, width, dtype=dtype, device="meta")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = torch.func.functional_call(bare, meta, (x,))
    except Exception:  # a custom forward may fail on such tensors in any way
        return None
    if isinstance(output, Tensor):
        return None
    return f"{type(module).__name__} returns a {type(output).__name__}, and adapters are added to a tensor"


# --- quantised weights ------------------------------------------------------------------------------------------------


def quantized_kind(module: nn.Module) -> str | None:
    """``"Linear4bit"``, ``"Linear8bitLt"``, the class of torchao's weight, or None; imports neither package."""
    for cls in type(module).__mro__:
        if cls.__module__.split(".")[0] == "bitsandbytes" and cls.__name__ in QUANTIZED:
            return cls.__name__
    weight = getattr(module, "weight", None)
    if type(weight) is nn.Parameter or type(weight) is Tensor:
        return None
    return type(weight).__name__ if type(weight).__module__.split(".")[0] == "torchao" else None


def dequantizer(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A function that turns a quantised layer's weight into its dense (out, in) matrix; None for a dense layer."""
    kind = quantized_kind(module)
    if kind is None:
        return None
    if kind not in QUANTIZED:
        return _dense_torchao
    return _dense_4bit if kind == "Linear4bit" else functools.partial(_dense_8bit, module)


def _dense_torchao(weight: Any) -> Tensor:
    # NF4Tensor has another name for it
    dense = getattr(weight, "get_original_weight", None) or weight.dequantize
    return dense()


def _dense_4bit(weight: Any) -> Tensor:
    from bitsandbytes import functional

    codes, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        # evaluation on a CPU rearranges the codes and transposes their scales; undo both on copies
        packed, state = state, copy.copy(state)
        # do not quantise the scales again, which would change them
        state.original_nested = False
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = packed.absmax.t().reshape(-1).float()
    return functional.dequantize_4bit(codes, state)


def _dense_8bit(module: Any, weight: Any) -> Tensor:
    state = module.state
    codes = weight.data if state.CB is None else state.CB
    scales = weight.SCB if state.SCB is None else state.SCB
    return codes.to(torch.float32).mul_(scales.to(torch.float32).unsqueeze(1) / 127)


def why_unsupported(module: nn.Module, weight: Tensor) -> str | None:
    """The reason why the dtype of a layer's weight rules out an adapter; None if it does not."""
    kind = quantized_kind(module)
    if kind is not None and kind not in QUANTIZED:
        return _why_not_dequantized(kind, weight)
    if weight.dtype in FLOATS:
        return None
    if kind is None:
        name, *known = (str(dtype).removeprefix("torch.") for dtype in (weight.dtype, *FLOATS))
        return f"its weight is {name}; expected {', '.join(known)}, bitsandbytes' 4 or 8 bits, or torchao's"
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        return f"it is a {kind} of bitsandbytes, which cannot be imported here: {error}"
    return None


def _why_not_dequantized(kind: str, weight: Any) -> str | None:
    """The reason why a layer with a weight of torchao computes something else than a product with a dense matrix."""
    for name in ("act_quant_kwargs", "act_quant_scale", "act_pre_scale"):
        if getattr(weight, name, None) is not None:
            return (
                f"its weight is torchao's {kind} with {name}, which quantises or scales inputs; expected a weight-only "
                "configuration, such as Int8WeightOnlyConfig"
            )
    if not callable(getattr(weight, "dequantize", None)):
        return f"its weight is torchao's {kind}, which has no dequantize()"
    return None
