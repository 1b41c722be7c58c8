"""Upper bounds on the error of low-rank attention and its gradients, from norms alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leanstep.kernels.poly.attention import poly_attention
from leanstep.lora.attention.attention import key_means, relative_error, slope_error, softmax_error, taylor_coefficients


class ErrorBounds(NamedTuple):
    """Upper bounds on entrywise errors, fp64 [B, heads]: per query head, and per key head for ``key`` and ``value``.

    ``logit`` is S, the bound on the logits. ``eta`` bounds the relative error of a softmax weight. A bound is inf if
    the polynomial is too far from exp.
    """

    out: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    logit: Tensor
    eta: Tensor


def largest_logit(query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None = None) -> Tensor:
    """Bound the logits of each head by ``|scale| * max |q_i| * max |k_j|`` (Cauchy-Schwarz): [B, Hq], in O(L d).

    Ignores masked keys. Does not centre the keys.
    """
    q, k = (
        torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
        for x in (query, key)
    )
    return (
        abs(scale)
        * _largest(q)
        * _largest(_without_masked(k, key_mask)).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    )


def error_bounds(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor | None = None,
    *,
    degree: int = 2,
    causal: bool = False,
    scale: float | None = None,
    center: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> ErrorBounds:
    """Bound ``|low_rank - exact|`` for the output, and for dQ, dK and dV given the output's gradient ``grad``.

    S is the largest logit; delta and delta' are the largest relative errors of p and p' on [-S, S]. Softmax weights
    have a relative error of at most ``eta = 2 delta / (1 - delta)``; the weights in the gradient, of at most ``eta' =
    (delta + delta') / (1 - delta)``. G is the largest ``|dO_i| |v_j|``, ``|f|_1`` is the largest column sum of the
    weights, and every other ``|.|`` is the largest absolute entry::

        |O~ - O|   <= eta |V|                       |dQ~ - dQ| <= |scale| (2 eta' + eta) G |K - center|
        |dV~ - dV| <= eta |dO| |f|_1                |dK~ - dK| <= |scale| (2 eta' + eta) G |Q| |f|_1

    The bounds hold in exact arithmetic. They are loose, by a factor of hundreds where errors average out.

    Args:
        query, key, value, degree, causal, scale, key_mask: as for :func:`leanstep.lora.low_rank_attention`.
        center: tensor subtracted from the keys, [H, d] or [B, H, d]; None: the default of that function.
        grad: [B, Hq, L, e]; without it, the bounds on gradients are inf.

    Returns:
        The :class:`ErrorBounds`. With ``grad``, this runs the approximation once, on values with one column.
    """
    coefficients = taylor_coefficients(degree)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    center = key_means(key, key_mask) if center is None and not causal else center
    query, key, value = (x.detach().double() for x in (query, key, value))
    shifted = key if center is None else key - center.double()[..., None, :]
    batch, heads, group = query.shape[0], key.shape[1], query.shape[1] // key.shape[1]
    logit = largest_logit(query, shifted, scale, key_mask)
    delta = _map(logit, lambda s: relative_error(coefficients, s))
    eta = _map(delta, softmax_error)
    infinite = torch.full_like(eta, torch.inf)
    largest_value = _largest(_without_masked(value.abs().amax(dim=-1), key_mask)).repeat_interleave(group, dim=1)
    out = eta * largest_value
    if grad is None:
        return ErrorBounds(out, infinite, infinite[:, ::group], infinite[:, ::group], logit, eta)
    grad = grad.detach().double()
    slope = _map(logit, lambda s: slope_error(coefficients, s))
    eta_slope = torch.where(delta < 1, (delta + slope) / (1 - delta), infinite)
    norm = _largest(_without_masked(value.norm(dim=-1), key_mask)).repeat_interleave(group, dim=1)
    factor = abs(scale) * (2 * eta_slope + eta) * norm * _largest(grad.norm(dim=-1))
    bound_query = factor * _largest(_without_masked(shifted.abs().amax(dim=-1), key_mask)).repeat_interleave(
        group, dim=1
    )
    sums = _column_sums(query, shifted, coefficients, scale, causal, key_mask)
    # exact column sums exceed the approximate ones by at most this factor
    growth = torch.where(delta < 1, (1 + delta) / (1 - delta), infinite)
    sums = sums * _largest(growth.view(batch, heads, group))
    bound_key = _largest((factor * _largest(query.abs().amax(dim=-1))).view(batch, heads, group)) * sums
    bound_value = _largest((eta * _largest(grad.abs().amax(dim=-1))).view(batch, heads, group)) * sums
    return ErrorBounds(out, bound_query, bound_key, bound_value, logit, eta)


def _column_sums(
    query: Tensor, key: Tensor, coefficients: Sequence[float], scale: float, causal: bool, key_mask: Tensor | None
) -> Tensor:
    """Largest column sum of the approximate weights, [B, H], as the gradient with respect to one-column values."""
    value = key.new_zeros(*key.shape[:3], 1).requires_grad_()
    with torch.enable_grad():
        out, _ = poly_attention(query, key, value, coefficients, scale=scale, causal=causal, key_mask=key_mask)
        (sums,) = torch.autograd.grad(out.sum(), value)
    return _largest(sums.squeeze(-1).abs())


def _without_masked(rows: Tensor, key_mask: Tensor | None) -> Tensor:
    """Per-key numbers [B, H, M], set to 0 at masked keys."""
    return rows if key_mask is None else torch.where(key_mask[:, None, :], rows, 0.0)


def _largest(rows: Tensor) -> Tensor:
    return rows.amax(dim=-1) if rows.shape[-1] else rows.sum(dim=-1)


def _map(values: Tensor, function: Callable[[float], float]) -> Tensor:
    results = [function(float(x)) if x == x else torch.inf for x in values.flatten().tolist()]
    return torch.tensor(results, dtype=torch.float64, device=values.device).view(values.shape)
