"""Runs an existing PEFT model on the fast path without changing its modules, names or state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leanstep._torch import is_conv1d
from leanstep.lora.config import SAVES
from leanstep.lora.layers.block import (
    fused_swiglu,
    join_siblings,
    swiglu_blocks,
    swiglu_fast_path,
    swiglu_layers,
    why_not_fused,
)
from leanstep.lora.layers.dora import NormCache
from leanstep.lora.layers.frozen import is_watched, widths
from leanstep.lora.layers.linear import Adapter, FastLinear, FastPath, LoRALayer, fast_linear

_LAYERS = {"peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit", "peft.tuners.lora.bnb.Linear8bitLt"}
# submodules of a layer that PEFT calls and the fast path skips
_INNER = ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector")


class Acceleration:
    """The handle that :func:`accelerate_peft` returns: reports the fast layers and undoes the acceleration."""

    def __init__(self, layers: dict[str, nn.Module], blocks: dict[str, nn.Module]) -> None:
        self._layers, self._blocks = layers, blocks

    def fast_path(self) -> dict[str, FastPath]:
        """For each layer and block by name: whether its next pass runs on the fast path, and why (not)."""
        fast = {name: fast_linear(module) for name, module in self._layers.items()}
        layers = {name: layer.fast_path for name, layer in fast.items() if layer is not None}
        return layers | {name: swiglu_fast_path(block) for name, block in self._blocks.items() if _is_ours(block)}

    def undo(self) -> None:
        """Restore the original forward of every module. A second call does nothing."""
        for module in (*self._blocks.values(), *self._layers.values()):
            _restore_forward(module)
        self._layers, self._blocks = {}, {}


def accelerate_peft(
    model: nn.Module, *, save: str = "min", fast_path: bool | None = None, fused_blocks: bool = True
) -> Acceleration:
    """Run the LoRA layers of a PEFT model on the fast path.

    Modules, names, parameters, hooks and ``state_dict`` stay as they are. The layers get a ``forward`` that checks at
    every call whether the fast path can run, and otherwise calls PEFT's forward.

    Args:
        model: a PEFT model, or any model with ``peft.tuners.lora`` layers; changed in place.
        save, fast_path, fused_blocks: as in :class:`leanstep.lora.LoraConfig`, without ``save="lora_fa"``: PEFT decides
            what is trained. Where ``lora_A`` is frozen, ``save="min"`` saves only the products with A, too.

    Returns:
        The :class:`Acceleration`, with ``fast_path()`` and ``undo()``.

    Raises:
        ValueError: for unknown values, a model without linear LoRA layers of PEFT, a layer with a custom forward,
            or, with ``fast_path=True``, a layer that cannot run on the fast path. The model is unchanged.

    Notes:
        An accelerated model, or a deepcopy of one, gets the new settings; any of its handles undoes the acceleration.
        After PEFT's ``merge_and_unload`` or ``unload``, ``undo()`` or the next pass restores a block's forward.
        Outputs equal PEFT's up to rounding: in 16 bits, products r wide use the base's dtype, where PEFT uses fp32.
        Dropout drops other entries than ``torch.nn.Dropout``, with the same probability.
    """
    if save not in SAVES:
        raise ValueError(f"accelerate_peft: save must be one of {', '.join(map(repr, SAVES))}, got {save!r}")
    if save == "lora_fa":
        raise ValueError(
            "accelerate_peft: save='lora_fa' freezes A, and PEFT decides what its model trains; freeze the weights of "
            "lora_A by requires_grad_(False) and take save='min', which then saves the same"
        )
    layers = {
        name: PeftLinear(module, name, save, fast_path)
        for name, module in model.named_modules()
        if f"{type(module).__module__}.{type(module).__qualname__}" in _LAYERS
    }
    if not layers:
        raise ValueError(f"accelerate_peft: {_why_none(model)}")
    custom = [name for name, layer in layers.items() if "forward" in vars(layer.module) and not _is_ours(layer.module)]
    if custom:
        raise ValueError(f"accelerate_peft: {custom[0]} has a custom forward already; remove that first")
    reasons = {name: layer.why_not_fast() for name, layer in layers.items()}
    if fast_path and any(reasons.values()):
        name, reason = next((name, reason) for name, reason in reasons.items() if reason)
        raise ValueError(f"accelerate_peft: fast_path=True was asked for, but {name} cannot: {reason}")
    for module in model.modules():
        _restore_forward(module)
    for layer in layers.values():
        layer.module.forward = layer.forward
    blocks = {}
    if fused_blocks:
        join_siblings(model)
        blocks = {name: block for name, block in swiglu_blocks(model).items() if "forward" not in vars(block)}
    for block in blocks.values():
        block.forward = _Block(block).forward
    return Acceleration({name: layer.module for name, layer in layers.items()}, blocks)


class PeftLinear(FastLinear):
    """One of PEFT's LoRA layers. Reads it at every call, so PEFT can still add, switch and merge adapters.

    ``adapter`` is the name of the adapter to read; None: the first active one.
    """

    def __init__(
        self, module: Any, name: str = "", save: str = "min", requested: bool | None = None, adapter: str | None = None
    ) -> None:
        self.module, self.name, self.save, self.requested, self.adapter = module, name, save, requested, adapter
        self.siblings = None
        self.norm_cache = NormCache()

    def _active(self) -> list[str]:
        return [name for name in self.module.active_adapters if name in self.module.lora_A]

    @property
    def lora(self) -> Adapter:  # type: ignore[override]
        """The settings of the active adapter."""
        module, name = self.module, self.adapter or self._active()[0]
        dropout = module.lora_dropout[name]
        return Adapter(
            name=self.name,
            rank=module.r[name],
            scale=module.scaling[name],
            dropout=dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
            save=self.save,
            fast_path=self.requested,
            transposed=is_conv1d(module.get_base_layer()),
            base=type(module.get_base_layer()),
            merged=bool(module.merged),
            enabled=not module.disable_adapters,
            norms=self.norm_cache,
        )

    def operand_tensors(self) -> tuple[nn.Module, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The base layer, A, B, B's bias, and DoRA's magnitude."""
        module, name = self.module, self.adapter or self._active()[0]
        a, b = module.lora_A[name], module.lora_B[name]
        magnitude = module.lora_magnitude_vector[name].weight if name in module.lora_magnitude_vector else None
        return module.get_base_layer(), a.weight, b.weight, b.bias, magnitude

    def input_width(self) -> int:
        """The number of entries that the layer takes of each input row."""
        return widths(self.module.get_base_layer())[0]

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Whether dropout is on."""
        return self.module.training

    def why_not_fast(self, x: Tensor | None = None) -> str | None:
        """The reason why the layer cannot run on the fast path (on ``x``, if given); None if it can."""
        module = self.module
        active = self._active()
        if len(active) != 1:
            return f"{len(active)} adapters are active, the fast path takes one"
        variant = module.lora_variant.get(active[0])
        if variant is not None and type(variant).__name__ != "DoraLinearVariant":
            return f"the adapter is a {type(variant).__name__}, which the fast path does not support"
        dropout, base = module.lora_dropout[active[0]], module.get_base_layer()
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"its dropout is a {type(dropout).__name__}"
        if any(type(factor[active[0]]) is not nn.Linear for factor in (module.lora_A, module.lora_B)):
            return "its factors are not plain linear layers"
        if is_watched(base):
            return "the base layer has hooks or a custom forward, which the fast path would skip"
        for name in _INNER:
            # runs at every call, and nn.Module's own look-up is slower than _modules
            inner = module._modules[name]._modules.get(active[0])
            if inner is not None and is_watched(inner):
                return f"{name}.{active[0]} has hooks"
        return super().why_not_fast(x)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward given to the module."""
        if args or kwargs or self.module.merged or self.module.disable_adapters or not self._active():
            return self.plain(x, *args, **kwargs)
        return self.run(x)

    def plain(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward."""
        return type(self.module).forward(self.module, x, *args, **kwargs)


class _Block:
    """A SwiGLU block of PEFT layers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward given to the block."""
        if not swiglu_layers(self.module) and not torch.compiler.is_compiling():
            # PEFT has unloaded its layers without removing this forward
            _restore_forward(self.module)
        if args or kwargs or why_not_fused(self.module, x) is not None:
            return type(self.module).forward(self.module, x, *args, **kwargs)
        return fused_swiglu(self.module, x)


def _why_none(model: nn.Module) -> str:
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        return "the model is adapted by apply_lora, and on the fast path already"
    layers = (m for m in model.modules() if type(m).__module__.startswith("peft.") and hasattr(m, "lora_A"))
    kinds = sorted({type(module).__name__ for module in layers})
    if kinds:
        return f"the model has no linear LoRA layer of PEFT, only {', '.join(kinds)}, which keep PEFT's forward"
    return "the model has no LoRA layer of PEFT; for a plain model, use apply_lora"


def _is_ours(module: nn.Module) -> bool:
    """Whether :func:`accelerate_peft` set the module's forward."""
    owner = getattr(vars(module).get("forward"), "__self__", None)
    return isinstance(owner, (PeftLinear, _Block))


def _restore_forward(module: nn.Module) -> None:
    if _is_ours(module):
        del module.forward
