"""Low-rank attention: softmax attention with a polynomial in place of exp, in time linear in the sequence length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from leanstep.kernels.poly.attention import poly_attention


class LowRankAttentionError(ArithmeticError):
    """A normaliser is negative, zero or not finite: the polynomial does not approximate exp at these logits."""


def low_rank_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    degree: int = 2,
    causal: bool = False,
    scale: float | None = None,
    center: bool | Tensor | None = None,
    key_mask: Tensor | None = None,
    check: bool = True,
) -> Tensor:
    """Softmax attention with a polynomial in place of exp: ``O(L k d)`` instead of ``O(L^2 d)``, forward and backward.

    ``O_i = sum_j p(s_ij) v_j / D_i`` with ``D_i = sum_j p(s_ij)``, ``s_ij = scale * q_i . (k_j - center)`` and p the
    Taylor sum of exp, ``p(s) = sum over t <= g of s^t / t!``. p factors over ``k = C(d + g, g)`` features of each query
    and key, so no L x L matrix is formed. Backward differentiates this function exactly: ``dS_ij = p'(s_ij) / D_i *
    (dO_i . v_j - dO_i . O_i)``. Only the gradients that autograd asks for are computed.

    This is an **approximation** for small logits. :func:`leanstep.lora.error_bounds` bounds its error,
    :class:`leanstep.lora.NormMonitor` measures it on a model, and :class:`leanstep.lora.LowRankGate` uses it only where
    the error is small and it is faster. It pays only for sequences much longer than k, which is 2145 at head size 64
    and degree 2.

    Args:
        query: [B, Hq, L, d], floating.
        key: [B, H, M, d], H a divisor of Hq (grouped queries).
        value: [B, H, M, e].
        degree: g. Taylor sums of even degree are positive everywhere, so normalisers are too. At the usual head sizes,
            only degree 2 has few enough features.
        causal: query i sees keys up to i.
        scale: factor of the logits; None: ``d ** -0.5``.
        center: vector subtracted from the keys. It changes no softmax and makes logits smaller; no gradient flows
            through it. True: the mean of the unmasked keys. A tensor: [H, d] or [B, H, d]. False: nothing. None: True
            without ``causal``, else False, since the mean of a causal sequence leaks later keys into earlier outputs,
            within the approximation error. Pass a mean of earlier batches instead, as the gate does.
        key_mask: [B, M] bool, False for padding.
        check: raise if a normaliser is not positive. Reads one flag back from the device; skipped inside
            ``torch.compile``.

    Returns:
        [B, Hq, L, e] in the dtype of the inputs. Queries that see no key get zeros.

    Raises:
        ValueError: for unsupported shapes, dtypes, degrees or combinations of arguments.
        LowRankAttentionError: for a normaliser that is not positive and finite.

    Notes:
        Sums run in fp32, or fp64 for fp64 inputs. Saved for backward: q, k, v, the output and one number per query.
        Scratch memory: the features of one chunk and a state of k x (e + 1), for as many heads as fit 16 MB (1 GB on a
        GPU). ``benchmarks/lora/low_rank_attention.py`` compares time and error with exact attention.

    References:
        Alman, Song, Fast Attention Requires Bounded Entries, arXiv:2302.13214; Hu, Su, Kuo, Song, Liu, Computational
        Limits of Low-Rank Adaptation (LoRA) Fine-Tuning for Transformer Models, arXiv:2406.03136, theorems 3.1 and A.1.
        The chunked causal form is that of linear attention.

    Example:
        >>> import torch
        >>> from leanstep.lora import low_rank_attention
        >>> q, k, v = (0.3 * torch.randn(1, 2, 256, 8) for _ in range(3))
        >>> out = low_rank_attention(q, k, v, causal=True)
        >>> exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> bool((out - exact).abs().max() < 1e-2)
        True
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
        raise ValueError(f"low_rank_attention: expected a whole degree >= 1, got {degree!r}")
    if scale is not None and not (isinstance(scale, int | float) and math.isfinite(scale)):
        raise ValueError(f"low_rank_attention: expected a finite scale, or None for d ** -0.5, got {scale!r}")
    if not (center is None or isinstance(center, bool | Tensor)):
        raise ValueError(f"low_rank_attention: expected center True, False, None or a tensor, got {center!r}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not isinstance(center, Tensor):
        use_mean = not causal if center is None else center
        center = key_means(key, key_mask) if use_mean and key.dim() == 4 else None
    coefficients = taylor_coefficients(degree)
    out, total = poly_attention(
        query, key, value, coefficients, scale=scale, causal=causal, center=center, key_mask=key_mask
    )
    if check and not torch.compiler.is_compiling():
        check_normalisers(total, degree, causal, key_mask)
    return out


def key_means(key: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Mean of the unmasked keys [B, H, M, d]: [B, H, d], fp32 or fp64, without a gradient."""
    wide = key.detach().to(torch.promote_types(key.dtype, torch.float32))
    if key_mask is None:
        return wide.mean(dim=-2) if key.shape[-2] else wide.sum(dim=-2)
    if key_mask.dtype != torch.bool or key_mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            "low_rank_attention: expected a bool key_mask [B, M], True where a key counts, for keys "
            f"{tuple(key.shape)}, got {tuple(key_mask.shape)} of {key_mask.dtype}"
        )
    sums = torch.where(key_mask[:, None, :, None], wide, 0.0).sum(dim=-2)
    return sums / key_mask.sum(dim=-1).clamp(min=1)[:, None, None]


def check_normalisers(total: Tensor, degree: int, causal: bool, key_mask: Tensor | None) -> None:
    """Raise LowRankAttentionError unless the normalisers [B, Hq, L] are positive and finite.

    Queries that see no key are not checked.
    """
    wrong = ~((total > 0) & total.isfinite())
    if key_mask is not None:
        sees_a_key = key_mask.cumsum(dim=-1) > 0 if causal else key_mask.any(dim=-1, keepdim=True)
        wrong = wrong & sees_a_key[:, None, :]
    if total.numel() and bool(wrong.any()):
        first = tuple(wrong.nonzero()[0].tolist())
        raise LowRankAttentionError(
            f"low_rank_attention: {int(wrong.sum())} of {wrong.numel()} normalisers are not positive and finite; the "
            f"first is {float(total[first]):g}, at (batch, head, query) {first}. A polynomial of degree "
            f"{degree} does not approximate exp at these logits: take exact attention here, or an even degree"
        )


# --- polynomials ------------------------------------------------------------------------------------------------------

# Errors of polynomials are relative, on |x| <= bound: delta = max |p(x) / exp(x) - 1|. If every exponential has a
# relative error of at most delta, every softmax weight has one of at most eta = 2 delta / (1 - delta).

# fp64 cannot resolve the error of Taylor sums of a higher degree
MAX_DEGREE = 64


def taylor_coefficients(degree: int) -> list[float]:
    """``1 / t!`` for t up to ``degree``. Sums of even degree are positive everywhere."""
    if degree < 0:
        raise ValueError(f"expected a degree >= 0, got {degree}")
    return [1 / math.factorial(t) for t in range(degree + 1)]


def relative_error(coefficients: Sequence[float], bound: float) -> float:
    """delta of a polynomial: the maximum of ``|p(x) / exp(x) - 1|`` over ``|x| <= bound``; inf if exp overflows.

    The maximum is exact, not sampled: it lies at an end of the interval or where ``p' = p``.
    """
    return _max_relative_error(Polynomial(list(coefficients)), bound)


def slope_error(coefficients: Sequence[float], bound: float) -> float:
    """delta of the polynomial's derivative, which replaces exp in the gradient."""
    return _max_relative_error(Polynomial(list(coefficients)).deriv(), bound)


def softmax_error(delta: float) -> float:
    """eta, the largest relative error of softmax weights; inf for delta >= 1."""
    return 2 * delta / (1 - delta) if delta < 1 else math.inf


def _max_relative_error(p: Polynomial, bound: float) -> float:
    if not bound >= 0:
        raise ValueError(f"expected a bound >= 0 on the logits, got {bound}")
    if bound > 300:
        return math.inf
    points = [-bound, 0.0, bound]
    turning = p.deriv() - p
    if turning.degree() > 0:
        roots = turning.roots()
        # rounding gives double roots an imaginary part; extra points do no harm
        points += [x for x in roots.real if abs(x) < bound]
    return float(max(abs(p(x) * math.exp(-x) - 1) for x in points))


def needed_degree(bound: float, tolerance: float) -> int | None:
    """The smallest even Taylor degree that keeps eta within ``tolerance`` for logits up to ``bound``.

    Returns None if that degree is above 64. Raises ValueError unless the tolerance is above 0.
    """
    if not tolerance > 0:
        raise ValueError(f"needed_degree: expected a tolerance > 0, got {tolerance}")
    if not bound < MAX_DEGREE:
        return None
    errors = ((g, relative_error(taylor_coefficients(g), bound)) for g in range(2, MAX_DEGREE + 1, 2))
    return next((g for g, delta in errors if softmax_error(delta) <= tolerance), None)
