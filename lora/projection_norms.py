"""Which factor makes queries and keys large: the layer's input, the frozen weight, or the adapter on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

__all__ = ["ProjectionNorms", "adapter_output", "find_projections"]


def find_projections(layer: Any) -> dict[str, tuple[nn.Module, int]]:
    """The layers that make "q" and "k" and the part of their output that does: part 1 of a fused ``c_attn`` is k."""
    if hasattr(layer, "q_proj") and hasattr(layer, "k_proj"):
        return {"q": (layer.q_proj, 0), "k": (layer.k_proj, 0)}
    if hasattr(layer, "c_attn"):
        return {"q": (layer.c_attn, 0), "k": (layer.c_attn, 1)}
    return {}


def adapter_output(module: nn.Module, x: Tensor) -> Tensor | None:
    """``scale * x A^T B^T`` of a layer's active adapters, ours or PEFT's; None where it has none. O(L r (n + m))."""
    a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    if a is None or b is None:
        return None
    own: Any = getattr(module, "lora", None)
    if own is not None:
        return None if own.merged or not own.enabled else _product(x, a.weight, b.weight, own.scale)
    peft: Any = module
    if getattr(peft, "disable_adapters", False) or getattr(peft, "merged", False):
        return None
    active = [name for name in getattr(peft, "active_adapters", []) if name in a]
    parts = [_product(x, a[name].weight, b[name].weight, peft.scaling[name]) for name in active]
    return torch.stack(parts).sum(dim=0) if parts else None


def _product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return scale * (x.to(a.dtype) @ a.mT) @ b.mT


def whole_weight(module: nn.Module) -> Tensor | None:
    """The (out, in) weight of a projection with its adapters, without DoRA's scale; None for a quantised one."""
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        return None
    # transformers' Conv1D has nf outputs and stores its weight the other way round
    base = weight.detach().mT if hasattr(getattr(module, "base_layer", module), "nf") else weight.detach()
    added = adapter_output(module, torch.eye(base.shape[1], device=base.device))
    return base.float() if added is None else base.float() + added.detach().float().mT


class ProjectionNorms:
    """Hooks on the projections of one attention layer, which take norms of the passes they are told to.

    ``found`` holds for "q" and "k": ``input``, the largest entry of X; ``base`` and ``adapter`` [heads], the largest
    entries of X W* and of scale * X A^T B^T a head, before rotary embeddings. ``full`` [heads] is the norm that the
    theorem
    asks for besides where K is adapted too: the largest entry of ``X W_Q W_K``, of up to 64 tokens a sequence.
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
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            x = inputs[0].detach()
            added = adapter_output(module, x)
            base = output.detach() if added is None else output.detach() - added.to(output.dtype)
            for name, part in self.parts[module]:
                largest = {"input": x.abs().amax().float(), "base": self._heads(base, part)}
                largest["adapter"] = torch.zeros_like(largest["base"]) if added is None else self._heads(added, part)
                self.found[name] = largest
                if name == "q":
                    self.full = self._through_keys(self._part(output.detach(), part))

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
