"""Adapters that keep the zeros of a pruned base weight zero in the merged weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leanstep.lora.layers.frozen import quantized_kind, why_custom_forward
from leanstep.lora.layers.linear import LoRALinearLayer
from leanstep.lora.layers.pissa import start_factors


def keep_zeros(model: nn.Module, layers: Iterable[str] | None = None) -> list[str]:
    """Make adapted layers of a pruned model compute ``y = x (W + scale (B A) * (W != 0))^T + b``.

    Merging a plain adapter fills the zeros of its base. Here training masks the product of the factors, so the merged
    model is as sparse as the base and computes the same as the trained one. :func:`leanstep.lora.merge` and the final
    folder of a run then keep the zeros without ``keep_mask``.

    Args:
        model: adapted by :func:`leanstep.lora.apply_lora` and not merged; changed in place.
        layers: names of adapted linear layers; None: every layer with a zero in its base weight.

    Returns:
        The names of the layers.

    Raises:
        ValueError: for a name that is not an adapted linear layer, DoRA (its norms need the unmasked sum), PiSSA, a
            quantised base, a layer with a custom forward, ``fast_path=True``, or a merged adapter. The model is
            unchanged.

    Notes:
        Such a layer forms the (out, in) product of its factors in the forward and again in the backward pass. Autograd
        saves the input and no matrix of the weight's size, unless the layer has dropout: that saves one. An adapter
        file does not record the mask: a program that adds the file to the base gets a dense model. Share the merged
        model instead.

    References:
        Munoz, Yuan, Jain, "SQFT: Low-cost Model Adaptation in Low-precision Sparse Foundation Models", arXiv
        2410.03750.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinearLayer)}
    if layers is None:
        layers = [n for n, m in adapted.items() if quantized_kind(m) is None and bool((m.weight == 0).any())]
    names = list(layers)
    for name in names:
        if name not in adapted:
            raise ValueError(f"keep_zeros: {name!r} is not an adapted linear layer")
        reason = _why_not(adapted[name])
        if reason is not None:
            raise ValueError(f"keep_zeros: {name} {reason}")
    for name in names:
        adapted[name].lora.keep_zeros = True
    return names


def _why_not(layer: LoRALinearLayer) -> str | None:
    if layer.lora_magnitude_vector is not None:
        return "has DoRA, whose norms need the unmasked sum; use LoRA"
    if start_factors(layer) is not None:
        return "began with PiSSA, whose base weight has no zeros left; take another init_lora_weights"
    if quantized_kind(layer) is not None:
        return f"is a {quantized_kind(layer)}, whose zeros are not exact; use a base in 16 bits"
    if why_custom_forward(layer.lora.base) is not None:
        return f"is a {layer.lora.base.__name__}, whose forward may compute more than a product with its weight"
    if layer.lora.fast_path is True:
        return "has fast_path=True, and the fast path cannot mask the product"
    return "is merged already" if layer.lora.merged else None


def masked_update(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale B A`` with zeros where ``weight`` [out, in] is zero, in the factors' dtype."""
    return _MaskedProduct.apply(weight, a, b, scale)


def masked_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """``x (W + masked_update)^T + bias``, with the sum in W's dtype; x is [..., in]."""
    return _MaskedLinear.apply(x, weight, a, b, bias, scale)


def _product(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    # out of place: selective activation checkpointing may hold the product
    with torch.autocast(a.device.type, enabled=False):
        return ((b @ a) * scale).masked_fill(weight == 0, 0)


def _factor_gradients(
    grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of both factors from that of their masked product."""
    grad = grad.to(a.dtype).masked_fill(weight == 0, 0).mul_(scale)
    with torch.autocast(a.device.type, enabled=False):
        return b.t() @ grad if needed[0] else None, grad @ a.t() if needed[1] else None


class _MaskedProduct(torch.autograd.Function):
    """Saves only the factors and the weight; backward recomputes the mask from the weight.

    Autocast is off inside, as its backward would meet the factors in another dtype than the product.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(weight, a, b)
        ctx.scale = scale
        return _product(weight, a, b, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        weight, a, b = ctx.saved_tensors
        return None, *_factor_gradients(grad, weight, a, b, ctx.scale, ctx.needs_input_grad[1:3]), None


class _MaskedLinear(torch.autograd.Function):
    """Saves the input, the factors and the weight; backward recomputes their sum, which has the weight's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return nn.functional.linear(x, _sum(weight, a, b, scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        of_x, of_weight, of_a, of_b, of_bias, _ = ctx.needs_input_grad
        rows, product = grad.reshape(-1, grad.shape[-1]), None
        # under autocast the gradient has its dtype, whether or not it is on here
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = (grad @ _sum(weight, a, b, ctx.scale).to(grad.dtype)).to(x.dtype) if of_x else None
            grad_bias = rows.sum(0) if of_bias else None
            if of_weight or of_a or of_b:
                product = (rows.t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype)).to(weight.dtype)
        if product is None:
            return grad_x, None, None, None, grad_bias, None
        factors = _factor_gradients(product, weight, a, b, ctx.scale, (of_a, of_b))
        return grad_x, product if of_weight else None, *factors, grad_bias, None


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return (weight + _product(weight, a, b, scale)).to(weight.dtype)
