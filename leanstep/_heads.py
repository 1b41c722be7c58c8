"""Which rows of attention weights belong to which head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leanstep._torch import is_conv1d

# separate projections of queries, keys and values, by the names of attributes
_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
# classes with one weight for all three: all queries, then all keys, then all values
_FUSED = {
    "MultiheadAttention": "in_proj",
    "Phi3Attention": "qkv_proj",
    "Phi4MultimodalAttention": "qkv_proj",
    "MptAttention": "Wqkv",
    "DbrxAttention": "Wqkv",
    "ModernBertAttention": "Wqkv",
}
# the same, with query, key and value of one head after another
_FUSED_BY_HEAD = ("GPTNeoXAttention", "GPTNeoXJapaneseAttention", "BloomAttention", "PersimmonAttention")


class Projection(NamedTuple):
    """The rows of a weight (out, in) that compute the queries, keys or values of all heads.

    Head h has the ``head_dim`` rows from ``start + h * stride``.
    """

    module: nn.Module  # has the weight and the bias
    weight: str  # name of the weight, such as "weight"
    bias: str
    start: int
    heads: int
    head_dim: int
    stride: int

    @property
    def apart(self) -> bool:
        """Whether rows of something else lie between the heads."""
        return self.stride != self.head_dim


def attention_projections(layer: nn.Module) -> dict[str, Projection]:
    """Map "q", "k" and, where it is known, "v" to the rows that compute them; {} for a layer of unknown layout.

    Knows separate projections by the names of LLaMA, BERT, DistilBERT and T5, with any number of key heads; torch's
    ``MultiheadAttention``; and the fused weights of GPT-2 (``c_attn``), Phi-3, MPT, DBRX, ModernBERT, GPT-NeoX, BLOOM
    and Persimmon. The sizes come from the layer, or from its ``config``. A layer whose weights have another number of
    rows than the sizes say, such as queries fused with a gate, is unknown.
    """
    heads = _size(layer, "num_attention_heads", "num_heads", "n_heads", "n_head")
    if heads is None:
        return {}
    key_heads = _size(layer, "num_key_value_heads", "num_kv_heads") or heads
    dim = _size(layer, "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    for names in _SEPARATE:
        q, k, v = (_linear(layer, name) for name in names)
        if q is None or k is None:
            continue
        dim = dim or _rows(q) // heads
        parts = {"q": (q, heads), "k": (k, key_heads)} | ({} if v is None else {"v": (v, key_heads)})
        if any(_rows(module) != count * dim for module, count in parts.values()):
            return {}
        return {
            name: Projection(module, "weight", "bias", 0, count, dim, dim) for name, (module, count) in parts.items()
        }
    return _fused_projections(layer, heads, key_heads, dim)


def _fused_projections(layer: nn.Module, heads: int, key_heads: int, dim: int | None) -> dict[str, Projection]:
    """:func:`attention_projections` of a layer with one weight for queries, keys and values."""
    by_head = _class_in(layer, _FUSED_BY_HEAD)
    attribute = "query_key_value" if by_head else next((a for c, a in _FUSED.items() if _class_in(layer, (c,))), "")
    if not attribute and is_conv1d(getattr(layer, "c_attn", nn.Identity())):
        attribute = "c_attn"
    in_proj = attribute == "in_proj"
    module = layer if in_proj else _linear(layer, attribute)
    weight = getattr(module, "in_proj_weight", None) if in_proj else None
    if module is None or (in_proj and weight is None):
        return {}
    rows = _rows(module) if weight is None else weight.shape[0]
    dim = dim or rows // (heads + 2 * key_heads)
    if rows != (heads + 2 * key_heads) * dim or (by_head and heads != key_heads):
        return {}
    names = ("in_proj_weight", "in_proj_bias") if in_proj else ("weight", "bias")
    starts, stride = (0, heads * dim, (heads + key_heads) * dim), dim
    if by_head:
        starts, stride = (0, dim, 2 * dim), 3 * dim
    return {
        name: Projection(module, *names, start, count, dim, stride)
        for name, start, count in zip("qkv", starts, (heads, key_heads, key_heads), strict=True)
    }


def _size(layer: nn.Module, *names: str) -> int | None:
    """Return the first of these sizes that a layer has, or its config."""
    for owner in (layer, getattr(layer, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _class_in(layer: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a layer's class, or one that it derives from, has one of these names."""
    return any(cls.__name__ in names for cls in type(layer).__mro__)


def _linear(layer: nn.Module, name: str) -> Any:
    """Return the linear layer at an attribute, without the wrapper of an adapter; None if there is none."""
    module = getattr(layer, name, None) if name else None
    module = getattr(module, "base_layer", module)
    weight = getattr(module, "weight", None)
    return module if isinstance(module, nn.Module) and isinstance(weight, Tensor) and weight.dim() == 2 else None


def _rows(module: Any) -> int:
    """Return the number of outputs of a linear layer."""
    return module.weight.shape[1 if is_conv1d(module) else 0]


def attention_blocks(layer: nn.Module, *, heads: bool) -> dict[tuple[nn.Module, str], int | tuple[int, ...]]:
    """Map (module, name of the weight) to the blocks of rows of an attention layer that are matrices of their own.

    Args:
        layer: any module; one that is no attention layer, or of unknown layout, has no blocks.
        heads: split Q and K into heads, too. V stays one matrix, unless the weight has query, key and value of one head
            after another: then each of the three is a block in every head.

    Returns:
        The rows of every block, one number if all have the same. Weights that are one matrix are left out.
    """
    by_weight: dict[tuple[nn.Module, str], list[tuple[str, Projection]]] = {}
    for name, projection in attention_projections(layer).items():
        by_weight.setdefault((projection.module, projection.weight), []).append((name, projection))
    blocks: dict[tuple[nn.Module, str], int | tuple[int, ...]] = {}
    for key, parts in by_weight.items():
        sizes: list[int] = []
        for name, p in parts:
            sizes += [p.head_dim] * p.heads if heads and (name != "v" or p.apart) else [p.head_dim * p.heads]
        if len(sizes) > 1 and (heads or not parts[0][1].apart):
            blocks[key] = sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
    return blocks


def factors_of_rows(projection: Projection, factors: Tensor, rows: int) -> Tensor:
    """Return one factor per row of a weight with ``rows`` rows: that of the row's head, and 1 for all other rows."""
    per_row = torch.ones(rows, dtype=factors.dtype, device=factors.device)
    for head, factor in enumerate(factors):
        first = projection.start + head * projection.stride
        per_row[first : first + projection.head_dim] = factor
    return per_row
