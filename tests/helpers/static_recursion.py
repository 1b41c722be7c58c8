"""The inverse of a damped empirical Fisher matrix as a dense matrix and by M-FAC's static recursion.

Frantar, Kurtic, Alistarh, arXiv 2107.03356. The recursion stores m vectors of length d. It is the definition in
float64; in fp32 it subtracts numbers that nearly cancel.
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
