"""Taps on transformers' attention layers, which receive queries, keys and values after rotary embeddings.

transformers' models look attention up by name in a registry. For an implementation X (``sdpa``, ``eager``, ...), this
module registers ``leanstep_X``. It calls X, unless the layer has a :class:`Tap`: the tap's observers receive the
tensors, and its gate may replace the computation. Masks are built as for X.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

_PREFIX = "leanstep_"
_ATTRIBUTE = "_leanstep_tap"
# features of attention that low-rank attention lacks, by the argument that transformers passes
_FEATURES = {
    "softcap": "capped logits (softcap)",
    "s_aux": "attention sinks (s_aux)",
    "position_bias": "a bias by position (position_bias)",
}


class AttentionInputs(NamedTuple):
    """Inputs of one attention layer: q [B, Hq, L, d], k [B, H, M, d], v [B, H, M, e], key_mask [B, M]."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    causal: bool
    key_mask: Tensor | None = None

    def sequences(self, index: slice) -> AttentionInputs:
        """The detached inputs of a slice of the batch."""
        q, k, v = (x.detach()[index] for x in (self.query, self.key, self.value))
        mask = None if self.key_mask is None else self.key_mask[index]
        return AttentionInputs(q, k, v, self.scale, self.causal, mask)


@dataclass(frozen=True)
class Call:
    """One call of a layer's attention.

    Attributes:
        inputs: its tensors, scale and mask.
        unsupported_mask: why low-rank attention cannot handle this mask, or None.
        dropout: dropout probability of attention weights.
        exact: runs the exact implementation; returns the output [B, L, Hq, e], and the weights or None.
        special: the layer's features that low-rank attention lacks, in words.
    """

    layer: nn.Module
    inputs: AttentionInputs
    unsupported_mask: str | None
    dropout: float
    exact: Callable[[], tuple[Tensor, Tensor | None]]
    special: tuple[str, ...]


@dataclass
class Tap:
    """The functions that a layer calls: observers inspect a call, the gate computes it in place of ``call.exact``."""

    name: str
    observers: list[Callable[[Call], None]] = field(default_factory=list)
    gate: Callable[[Call], tuple[Tensor, Tensor | None]] | None = None


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The self-attention layers of a transformers model that call attention through the registry, by name.

    Raises:
        ValueError: if the model has no such layer.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal") and hasattr(module, "config")
        and not getattr(module, "is_cross_attention", False)
    }  # fmt: skip
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no attention layers that call transformers' attention by name; use LLaMA, "
            "GPT-2 or a related model of transformers"
        )
    return layers


def _transformers_model(model: nn.Module) -> Any:
    """The transformers model inside ``model``, which may be a wrapper such as PEFT's."""
    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            return module
    raise ValueError(f"{type(model).__name__} holds no transformers model: attention cannot be set by name")


def attach(model: nn.Module) -> dict[nn.Module, Tap]:
    """Give every attention layer a tap, and route the model's attention through it.

    Raises:
        ValueError: for a model without such layers, or an attention implementation that is not registered.
    """
    layers, owner = attention_layers(model), _transformers_model(model)
    current = owner.config._attn_implementation
    if not current.startswith(_PREFIX):
        owner.set_attn_implementation(_register(current, next(iter(layers.values()))))
    for name, layer in layers.items():
        if _ATTRIBUTE not in layer.__dict__:
            layer.__dict__[_ATTRIBUTE] = Tap(name)
    return {layer: layer.__dict__[_ATTRIBUTE] for layer in layers.values()}


def detach(model: nn.Module) -> None:
    """Restore the model's attention implementation and remove all taps, unless one is still in use."""
    taps = [(layer, layer.__dict__.get(_ATTRIBUTE)) for layer in attention_layers(model).values()]
    if any(tap is not None and (tap.observers or tap.gate is not None) for _, tap in taps):
        return
    for layer, _ in taps:
        layer.__dict__.pop(_ATTRIBUTE, None)
    owner = _transformers_model(model)
    current = owner.config._attn_implementation
    if current.startswith(_PREFIX):
        owner.set_attn_implementation(current.removeprefix(_PREFIX))


def _register(original: str, layer: nn.Module) -> str:
    """Register ``leanstep_ORIGINAL`` for attention and masks in transformers; returns that name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if original not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(f"attention implementation {original!r} has no mask function in transformers; take 'sdpa'")
    _implementation(original, layer)
    name = _PREFIX + original
    AttentionInterface.register(name, partial(_forward, original))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def _implementation(original: str, layer: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function of an implementation. "eager" is defined in the model's own file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if original in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[original]
    for cls in type(layer).__mro__:
        eager = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise ValueError(f"{type(layer).__name__} has no eager attention; load the model with attn_implementation='sdpa'")


def _forward(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function registered as ``leanstep_ORIGINAL``."""

    def exact() -> tuple[Tensor, Tensor | None]:
        run = _implementation(original, module)
        return run(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)

    tap = module.__dict__.get(_ATTRIBUTE)
    if tap is None or not (tap.gate or tap.observers):
        return exact()
    return _tapped(tap, exact, module, (query, key, value), attention_mask, dropout, scaling, kwargs)


@_disable_dynamo  # as torch.compiler.disable, which imports the compiler at once
def _tapped(
    tap: Tap,
    exact: Callable[[], tuple[Tensor, Tensor | None]],
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    query, key, _ = tensors
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal) and query.shape[2] > 1
    key_mask, unsupported_mask = None, None
    if mask is not None:
        causal, key_mask, unsupported_mask = read_mask(mask, key.shape[0], query.shape[2], key.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    special = tuple(words for name, words in _FEATURES.items() if kwargs.get(name) is not None)
    inputs = AttentionInputs(*tensors, scale, causal, key_mask)
    call = Call(module, inputs, unsupported_mask, dropout, exact, special)
    for observer in list(tap.observers):
        observer(call)
    return exact() if tap.gate is None else tap.gate(call)


def read_mask(mask: Tensor, batch: int, length: int, keys: int) -> tuple[bool, Tensor | None, str | None]:
    """Recognise causal masks and padding masks.

    Args:
        mask: [B, 1, L, M]; visible keys are True in a bool mask, 0 in an additive one. Rows of padded queries are
            ignored.
        batch, length, keys: B, L, M.

    Returns:
        (causal, key_mask [B, M] or None, the reason why the mask is not supported or None).
    """
    if mask.dim() != 4 or mask.shape[1] != 1 or length != keys or mask.shape[-2:] != (length, keys):
        return False, None, f"a mask of shape {tuple(mask.shape)} for {length} queries and {keys} keys"
    visible = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
    valid = visible[:, -1]
    order = torch.ones(length, keys, dtype=torch.bool, device=mask.device).tril()
    for causal in (True, False):
        expected = valid[:, None, :] & order if causal else valid[:, None, :].expand_as(visible)
        if bool(((visible == expected) | ~valid[:, :, None]).all()):
            valid = valid.expand(batch, -1)
            return causal, None if bool(valid.all()) else valid, None
    return False, None, "a mask that is neither causal nor padding: windows, packed documents or the like"
