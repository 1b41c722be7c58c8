"""The dynamic recursion for the inverse of a damped empirical Fisher matrix, as plain torch.

Rows of G [m, d] are gradients g_1 .. g_m, and F = damping * I + G^T G / m. Frantar, Kurtic, Alistarh, "M-FAC:
Efficient Matrix-Free Approximations of Second-Order Information", arXiv 2107.03356, give two recursions for F^-1 x. The
dynamic one can replace a gradient. Tests compare both, in float64, with :mod:`leanstep.kernels.fisher.inverse_fisher`;
in fp32 they subtract numbers that nearly cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
