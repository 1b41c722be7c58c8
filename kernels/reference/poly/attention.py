"""Attention with a polynomial in place of exp, with the full matrix of weights, as plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def polynomial(s: Tensor, coefficients: Sequence[float]) -> Tensor:
    """``sum over t of coefficients[t] * s^t``, by Horner's rule."""
    value = torch.full_like(s, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * s + coefficient
    return value


def poly_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    center: Tensor | None,
    key_mask: Tensor | None,
    coefficients: Sequence[float],
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """``P V / D`` with ``P_ij = p(scale * q_i . (k_j - center))`` and ``D_i = sum_j P_ij``, and D.

    q [B, Hq, L, d]; k [B, H, M, d] and v [B, H, M, e], where H divides Hq; key_mask [B, M], False for keys to ignore.
    Queries without keys get zero. Runs in the dtype of the inputs.
    """
    group = q.shape[1] // k.shape[1]
    y = k if center is None else k - center[..., None, :]
    s = scale * q @ y.repeat_interleave(group, dim=1).mT
    visible = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device)
    visible = visible.tril() if causal else visible
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    weights = torch.where(visible, polynomial(s, coefficients), 0.0)
    total = weights.sum(dim=-1)
    safe = torch.where(total == 0, 1.0, total)
    return weights @ v.repeat_interleave(group, dim=1) / safe[..., None], total
