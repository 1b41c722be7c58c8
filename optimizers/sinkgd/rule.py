"""The formulas of :class:`leanstep.optimizers.SinkGD`.

Pure functions of matrices G (m, n) or stacks (e, m, n), in any floating dtype, float64 included. The optimizer adds
the sums over processes for sharded matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leanstep.kernels import Scales, sinkhorn
from leanstep.kernels.reference.rounding import hash32
from leanstep.kernels.reference.steps.scaled_step import scaled_update
from leanstep.kernels.steps.common import compute_dtype, decay_factor, pack

# "balanced" sets rows to 0 whose norm is below this fraction of the mean row norm
QUIET = 1e-3


def momentum_average(buffer: Tensor, gradient: Tensor, momentum: float) -> Tensor:
    """M = momentum * M + (1 - momentum) * G, in fp32 (fp64 for an fp64 buffer).

    Nesterov's variant applies it again, to its result and the same G.
    """
    wide = compute_dtype(buffer.dtype)
    return buffer.to(wide).lerp(gradient.to(wide), 1.0 - momentum)


def row_norms(matrix: Tensor) -> Tensor:
    """||G[i, :]|| of every row, [..., m]; infinite where the squares overflow."""
    return torch.linalg.vector_norm(matrix, dim=-1, dtype=compute_dtype(matrix.dtype))


def mean_norm(norms: Tensor, rows: int) -> Tensor:
    """Mean of the norms of ``rows`` rows, [..., 1], or the share of it that the rows at hand have."""
    return (norms / max(rows, 1)).sum(dim=-1, keepdim=True)  # the sum of the norms could overflow


def mask_rows(matrix: Tensor, norms: Tensor, mean: Tensor, tau: float) -> Tensor:
    """Return a copy of G whose rows of norm below ``tau * mean`` are zero.

    Args:
        matrix: G.
        norms: row norms, [..., m].
        mean: mean of the norms of all rows, [..., 1].
        tau: threshold, relative to the mean norm.
    """
    # False for NaN, whose matrix is skipped later, for infinite norms, and where all squares underflow
    quiet = norms < tau * mean
    return matrix * (~quiet).unsqueeze(-1)


def normalize(matrices: list[Tensor], num_iters: int, *, end_with_rows: bool = False) -> Scales:
    """Return scales r and c with X = diag(r) G diag(c), after ``num_iters`` iterations of::

        X[i, :] = sqrt(n) * X[i, :] / ||X[i, :]||      every row
        X[:, j] = sqrt(m) * X[:, j] / ||X[:, j]||      every column

    ``end_with_rows`` normalizes the rows once more at the end. All column scales of a non-finite matrix are NaN.
    """
    return sinkhorn(matrices, num_iters, end_with_rows=end_with_rows)


def scaled(matrix: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """X = diag(r) G diag(c)."""
    return scaled_update(matrix, rows.unsqueeze(-1), cols.unsqueeze(-2))


def first_power_vector(like: Tensor) -> Tensor:
    """Return the start of the power iteration, [..., n]: hashed values, the same for every matrix."""
    index = torch.arange(like.shape[-1], device=like.device)
    return (hash32(index, 0).to(like.dtype) / 2**31).expand_as(like)


def power_step(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Do one power iteration on X^T X: return ||X v||^2 [..., 1] and X^T X v [..., n], with v = vector / ||vector||.

    ||X v|| is a lower bound of the operator norm of X. If rows are sharded, sum both results over the shards.
    """
    unit = vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp_min(1e-30)
    image = (matrix @ unit.unsqueeze(-1)).squeeze(-1)
    return image.square().sum(dim=-1, keepdim=True), (image.unsqueeze(-2) @ matrix).squeeze(-2)


def spectral_target(kind: str, m: int, n: int) -> float:
    """Return the operator norm of updates: 1 ("unit") or sqrt(m / n) ("muon")."""
    return 1.0 if kind == "unit" else math.sqrt(m / n)


def step_scalars(lr: float | Tensor, scale: float, weight_decay: float, like: Tensor) -> Tensor:
    """Pack [lr * scale, 1 - lr * scale * weight_decay], the step and decay of p = p * decay - step * X.

    On the device of ``like``, in fp64 for an fp64 ``like``, else in fp32.
    """
    step = (lr.to(torch.float64) if isinstance(lr, Tensor) else lr) * scale
    return pack([step, decay_factor(step, weight_decay)], like.device, compute_dtype(like.dtype))
