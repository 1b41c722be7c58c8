"""Which factor makes queries and keys large: the layer's input, the frozen weight, or the adapter on it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from leanstep.kernels._modes import unseen
from leanstep.lora.layers.autograd import Setting, Weights, dora_factor, matrix
from leanstep.lora.layers.dora import row_norms
from leanstep.lora.layers.frozen import dequantizer
from leanstep.lora.layers.linear import is_conv1d
from leanstep.lora.layers.pruned import masked_update

__all__ = ["ProjectionNorms", "adapter_output", "find_projections", "whole_weight"]


def find_projections(layer: Any) -> dict[str, tuple[nn.Module, int]]:
    """The layers that make "q" and "k" and the part of their output that does: part 1 of a fused ``c_attn`` is k."""
    if hasattr(layer, "q_proj") and hasattr(layer, "k_proj"):
        return {"q": (layer.q_proj, 0), "k": (layer.k_proj, 0)}
    if hasattr(layer, "c_attn"):
        return {"q": (layer.c_attn, 0), "k": (layer.c_attn, 1)}
    return {}


class _Active(NamedTuple):
    """An adapter that takes part: ``factor * (W + scale B A)``, where factor [out] is DoRA's, None without it.

    With several of PEFT's, W has the earlier ones in it.
    """

    a: Tensor
    b: Tensor
    scale: float
    factor: Tensor | None = None


def adapter_output(module: nn.Module, x: Tensor) -> Tensor | None:
    """``scale * x A^T B^T`` of a layer's active adapters, ours or PEFT's, with DoRA times ``magnitude / norm``; None
    where it has none. O(L r (n + m)), and for DoRA its norms, O(n m r).
    """
    if _keeps_zeros(module):
        return x.float() @ _masked(module).mT
    total: Any = None
    for a, b, scale, factor in _active(module):
        part = scale * (x.to(a.dtype) @ a.mT) @ b.mT
        total = part if total is None else total + part
        total = total if factor is None else total * factor.to(total.dtype)
    return total


def whole_weight(module: nn.Module) -> Tensor | None:
    """The (out, in) weight that a projection with its adapters stands for, in fp32; None for a quantised one."""
    base = getattr(module, "base_layer", module)
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        return None
    dense = (weight.detach().mT if is_conv1d(base) else weight.detach()).float()
    if _keeps_zeros(module):
        return dense + _masked(module)
    for a, b, scale, factor in _active(module):
        dense = dense + scale * b.detach().float() @ a.detach().float()
        dense = dense if factor is None else dense * factor.float()[:, None]
    return dense


def _active(module: Any) -> list[_Active]:
    """A layer's adapters that take part: our one, or PEFT's active ones."""
    a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    if a is None or b is None:
        return []
    own = getattr(module, "lora", None)
    if own is not None:
        if own.merged or not own.enabled:
            return []
        magnitude = module.lora_magnitude_vector
        factor = None if magnitude is None else _factor(module, a.weight, b.weight, magnitude, module.norms())
        return [_Active(a.weight, b.weight, own.scale, factor)]
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return []
    return [_of_peft(module, name) for name in getattr(module, "active_adapters", []) if name in a]


def _of_peft(module: Any, name: str) -> _Active:
    a, b, scale = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    variant = getattr(module, "lora_variant", {}).get(name)
    if type(variant).__name__ != "DoraLinearVariant":
        return _Active(a, b, scale)
    base = module.get_base_layer()
    setting = Setting(scale, transposed=is_conv1d(base), dense=dequantizer(base))
    dense = matrix(setting, Weights(base.weight.detach(), None, a, b), torch.float32)
    norm = row_norms(dense, a.detach(), b.detach(), scale)
    return _Active(a, b, scale, _factor(base, a, b, module.lora_magnitude_vector[name].weight, norm))


def _factor(base: Any, a: Tensor, b: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    return dora_factor(Weights(base.weight, None, a, b, None, magnitude.detach(), norm))


def _keeps_zeros(module: Any) -> bool:
    own = getattr(module, "lora", None)
    return own is not None and own.keep_zeros and own.enabled and not own.merged


def _masked(module: Any) -> Tensor:
    """The adapter (out, in) of a layer that keeps the zeros of its base, in fp32."""
    weight = module.weight.detach()
    update = masked_update(
        weight.mT if module.lora.transposed else weight, module.lora_A.weight, module.lora_B.weight, module.lora.scale
    )
    return update.detach().float()


class ProjectionNorms:
    """Hooks on the projections of one attention layer, which take norms of the passes they are told to.

    ``found`` holds for "q" and "k": ``input``, the largest entry of X; ``base`` and ``adapter`` [heads], the largest
    entries of X W* and of scale * X A^T B^T a head, with DoRA both times ``magnitude / norm``, before rotary
    embeddings. ``full`` [heads] is the norm that the theorem asks for besides where K is adapted too: the largest entry
    of ``X W_Q W_K``, of up to 64 tokens a sequence.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.found, self.on = layer, {}, False  # type: ignore[var-annotated]
        self.full: Tensor | None = None
        self.parts: dict[nn.Module, list[tuple[str, int]]] = {}
        for name, (module, part) in find_projections(layer).items():
            self.parts.setdefault(module, []).append((name, part))
        self.handles = [module.register_forward_hook(self._see) for module in self.parts]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    @_disable_dynamo
    def _see(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not self.on or not inputs or not isinstance(output, Tensor):
            return
        # a pass that is repeated does not measure
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            unseen(lambda: self._measure(module, inputs[0].detach(), output.detach()))

    def _measure(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        added = adapter_output(module, x)
        base = output if added is None else output - added.to(output.dtype)
        for name, part in self.parts[module]:
            largest = {"input": x.abs().amax().float(), "base": self._heads(base, part)}
            largest["adapter"] = torch.zeros_like(largest["base"]) if added is None else self._heads(added, part)
            self.found[name] = largest
            if name == "q":
                self.full = self._through_keys(self._part(output, part))

    def _heads(self, y: Tensor, part: int) -> Tensor:
        """Largest absolute entry of every head: [heads]."""
        heads = self._part(y, part).unflatten(-1, (-1, self.layer.head_dim))
        return heads.abs().flatten(0, -3).amax(dim=(0, 2)).float()

    def _part(self, y: Tensor, part: int) -> Tensor:
        layer: Any = self.layer
        return y[..., part * layer.embed_dim : (part + 1) * layer.embed_dim] if hasattr(layer, "c_attn") else y

    def _through_keys(self, q: Tensor) -> Tensor | None:
        """Largest entry of ``q W_K`` of every head, [heads], for queries [.., L, heads * d]."""
        module, part = find_projections(self.layer)["k"]
        weight = whole_weight(module)
        if weight is None:
            return None
        dim: Any = self.layer.head_dim
        keys = self._part(weight.mT, part).mT.unflatten(0, (-1, dim))
        rows = q[..., :: max(1, q.shape[-2] // 64), :].unflatten(-1, (-1, dim)).float().flatten(0, -3)
        group = rows.shape[1] // keys.shape[0]
        return torch.stack([(rows[:, h] @ keys[h // group]).abs().amax() for h in range(rows.shape[1])])
