"""A place in transformers' attention layers where queries, keys and values pass, after rotary embeddings.

transformers' models call attention by a name in a registry. Here a name ``leanstep_X`` is added for an implementation X
(``sdpa``, ``eager``, ...): it does what X does, unless the layer has a :class:`Tap`, whose observers then see the
tensors, and whose gate may compute something else. Masks are made as for X.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from leanstep.lora.attention.norms import Seen

__all__ = ["Call", "Tap", "attach", "attention_layers", "detach"]

_PREFIX = "leanstep_"
_ATTRIBUTE = "_leanstep_tap"


@dataclass(frozen=True)
class Call:
    """One call of a layer's attention: its tensors, what its mask means, and the exact implementation.

    ``masked`` says in words why the mask is none that low-rank attention knows; None where ``seen`` describes it.
    """

    layer: nn.Module
    seen: Seen
    masked: str | None
    dropout: float
    exact: Callable[[], tuple[Tensor, Tensor | None]]
    special: tuple[str, ...]


class Observer(Protocol):
    """What looks at calls."""

    def see(self, call: Call) -> None:
        """Look at one call; nothing may be changed."""


class Gate(Protocol):
    """What may answer a call in place of the exact implementation."""

    def answer(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """The output [B, L, Hq, e] and the weights, or None for them."""


@dataclass
class Tap:
    """What is attached to one attention layer."""

    name: str
    observers: list[Observer] = field(default_factory=list)
    gate: Gate | None = None


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The self-attention layers of a transformers model by name: those that call the registry's attention.

    Raises:
        ValueError: if there are none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal") and hasattr(module, "config")
        and not getattr(module, "is_cross_attention", False)
    }  # fmt: skip
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention layers that call transformers' attention by name; LLaMA, GPT-2 "
            "and their relatives in transformers have"
        )
    return found


def _owner(model: nn.Module) -> Any:
    """The transformers model in ``model``, which may be wrapped, as by PEFT."""
    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            return module
    raise ValueError(f"{type(model).__name__} holds no transformers model: attention cannot be set by name")


def attach(model: nn.Module) -> dict[nn.Module, Tap]:
    """Give every attention layer a tap, and let the model call attention through it.

    Raises:
        ValueError: for a model without such layers, or with an implementation that cannot be called by name.
    """
    layers, owner = attention_layers(model), _owner(model)
    current = owner.config._attn_implementation
    if not current.startswith(_PREFIX):
        owner.set_attn_implementation(_register(current, next(iter(layers.values()))))
    for name, layer in layers.items():
        if _ATTRIBUTE not in layer.__dict__:
            layer.__dict__[_ATTRIBUTE] = Tap(name)
    return {layer: layer.__dict__[_ATTRIBUTE] for layer in layers.values()}


def detach(model: nn.Module) -> None:
    """Take away taps that nothing uses; with the last of them, give the model its own implementation back."""
    taps = [(layer, layer.__dict__.get(_ATTRIBUTE)) for layer in attention_layers(model).values()]
    if any(tap is not None and (tap.observers or tap.gate is not None) for _, tap in taps):
        return
    for layer, _ in taps:
        layer.__dict__.pop(_ATTRIBUTE, None)
    owner = _owner(model)
    current = owner.config._attn_implementation
    if current.startswith(_PREFIX):
        owner.set_attn_implementation(current.removeprefix(_PREFIX))


def _register(original: str, layer: nn.Module) -> str:
    """Add ``leanstep_ORIGINAL`` to transformers' registries of attention and of masks; returns the name."""
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
    """The function of an implementation; "eager" is one of the model's own file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if original in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[original]
    for kind in type(layer).__mro__:
        found = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise ValueError(
        f"{type(layer).__name__} brings no eager attention; load the model with attn_implementation='sdpa'"
    )


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
    """What transformers calls under the name ``leanstep_ORIGINAL``."""

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
    masked: str | None = None
    key_mask: Tensor | None = None
    if mask is not None:
        causal, key_mask, masked = read_mask(mask, key.shape[0], query.shape[2], key.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    special = tuple(name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None)
    call = Call(module, Seen(*tensors, scale, causal, key_mask), masked, dropout, exact, special)
    for observer in list(tap.observers):
        observer.see(call)
    return exact() if tap.gate is None else tap.gate.answer(call)


def read_mask(mask: Tensor, batch: int, length: int, keys: int) -> tuple[bool, Tensor | None, str | None]:
    """What a mask [B, 1, L, M] means: (causal, which keys count [B, M] or None for all, or why it is nothing of the
    kind).

    True, or 0 where it is added, is what is visible. Rows of queries that are padding themselves may be anything.
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
