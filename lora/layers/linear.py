"""Adapted linear layers: ``torch.nn.Linear``, transformers' ``Conv1D``, and what is derived from them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from leanstep.kernels import lora_dropout
from leanstep.kernels._backend import on_remembered_backend, remember_backend
from leanstep.lora.layers.autograd import Setting, Weights, dora_factor, matrix
from leanstep.lora.layers.fast import FastLinear
from leanstep.lora.layers.frozen import dequantizer, why_own_forward
from leanstep.lora.layers.layer import Adapter, LoRALayer, mixture
from leanstep.lora.layers.seeds import new_seed


class LoRALinearLayer(FastLinear, LoRALayer):
    """``y = x W^T + b + scale * dropout(x) A^T B^T``, mixed into a linear layer's class.

    Attributes:
        lora_A: ``nn.Linear(in, r)`` without bias; its weight is A (r, in).
        lora_B: ``nn.Linear(r, out)``; its weight is B (out, r).
        lora_magnitude_vector: (out,), for DoRA, else None: ``y = c * (x W^T + scale * ...) + b`` with
            ``c = magnitude / |rows of W + scale B A|``, the norms outside the gradient.
    """

    weight: Tensor
    bias: nn.Parameter | None
    lora: Adapter
    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_magnitude_vector: nn.Parameter | None

    def parts(self) -> tuple[nn.Module, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The layer, A, B, the bias of B, and DoRA's magnitude."""
        return self, self.lora_A.weight, self.lora_B.weight, self.lora_B.bias, self.lora_magnitude_vector

    def base_class(self) -> type[nn.Module]:
        """The class that the layer had before it was adapted."""
        return self.lora.base

    def in_training(self) -> bool:
        """Whether dropout is on."""
        return self.training

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] to [..., out]."""
        if self.lora.merged or not self.lora.enabled:
            return super().forward(x, *args, **kwargs)
        return self.run(x, *args, **kwargs)

    def plain(self, x: Tensor, reason: str, *args: Any, **kwargs: Any) -> Tensor:
        """The same in plain torch."""
        a, b = self.lora_A, self.lora_B
        inputs = x
        if self.training and self.lora.dropout > 0:
            inputs = _DropoutFunction.apply(x, self.lora.dropout, new_seed())
        if self.lora.keep_zeros:
            return self._with_zeros(x, inputs)
        wide = inputs if torch.is_autocast_enabled(x.device.type) else inputs.to(a.weight.dtype)
        update = b(a(wide)) * self.lora.scale
        base = super().forward(x, *args, **kwargs)
        if not isinstance(base, Tensor):
            raise TypeError(
                f"{self.lora.name}: expected a tensor from {self.lora.base.__name__}.forward, to which the adapter is "
                f"added, got a {type(base).__name__}; leave the layer out with exclude_modules"
            )
        if self.lora_magnitude_vector is None:
            return (base + update).to(base.dtype)
        if why_own_forward(self.lora.base) is not None:
            reached = super().forward(inputs, *args, **kwargs)
            reached = reached if self.bias is None else reached - self.bias
        else:
            reached = torch.nn.functional.linear(inputs, self.dense_weight(inputs.dtype))
        c = dora_factor(Weights(self.weight, None, a.weight, b.weight, None, self.lora_magnitude_vector, self.norms()))
        return (base + (c - 1) * reached + c * update).to(base.dtype)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The base weight as an (out, in) matrix, dequantised if need be."""
        setting = Setting(self.lora.scale, transposed=self.lora.transposed, dense=dequantizer(self))
        return matrix(setting, Weights(self.weight, None, self.lora_A.weight, self.lora_B.weight), dtype)

    def _with_zeros(self, x: Tensor, inputs: Tensor) -> Tensor:
        """The output for an input, of which ``inputs`` is what dropout left: the zeros of the weight are kept."""
        from leanstep.lora.layers.pruned import masked_update

        weight = self.weight.t() if self.lora.transposed else self.weight
        update = masked_update(weight, self.lora_A.weight, self.lora_B.weight, self.lora.scale)
        linear = torch.nn.functional.linear
        if inputs is x:
            # what the merged layer computes, rounded as its weight will be
            y = linear(x, (weight + update).to(weight.dtype), self.bias)
        else:
            y = linear(x, weight, self.bias)
            y = y + linear(inputs, update.to(weight.dtype))
        bias = self.lora_B.bias
        return y if bias is None else (y + bias * self.lora.scale).to(y.dtype)


class _DropoutFunction(torch.autograd.Function):
    """Dropout whose mask is found again from its seed: the plain path drops what the fast path drops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.p, ctx.shape = p, x.shape
        ctx.save_for_backward(seed)
        remember_backend(ctx)
        return lora_dropout(x.reshape(-1, x.shape[-1]), p, seed).view(x.shape)

    @staticmethod
    @on_remembered_backend
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows = grad.reshape(-1, grad.shape[-1])
        return lora_dropout(rows, ctx.p, ctx.saved_tensors[0]).view(ctx.shape), None, None


class LoRALinear(LoRALinearLayer, nn.Linear):  # type: ignore[misc]
    """An adapted ``torch.nn.Linear``; see :class:`LoRALinearLayer` for what it computes."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that can be adapted: nn.Linear or Conv1D, or derived from them."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer with an (in, out) weight."""
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(module).__mro__)


def widths(module: Any) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    n, m = module.weight.shape
    return n, m


def attach_linear(module: Any, adapter: Adapter, config: Any) -> None:
    """Turn a linear layer into an adapted one, in place. Everything has been checked before."""
    n, m = widths(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    # PEFT keeps the factors of 16-bit models in fp32, and so do we: updates are small
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    device = weight.device
    module.lora_A = nn.Linear(n, adapter.rank, bias=False, device=device, dtype=dtype)
    module.lora_B = nn.Linear(adapter.rank, m, bias=config.lora_bias, device=device, dtype=dtype)
    reset_factors(module.lora_A, module.lora_B, config.init_lora_weights)
    module.lora = adapter
    module.siblings = None
    module.register_parameter("lora_magnitude_vector", None)
    base: Any = type(module)
    adapter.base, module.__class__ = base, mixture(base, LoRALinearLayer)
    assert isinstance(module, LoRALinearLayer)
    if config.use_dora:
        module.lora_magnitude_vector = nn.Parameter(module.norms().to(dtype))
    if adapter.save == "lora_fa":
        module.lora_A.weight.requires_grad_(False)
    module.lora_A.train(module.training)
    module.lora_B.train(module.training)


@torch.no_grad()
def reset_factors(a: nn.Linear, b: nn.Linear, how: bool | str) -> None:
    """Initialise the factors; see ``init_lora_weights`` of :class:`leanstep.lora.LoraConfig`."""
    if how is False:
        return
    if how == "gaussian":
        nn.init.normal_(a.weight, std=1 / a.out_features)
    elif how == "orthogonal":
        nn.init.orthogonal_(a.weight)
    else:
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    nn.init.zeros_(b.weight)
    if b.bias is not None:
        nn.init.zeros_(b.bias)


def detach_linear(module: Any) -> None:
    """Give a layer its own class back, without the adapter."""
    base = module.lora.base
    for name in ("lora_A", "lora_B", "lora_magnitude_vector", "lora", "siblings"):
        delattr(module, name)
    module.__class__ = base
