"""Layers with a shared input as one function: q, k and v of an attention block, and SwiGLU blocks."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leanstep.kernels import swiglu, swiglu_backward_
from leanstep.kernels._backend import on_remembered_backend, remember_backend
from leanstep.lora.layers.autograd import (
    Setting,
    backward_layers,
    forward_layer,
    inner_gradients,
    input_gradient,
    layers_of,
    lora_linears,
    saved_tensors,
    shared_hidden,
    tensors_to_save,
    watched,
    weight_gradients,
)
from leanstep.lora.layers.frozen import is_watched
from leanstep.lora.layers.linear import FastLinear, FastPath, LoRALinearLayer, Mixin, autocasted, fast_linear, mixture

# names of projections that share an input within one module
GROUPS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
# modules whose queries have another input than their keys and values
_CROSS_ATTENTION = re.compile(r"cross_?att|encoder_att|enc_?dec", re.IGNORECASE)
SWIGLU = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")


class Siblings:
    """Layers of one block that are called with the same input one after another.

    The first call computes the outputs of all layers in one function, with one gradient of the input. The calls of the
    other layers return their waiting outputs. If a layer is called with another input, as in cross-attention, or after
    its tensors, its settings or autocast have changed, the group breaks for good, and every layer computes its own
    output. Activation checkpointing still recomputes the pass that broke the group as it was: it compares the saved
    tensors.
    """

    def __init__(self, layers: Sequence[FastLinear]) -> None:
        self.layers = list(layers)
        self.broken = False
        # index of the layer that ran for all in the pass that broke the group; None after that pass
        self._first: int | None = None
        self._forget()

    def _forget(self) -> None:
        # index of a layer -> its output and the state in which it was computed
        self._waiting: dict[int, tuple[Tensor, tuple[object, ...]]] = {}
        self._source: tuple[weakref.ref, int, bool, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "broken": self.broken}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers, self.broken = state["layers"], state["broken"]
        self._first = None
        self._forget()

    def take(self, layer: FastLinear, x: Tensor) -> Tensor | None:
        """The output of one layer, or None if the layer has to compute it itself."""
        # a compiled program shares the input's storage anyway, and must not depend on waiting outputs;
        # inference tensors do not count in-place changes
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        index = next((i for i, other in enumerate(self.layers) if other is layer), None)
        if index is None:
            # a replica of the layer, as DataParallel makes them
            return None
        if self.broken and not self._recomputes(index):
            self._forget()
            return None
        if self._waiting:
            assert self._source is not None
            reference, version, grad, first = self._source
            same_input = reference() is x and version == x._version and grad == torch.is_grad_enabled()
            if index in self._waiting and same_input:
                y, state = self._waiting.pop(index)
                if state == _current_state(layer, x):
                    return y
            # if the input is gone, an exception ended the pass that left outputs waiting
            self.broken = reference() is not None
            self._forget()
            if self.broken:
                self._first = first
                return None
        # before reading other layers: a PEFT layer without the active adapter has no settings
        if any(other.why_not_fast(x) is not None for other in self.layers):
            return None
        inputs = autocasted(x)
        settings, weights = zip(*(other.operands(inputs) for other in self.layers), strict=True)
        outputs = lora_linears(inputs, settings, weights, [other.seed() for other in self.layers])
        states = (_state(other, x, *tensors[:6]) for other, tensors in zip(self.layers, weights, strict=True))
        self._waiting = {i: waiting for i, waiting in enumerate(zip(outputs, states, strict=True)) if i != index}
        self._source = (weakref.ref(x), x._version, torch.is_grad_enabled(), index)
        return outputs[index]

    def _recomputes(self, index: int) -> bool:
        """Whether this call begins the recomputation, inside backward, of the pass that broke the group."""
        if index == self._first and torch._C._current_graph_task_id() == -1:
            self._first = None
        return index == self._first


def _current_state(layer: FastLinear, x: Tensor) -> tuple[object, ...]:
    base, *factors = layer.operand_tensors()
    return _state(layer, x, base._parameters.get("weight"), base._parameters.get("bias"), *factors)


def _state(
    layer: FastLinear, x: Tensor, weight: Tensor | None, bias: Tensor | None, *factors: Tensor | None
) -> tuple[object, ...]:
    """What a layer's output depends on besides x: its tensors and their in-place changes, its settings and autocast."""
    # a parametrization makes another tensor at every access
    base = (tensor if isinstance(tensor, nn.Parameter) else None for tensor in (weight, bias))
    tensors = (*base, *factors)
    device, lora = x.device.type, layer.lora
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return layer.training, lora.scale, lora.dropout, autocast, *map(id, tensors), *map(_changes, tensors)


def _changes(tensor: Tensor | None) -> int:
    """The count of in-place changes of a tensor; inference tensors have none."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def join_siblings(model: nn.Module) -> None:
    """Group the fast layers of each module by the names in :data:`GROUPS` and their input widths."""
    for path, module in model.named_modules():
        if _CROSS_ATTENTION.search(path):
            continue
        for names in GROUPS:
            layers = [fast_linear(getattr(module, name, None)) for name in names]
            ungrouped = [layer for layer in layers if layer is not None and layer.siblings is None]
            if len(ungrouped) == len(names):
                _join(ungrouped)


def _join(layers: Sequence[FastLinear]) -> None:
    """Group the layers that may share an input: those of one input width."""
    by_width: dict[int, list[FastLinear]] = {}
    for layer in layers:
        by_width.setdefault(layer.input_width(), []).append(layer)
    for members in by_width.values():
        if len(members) > 1:
            group = Siblings(members)
            for layer in members:
                layer.siblings = group


def fuse_blocks(model: nn.Module) -> None:
    """Make each block of an adapted model run as one function."""
    join_siblings(model)
    for module in swiglu_blocks(model).values():
        module.__class__ = mixture(type(module), FusedSwiGLU)  # type: ignore[arg-type]


def unfuse_blocks(model: nn.Module) -> None:
    """Undo :func:`fuse_blocks`."""
    for module in model.modules():
        if isinstance(module, LoRALinearLayer):
            module.siblings = None
        if isinstance(module, FusedSwiGLU):
            original: Any = type(module).__bases__[1]
            module.__class__ = original


# --- SwiGLU blocks ----------------------------------------------------------------------------------------------------


def fused_swiglu(block: nn.Module, x: Tensor) -> Tensor:
    """The output of a SwiGLU block with all three layers on the fast path."""
    x = autocasted(x)
    layers = swiglu_layers(block)
    settings, weights = zip(*(layer.operands(x) for layer in layers), strict=True)
    seeds = [layer.seed() for layer in layers]
    rows = x.reshape(-1, x.shape[-1])
    y = SwiGLUFunction.apply(rows, settings, *seeds, *(tensor for layer in weights for tensor in layer))
    return y.view(*x.shape[:-1], y.shape[-1])


class SwiGLUFunction(torch.autograd.Function):
    """``down(silu(e) * u)`` with ``e = gate(X)`` and ``u = up(X)``, on rows. Saves X, e and u.

    Takes the arguments of :class:`leanstep.lora.layers.autograd.LoRAFunction`, for gate, up and down. torch also saves
    silu(e) and the input of down. Here, one pass of backward recomputes that input and gives the gradients of e and u.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Setting, ...], *tensors: Tensor | None) -> Tensor:
        """[M, n] to [M, n]."""
        gate, up, down = layers_of(ctx, settings, tensors)
        with torch.autocast(x.device.type, enabled=False):
            h_gate, h_up = shared_hidden(x, (gate, up))
            e, save_gate, gate_needs_x = tensors_to_save(forward_layer(gate, x, h_gate))
            u, save_up, up_needs_x = tensors_to_save(forward_layer(up, x, h_up))
            y, save_down, _ = tensors_to_save(forward_layer(down, swiglu(e, u)))
        save_x = x if gate_needs_x or up_needs_x else None
        saved = [*save_gate, *save_up, *save_down]
        ctx.counts = {}
        # only DoRA saves outputs
        saved = watched(ctx, saved) if any(y is not None for y in saved[2::3]) else saved
        ctx.save_for_backward(save_x, e, u, *saved, *tensors)
        ctx.settings = settings
        remember_backend(ctx)
        return y

    @staticmethod
    @once_differentiable
    @on_remembered_backend
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the tensors that need one."""
        x, e, u, *saved = saved_tensors(ctx)
        gate, up, down = layers_of(ctx, ctx.settings, saved[9:], saved)
        with torch.autocast(dy.device.type, enabled=False):
            inner = inner_gradients(down, dy)
            down_input, de, du = swiglu_backward_(input_gradient(down, inner, None), e, u)
            d_down = weight_gradients(down, inner, down_input)
            del down_input, inner
            # no other code holds de and du, so they may be overwritten
            dx, d_gate_up = backward_layers(x, (gate, up), (de, du), ctx.needs_input_grad[0], overwrite=True)
        return (dx, None, None, None, None, *d_gate_up, *d_down)


class FusedSwiGLU(Mixin):
    """Mixin for a SwiGLU block's class: forward runs :func:`fused_swiglu` if every layer allows it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., n] to [..., n]."""
        if args or kwargs or why_not_fused(self, x) is not None:
            return super().forward(x, *args, **kwargs)
        return fused_swiglu(self, x)

    @property
    def fast_path(self) -> FastPath:
        """Whether the block runs as one function, and why (not)."""
        return swiglu_fast_path(self)


def swiglu_fast_path(block: nn.Module) -> FastPath:
    """Whether a SwiGLU block runs as one function, and why (not)."""
    reason = why_not_fused(block)
    return FastPath(reason is None, reason or "one function that saves its input and the two inner projections")


def swiglu_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The SwiGLU blocks of a model whose three layers are fast, by name."""
    return {name: m for name, m in model.named_modules() if is_swiglu(m) and len(swiglu_layers(m)) == 3}


def swiglu_layers(block: nn.Module) -> list[FastLinear]:
    """The fast layers among a block's gate, up and down."""
    layers = [fast_linear(getattr(block, name)) for name in SWIGLU]
    return [layer for layer in layers if layer is not None]


def why_not_fused(block: nn.Module, x: Tensor | None = None) -> str | None:
    """The reason why a SwiGLU block cannot run as one function (on ``x``, if given); None if it can."""
    if is_watched(block.act_fn):  # type: ignore[arg-type]
        return "act_fn has hooks or a custom forward, which one function for the block would skip"
    for name in SWIGLU:
        module = getattr(block, name)
        layer = fast_linear(module)
        if layer is None:
            return f"{name} is not adapted"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{name} has hooks, which one function for the block would skip"
        if layer is module and "forward" in vars(module):
            return f"{name} has a custom forward"
        # the input of down does not exist yet, but has the dtype of x
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
    """The bytecode of a Python function and the attribute names it reads, without names of local variables."""
    code = getattr(function, "__code__", None)
    return None if code is None or hasattr(function, "__wrapped__") else (code.co_code, code.co_names)


# transformers' blocks write the formula in these two ways
_SWIGLU_FORWARDS = {_instructions(_returned), _instructions(_named_and_returned)}


def is_swiglu(module: nn.Module) -> bool:
    """Whether a module is a SwiGLU block: its forward has the bytecode of one of the two functions above."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in SWIGLU):
        return False
    activation = type(getattr(module, "act_fn", None))
    if f"{activation.__module__}.{activation.__qualname__}" not in ACTIVATIONS:
        return False
    return _instructions(type(module).forward) in _SWIGLU_FORWARDS
