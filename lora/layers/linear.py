"""Adapted layers: their settings, the choice of the fast path, and adapted linear layers.

Layers are adapted in place. A layer stays the same object, keeps its parameters and their names, and becomes an
instance of a subclass of its class. The subclass adds ``lora_A`` and ``lora_B`` (or ``lora_embedding_A`` and ``_B``),
and ``lora_magnitude_vector`` for DoRA. So a ``state_dict`` of the base model still loads, hooks and ``isinstance``
still work, and quantised or parametrised layers need no wrapper.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leanstep._torch import is_dtensor
from leanstep.kernels.op import in_transform, outside_dispatch_modes
from leanstep.lora.config import is_pissa
from leanstep.lora.layers.autograd import Setting, Weights, dense_weight, lora_linears, new_seed, seeded_dropout
from leanstep.lora.layers.contraction import ContractionPath, contraction_path
from leanstep.lora.layers.dora import NormCache
from leanstep.lora.layers.frozen import dequantizer, why_custom_forward, widths
from leanstep.lora.layers.pissa import START_A, START_B, start_factors, start_product, take_principal_part
from leanstep.lora.layers.rule import dora_factor


class FastPath(NamedTuple):
    """Whether a layer runs on the fast path, and the reason in words."""

    on: bool
    reason: str


@dataclass
class Adapter:
    """The settings and the state of one layer's adapter.

    Attributes:
        name: the layer's name in the model.
        rank, scale, dropout, save, fast_path: this layer's settings, as in :class:`leanstep.lora.LoraConfig`.
        transposed: whether the base weight is (in, out).
        base: the class whose forward computes the base product, which the layer had before.
        merged: whether the base weight contains the adapter.
        enabled: whether the adapter is on.
        keep_zeros: whether zeros of the base weight stay zero (:func:`leanstep.lora.keep_zeros`).
        norms: cache of DoRA's norms; None until first use.
        undo: state for :func:`leanstep.lora.unmerge`.
    """

    name: str
    rank: int
    scale: float
    dropout: float
    save: str
    fast_path: bool | None
    transposed: bool
    base: type[nn.Module] = nn.Module
    merged: bool = False
    enabled: bool = True
    keep_zeros: bool = False
    norms: NormCache | None = None
    undo: Any = None


# --- mixed classes ----------------------------------------------------------------------------------------------------


class Mixin(nn.Module):
    """Base of mixins for a module's own class. Pickles both base classes: a mixture has no importable name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: Any = super().__reduce_ex__(protocol)
        bases = type(self).__bases__[::-1]
        is_mixture = len(bases) == 2 and mixture(*bases) is type(self)
        return (_new, bases, *state[2:]) if is_mixture else state


@functools.cache
def mixture(cls: Any, mixin: Any) -> Any:
    """The class that derives from a mixin and a module's class; one per pair."""
    return type(f"LoRA{cls.__name__}", (mixin, cls), {"__module__": mixin.__module__})


def _new(cls: Any, mixin: Any) -> nn.Module:
    mixed = mixture(cls, mixin)
    return mixed.__new__(mixed)


class LoRALayer(Mixin):
    """Base of adapted layers; mixed into the layer's own class.

    Attributes:
        lora_magnitude_vector: (out,) for DoRA, else None.
    """

    lora: Adapter
    weight: Tensor
    lora_magnitude_vector: nn.Parameter | None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        raise NotImplementedError

    def norms(self) -> Tensor:
        """DoRA's norms: (out,), fp32 or fp64, without a gradient."""
        raise NotImplementedError

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Like ``nn.Module.register_parameter``.

        Raises:
            ValueError: for a DTensor in place of a whole factor, which is how tensor parallelism shards a layer.
        """
        if name.startswith("lora_") and is_dtensor(param) and not is_dtensor(self._parameters.get(name)):
            raise ValueError(
                f"tensor parallelism (parallelize_module) takes no adapted layer, got {name}. The model is partly "
                "sharded now; load it again. Leave adapted layers out of the plan, shard the model by fully_shard "
                "(FSDP2), or merge the adapters first."
            )
        super().register_parameter(name, param)

    def train(self, mode: bool = True) -> Any:
        """Like ``nn.Module.train``, but also drops the cache of DoRA's norms. Warns if the adapter is merged."""
        if mode and self.lora.merged:
            warnings.warn(
                "train() of a model with merged adapters, whose factors get no gradient; unmerge(model) first",
                stacklevel=2,
            )
        # training loops call train() at every step, and training recomputes the norms anyway
        if not (mode and self.training):
            self.lora.norms = None
        return super().train(mode)

    def extra_repr(self) -> str:
        """The adapter's settings for ``print(model)``."""
        lora = self.lora
        state = "merged" if lora.merged else "on" if lora.enabled else "off"
        return f"{super().extra_repr()}, lora r={lora.rank} scale={lora.scale:g} dropout={lora.dropout:g} ({state})"


# --- the fast path ----------------------------------------------------------------------------------------------------


def why_not_fast(lora: Adapter, tensors: dict[str, Tensor | None]) -> str | None:
    """The reason why a layer of any kind cannot run on the fast path; None if it can."""
    if lora.fast_path is False:
        return "turned off by fast_path=False"
    if lora.merged:
        return "the adapter is merged into the base weight: the base layer runs"
    if not lora.enabled:
        return "the adapter is disabled: the base layer runs"
    if lora.keep_zeros:
        return "keep_zeros needs the masked product of the factors"
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            return f"{name} is sharded (DTensor), which only torch's own operations can multiply"
    if in_transform():
        return "inside a torch.func transform, which the fast path's autograd function does not support"
    return None


class FastLinear:
    """A linear layer with an adapter: :class:`LoRALinearLayer`, or one of PEFT's.

    Attributes:
        lora: the adapter's settings and state.
        siblings: the layers that share its input (:class:`leanstep.lora.layers.block.Siblings`), or None.
        training: whether dropout is on.
    """

    lora: Adapter
    siblings: Any = None
    training: bool

    def operand_tensors(self) -> tuple[nn.Module, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The module with the base weight and bias, A, B, B's bias, and DoRA's magnitude."""
        raise NotImplementedError

    def input_width(self) -> int:
        """The number of entries that the layer takes of each input row."""
        raise NotImplementedError

    def plain(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output in plain torch."""
        raise NotImplementedError

    @property
    def fast_path(self) -> FastPath:
        """Whether the next forward pass runs on the fast path, and why (not)."""
        reason = self.why_not_fast()
        if reason is not None:
            return FastPath(False, reason)
        alone = self.siblings is not None and self.siblings.broken
        others = ", for this layer alone: its sibling layers got other inputs, so each layer saves its input"
        return FastPath(True, "one autograd function that saves only the input" + (others if alone else ""))

    def why_not_fast(self, x: Tensor | None = None) -> str | None:
        """The reason why the layer cannot run on the fast path (on ``x``, if given); None if it can."""
        base, a, _, _, _ = self.operand_tensors()
        weight, lora = base.weight, self.lora
        assert isinstance(weight, Tensor)
        reason = why_not_fast(lora, {"weight": weight, "lora_A": a}) or why_custom_forward(lora.base)
        if reason is not None:
            return reason
        if weight.requires_grad:
            return "the base weight is trained, and its gradient is a full matrix"
        quantized = dequantizer(base) is not None
        if not quantized and type(weight).__module__.split(".")[0] != "torch":
            return f"the base weight is a {type(weight).__name__}, which defines its own products"
        if not quantized and not weight.is_floating_point():
            return f"the base weight is {weight.dtype}, which the fast path cannot multiply"
        if x is None:
            return None
        if not x.is_floating_point():
            return f"the input is {x.dtype}, which has no gradient"
        # autocast does not cast fp64
        casts = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        if not quantized and x.dtype != weight.dtype and not casts:
            return f"the input is {x.dtype} and the base weight {weight.dtype}"
        return None

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] to [..., out], on the fast path if possible."""
        if self.siblings is not None:
            y = self.siblings.take(self, x)
            if y is not None:
                return y
        reason = self.why_not_fast(x)
        if reason is not None:
            if self.lora.fast_path:
                raise RuntimeError(f"{self.lora.name}: fast_path=True was asked for, but {reason}")
            return self.plain(x, *args, **kwargs)
        x = autocasted(x)
        setting, weights = self.operands(x)
        return lora_linears(x, (setting,), (weights,), (self.seed(),))[0]

    def seed(self) -> Tensor | None:
        """A new seed if the next pass has dropout, else None."""
        return new_seed() if self.training and self.lora.dropout > 0 else None

    def operands(self, x: Tensor) -> tuple[Setting, Weights]:
        """The layer's arguments for :func:`leanstep.lora.layers.autograd.lora_linears` on ``x``."""
        base, a, b, b_bias, magnitude = self.operand_tensors()
        lora, dense = self.lora, dequantizer(base)
        p = lora.dropout if self.training else 0.0
        save, norm, path = lora.save, None, ContractionPath()
        if magnitude is not None:
            norm = self.norms()
            if save == "min" and _can_read(magnitude) and bool((magnitude == 0).any()):
                # the magnitude's gradient needs Z, and an output scaled by 0 does not contain it
                save = "full"
        elif p == 0 and dense is None and save != "lora_fa" and not _trains_b_alone(a, b):
            path = contraction_path(x.numel() // max(1, x.shape[-1]), a.shape[1], b.shape[0], lora.rank, x.dtype)
        setting = Setting(lora.scale, p, save, lora.transposed, path, dense)
        return setting, Weights(base.weight, base.bias, a, b, b_bias, magnitude, norm)  # type: ignore[arg-type]

    def norms(self) -> Tensor:
        """DoRA's norms: (out,), fp32 or fp64, without a gradient."""
        return outside_dispatch_modes(self._norms)

    def _norms(self) -> Tensor:
        base, a, b, _, _ = self.operand_tensors()
        a, b, lora = a.detach(), b.detach(), self.lora
        assert isinstance(base.weight, Tensor)
        weight = base.weight.detach() if base.weight.is_floating_point() else base.weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        dense = dense_weight(Setting(lora.scale, transposed=lora.transposed, dense=dequantizer(base)), weight, dtype)
        if lora.norms is None:
            lora.norms = NormCache()
        return lora.norms.norms(weight, dense, a, b, lora.scale, self.training)


def _trains_b_alone(a: Tensor, b: Tensor) -> bool:
    """Whether backward needs ``A x`` and not x, which the sum of weight and update would have to keep."""
    return torch.is_grad_enabled() and b.requires_grad and not a.requires_grad


def _can_read(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read without waiting for a device."""
    has_values = type(tensor) in (Tensor, nn.Parameter)
    return has_values and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def autocasted(x: Tensor) -> Tensor:
    """Cast x to autocast's dtype if autocast is on. As in torch, fp64 stays."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def fast_linear(module: nn.Module | None) -> FastLinear | None:
    """The module if it is a fast layer, the fast layer that :func:`leanstep.lora.accelerate_peft` gave it, or None."""
    if isinstance(module, FastLinear):
        return module
    owner = getattr(vars(module).get("forward"), "__self__", None) if isinstance(module, nn.Module) else None
    return owner if isinstance(owner, FastLinear) else None


# --- adapted linear layers --------------------------------------------------------------------------------------------


class LoRALinearLayer(FastLinear, LoRALayer):
    """``y = x W^T + b + scale * dropout(x) A^T B^T``, mixed into a linear layer's class.

    Attributes:
        lora_A: ``nn.Linear(in, r)`` without bias; its weight is A (r, in).
        lora_B: ``nn.Linear(r, out)``; its weight is B (out, r).
        lora_magnitude_vector: (out,) for DoRA, else None. DoRA computes ``y = c * (x W^T + scale * ...) + b`` with
            ``c = magnitude / |rows of W + scale B A|`` and detached norms.
    """

    bias: nn.Parameter | None
    lora: Adapter
    lora_A: nn.Linear
    lora_B: nn.Linear

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        return self.lora_A.weight, self.lora_B.weight

    def operand_tensors(self) -> tuple[nn.Module, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The layer, A, B, B's bias, and DoRA's magnitude."""
        return self, self.lora_A.weight, self.lora_B.weight, self.lora_B.bias, self.lora_magnitude_vector

    def input_width(self) -> int:
        """The number of entries that the layer takes of each input row."""
        return widths(self)[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] to [..., out]."""
        if self.lora.merged or not self.lora.enabled:
            y = super().forward(x, *args, **kwargs)
            if self.lora.merged or start_factors(self) is None:
                return y
            return (y + start_product(self, x)).to(y.dtype)
        return self.run(x, *args, **kwargs)

    def plain(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output in plain torch."""
        dropped = x
        if self.training and self.lora.dropout > 0:
            dropped = seeded_dropout(x, self.lora.dropout, new_seed())
        if self.lora.keep_zeros:
            return self._with_zeros(x, dropped)
        a, b = self.lora_A, self.lora_B
        wide = dropped if torch.is_autocast_enabled(x.device.type) else dropped.to(a.weight.dtype)
        update = b(a(wide)) * self.lora.scale
        base = super().forward(x, *args, **kwargs)
        if not isinstance(base, Tensor):
            raise TypeError(
                f"{self.lora.name}: expected a tensor from {self.lora.base.__name__}.forward to add the adapter to, "
                f"got a {type(base).__name__}; leave the layer out with exclude_modules"
            )
        if self.lora_magnitude_vector is None:
            return (base + update).to(base.dtype)
        if why_custom_forward(self.lora.base) is None:
            lora = self.lora
            setting = Setting(lora.scale, transposed=lora.transposed, dense=dequantizer(self))
            product = nn.functional.linear(dropped, dense_weight(setting, self.weight, dropped.dtype))
        else:
            product = super().forward(dropped, *args, **kwargs)
            product = product if self.bias is None else product - self.bias
        c = dora_factor(self.lora_magnitude_vector, self.norms())
        return (base + (c - 1) * product + c * update).to(base.dtype)

    def _with_zeros(self, x: Tensor, dropped: Tensor) -> Tensor:
        """The output of a layer that keeps the zeros of its weight; ``dropped`` is x after dropout."""
        from leanstep.lora.layers.pruned import masked_linear, masked_update

        weight = self.weight.t() if self.lora.transposed else self.weight
        a, b, scale = self.lora_A.weight, self.lora_B.weight, self.lora.scale
        if dropped is x:
            # like the merged layer, with the same rounding of the weight
            y = masked_linear(x, weight, a, b, self.bias, scale)
        else:
            linear = nn.functional.linear
            y = linear(x, weight, self.bias) + linear(dropped, masked_update(weight, a, b, scale).to(weight.dtype))
        bias = self.lora_B.bias
        return y if bias is None else (y + bias * self.lora.scale).to(y.dtype)


def attach_linear(module: Any, adapter: Adapter, config: Any) -> None:
    """Turn a linear layer into an adapted one, in place, after all checks."""
    (n, m), like = widths(module), factor_type(module.weight)
    module.lora_A = nn.Linear(n, adapter.rank, bias=False, **like)
    module.lora_B = nn.Linear(adapter.rank, m, bias=config.lora_bias, **like)
    if is_pissa(config.init_lora_weights):
        take_principal_part(module, config.init_lora_weights, adapter.scale, adapter.transposed)
    else:
        _initialize(module.lora_A, module.lora_B, config.init_lora_weights)
    module.siblings = None
    mix_in(LoRALinearLayer, module, adapter, config.use_dora)
    module.lora_A.weight.requires_grad_(adapter.save != "lora_fa")
    module.lora_A.train(module.training)
    module.lora_B.train(module.training)


def factor_type(weight: Tensor) -> dict[str, Any]:
    """Device and dtype of the factors. As in PEFT, 16-bit models get fp32 factors, since updates are small."""
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    return {"device": weight.device, "dtype": dtype}


def mix_in(mixin: Any, module: Any, adapter: Adapter, use_dora: bool) -> None:
    """Make a module with factors an adapted layer. DoRA's magnitude starts at the norms."""
    module.lora = adapter
    module.register_parameter("lora_magnitude_vector", None)
    base: Any = type(module)
    adapter.base, module.__class__ = base, mixture(base, mixin)
    if use_dora:
        _, b = module.factors()
        module.lora_magnitude_vector = nn.Parameter(module.norms().to(b.dtype))


@torch.no_grad()
def _initialize(a: nn.Linear, b: nn.Linear, how: bool | str) -> None:
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


def detach(module: Any) -> None:
    """Remove the adapter from a linear layer or an embedding."""
    factors = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    restore_class(module, module.lora.base, (*factors, START_A, START_B, "lora", "siblings"))


def restore_class(module: Any, base: Any, names: Iterable[str]) -> None:
    """Remove the attributes of an adapter from a module, and give it the class that it had before."""
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
    module.__class__ = base
