"""The inverse of a damped empirical Fisher matrix by the paper's recursions and as a dense matrix, as plain torch.

Rows of G [m, d] are gradients g_1 .. g_m, and F = damping * I + G^T G / m. Frantar, Kurtic, Alistarh, "M-FAC:
Efficient Matrix-Free Approximations of Second-Order Information", arXiv 2107.03356, give two recursions for F^-1 x. The
static one stores m vectors of length d. The dynamic one can replace a gradient. In float64 they are the definition in
tests of :mod:`leanstep.kernels.fisher.inverse_fisher`; in fp32 they subtract numbers that nearly cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def dense_fisher(rows: Tensor, damping: float) -> Tensor:
    """F = damping * I + G^T G / m, [d, d]."""
    m, d = rows.shape
    return damping * torch.eye(d, dtype=rows.dtype, device=rows.device) + rows.T @ rows / m


class StaticRecursion(NamedTuple):
    """The static recursion's vectors v_i = F_{i-1}^-1 g_i, [m, d], and q_i = m + g_i . v_i, [m].

    F_i is F with the first i gradients only, a rank-one update of F_{i-1} (Sherman, Morrison).
    """

    vectors: Tensor
    q: Tensor
    damping: float

    def solve(self, x: Tensor) -> Tensor:
        """F^-1 x for x [d]."""
        return x / self.damping - self.vectors.T @ (self.vectors @ x / self.q)

    def diagonal(self) -> Tensor:
        """The diagonal of F^-1, [d]."""
        return 1 / self.damping - (self.vectors.square() / self.q.unsqueeze(1)).sum(dim=0)

    def element(self, a: int, b: int) -> Tensor:
        """[F^-1]_ab, 0-d."""
        identity = 1 / self.damping if a == b else 0.0
        return identity - (self.vectors[:, a] * self.vectors[:, b] / self.q).sum()


def static_recursion(rows: Tensor, damping: float) -> StaticRecursion:
    """Run the static recursion over the rows of G [m, d]: O(d m^2) operations, m sequential steps."""
    m = rows.shape[0]
    vectors, q = torch.zeros_like(rows), torch.zeros(m, dtype=rows.dtype, device=rows.device)
    for i, gradient in enumerate(rows):
        vectors[i] = StaticRecursion(vectors[:i], q[:i], damping).solve(gradient)
        q[i] = m + gradient @ vectors[i]
    return StaticRecursion(vectors, q, damping)


class DynamicRecursion(NamedTuple):
    """The dynamic recursion's coefficients, which depend on G G^T only.

    Attributes:
        upper: D [m, m], D_ij = g_i . F_{i-1}^-1 g_j for i <= j.
        lower: B [m, m], with v_i = sum_j B_ij g_j for j <= i.
        q: q_i = m + D_ii.
        damping: as in F.
    """

    upper: Tensor
    lower: Tensor
    q: Tensor
    damping: float

    def coefficients(self, dots: Tensor) -> Tensor:
        """The c [m] with F^-1 x = x / damping - G^T c, from dots = G x."""
        p = torch.zeros_like(dots)
        for i in range(len(dots)):
            p[i] = dots[i] / self.damping - (self.upper[:i, i] / self.q[:i] * p[:i]).sum()
        return self.lower.T @ (p / self.q)


def dynamic_recursion(gram: Tensor, damping: float) -> DynamicRecursion:
    """Run the dynamic recursion on G G^T [m, m], of which a new gradient changes one row and column."""
    m = gram.shape[0]
    scaled = gram / damping
    upper, lower = torch.zeros_like(gram), torch.zeros_like(gram)
    q = torch.zeros(m, dtype=gram.dtype, device=gram.device)
    for i in range(m):
        earlier = upper[:i, i] / q[:i]
        upper[i, i:] = scaled[i, i:] - earlier @ upper[:i, i:]
        q[i] = m + upper[i, i]
        lower[i, :i] = -earlier @ lower[:i, :i]
        lower[i, i] = 1 / damping
    return DynamicRecursion(upper, lower, q, damping)
