"""Linear layers with low-rank adapters on one input, as one autograd function that keeps the input and nothing else.

With X (M, n) the input, W (m, n) the frozen weight, A (r, n) and B (m, r) the factors, s the scale and
X' = dropout(X)::

    H  = X' A^T                     (M, r)
    Y  = X W^T + b + s H B^T
    E  = dY B                       (M, r)
    dA = s E^T X'                   (r, n), never through dY^T X, which is as large as W
    dB = s dY^T H                   (m, r)
    dX = dY W + s dropout'(E A)

X is kept, once however many layers share it; H is computed again, at ``2 M n r`` operations, and the dropped entries
are found again from a seed. DoRA scales the columns of ``Z = X W^T + s H B^T`` by ``c = magnitude / norm`` and keeps Y,
from which ``Z = Y / c``; with a bias, ``Y - b`` would have lost digits, and Z is computed again from X.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanstep.kernels import (
    lora_down,
    lora_down_backward,
    lora_dropout,
    lora_scale_backward,
    lora_up_,
    product,
)
from leanstep.kernels._backend import on_remembered_backend, remember_backend
from leanstep.lora.layers.contraction import Order
from leanstep.lora.layers.in_place import add, add_product, scale_columns


class Weights(NamedTuple):
    """The tensors of one layer: base weight and bias, factors, the bias of B, and DoRA's magnitude and norms."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    b_bias: Tensor | None = None
    magnitude: Tensor | None = None
    norm: Tensor | None = None


FIELDS = len(Weights._fields)


@dataclass(frozen=True)
class Setting:
    """The numbers of one layer.

    Attributes:
        scale: s.
        dropout: p, 0 where the layer is not training.
        save: ``"min"``, ``"full"`` or ``"lora_fa"``; see :class:`leanstep.lora.LoraConfig`.
        transposed: the weight is (n, m), as transformers' Conv1D keeps it.
        order: which products go through ``W + s B A``.
        dense: makes a matrix of a quantised weight; None where it is one.
    """

    scale: float
    dropout: float = 0.0
    save: str = "min"
    transposed: bool = False
    order: Order = Order()
    dense: Callable[[Tensor], Tensor] | None = None


def lora_linears(
    x: Tensor, settings: Sequence[Setting], weights: Sequence[Weights], seeds: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Apply layers that share an input.

    Args:
        x: [..., n], floating.
        settings, weights, seeds: one of each per layer; a seed (int64, 0-d, CPU) where there is dropout.

    Returns:
        One [..., m] of x's dtype per layer.
    """
    flat = [tensor for layer in weights for tensor in layer]
    rows = x.reshape(-1, x.shape[-1])
    outputs = LoRAFunction.apply(rows, tuple(settings), *seeds, *flat)
    # views are made outside: what a function returns can then be changed in place by those who come after
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


class LoRAFunction(torch.autograd.Function):
    """See the formulas above; called by :func:`lora_linears`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Setting, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """[M, n] to one [M, m] per layer. ``tensors``: the seeds, then the weights of each layer."""
        seeds, layers = unpack(settings, tensors)
        outputs: list[Tensor] = []
        kept: list[Tensor | None] = []
        keep_x = False
        with torch.autocast(x.device.type, enabled=False):
            for i, h in enumerate(shared_down(x, settings, layers)):
                setting, layer = settings[i], layers[i]
                y, h, z = project(x, setting, layer, seeds[i], h)
                needs = needs_of(ctx, 2 + len(settings), i)
                held, wants_x = to_keep(y, h, z, setting, needs, layer.bias is not None)
                outputs.append(y)
                kept += held
                keep_x |= wants_x
        ctx.save_for_backward(x if keep_x else None, *kept, *tensors)
        ctx.settings = settings
        remember_backend(ctx)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    @on_remembered_backend
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of every layer's tensors that need one."""
        settings = ctx.settings
        saved = saved_of(ctx)
        count = 1 + 3 * len(settings)
        x, kept = saved[0], saved[1:count]
        seeds, layers = unpack(settings, saved[count:])
        parts = [
            Part(
                g, Kept(*kept[3 * i : 3 * i + 3]), settings[i], layers[i], seeds[i], needs_of(ctx, 2 + len(settings), i)
            )
            for i, g in enumerate(gradients)
        ]
        with torch.autocast(gradients[0].device.type, enabled=False):
            dx, results = layers_backward(x, parts, ctx.needs_input_grad[0])
        return (dx, None, *(None,) * len(settings), *results)


def saved_of(ctx: Any) -> tuple[Tensor, ...]:
    """What a forward pass kept."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if any(setting.save == "min" for setting in ctx.settings) and "inplace operation" in str(error):
            # of what is kept, only DoRA's outputs are in others' hands besides the inputs
            raise RuntimeError(
                f"{error}\nAn input of an adapted layer, or the output of one with DoRA, was changed in place after it "
                "was computed, as nn.ReLU(inplace=True) does; change a copy, or keep DoRA's products besides with "
                'LoraConfig(save="full")'
            ) from None
        raise


class Kept(NamedTuple):
    """What the forward pass of one layer kept: H, DoRA's Z, and the output."""

    h: Tensor | None
    z: Tensor | None
    y: Tensor | None


class Part(NamedTuple):
    """One of the layers on an input, on the way back.

    Attributes:
        g: [M, m], the gradient of the output.
        kept, setting, layer, seed: of the layer.
        needs: which of the layer's tensors need a gradient.
        own: whether g is nobody else's, and may be written.
    """

    g: Tensor
    kept: Kept
    setting: Setting
    layer: Weights
    seed: Tensor | None
    needs: Weights
    own: bool = False

    def has_done_with_g(self) -> bool:
        """Whether DoRA needs g no more when it has been through the columns' factors."""
        formed = self.kept.y is not None or self.kept.z is not None or not self.needs.magnitude
        return self.own and formed and self.setting.dropout == 0 and not self.needs.bias


def needs_of(ctx: Any, first: int, i: int) -> Weights:
    """Which tensors of layer i need a gradient, where layer 0's begin at argument ``first``."""
    return Weights(*ctx.needs_input_grad[first + i * FIELDS : first + (i + 1) * FIELDS])


def to_keep(
    y: Tensor, h: Tensor | None, z: Tensor | None, setting: Setting, needs: Weights, has_bias: bool
) -> tuple[Kept, bool]:
    """What backward needs of one layer, and whether it needs the layer's input."""
    least = setting.save == "min"
    kept_h = h if needs.b and (not least or not needs.a) else None
    kept_z = z if needs.magnitude and not least else None
    # with a bias, Y has lost digits of Z to it: Z is computed again instead
    kept_y = y if needs.magnitude and kept_z is None and setting.dropout == 0 and not has_bias else None
    wants_x = needs.a or (needs.b and kept_h is None) or (needs.magnitude and kept_z is None and kept_y is None)
    return Kept(kept_h, kept_z, kept_y), bool(wants_x)


def unpack(
    settings: Sequence[Setting], tensors: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor | None], list[Weights]]:
    """Seeds and weights from the flat list."""
    n = len(settings)
    layers = [Weights(*tensors[k : k + FIELDS]) for k in range(n, n + n * FIELDS, FIELDS)]  # type: ignore[arg-type]
    return tensors[:n], layers


def matrix(setting: Setting, layer: Weights, dtype: torch.dtype) -> Tensor:
    """The base weight as a dense (m, n) view or matrix in ``dtype``."""
    dense = layer.weight if setting.dense is None else setting.dense(layer.weight)
    dense = dense.to(dtype)
    return dense.t() if setting.transposed else dense


def merged(setting: Setting, layer: Weights, dtype: torch.dtype) -> Tensor:
    """``W + s B A``, a new matrix."""
    w = matrix(setting, layer, dtype)
    return torch.addmm(w, layer.b.to(dtype), layer.a.to(dtype), alpha=setting.scale)


def shared_down(x: Tensor, settings: Sequence[Setting], layers: Sequence[Weights]) -> Sequence[Tensor | None]:
    """H of each layer from one product for all, as columns of it; None for each where one product will not do."""
    if len(layers) == 1 or any(setting.dropout > 0 or setting.order.forward for setting in settings):
        return (None,) * len(layers)
    a = torch.cat([layer.a.to(x.dtype) for layer in layers])
    return product(x, a.t()).split([len(layer.a) for layer in layers], 1)


def project(
    x: Tensor, setting: Setting, layer: Weights, seed: Tensor | None, h: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(Y, H, Z): the output, and what was formed on the way, unless it is given; Z for DoRA only."""
    dtype, p = x.dtype, setting.dropout
    bias = None if layer.bias is None else layer.bias.to(dtype)
    if layer.magnitude is not None:
        return _project_dora(x, setting, layer, seed, bias, h)
    if layer.b_bias is not None:
        shift = layer.b_bias.to(dtype) * setting.scale
        bias = shift if bias is None else bias + shift
    if setting.order.forward:
        return _linear(x, merged(setting, layer, dtype), bias), None, None
    y = _linear(x, matrix(setting, layer, dtype), bias)
    h = lora_down(x, layer.a.to(dtype), p, seed) if h is None else h
    return add_product(y, h, layer.b.to(dtype).t(), setting.scale), h, None


def _project_dora(
    x: Tensor, setting: Setting, layer: Weights, seed: Tensor | None, bias: Tensor | None, h: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    h = lora_down(x, layer.a.to(x.dtype), setting.dropout, seed) if h is None else h
    # z is kept where "full" says so; otherwise y takes its memory
    c, keep = dora_factor(layer), setting.save != "min"
    if setting.dropout == 0:
        z = _dora_output(x, h, setting, layer)
        return scale_columns(z, c, bias, keep), h, z
    # the magnitude weighs the dropped input's part only: Y = X W^T + b + (c - 1) (X' W^T) + c s H B^T
    w = matrix(setting, layer, x.dtype)
    z = _linear(lora_dropout(x, setting.dropout, seed), w, None)
    y = add(_linear(x, w, bias), z, -1.0)
    z = _add_up(z, h, setting, layer)
    return add(y, scale_columns(z, c, keep=keep)), h, z


def _dora_output(x: Tensor, h: Tensor, setting: Setting, layer: Weights) -> Tensor:
    """Z = X W^T + s (H B^T + b_B)."""
    return _add_up(_linear(x, matrix(setting, layer, x.dtype), None), h, setting, layer)


def _add_up(z: Tensor, h: Tensor, setting: Setting, layer: Weights) -> Tensor:
    z = add_product(z, h, layer.b.to(z.dtype).t(), setting.scale)
    return z if layer.b_bias is None else add(z, layer.b_bias.to(z.dtype), setting.scale)


def dora_factor(layer: Weights) -> Tensor:
    """``c = magnitude / norm``; 1 where the norm is 0, as in a row that was pruned away."""
    assert layer.magnitude is not None and layer.norm is not None
    empty = layer.norm == 0
    # a quotient that is not taken has a gradient all the same, 0 times infinity
    return torch.where(empty, 1.0, layer.magnitude.to(layer.norm.dtype) / torch.where(empty, 1.0, layer.norm))


def layers_backward(x: Tensor | None, parts: Sequence[Part], wants_dx: bool) -> tuple[Tensor | None, list[Any]]:
    """The gradient of an input, if it is wanted, and those of the tensors of the layers on it, one after another.

    Products with A, r wide, are taken of all layers at once where no mask and no other order keeps them apart: x and dx
    are then read once instead of once a layer.
    """
    dx: Tensor | None = None
    results: list[Any] = []
    if len(parts) == 1 or not all(
        part.needs.a and part.setting.dropout == 0 and not part.setting.order.backward for part in parts
    ):
        for part in parts:
            inner = inner_gradients(part)
            results += tensor_gradients(inner, x, part)
            dx = input_gradient(inner, part, dx) if wants_dx else None
        return dx, results
    assert x is not None
    dtype, ranks = x.dtype, [len(part.layer.a) for part in parts]
    # with its scale, which then is in H and in dx
    a = torch.cat([(part.layer.a * part.setting.scale).to(dtype) for part in parts])
    again = any(part.needs.b and part.kept.h is None for part in parts)
    hs = product(x, a.t()).split(ranks, 1) if again else (None,) * len(parts)
    products = []
    for part, h in zip(parts, hs, strict=True):
        inner = inner_gradients(part)
        results.append(tensor_gradients(inner, x, part, h, want_a=False))
        assert inner.e is not None  # as A's gradient is wanted
        products.append(inner.e)
        if wants_dx:
            w = matrix(part.setting, part.layer, dtype)
            dx = product(inner.z, w, dx)
    e = torch.cat(products, 1)
    for part, grads, d_a in zip(parts, results, product(e.t(), x).split(ranks), strict=True):
        grads[2] = d_a.to(part.layer.a.dtype) * part.setting.scale
    return None if dx is None else product(e, a, dx), [grad for grads in results for grad in grads]


class Inner(NamedTuple):
    """What the gradient of an output becomes on its way in.

    Attributes:
        g: of the output, [M, m]; z where the part has done with it.
        z: of Z, which is that of the output without DoRA.
        e: E = dZ B, [M, r], where it is needed.
        dot: DoRA's sums over rows of dY * Y, [m], in the norms' dtype, where the output was kept.
        total: sums over rows of dY, likewise.
    """

    g: Tensor
    z: Tensor
    e: Tensor | None
    dot: Tensor | None = None
    total: Tensor | None = None


def inner_gradients(part: Part) -> Inner:
    """The gradients of Z and of H, and the sums that DoRA's magnitude needs."""
    g, kept, layer = part.g, part.kept, part.layer
    inner, dot, total = g, None, None
    if layer.magnitude is not None:
        y = kept.y if kept.z is None else kept.z
        inner, dot, total = lora_scale_backward(g, y, dora_factor(layer), part.has_done_with_g())
    e = None if part.setting.order.backward and not part.needs.a else product(inner, layer.b.to(g.dtype))
    return Inner(g, inner, e, dot, total)


def tensor_gradients(
    inner: Inner, x: Tensor | None, part: Part, scaled_h: Tensor | None = None, want_a: bool = True
) -> list[Tensor | None]:
    """The gradients of a layer's tensors, in their dtypes and order.

    Args:
        inner: of the layer.
        x: [M, n], where it was kept.
        part: the layer.
        scaled_h: s H, if it is there.
        want_a: whether that of A is to be among them.
    """
    g, setting, layer, needs, h = inner.g, part.setting, part.layer, part.needs, part.kept.h
    s, a = setting.scale, layer.a.to(g.dtype)
    d_bias = d_a = d_b = d_b_bias = d_magnitude = None
    if needs.bias and layer.bias is not None:
        d_bias = g.sum(0).to(layer.bias.dtype)
    if needs.a and want_a:
        assert x is not None and inner.e is not None
        again = a if needs.b and h is None else None
        d_a, formed = lora_down_backward(x, inner.e, again, setting.dropout, part.seed)
        h = formed if h is None else h
        d_a = d_a.to(layer.a.dtype).mul_(s)
    if needs.b:
        if h is None and scaled_h is None:
            assert x is not None
            h = lora_down(x, a, setting.dropout, part.seed)
        factor, left = (s, h) if h is not None else (1.0, scaled_h)
        assert left is not None
        # a product with few rows is faster than one with few columns
        d_b = product(left.t(), inner.z).t().to(layer.b.dtype, memory_format=torch.contiguous_format).mul(factor)
    if needs.b_bias and layer.b_bias is not None:
        d_b_bias = inner.z.sum(0).to(layer.b_bias.dtype).mul_(s)
    if needs.magnitude:
        d_magnitude = _magnitude_gradient(inner, x, part)
    return [None, d_bias, d_a, d_b, d_b_bias, d_magnitude, None]


def input_gradient(inner: Inner, part: Part, dx: Tensor | None) -> Tensor:
    """``dx + dY W + s dropout'(E A)``, in the memory of dx."""
    dtype, setting, layer = inner.g.dtype, part.setting, part.layer
    dora_dropout = layer.magnitude is not None and setting.dropout > 0
    w = (merged if setting.order.backward else matrix)(setting, layer, dtype)
    outer = inner.g if dora_dropout else inner.z
    dx = product(outer, w, dx)
    if dora_dropout:
        # the dropped input reaches W with weight c - 1
        dx += lora_dropout(product(inner.z - inner.g, w), setting.dropout, part.seed)
    if setting.order.backward:
        return dx
    assert inner.e is not None
    return lora_up_(dx, inner.e, layer.a.to(dtype), setting.scale, setting.dropout, part.seed)


def _magnitude_gradient(inner: Inner, x: Tensor | None, part: Part) -> Tensor:
    """Sum over rows of ``dY * Z / norm``."""
    kept, setting, layer = part.kept, part.setting, part.layer
    assert layer.magnitude is not None and layer.norm is not None and inner.dot is not None
    if kept.y is not None:
        # Z / norm = Y / magnitude
        total = inner.dot
        magnitude = layer.magnitude.to(layer.norm.dtype)
        # a zero would need Z itself: layers that can see it coming keep that
        result = torch.where(magnitude == 0, 0.0, total / magnitude)
    else:
        total = inner.dot
        if kept.z is None:
            assert x is not None
            inputs = lora_dropout(x, setting.dropout, part.seed)
            z = _dora_output(inputs, product(inputs, layer.a.to(x.dtype).t()), setting, layer)
            _, total, _ = lora_scale_backward(inner.g, z, layer.norm)
        result = total / layer.norm
    return torch.where(layer.norm == 0, 0.0, result).to(layer.magnitude.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight.t(), bias)
