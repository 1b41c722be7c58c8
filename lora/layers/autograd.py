"""Linear layers with adapters as one autograd function that saves their input and little else.

The formulas are in :mod:`leanstep.lora.layers.rule`. Layers with the same input save X once. With ``save="min"``,
backward recomputes H, at ``2 M n r`` operations; it always recomputes dropout's mask from its seed. DoRA then saves Y
and gets ``Z = Y / c`` from it. With a bias, ``Y - b`` would lose digits of Z, so backward recomputes Z from X; it does
the same if other code has changed Y in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanstep.kernels import lora_dropout, product
from leanstep.kernels._backend import on_remembered_backend, remember_backend
from leanstep.lora.layers import rule
from leanstep.lora.layers.contraction import ContractionPath


class Weights(NamedTuple):
    """The tensors of one layer: base weight and bias, A, B, B's bias, and DoRA's magnitude and norms."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    b_bias: Tensor | None = None
    magnitude: Tensor | None = None
    norm: Tensor | None = None


_FIELDS = len(Weights._fields)
_ADVICE = (
    "An input of an adapted layer, or the output of one with DoRA and a frozen A, was changed in place after it was "
    "computed, as nn.ReLU(inplace=True) does; change a copy, or let DoRA keep its products with "
    'LoraConfig(save="full")'
)


@dataclass(frozen=True)
class Setting:
    """The settings of one layer in one pass.

    Attributes:
        scale: s.
        dropout: p; 0 in evaluation.
        save: ``"min"``, ``"full"`` or ``"lora_fa"``; see :class:`leanstep.lora.LoraConfig`.
        transposed: whether the weight is (n, m), as in transformers' Conv1D.
        path: the products that use the materialised ``W + s B A``.
        dense: function that dequantises the weight; None for a dense weight.
    """

    scale: float
    dropout: float = 0.0
    save: str = "min"
    transposed: bool = False
    path: ContractionPath = ContractionPath()
    dense: Callable[[Tensor], Tensor] | None = None


class LayerPass(NamedTuple):
    """One layer in a forward or backward pass.

    Attributes:
        setting, weights: the layer's settings and tensors.
        seed: seed of dropout's mask, or None.
        needs: for each weight, whether it needs a gradient.
        h, z, y: H, DoRA's Z and the output Y, or None. Forward sets them as computed, backward as saved.
    """

    setting: Setting
    weights: Weights
    seed: Tensor | None
    needs: Weights
    h: Tensor | None = None
    z: Tensor | None = None
    y: Tensor | None = None


def new_seed() -> Tensor:
    """Draw a dropout seed, int64, 0-d, on the CPU, from the CPU's global generator, without waiting for a device.

    So ``torch.manual_seed`` makes a run repeatable, and activation checkpointing, which restores that generator, draws
    the same seed again.
    """
    return torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu")


def dense_weight(setting: Setting, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The base weight as a dense (m, n) matrix or view in ``dtype``."""
    dense = weight if setting.dense is None else setting.dense(weight)
    dense = dense.to(dtype)
    return dense.t() if setting.transposed else dense


# --- the functions that layers call -----------------------------------------------------------------------------------


def lora_linears(
    x: Tensor, settings: Sequence[Setting], weights: Sequence[Weights], seeds: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Apply layers that share an input.

    Args:
        x: [..., n], floating.
        settings, weights, seeds: one entry per layer; a seed is None without dropout.

    Returns:
        One output [..., m] per layer, in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    outputs = LoRAFunction.apply(rows, tuple(settings), *seeds, *(tensor for layer in weights for tensor in layer))
    # autograd forbids in-place changes to views made inside the function
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def seeded_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Dropout of [..., n] with a gradient; drops the same entries as the fast path for this seed."""
    return _DropoutFunction.apply(x, p, seed)


class LoRAFunction(torch.autograd.Function):
    """:func:`lora_linears` on rows. Arguments: x [M, n], settings, the seeds of all layers, then all weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Setting, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """One output [M, m] per layer."""
        layers = layers_of(ctx, settings, tensors)
        outputs: list[Tensor] = []
        saved: list[Tensor | None] = []
        needs_x = False
        with torch.autocast(x.device.type, enabled=False):
            for layer, h in zip(layers, shared_hidden(x, layers), strict=True):
                y, h_z_y, needs_input = tensors_to_save(forward_layer(layer, x, h))
                outputs.append(y)
                saved += h_z_y
                needs_x |= needs_input
        ctx.counts = {}
        # only DoRA saves outputs
        saved = watched(ctx, saved) if any(y is not None for y in saved[2::3]) else saved
        ctx.save_for_backward(x if needs_x else None, *saved, *tensors)
        ctx.settings = settings
        if len(settings) > 1:
            # an unused output then has no gradient in place of zeros
            ctx.set_materialize_grads(False)
        remember_backend(ctx)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    @on_remembered_backend
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the tensors that need one; none of the weights of a layer with unused output."""
        x, *saved = saved_tensors(ctx)
        layers = layers_of(ctx, ctx.settings, saved[3 * len(ctx.settings) :], saved)
        used = {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}
        dx: Tensor | None = None
        d_weights: list[Tensor | None] = [None] * (len(layers) * _FIELDS)
        if used:
            with torch.autocast(next(iter(used.values())).device.type, enabled=False):
                dx, d_used = backward_layers(x, [layers[i] for i in used], list(used.values()), ctx.needs_input_grad[0])
            for number, i in enumerate(used):
                d_weights[i * _FIELDS : (i + 1) * _FIELDS] = d_used[number * _FIELDS : (number + 1) * _FIELDS]
        return (dx, None, *(None,) * len(layers), *d_weights)


class _DropoutFunction(torch.autograd.Function):
    # torch.func takes no function that saves tensors in its forward
    @staticmethod
    def forward(x: Tensor, p: float, seed: Tensor) -> Tensor:
        return lora_dropout(x.reshape(-1, x.shape[-1]), p, seed).view(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:
        _, ctx.p, seed = inputs
        ctx.save_for_backward(seed)
        remember_backend(ctx)

    @staticmethod
    @on_remembered_backend
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # linear in x, with a symmetric matrix: its gradient is itself, to every order
        return seeded_dropout(grad, ctx.p, ctx.saved_tensors[0]), None, None


# --- forward ----------------------------------------------------------------------------------------------------------


def layers_of(
    ctx: Any, settings: Sequence[Setting], tensors: Sequence[Tensor | None], saved: Sequence[Tensor | None] = ()
) -> list[LayerPass]:
    """Group flat arguments by layer: ``tensors`` holds all seeds, then all weights; ``saved`` holds H, Z, Y of each."""
    count = len(settings)

    def weights_of(index: int, values: Sequence[Any]) -> Weights:
        return Weights(*values[count + index * _FIELDS : count + (index + 1) * _FIELDS])

    # the first two arguments are x and the settings
    needs = ctx.needs_input_grad[2:]
    if saved and ctx.counts:
        saved = without_changed(ctx, saved)
    return [
        LayerPass(setting, weights_of(i, tensors), tensors[i], weights_of(i, needs), *saved[3 * i : 3 * i + 3])
        for i, setting in enumerate(settings)
    ]


def shared_hidden(x: Tensor, layers: Sequence[LayerPass]) -> Sequence[Tensor | None]:
    """H of every layer, from one product for all; None for every layer if they must be computed separately."""
    if len(layers) == 1 or any(layer.setting.dropout > 0 or layer.setting.path.forward for layer in layers):
        return (None,) * len(layers)
    a = torch.cat([layer.weights.a.to(x.dtype) for layer in layers])
    return product(x, a.t()).split([len(layer.weights.a) for layer in layers], 1)


def forward_layer(layer: LayerPass, x: Tensor, h: Tensor | None = None) -> LayerPass:
    """Compute the output Y for x [M, n], and set H and DoRA's Z if they are formed; ``h``: H, if already known."""
    setting, weights, dtype = layer.setting, layer.weights, x.dtype
    a, b = weights.a.to(dtype), weights.b.to(dtype)
    w = dense_weight(setting, weights.weight, dtype)
    bias = _to(weights.bias, dtype)
    if weights.magnitude is not None:
        h = rule.hidden(x, a, setting.dropout, layer.seed) if h is None else h
        return _forward_dora(layer, x, w, bias, h)
    if weights.b_bias is not None:
        shift = weights.b_bias.to(dtype) * setting.scale
        bias = shift if bias is None else bias + shift
    if setting.path.forward:
        return layer._replace(y=product(x, rule.materialized_sum(w, a, b, setting.scale).t(), bias))
    h = rule.hidden(x, a, setting.dropout, layer.seed) if h is None else h
    return layer._replace(h=h, y=rule.output(x, w, bias, h, b, setting.scale))


def _forward_dora(layer: LayerPass, x: Tensor, w: Tensor, bias: Tensor | None, h: Tensor) -> LayerPass:
    setting, weights = layer.setting, layer.weights
    assert weights.magnitude is not None and weights.norm is not None
    c, keep_z = rule.dora_factor(weights.magnitude, weights.norm), setting.save != "min"
    base = product(lora_dropout(x, setting.dropout, layer.seed), w.t())
    rest = bias if setting.dropout == 0 else rule.dora_rest(x, w, bias, base)
    z = rule.dora_product(base, h, weights.b.to(x.dtype), setting.scale, _to(weights.b_bias, x.dtype))
    return layer._replace(h=h, z=z, y=rule.dora_output(z, c, rest, keep_z))


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def tensors_to_save(layer: LayerPass) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None], bool]:
    """The output, those of (H, Z, Y) that backward needs, and whether it needs the layer's input."""
    setting, needs = layer.setting, layer.needs
    assert layer.y is not None
    minimal = setting.save == "min"
    h = layer.h if needs.b and (not minimal or not needs.a) else None
    z = layer.z if needs.magnitude and not minimal else None
    y_gives_z = setting.dropout == 0 and layer.weights.bias is None
    y = layer.y if needs.magnitude and z is None and y_gives_z else None
    needs_input = needs.a or (needs.b and h is None) or (needs.magnitude and z is None and y is None)
    return layer.y, (h, z, y), bool(needs_input)


def saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    """The saved tensors of a forward pass. Raises RuntimeError with advice if one was changed in place."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if any(setting.save == "min" for setting in ctx.settings) and "inplace operation" in str(error):
            # only inputs and DoRA's outputs are saved here and visible to other code
            raise RuntimeError(f"{error}\n{_ADVICE}") from None
        raise


# --- backward ---------------------------------------------------------------------------------------------------------


class InnerGradients(NamedTuple):
    """Gradients inside one layer.

    Attributes:
        dy: gradient of the output Y, [M, m]; dz may overwrite it after its last use.
        dz: gradient of DoRA's Z; dy without DoRA.
        e: ``dZ B`` [M, r], or None if not needed.
        sums: for DoRA, the sums over rows of dY times the saved Z or Y, [m].
    """

    dy: Tensor
    dz: Tensor
    e: Tensor | None
    sums: Tensor | None = None


def backward_layers(
    x: Tensor | None, layers: Sequence[LayerPass], gradients: Sequence[Tensor], needs_dx: bool, overwrite: bool = False
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of the shared input, or None, and the gradients of all layers' weights in one list.

    Without dropout and materialised sums, one product with A serves all layers, which reads x and dx only once.

    Args:
        x: [M, n], if it was saved.
        layers: the layers with their saved tensors.
        gradients: one output gradient [M, m] per layer.
        needs_dx: whether to compute the gradient of x.
        overwrite: whether the memory of ``gradients`` may be reused.
    """
    dx: Tensor | None = None
    d_weights: list[list[Tensor | None]] = []
    together = all(layer.needs.a and layer.setting.dropout == 0 and not layer.setting.path.backward for layer in layers)
    if len(layers) == 1 or not together:
        for layer, dy in zip(layers, gradients, strict=True):
            inner = inner_gradients(layer, dy, overwrite)
            d_weights.append(weight_gradients(layer, inner, x))
            dx = input_gradient(layer, inner, dx) if needs_dx else None
        return dx, [gradient for d_layer in d_weights for gradient in d_layer]
    assert x is not None
    dtype, ranks = x.dtype, [len(layer.weights.a) for layer in layers]
    # s A of every layer, which scales both H and dx
    a = torch.cat([(layer.weights.a * layer.setting.scale).to(dtype) for layer in layers])
    recompute = any(layer.needs.b and layer.h is None for layer in layers)
    hiddens = product(x, a.t()).split(ranks, 1) if recompute else (None,) * len(layers)
    columns = []
    for layer, dy, h in zip(layers, gradients, hiddens, strict=True):
        inner = inner_gradients(layer, dy, overwrite)
        d_weights.append(weight_gradients(layer, inner, x, scaled_h=h, with_a=False))
        assert inner.e is not None
        columns.append(inner.e)
        if needs_dx:
            dx = product(inner.dz, dense_weight(layer.setting, layer.weights.weight, dtype), dx)
    e = torch.cat(columns, 1)
    for layer, d_layer, da in zip(layers, d_weights, product(e.t(), x).split(ranks), strict=True):
        d_layer[2] = da.to(layer.weights.a.dtype) * layer.setting.scale
    dx = None if dx is None else product(e, a, dx)
    return dx, [gradient for d_layer in d_weights for gradient in d_layer]


def inner_gradients(layer: LayerPass, dy: Tensor, overwrite: bool = False) -> InnerGradients:
    """Compute the :class:`InnerGradients` from ``dy``, in its memory if ``overwrite`` allows it."""
    setting, weights, needs = layer.setting, layer.weights, layer.needs
    dz, sums = dy, None
    if weights.magnitude is not None:
        assert weights.norm is not None
        saved = layer.y if layer.z is None else layer.z
        # recomputing Z for the magnitude's gradient needs dY again
        last_use = (saved is not None or not needs.magnitude) and setting.dropout == 0 and not needs.bias
        c = rule.dora_factor(weights.magnitude, weights.norm)
        dz, sums = rule.gradient_of_product(dy, saved, c, overwrite and last_use)
    needs_e = needs.a or not setting.path.backward
    return InnerGradients(dy, dz, rule.gradient_of_hidden(dz, weights.b.to(dy.dtype)) if needs_e else None, sums)


def weight_gradients(
    layer: LayerPass, inner: InnerGradients, x: Tensor | None, scaled_h: Tensor | None = None, with_a: bool = True
) -> list[Tensor | None]:
    """The gradients of the layer's :class:`Weights`, in their order and dtypes; ``scaled_h``: s H, if already known."""
    setting, weights, needs, h = layer.setting, layer.weights, layer.needs, layer.h
    scale, p, a = setting.scale, setting.dropout, weights.a.to(inner.dy.dtype)
    d_bias = da = db = d_b_bias = d_magnitude = None
    if needs.bias and weights.bias is not None:
        d_bias = inner.dy.sum(0).to(weights.bias.dtype)
    if needs.a and with_a:
        assert x is not None and inner.e is not None
        recompute = a if needs.b and h is None else None
        da, recomputed = rule.gradient_of_a(x, inner.e, scale, weights.a.dtype, p, layer.seed, recompute)
        h = recomputed if h is None else h
    if needs.b and (h is not None or scaled_h is None):
        if h is None:
            assert x is not None
            h = rule.hidden(x, a, p, layer.seed)
        db = rule.gradient_of_b(inner.dz, h, scale, weights.b.dtype)
    elif needs.b and scaled_h is not None:
        db = rule.gradient_of_b(inner.dz, scaled_h, 1.0, weights.b.dtype)
    if needs.b_bias and weights.b_bias is not None:
        d_b_bias = inner.dz.sum(0).to(weights.b_bias.dtype).mul_(scale)
    if needs.magnitude:
        d_magnitude = _magnitude_gradient(layer, inner, x)
    return [None, d_bias, da, db, d_b_bias, d_magnitude, None]


def _magnitude_gradient(layer: LayerPass, inner: InnerGradients, x: Tensor | None) -> Tensor:
    setting, weights, sums = layer.setting, layer.weights, inner.sums
    assert weights.magnitude is not None and weights.norm is not None and sums is not None
    divisor = weights.norm
    if layer.y is not None:
        # sums of dY Y; layers with a magnitude of 0 save Z instead
        divisor = weights.magnitude.to(weights.norm.dtype)
    elif layer.z is None:
        if x is None:
            raise RuntimeError(_ADVICE)
        dropped = lora_dropout(x, setting.dropout, layer.seed)
        base = product(dropped, dense_weight(setting, weights.weight, x.dtype).t())
        h, b = rule.hidden(dropped, weights.a.to(x.dtype)), weights.b.to(x.dtype)
        z = rule.dora_product(base, h, b, setting.scale, _to(weights.b_bias, x.dtype))
        _, sums = rule.gradient_of_product(inner.dy, z, weights.norm)
    return rule.gradient_of_magnitude(sums, divisor, weights.norm).to(weights.magnitude.dtype)


def input_gradient(layer: LayerPass, inner: InnerGradients, dx: Tensor | None) -> Tensor:
    """Add the gradient of the layer's input to ``dx`` in place; None starts a new tensor."""
    setting, weights, dtype = layer.setting, layer.weights, inner.dy.dtype
    w, a = dense_weight(setting, weights.weight, dtype), weights.a.to(dtype)
    if setting.path.backward:
        return product(inner.dz, rule.materialized_sum(w, a, weights.b.to(dtype), setting.scale), dx)
    assert inner.e is not None
    split = weights.magnitude is not None and setting.dropout > 0
    dy, masked_dy = (inner.dy, inner.dz - inner.dy) if split else (inner.dz, None)
    return rule.gradient_of_input(dy, w, inner.e, a, setting.scale, setting.dropout, layer.seed, dx, masked_dy)


class _Count(NamedTuple):
    """A tensor without memory that shares a tensor's count of in-place changes, and the count in forward."""

    counter: Tensor
    version: int


def watched(ctx: Any, saved: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The saved (H, Z, Y) of every layer in one list, with Y in a form that may be changed; fills ``ctx.counts``.

    Y is the layer's output, which other code sees and may change in place, as ``nn.SiLU(inplace=True)`` does. torch
    would refuse to return it in backward, where the layer can recompute its Z instead. So Y is saved without its count
    of changes, and the count is kept beside it, without the memory of Y, which hooks of saved tensors may move.
    """
    tensors = list(saved)
    for i in range(2, len(tensors), 3):
        y = tensors[i]
        # a compiled program has no changes in place, and subclasses, such as fake tensors, do not reveal them
        if y is not None and not torch.compiler.is_compiling() and type(y) is Tensor and not y.is_inference():
            counter = y.detach()
            counter.data = torch.empty(0, dtype=y.dtype, device=y.device)
            ctx.counts[i], tensors[i] = _Count(counter, counter._version), y.data
    return tensors


def without_changed(ctx: Any, saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """``saved`` with None for every Y that was changed since :func:`watched`."""
    counts: dict[int, _Count] = ctx.counts
    changed = {i for i, (counter, version) in counts.items() if counter._version != version}
    return [None if i in changed else tensor for i, tensor in enumerate(saved)] if changed else saved
