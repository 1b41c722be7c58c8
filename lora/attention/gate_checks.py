"""Checks of :class:`leanstep.lora.LowRankGate`: which calls can run low-rank, and which are accurate enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from leanstep.lora.attention.interface import AttentionInputs, Call
from leanstep.lora.attention.polynomials import relative_error, softmax_error

NON_FINITE = "non-finite logits"


def why_impossible(call: Call) -> str | None:
    """The reason why a call cannot run low-rank, whatever its norms; None if it can."""
    query, key, value = call.inputs[:3]
    if call.unsupported_mask is not None:
        return call.unsupported_mask
    if call.special:
        return f"the layer has {', '.join(call.special)}"
    if call.dropout > 0:
        return f"dropout of {call.dropout:g} on attention weights, which are not formed"
    if query.shape[2] != key.shape[2]:
        return f"{query.shape[2]} queries against a cache of {key.shape[2]} keys"
    if not query.dtype == key.dtype == value.dtype:
        return f"dtypes differ: {query.dtype}, {key.dtype} and {value.dtype}"
    return None


def autocasted_inputs(inputs: AttentionInputs) -> AttentionInputs:
    """Cast q, k and v as autocast does for exact attention; fp64 tensors stay fp64."""
    device = inputs.query.device.type
    if not torch.is_autocast_enabled(device):
        return inputs
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in inputs[:3])
    return inputs._replace(query=q, key=k, value=v)


def verdict(
    certified: float, sampled: float, error: float, coefficients: Sequence[float], tolerance: float
) -> tuple[bool, str]:
    """Decide whether a layer's low-rank attention is accurate enough, and give the reason.

    Args:
        certified, sampled: upper bound on all logits, and the largest sampled logit.
        error: relative error of the output on sampled queries.
        coefficients: coefficients of the polynomial.
        tolerance: largest accepted error of softmax weights and of the output.
    """
    # norms of finite queries and keys can overflow fp32
    if not (math.isfinite(certified) and math.isfinite(sampled)):
        return False, NON_FINITE
    weight_errors = [softmax_error(relative_error(coefficients, min(s, 1e3))) for s in (certified, sampled)]
    if weight_errors[0] <= tolerance and math.isfinite(error):
        return True, f"certified: no logit exceeds {certified:.3g}"
    if weight_errors[1] <= tolerance and error <= tolerance:
        return True, f"measured: sampled logits reach {sampled:.3g}, with an error of {error:.2g}"
    return False, (
        f"logits reach {sampled:.3g}, where degree {len(coefficients) - 1} is off by {weight_errors[1]:.2g}; sampled "
        f"error {error:.2g}, tolerance {tolerance:g}"
    )


def all_finite(inputs: AttentionInputs) -> bool:
    """Whether all queries and all unmasked keys are finite."""
    key = inputs.key if inputs.key_mask is None else torch.where(inputs.key_mask[:, None, :, None], inputs.key, 0.0)
    return bool(inputs.query.isfinite().all() & key.isfinite().all())


def exact_attention(inputs: AttentionInputs) -> Tensor:
    """Exact attention of one head."""
    tensors = inputs.query, inputs.key, inputs.value
    if inputs.key_mask is None:
        return scaled_dot_product_attention(*tensors, is_causal=inputs.causal, scale=inputs.scale)
    mask = inputs.key_mask[:, None, None, :].expand(-1, 1, inputs.query.shape[2], -1)
    mask = mask.tril() if inputs.causal else mask
    # queries without a visible key are padding: let them see themselves to avoid NaN
    mask = mask | (~mask.any(dim=-1, keepdim=True) & torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device))
    return scaled_dot_product_attention(*tensors, attn_mask=mask, scale=inputs.scale)


def relative_distance(result: Tensor, expected: Tensor) -> float:
    """``|result - expected| / |expected|``."""
    return float((result.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))
