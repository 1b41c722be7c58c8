"""What every adapted layer has in common, whatever its class: the adapter's numbers, and whether its fast path is on.

A layer is adapted in place: it stays the same object, keeps its parameters and their names, and becomes an instance of
a subclass of its class, which adds ``lora_A`` and ``lora_B`` (or ``lora_embedding_A`` and ``_B``), and
``lora_magnitude_vector`` for DoRA. So a ``state_dict`` of the base model stays one, hooks stay, ``isinstance`` holds,
and quantised or parametrised layers need no wrapper.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leanstep.lora.layers.contraction import Order, choose_order, sum_is_accurate
from leanstep.lora.layers.dora import NormCache
from leanstep.lora.layers.timed_order import timed_order


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor; importing that class to ask would bring torch's compiler along."""
    return hasattr(tensor, "placements")


def is_watched(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class says."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


class FastPath(NamedTuple):
    """Whether a layer runs on the fast path, and the reason in words."""

    on: bool
    reason: str


@dataclass
class Adapter:
    """The numbers of one layer's adapter.

    Attributes:
        name: the layer's name in the model.
        rank, scale, dropout, save, order, fast_path: as in :class:`leanstep.lora.LoraConfig`, for this layer.
        transposed: whether the base weight is (in, out).
        merged: whether the base weight holds the adapter.
        enabled: whether the adapter takes part.
        keep_zeros: whether what is zero in the base weight stays so (:func:`leanstep.lora.keep_zeros`).
        base: the class the layer had.
        norms: DoRA's norms.
        undo: what :func:`leanstep.lora.unmerge` needs.
    """

    name: str
    rank: int
    scale: float
    dropout: float
    save: str
    order: str
    fast_path: bool | None
    transposed: bool
    base: type[nn.Module] = nn.Module
    merged: bool = False
    enabled: bool = True
    keep_zeros: bool = False
    norms: NormCache = field(default_factory=NormCache)
    undo: Any = None


class Mixin(nn.Module):
    """Base of what is mixed into a module's own class; pickled by the two classes, as the mixture has no name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts: Any = super().__reduce_ex__(protocol)
        bases = type(self).__bases__[::-1]
        known = len(bases) == 2 and mixture(*bases) is type(self)
        return (_new, bases, *parts[2:]) if known else parts


@functools.cache
def mixture(cls: Any, mixin: Any) -> Any:
    """The subclass of a module's class and a mixin; one for each pair."""
    name = f"LoRA{cls.__name__}"
    # those that have a name of their own
    own = next((c for c in mixin.__subclasses__() if c.__bases__ == (mixin, cls) and c.__name__ == name), None)
    return own or type(name, (mixin, cls), {"__module__": mixin.__module__})


def _new(cls: Any, mixin: Any) -> nn.Module:
    made = mixture(cls, mixin)
    return made.__new__(made)


class LoRALayer(Mixin):
    """Base of adapted layers; mixed into the layer's own class."""

    lora: Adapter

    def train(self, mode: bool = True) -> Any:
        """As ``nn.Module.train``; DoRA's norms are computed anew afterwards. Warns where the adapter is merged."""
        if mode and self.lora.merged:
            warnings.warn(
                "train() of a model with merged adapters, whose factors get no gradient; unmerge(model) first",
                stacklevel=2,
            )
        # in training they are anyway, and training loops say so at every step
        if not (mode and self.training):
            self.lora.norms.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        lora = self.lora
        state = "merged" if lora.merged else "on" if lora.enabled else "off"
        return f"{super().extra_repr()}, lora r={lora.rank} scale={lora.scale:g} dropout={lora.dropout:g} ({state})"


def common_reasons(lora: Adapter, tensors: dict[str, Tensor | None], x: Tensor | None) -> str | None:
    """Reasons against the fast path that hold for every kind of layer."""
    if lora.fast_path is False:
        return "turned off by fast_path=False"
    if lora.merged:
        return "the adapter is merged into the base weight: the base layer runs"
    if not lora.enabled:
        return "the adapter is disabled: the base layer runs"
    if lora.keep_zeros:
        return "the zeros of the base weight are kept, for which the product of the factors is formed and masked"
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            return f"{name} is sharded (DTensor): torch's own operations know how to multiply it"
    if x is not None and not x.is_floating_point():
        return f"the input is {x.dtype}, which has no gradient"
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform, which autograd functions of this kind do not support"
    return None


def layer_order(lora: Adapter, x: Tensor, n: int, m: int, plain: bool) -> Order:
    """The order of a layer's products for an input; ``plain`` as in :func:`contraction.choose_order`."""
    if lora.order == "time" and plain and sum_is_accurate(x.dtype):
        found = timed_order(x, n, m, lora.rank)
        if found is not None:
            return found
    rows = x.numel() // max(1, x.shape[-1])
    return choose_order(rows, n, m, lora.rank, dtype=x.dtype, plain=plain, asked=lora.order)
