"""Checks of the gate: which attention calls can be low-rank at all, and which are close enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from leanstep.lora.attention.features import relative_error, softmax_error
from leanstep.lora.attention.interface import Call
from leanstep.lora.attention.norms import Seen

__all__ = ["NON_FINITE", "all_finite", "autocasted_seen", "distance", "exact_attention", "verdict", "why_impossible"]

NON_FINITE = "non-finite logits"


def why_impossible(call: Call) -> str | None:
    """Why a call cannot run low-rank, whatever its norms."""
    query, key, value = call.seen[:3]
    if call.masked is not None:
        return call.masked
    if call.special:
        return f"the layer has {', '.join(call.special)}"
    if call.dropout > 0:
        return f"dropout of {call.dropout:g} on attention weights, which are not formed"
    if query.shape[2] != key.shape[2]:
        return f"{query.shape[2]} queries against a cache of {key.shape[2]} keys"
    if not query.dtype == key.dtype == value.dtype:
        return f"dtypes differ: {query.dtype}, {key.dtype} and {value.dtype}"
    return None


def autocasted_seen(seen: Seen) -> Seen:
    """What exact attention computes with: under autocast, torch casts q, k and v to its dtype, save fp64."""
    device = seen.query.device.type
    if not torch.is_autocast_enabled(device):
        return seen
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in seen[:3])
    return seen._replace(query=q, key=k, value=v)


def verdict(
    certified: float, sampled: float, error: float, coefficients: Sequence[float], tolerance: float
) -> tuple[bool, str]:
    """Whether a layer is close enough, and why (not).

    Args:
        certified, sampled: the bound of all logits, and the largest of the sampled ones.
        error: of the output on sampled queries.
        coefficients, tolerance: the polynomial, and what its errors may be.
    """
    # the bound is infinite too where norms of finite queries and keys are too large for fp32
    if not (math.isfinite(certified) and math.isfinite(sampled)):
        return False, NON_FINITE
    etas = [softmax_error(relative_error(coefficients, min(s, 1e3))) for s in (certified, sampled)]
    if etas[0] <= tolerance and math.isfinite(error):
        return True, f"certified: no logit exceeds {certified:.3g}"
    if etas[1] <= tolerance and error <= tolerance:
        return True, f"measured: sampled logits reach {sampled:.3g}, with an error of {error:.2g}"
    return False, (
        f"logits reach {sampled:.3g}, where degree {len(coefficients) - 1} is off by {etas[1]:.2g}; sampled error "
        f"{error:.2g}, tolerance {tolerance:g}"
    )


def all_finite(seen: Seen) -> bool:
    """Whether queries and keys, where these count, are finite."""
    key = seen.key if seen.key_mask is None else torch.where(seen.key_mask[:, None, :, None], seen.key, 0.0)
    return bool(seen.query.isfinite().all() & key.isfinite().all())


def exact_attention(seen: Seen) -> Tensor:
    """Exact attention of one head."""
    if seen.key_mask is None:
        return scaled_dot_product_attention(seen.query, seen.key, seen.value, is_causal=seen.causal, scale=seen.scale)
    mask = seen.key_mask[:, None, None, :].expand(-1, 1, seen.query.shape[2], -1)
    mask = mask.tril() if seen.causal else mask
    # queries that see nothing are padding: let them see themselves rather than be NaN
    mask = mask | (~mask.any(dim=-1, keepdim=True) & torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device))
    return scaled_dot_product_attention(seen.query, seen.key, seen.value, attn_mask=mask, scale=seen.scale)


def distance(found: Tensor, want: Tensor) -> float:
    """``|found - want| / |want|``."""
    return float((found.float() - want.float()).norm() / want.float().norm().clamp(min=1e-30))
