"""Norms of an attention layer: of queries and keys per head, and of the projections that compute them.

:func:`head_norms` measures norms, sampled logits, and the error of low-rank attention on sampled queries.
:class:`ProjectionNorms` shows which factor makes queries and keys large: the input, the frozen weight, or the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from leanstep._torch import is_conv1d
from leanstep.kernels.op import outside_dispatch_modes
from leanstep.kernels.reference.poly.attention import polynomial
from leanstep.lora.attention.attention import key_means, taylor_coefficients
from leanstep.lora.attention.error_bounds import largest_logit
from leanstep.lora.attention.interface import AttentionInputs
from leanstep.lora.layers.linear import FastLinear, LoRALinearLayer
from leanstep.lora.layers.pruned import masked_update
from leanstep.lora.layers.rule import dora_factor
from leanstep.lora.peft.bridge import PeftLinear

# reason for exact attention in reports
NON_FINITE = "non-finite logits"


class HeadNorms(NamedTuple):
    """Maxima over the sequences for every query head: fp32 [Hq] on the layer's device.

    Attributes:
        gamma_q, gamma_k, certified, sampled: as in :class:`leanstep.lora.HeadReport`.
        errors: [degrees, Hq], the relative error ``|O~ - O| / |O|`` of the output on the sampled queries.
        logit: the largest sampled logit, with its sign and with the keys as they are; -inf if no query sees a key.
    """

    gamma_q: Tensor
    gamma_k: Tensor
    certified: Tensor
    sampled: Tensor
    errors: Tensor
    logit: Tensor


def sample_rows(length: int, rows: int, generator: torch.Generator | None = None) -> Tensor:
    """Ascending indices of up to ``rows`` distinct queries; includes the last, which sees the most keys if causal."""
    if rows >= length:
        return torch.arange(length)
    others = torch.randperm(length - 1, generator=generator)[: rows - 1]
    return torch.cat([others, torch.tensor([length - 1])]).sort().values


def head_norms(
    inputs: AttentionInputs,
    *,
    degrees: Sequence[int] = (2,),
    rows: int = 256,
    center: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> HeadNorms:
    """Measure the heads of a layer in ``O(L d)``: one pass over q and k, and sampled queries against all keys.

    Args:
        inputs: the layer's inputs.
        degrees: degrees of Taylor's sum to measure the error of.
        rows: number of sampled queries.
        center: vector subtracted from the keys, [H, d] or [B, H, d]; None: their mean.
        generator: random generator of the sample.
    """
    with torch.no_grad(), torch.autocast(inputs.query.device.type, enabled=False):
        q, k = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (inputs.query, inputs.key))
        shift = key_means(k, inputs.key_mask) if center is None else center.to(k.dtype)
        group = q.shape[1] // k.shape[1]
        unmasked = k if inputs.key_mask is None else torch.where(inputs.key_mask[:, None, :, None], k, 0.0)
        root = abs(inputs.scale) ** 0.5
        gamma_q = root * q.abs().amax(dim=(0, 2, 3))
        gamma_k = root * unmasked.abs().amax(dim=(0, 2, 3)).repeat_interleave(group)
        certified = largest_logit(q, k - shift[..., None, :], inputs.scale, inputs.key_mask).amax(dim=0)
        indices = sample_rows(q.shape[2], rows, generator).to(q.device)
        sampled, errors, largest = [], [], []
        for head in range(k.shape[1]):
            sample = _Sample.of(inputs, head, indices)
            logits = inputs.scale * sample.query @ (sample.key - shift[..., head, None, None, :]).mT
            largest.append(sample.largest)
            sampled.append(torch.where(sample.visible, logits.abs(), 0.0).amax(dim=(0, 2, 3)))
            polynomials = (polynomial(logits, taylor_coefficients(degree)) for degree in degrees)
            errors.append(torch.stack([_error(torch.where(sample.visible, p, 0.0), sample) for p in polynomials]))
        return HeadNorms(gamma_q, gamma_k, certified, torch.cat(sampled), torch.cat(errors, dim=-1), torch.cat(largest))


class _Sample(NamedTuple):
    """Sampled queries of one key head in fp32 or fp64, for a group of g query heads.

    Attributes:
        query, key, value: [B, g, rows, d], [B, 1, M, d], [B, 1, M, e].
        visible: mask of the keys that the queries see, [1 or B, 1, rows, M].
        exact: exact attention, [B, g, rows, e]; zero for queries that see no key.
        largest: largest logit of every query head, [g].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    exact: Tensor
    largest: Tensor

    @classmethod
    def of(cls, inputs: AttentionInputs, head: int, indices: Tensor) -> _Sample:
        """The queries at ``indices`` of one key head."""
        group, wide = (
            inputs.query.shape[1] // inputs.key.shape[1],
            torch.promote_types(inputs.query.dtype, torch.float32),
        )
        query = inputs.query.detach()[:, head * group : (head + 1) * group, indices].to(wide)
        key, value = (x.detach()[:, head, None].to(wide) for x in (inputs.key, inputs.value))
        visible = _visible(inputs, indices)
        logits = (inputs.scale * query @ key.mT).masked_fill(~visible, -torch.inf)
        weights = torch.softmax(logits, dim=-1)
        exact = torch.where(visible.any(dim=-1, keepdim=True), weights, 0.0) @ value
        return cls(query, key, value, visible, exact, logits.amax(dim=(0, 2, 3)))


def _visible(inputs: AttentionInputs, indices: Tensor) -> Tensor:
    """Mask of the keys visible to the queries at ``indices``: [1 or B, 1, rows, M]."""
    keys = torch.arange(inputs.key.shape[2], device=indices.device)
    all_keys = torch.ones(len(indices), len(keys), dtype=torch.bool, device=indices.device)
    visible = (keys <= indices[:, None]) if inputs.causal else all_keys
    return visible[None, None] if inputs.key_mask is None else visible & inputs.key_mask[:, None, None, :]


def _error(weights: Tensor, sample: _Sample) -> Tensor:
    """Relative error [g] of a sample's output with these weights; inf if a normaliser is not positive."""
    total = weights.sum(dim=-1, keepdim=True)
    out = weights @ sample.value / torch.where(total > 0, total, 1.0)
    empty = (weights == 0).all(dim=-1, keepdim=True)
    wrong = ~(((total > 0) & total.isfinite()) | empty)
    return torch.where(wrong.any(dim=-1).any(dim=-1).any(dim=0), torch.inf, _relative_difference(out, sample.exact))


def _relative_difference(out: Tensor, exact: Tensor) -> Tensor:
    """``|out - exact| / |exact|`` of every head, inf if not finite: [B, group, rows, e] to [group]."""
    difference = (out - exact).square().sum(dim=(0, 2, 3)).sqrt()
    size = exact.square().sum(dim=(0, 2, 3)).sqrt().clamp(min=torch.finfo(exact.dtype).tiny)
    return torch.where((difference / size).isfinite(), difference / size, torch.inf)


def sampled_error(inputs: AttentionInputs, out: Tensor, indices: Tensor) -> Tensor:
    """Relative error [Hq] of an output [B, Hq, L, e] on the queries at ``indices``; inf if it is not finite."""
    with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
        group, errors = inputs.query.shape[1] // inputs.key.shape[1], []
        for head in range(inputs.key.shape[1]):
            exact = _Sample.of(inputs, head, indices).exact
            rows = out.detach()[:, head * group : (head + 1) * group, indices].to(exact.dtype)
            errors.append(_relative_difference(rows, exact))
        return torch.cat(errors)


# --- projections ------------------------------------------------------------------------------------------------------


def find_projections(layer: Any) -> dict[str, tuple[nn.Module, int]]:
    """Map "q" and "k" to the layer that computes it and the index of its slice of the output (k is 1 in c_attn)."""
    if hasattr(layer, "q_proj") and hasattr(layer, "k_proj"):
        return {"q": (layer.q_proj, 0), "k": (layer.k_proj, 0)}
    if hasattr(layer, "c_attn"):
        return {"q": (layer.c_attn, 0), "k": (layer.c_attn, 1)}
    return {}


def adapter_output(module: nn.Module, x: Tensor) -> Tensor | None:
    """``scale * x A^T B^T`` of a layer's active adapters, ours or PEFT's; DoRA multiplies it by ``magnitude / norm``.

    Returns None without an active adapter. Costs O(L r (n + m)), and O(n m r) for DoRA's norms.
    """
    masked = _masked_adapter(module)
    if masked is not None:
        return x.float() @ masked.mT
    total: Any = None
    for a, b, scale, factor in _active_adapters(module):
        added = scale * (x.to(a.dtype) @ a.mT) @ b.mT
        total = added if total is None else total + added
        total = total if factor is None else total * factor.to(total.dtype)
    return total


def whole_weight(module: nn.Module) -> Tensor | None:
    """The (out, in) weight of a projection including its adapters, in fp32; None for a quantised weight."""
    base = getattr(module, "base_layer", module)
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        return None
    dense = (weight.detach().mT if is_conv1d(base) else weight.detach()).float()
    masked = _masked_adapter(module)
    if masked is not None:
        return dense + masked
    for a, b, scale, factor in _active_adapters(module):
        dense = dense + scale * b.detach().float() @ a.detach().float()
        dense = dense if factor is None else dense * factor.float()[:, None]
    return dense


def _active_adapters(module: Any) -> Iterator[tuple[Tensor, Tensor, float, Tensor | None]]:
    """A, B, scale and DoRA's factor of each active adapter, ours or PEFT's; the next one adds to the scaled result."""
    layers: list[FastLinear] = []
    if isinstance(module, LoRALinearLayer):
        layers = [module] if module.lora.enabled and not module.lora.merged else []
    elif hasattr(module, "active_adapters") and not module.disable_adapters and not module.merged:
        layers = [PeftLinear(module, adapter=name) for name in module.active_adapters if name in module.lora_A]
    for layer in layers:
        _, a, b, _, magnitude = layer.operand_tensors()
        yield a, b, layer.lora.scale, None if magnitude is None else dora_factor(magnitude.detach(), layer.norms())


def _masked_adapter(module: Any) -> Tensor | None:
    """The fp32 adapter (out, in) of a layer that keeps the zeros of its base; None for any other layer."""
    lora = getattr(module, "lora", None)
    if lora is None or not lora.keep_zeros or not lora.enabled or lora.merged:
        return None
    weight = module.weight.detach()
    weight = weight.mT if lora.transposed else weight
    return masked_update(weight, module.lora_A.weight, module.lora_B.weight, lora.scale).detach().float()


class ProjectionNorms:
    """Hooks on the projections of one attention layer that measure norms while ``on`` is set.

    Attributes:
        largest: for "q" and "k", a dict of ``input``, the largest entry of X, and of ``base`` and ``adapter`` [heads],
            the largest entries of X W* and of scale * X A^T B^T before rotary embeddings. DoRA multiplies both by
            ``magnitude / norm``.
        full: [heads], the theorem's third norm, needed if K is adapted too: the largest entry of ``X W_Q W_K``, on 64
            to 127 tokens of each longer sequence; None if the weight of K cannot be read.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.on = layer, False
        self.largest: dict[str, dict[str, Tensor]] = {}
        self.full: Tensor | None = None
        self._outputs: dict[nn.Module, list[tuple[str, int]]] = {}
        for name, (module, index) in find_projections(layer).items():
            self._outputs.setdefault(module, []).append((name, index))
        self._handles = [module.register_forward_hook(self._hook) for module in self._outputs]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    @_disable_dynamo
    def _hook(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not self.on or not inputs or not isinstance(output, Tensor):
            return
        # recomputation by activation checkpointing does not measure
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            outside_dispatch_modes(lambda: self._measure(module, inputs[0].detach(), output.detach()))

    def _measure(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        added = adapter_output(module, x)
        base = output if added is None else output - added.to(output.dtype)
        for name, index in self._outputs[module]:
            entries = {"input": x.abs().amax().float(), "base": self._largest_per_head(base, index)}
            entries["adapter"] = (
                torch.zeros_like(entries["base"]) if added is None else self._largest_per_head(added, index)
            )
            self.largest[name] = entries
            if name == "q":
                self.full = self._through_keys(self._slice(output, index))

    def _largest_per_head(self, y: Tensor, index: int) -> Tensor:
        """Largest absolute entry of every head: [heads]."""
        heads = self._slice(y, index).unflatten(-1, (-1, self.layer.head_dim))
        return heads.abs().flatten(0, -3).amax(dim=(0, 2)).float()

    def _slice(self, y: Tensor, index: int) -> Tensor:
        layer: Any = self.layer
        return y[..., index * layer.embed_dim : (index + 1) * layer.embed_dim] if hasattr(layer, "c_attn") else y

    def _through_keys(self, q: Tensor) -> Tensor | None:
        """Largest entry of ``q W_K`` of every head, [heads], for queries [.., L, heads * d]."""
        module, index = find_projections(self.layer)["k"]
        weight = whole_weight(module)
        if weight is None:
            return None
        dim: Any = self.layer.head_dim
        keys = self._slice(weight.mT, index).mT.unflatten(0, (-1, dim))
        rows = q[..., :: max(1, q.shape[-2] // 64), :].unflatten(-1, (-1, dim)).float().flatten(0, -3)
        group = rows.shape[1] // keys.shape[0]
        return torch.stack([(rows[:, h] @ keys[h // group]).abs().amax() for h in range(rows.shape[1])])
