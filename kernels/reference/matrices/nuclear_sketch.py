"""Nuclear norms from eigenvalues: of a Gram matrix, or of a sketch of half its size. Plain torch: the definition.

The nuclear norm of X [m, n] is tr(sqrt(A)) for A = X X^T, here with m <= n. With x^2 as the ridge, it is an integral of
the effective dimension d::

    tr(sqrt(A)) = 2 / pi * integral of d(x^2) dx over x > 0,     d(r) = tr(A (A + r)^-1)

A sketch S X of k rows, S with orthonormal random rows, has the effective dimension of X at another ridge. In the limit
of large matrices whose rows S mixes evenly (a free compression: Nica and Speicher, "Lectures on the Combinatorics of
Free Probability", 2006, lecture 14), with d_S(t) the sketch's::

    d(r) = d_S(t)     at     r = t (m - d) / (k - d)

This gives d where it is at most k. Between r = 0 and there, a parabola continues it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leanstep.kernels.reference.matrices.newton_schulz import frobenius, widen
from leanstep.kernels.reference.rounding import hash32

# matrices of up to this many rows are not sketched: their eigenvalues take little time, and a sketch would be inexact
EXACT_ROWS = 256

# ridges at which d is computed, from 1e-8 to 1e3 of the largest eigenvalue
_RIDGES = 160


def nuclear_norm(batch: Tensor) -> Tensor:
    """Nuclear norms of ``batch`` [B, m, n], as [B], in fp32 (fp64 for fp64). NaN for a matrix that is not finite."""
    wide = widen(batch)
    size = frobenius(wide)
    scaled = torch.nan_to_num(wide / size.clamp(min=torch.finfo(size.dtype).tiny))
    return from_gram(gram(scaled), min(batch.shape[-2:])).to(size.dtype) * size.flatten()


def gram(batch: Tensor) -> Tensor:
    """Gram matrices on the smaller side of ``batch`` [B, m, n], in fp64; of its sketch for more than EXACT_ROWS rows.

    A sketch has the dtype of ``batch``. Its row is (row i + sign * row i + k) / sqrt(2) for hashed signs; with an odd
    m, one row stays alone.
    """
    x = batch.mT if batch.shape[-2] > batch.shape[-1] else batch
    rows = x.shape[-2]
    if rows <= EXACT_ROWS:
        # in fp32, the root of a Gram matrix's rounding error would stand for singular values that are 0
        x = x.double()
        return x @ x.mT
    half = rows // 2
    signs = 1 - 2 * (hash32(torch.arange(half, device=x.device), 0) & 1)
    sums = torch.addcmul(x[..., :half, :], signs.to(x.dtype).unsqueeze(-1), x[..., rows - half :, :])
    if rows % 2:
        sums = torch.cat([sums, math.sqrt(2.0) * x[..., half : half + 1, :]], dim=-2)
    return (sums @ sums.mT).mul_(0.5)


def from_gram(grams: Tensor, rows: int) -> Tensor:
    """Nuclear norms, [B] in fp64, of matrices of ``rows`` rows with these results of :func:`gram`."""
    values = torch.linalg.eigvalsh(grams).double().clamp_min(0.0)
    return values.sqrt().sum(dim=-1) if values.shape[-1] == rows else _from_half(values, rows)


def _from_half(values: Tensor, rows: int) -> Tensor:
    """Nuclear norms of matrices of ``rows`` rows, from the eigenvalues [B, k] of their sketches."""
    top = values[..., -1:]  # eigenvalues ascend
    values = (values / top.clamp_min(torch.finfo(values.dtype).tiny)).clamp_min(1e-12).unsqueeze(-2)
    ridges = torch.logspace(-8, 3, _RIDGES, dtype=values.dtype, device=values.device)
    ridges = torch.cat([ridges.new_zeros(1), ridges]).unsqueeze(-1)
    inverse = 1.0 / (values + ridges)
    dimension = (values * inverse).sum(dim=-1)
    x = (ridges.squeeze(-1) + (rows - values.shape[-1]) / inverse.sum(dim=-1)).sqrt()
    # far above all eigenvalues, d falls as 1 / x^2
    integral = torch.trapezoid(dimension, x) + dimension[..., -1] * x[..., -1] + _below(dimension, x, rows)
    return 2.0 / math.pi * integral * top.squeeze(-1).sqrt()


def _below(dimension: Tensor, x: Tensor, rows: int) -> Tensor:
    """Integral of d from 0 to the first x, of a parabola through d at the first x, and at 1.25 and 1.5 of it."""
    first = x[..., :1].contiguous()
    index = torch.searchsorted(x.contiguous(), torch.cat([first, 1.25 * first, 1.5 * first], dim=-1))
    index = index.cummax(dim=-1).values + torch.arange(3, device=x.device)  # three points, also where x grows fast
    (x0, x1, x2), (d0, d1, d2) = (t.gather(-1, index).unbind(-1) for t in (x, dimension))
    slope = (d1 - d0) / (x1 - x0)
    bend = ((d2 - d1) / (x2 - x1) - slope) / (x2 - x0)
    area = x0 * (d0 - slope * x0 / 2 + bend * x0 * (x1 / 2 - x0 / 6))
    return torch.minimum(area, rows * x0)
