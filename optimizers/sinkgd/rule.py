"""The formulas of :class:`leanstep.optimizers.SinkGD`, in the order of its docstring.

Pure functions of plain tensors: matrices G (m, n), rows first, or stacks (e, m, n); float64 included. The step calls
them in this order. What a process holds of a sharded matrix, and sums over processes, are not their concern.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leanstep.kernels import Scales, sinkhorn
from leanstep.kernels.reference.rounding import hash32
from leanstep.kernels.reference.steps.scaled_step import scaled_update
from leanstep.kernels.steps.common import compute_dtype, decay_factor, pack


def momentum_average(buffer: Tensor, gradient: Tensor, momentum: float) -> Tensor:
    """M = momentum * M + (1 - momentum) * G, in fp32 (fp64 for an fp64 buffer).

    Applied twice, the second time to its own result, it looks ahead by one gradient (Nesterov).
    """
    wide = compute_dtype(buffer.dtype)
    return buffer.to(wide).lerp(gradient.to(wide), 1.0 - momentum)


def row_norms(matrix: Tensor) -> Tensor:
    """||G[i, :]|| of every row, [..., m]."""
    return torch.linalg.vector_norm(matrix, dim=-1, dtype=compute_dtype(matrix.dtype))


def mask_rows(matrix: Tensor, norms: Tensor, total: Tensor, rows: int, tau: float) -> Tensor:
    """A copy of G in which rows of norm at most ``tau * total / rows`` are zero.

    Args:
        matrix: G.
        norms: of its rows, [..., m].
        total: sum of the norms of all rows, [..., 1].
        rows: how many rows the matrix has, so that total / rows is the mean norm.
        tau: the threshold.
    """
    quiet = norms <= tau * total / rows  # False for NaN: the matrix is skipped later
    return matrix * (~quiet).unsqueeze(-1)


def normalize(matrices: list[Tensor], num_iters: int, *, end_with_rows: bool = False) -> Scales:
    """Scales r and c with X = diag(r) G diag(c), after ``num_iters`` times::

        X[i, :] = sqrt(n) * X[i, :] / ||X[i, :]||      every row
        X[:, j] = sqrt(m) * X[:, j] / ||X[:, j]||      every column

    ``end_with_rows``: and the rows once more. A matrix that is not finite has NaN in all its column scales.
    """
    return sinkhorn(matrices, num_iters, end_with_rows=end_with_rows)


def scaled(matrix: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """X = diag(r) G diag(c)."""
    return scaled_update(matrix, rows.unsqueeze(-1), cols.unsqueeze(-2))


def first_power_vector(like: Tensor) -> Tensor:
    """Start of the power iteration, [..., n]: the same for every matrix; no pattern of signs is favoured."""
    index = torch.arange(like.shape[-1], device=like.device)
    return (hash32(index, 0).to(like.dtype) / 2**31).expand_as(like)


def power_step(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration on X^T X: (||X v||^2 [..., 1], X^T X v [..., n]) for v of norm 1 along ``vector``.

    ||X v|| estimates the operator norm of X from below. For the shards of a matrix's rows both are summed.
    """
    unit = vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp_min(1e-30)
    image = (matrix @ unit.unsqueeze(-1)).squeeze(-1)
    return image.square().sum(dim=-1, keepdim=True), (image.unsqueeze(-2) @ matrix).squeeze(-2)


def spectral_target(kind: str, m: int, n: int) -> float:
    """The operator norm that updates are held at: 1 ("unit") or sqrt(m / n) ("muon")."""
    return 1.0 if kind == "unit" else math.sqrt(m / n)


def step_scalars(lr: float | Tensor, scale: float, weight_decay: float, like: Tensor) -> Tensor:
    """The numbers of p = p * decay - step * X: [lr * scale, 1 - lr * scale * weight_decay].

    On the device of ``like``, in the dtype that an update of it is computed in.
    """
    step = (lr.to(torch.float64) if isinstance(lr, Tensor) else lr) * scale
    return pack([step, decay_factor(step, weight_decay)], like.device, compute_dtype(like.dtype))
