"""Newton-Schulz iterations towards the polar factor of a matrix, as plain torch: the definition.

Starting from X = M / ||M||_F, every step applies an odd polynomial to the singular values s of X::

    A = X X^T;   X <- a X + (b A + c A^2) X        that is, s <- a s + b s^3 + c s^5

X approaches U V^T for M = U S V^T. ``COEFFICIENTS`` holds the triples (a, b, c) and their sources.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Triple = tuple[float, float, float]

# (a, b, c) by name, one triple per step; further steps repeat the last one
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), github.com/KellerJordan/Muon.
    # Tuned for a large slope at 0. After five steps, singular values above 0.2 % of the norm are between 0.68 and 1.21,
    # those above 1 % are below 1.14. They do not converge to 1.
    "jordan": ((3.4445, -4.7750, 2.0315),),
    # Amsel, Persson, Musco, Gower, "The Polar Express", arXiv 2505.16932, with the paper's safety factor and its lower
    # bound of singular values, 1e-3; tests/helpers/polar_express.py derives them
    "polar_express": (
        (8.20516041400557, -22.90193498705603, 16.4607249101803),
        (4.06639515994277, -2.86115408675514, 0.5183995226694738),
        (3.909594904437917, -2.8233517350395156, 0.5250369769390022),
        (3.285564017198614, -2.4153019596359453, 0.48529406552790877),
        (2.2778732870839784, -1.6198217652654427, 0.3984807870416839),
        (1.8725756512746545, -1.2307042574884357, 0.35851616209511944),
        (1.856437109728543, -1.2132392818649087, 0.3567997893874689),
        (1.875, -1.25, 0.375),
    ),
    # the same for 3 steps from 0.015, then its limit: small singular values hardly matter in a nuclear norm
    "nuclear": (
        (7.755565002621937, -21.647041193095454, 15.558772234759974),
        (3.3785445759557904, -2.4829067599405827, 0.4928056730316914),
        (2.3885833717473823, -1.746744183399525, 0.42725609563686273),
        (1.875, -1.25, 0.375),
    ),
    # the cubic of the polar decomposition's literature (Higham and Schreiber, "Fast polar decomposition of an arbitrary
    # matrix", SIAM J. Sci. Stat. Comput. 11(4), 1990): converges to 1 for s in (0, sqrt(3))
    "classic": ((1.5, -0.5, 0.0),),
    # the quintic before Muon's tuning (Jordan et al., as above): converges, slowly at first
    "classic_quintic": ((2.0, -1.5, 0.5),),
}


def newton_schulz(batch: Tensor, triples: Sequence[Triple], eps: float, dtype: torch.dtype) -> Tensor:
    """Approximate polar factors of ``batch`` [B, m, n], computed in ``dtype``; see ``kernels.newton_schulz``."""
    wide = widen(batch, dtype)
    smallest = torch.finfo(wide.dtype).tiny  # zeros stay zero
    return iterate((wide / frobenius(wide).clamp(min=max(eps, smallest))).to(dtype), triples)


def iterate(iterate_0: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Run the steps on a batch [B, m, n] of matrices of spectral norm at most 1; A is of the smaller side."""
    tall = iterate_0.shape[-2] > iterate_0.shape[-1]
    x = iterate_0.mT if tall else iterate_0
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def nuclear_norm(batch: Tensor, triples: Sequence[Triple], dtype: torch.dtype) -> Tensor:
    """<M, P(M)> of every matrix of ``batch`` [B, m, n], as [B], with P computed in ``dtype``.

    Divides the singular values by their 4-norm, an upper bound of the largest one. If many singular values have similar
    size, it is a much closer bound than the Frobenius norm.
    """
    wide = widen(batch, dtype)
    size = frobenius(wide)
    x = wide / size.clamp(min=torch.finfo(size.dtype).tiny)
    gram = x.mT @ x if x.shape[-2] > x.shape[-1] else x @ x.mT
    four = frobenius(gram).sqrt()
    x = x / four.clamp(min=torch.finfo(four.dtype).tiny)
    return (x * iterate(x.to(dtype), triples)).sum((-2, -1)) * (size * four).flatten()


def widen(batch: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert ``batch`` to fp32, or to fp64 if it or ``dtype`` is fp64."""
    return batch.double() if torch.float64 in (batch.dtype, dtype) else batch.float()


def frobenius(batch: Tensor) -> Tensor:
    """Frobenius norms of [B, m, n] as [B, 1, 1], for entries of any size. NaN if an entry is not finite."""
    if batch.numel() == 0:
        return batch.new_zeros(batch.shape[0], 1, 1)
    largest = batch.abs().amax((-2, -1), keepdim=True)
    norm = torch.linalg.vector_norm(batch / torch.where(largest == 0, 1.0, largest), dim=(-2, -1), keepdim=True)
    return norm * largest
