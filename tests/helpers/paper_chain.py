"""The paper's gradient of adapters in attention: with dense softmax weights, and by its chain of low-rank factors.

For one head and one sequence of L tokens, in the paper's letters: ``Q = X W_Q``, ``K`` and ``V`` are (L, d); f is the
softmax of ``scale * Q K^T``, (L, L); c is the gradient of the output ``f V``, (L, d), which is ``f C3 - Y`` for the
paper's squared loss.

    dP = c V^T,   r_i = sum_j f_ij dP_ij,   p = f * dP - diag(r) f
    d loss / d Q = scale p K,   d loss / d K = scale p^T Q,   d loss / d V = f^T c

and with ``W_Q = W* + B A`` (the scale alpha / r in B), B (n, r) and A (r, d): ``dA = B^T X^T dQ``, ``dB = X^T dQ A^T``.

This corrects the paper's text twice, as finite differences confirm. The second term of p scales the **rows** of f by r;
scaling columns, as the text reads, gives an error as large as the gradient. And dB is ``C1^T p C2 A^T``; the shapes of
the printed ``C1^T p A C2`` do not fit.

The chain factors f as ``U V1^T`` with k columns. Then dP has rank d, ``f * dP`` is a product of row-wise Khatri-Rao
products of rank k d, and ``diag(r) f`` has rank k, so no (L, L) matrix is formed. The chain costs ``4 L k d^2``
operations and pays only for very long sequences; the gradient of :func:`leanstep.lora.low_rank_attention` costs
``L k d``. The chain is an oracle for that gradient and illustrates the theorem.

Reference: Hu, Su, Kuo, Song, Liu, Computational Limits of Low-Rank Adaptation (LoRA) Fine-Tuning for Transformer
Models, arXiv:2406.03136, lemmas 3.1 to 3.7 and A.1; Alman, Song, arXiv:2402.04497.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanstep.kernels.poly.features import poly_features


class AttentionGradients(NamedTuple):
    """Gradients of queries, keys and values, each of the shape of its tensor."""

    query: Tensor
    key: Tensor
    value: Tensor


def dense_gradients(
    f: Tensor, query: Tensor, key: Tensor, value: Tensor, c: Tensor, scale: float
) -> AttentionGradients:
    """Gradients of attention with the dense softmax weights f [.., L, M].

    query [.., L, d], key [.., M, d], value [.., M, e]; ``c`` [.., L, e] is the gradient of ``f @ value``.
    """
    dp = c @ value.mT
    r = (f * dp).sum(dim=-1, keepdim=True)
    p = f * dp - r * f
    return AttentionGradients(scale * p @ key, scale * p.mT @ query, f.mT @ c)


def chain_gradients(
    u: Tensor, v1: Tensor, query: Tensor, key: Tensor, value: Tensor, c: Tensor, scale: float
) -> AttentionGradients:
    """:func:`dense_gradients` for ``f = u @ v1^T``, u [.., L, k] and v1 [.., M, k], in ``O(L k d^2)``.

    Forms no L x M matrix. Exact if f is that product.
    """
    # r_i = <f_i, dP_i> = <u_i (v1^T V), c_i>
    r = (u @ (v1.mT @ value) * c).sum(dim=-1, keepdim=True)
    scaled = r * u
    d_query = _khatri_rao_product(u, c, v1, value, key) - scaled @ (v1.mT @ key)
    d_key = _khatri_rao_product(v1, value, u, c, query) - v1 @ (scaled.mT @ query)
    return AttentionGradients(scale * d_query, scale * d_key, v1 @ (u.mT @ c))


def _khatri_rao_product(left: Tensor, left_rows: Tensor, right: Tensor, right_rows: Tensor, matrix: Tensor) -> Tensor:
    """``((left right^T) * (left_rows right_rows^T)) matrix``, without forming the row-wise Khatri-Rao products."""
    inner = torch.einsum("...jk,...ja,...jb->...kab", right, right_rows, matrix)
    return torch.einsum("...ik,...ia,...kab->...ib", left, left_rows, inner)


def factor_gradients(x: Tensor, grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the factors A (r, d) and B (n, r) of a projection ``Q = X (W + B A)``, given ``grad`` = dQ (L, d).

    Uses only products r wide: ``dA = (X B)^T dQ``, ``dB = X^T (dQ A^T)``.
    """
    return (x @ b).mT @ grad, x.mT @ (grad @ a.mT)


class _PaperChain(torch.autograd.Function):
    """Polynomial attention by dense products, with the paper's chain as its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, degree: int
    ) -> tuple[Tensor, Tensor]:
        v1 = _features(key, degree)
        u = _features(scale * query, degree)
        total = u @ v1.sum(dim=-2, keepdim=True).mT
        ctx.save_for_backward(query, key, value, u / total, v1)
        ctx.scale = scale
        ctx.mark_non_differentiable(total)
        return u / total @ (v1.mT @ value), total.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, u, v1 = ctx.saved_tensors
        return *chain_gradients(u, v1, query, key, value, c, ctx.scale), None, None


def _features(rows: Tensor, degree: int) -> Tensor:
    flat = poly_features(rows.flatten(0, -3).mT, degree).mT
    return flat.unflatten(0, rows.shape[:-2])


def paper_chain_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, degree: int
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, L, e] with Taylor's polynomial for exp and the chain as its gradient, and its normalisers.

    Needs as many key heads as query heads. Not causal, since a causal f has no low rank. The gradient is that of
    softmax at the approximate weights, ``p = f~ * dP - diag(r) f~``, without the polynomial's derivative. Memory and
    time grow with ``k d^2``: use short sequences and small heads.
    """
    return _PaperChain.apply(query, key, value, scale, degree)
