"""A SwiGLU block with adapters as one function: it keeps its input and the two inner projections, and nothing else.

With e = gate(x), u = up(x)::

    y = down(silu(e) * u)

torch keeps e, silu(e), u and the product; here the product, which is the input of ``down``, is computed again in
backward, in the pass that also gives the gradients of e and u.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leanstep.kernels import swiglu, swiglu_backward_
from leanstep.kernels._backend import on_remembered_backend, remember_backend
from leanstep.lora.layers.autograd import (
    FIELDS,
    Kept,
    Part,
    Setting,
    inner_gradients,
    input_gradient,
    layers_backward,
    needs_of,
    project,
    saved_of,
    shared_down,
    tensor_gradients,
    to_keep,
    unpack,
)
from leanstep.lora.layers.fast import FastLinear, autocasted, fast_linear
from leanstep.lora.layers.layer import FastPath, Mixin, is_watched

NAMES = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")
_FIRST = 2 + len(NAMES)


class SwiGLUFunction(torch.autograd.Function):
    """[M, n] to [M, n]; the arguments are those of :class:`autograd.LoRAFunction`, for gate, up, down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Setting, ...], *tensors: Tensor | None) -> Tensor:
        """See the module's formula."""
        seeds, layers = unpack(settings, tensors)
        kept: list[Tensor | None] = []
        wants: list[bool] = []
        outputs: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):
            hs = (*shared_down(x, settings[:2], layers[:2]), None)
            for i in range(3):
                inputs = swiglu(*outputs) if i == 2 else x
                y, h, z = project(inputs, settings[i], layers[i], seeds[i], hs[i])
                held, wants_input = to_keep(y, h, z, settings[i], needs_of(ctx, _FIRST, i), layers[i].bias is not None)
                outputs.append(y)
                kept += held
                wants.append(wants_input)
        ctx.save_for_backward(x if any(wants[:2]) else None, outputs[0], outputs[1], *kept, *tensors)
        ctx.settings = settings
        remember_backend(ctx)
        return outputs[2]

    @staticmethod
    @once_differentiable
    @on_remembered_backend
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of every layer's tensors that need one."""
        x, e, u, *rest = saved_of(ctx)
        settings = ctx.settings
        seeds, layers = unpack(settings, rest[9:])
        needs = [needs_of(ctx, _FIRST, i) for i in range(3)]

        def part(i: int, gradient: Tensor) -> Part:
            # the gradients of e and u are made here
            return Part(gradient, Kept(*rest[3 * i : 3 * i + 3]), settings[i], layers[i], seeds[i], needs[i], i < 2)

        with torch.autocast(g.device.type, enabled=False):
            down = part(2, g)
            inner = inner_gradients(down)
            h, de, du = swiglu_backward_(input_gradient(inner, down, None), e, u)
            down_grads = tensor_gradients(inner, h, down)
            del h, inner
            dx, grads = layers_backward(x, [part(0, de), part(1, du)], ctx.needs_input_grad[0])
        return (dx, None, None, None, None, *grads, *down_grads)


def fused_swiglu(x: Tensor, layers: Sequence[FastLinear]) -> Tensor:
    """The block's output for gate, up and down, all on the fast path."""
    x = autocasted(x)
    rows = x.reshape(-1, x.shape[-1])
    operands = [layer.operands(rows) for layer in layers]
    flat = [tensor for _, weights in operands for tensor in weights]
    seeds = [layer.seed() for layer in layers]
    y = SwiGLUFunction.apply(rows, tuple(setting for setting, _ in operands), *seeds, *flat)
    return y.view(*x.shape[:-1], y.shape[-1])


class FusedSwiGLU(Mixin):
    """Mixed into a block's own class: its forward becomes :func:`fused_swiglu` where every layer allows it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., n] to [..., n]."""
        if args or kwargs or why_not_fused(self, x) is not None:
            return super().forward(x, *args, **kwargs)
        return fused_swiglu(x, members(self))

    @property
    def fast_path(self) -> FastPath:
        """Whether the block runs as one function, and why (not)."""
        reason = why_not_fused(self)
        return FastPath(reason is None, reason or "one function that keeps its input and the two inner projections")


def members(block: nn.Module) -> list[FastLinear]:
    """The fast layers gate, up and down of a block that has them all."""
    layers = [fast_linear(getattr(block, name)) for name in NAMES]
    return [layer for layer in layers if layer is not None]


def why_not_fused(block: nn.Module, x: Tensor | None = None) -> str | None:
    """The reason against one function for the block, for an input if one is given; None when there is none."""
    if is_watched(block.act_fn):  # type: ignore[arg-type]
        return "act_fn has hooks or a forward of its own, which one function for the block would pass by"
    for name in NAMES:
        module = getattr(block, name)
        layer = fast_linear(module)
        if layer is None:
            return f"{name} is not adapted"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{name} has hooks, which one function for the block would pass by"
        if layer is module and "forward" in vars(module):
            return f"{name} has a forward of its own"
        # the inner input is not there yet, and has the dtype of the outer one
        reason = layer.why_not_fast(x)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _returned(self: Any, x: Any) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _named_and_returned(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _instructions(function: Any) -> tuple[bytes, tuple[str, ...]] | None:
    """The bytecode of a Python function and the attributes it reads; names of local variables are not in it."""
    code = getattr(function, "__code__", None)
    return None if code is None or hasattr(function, "__wrapped__") else (code.co_code, code.co_names)


# the two ways in which the blocks of transformers write the formula
_FORMS = {_instructions(_returned), _instructions(_named_and_returned)}


def is_swiglu(module: nn.Module) -> bool:
    """Whether a module is a SwiGLU block: its forward runs the instructions of the formula above, and no others."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in NAMES):
        return False
    activation = type(getattr(module, "act_fn", None))
    if f"{activation.__module__}.{activation.__qualname__}" not in ACTIVATIONS:
        return False
    return _instructions(type(module).forward) in _FORMS


assert FIELDS == 7  # the backward above returns as many gradients per layer
