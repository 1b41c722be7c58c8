"""Solves F^-1 x for a damped empirical Fisher matrix F, as a combination of its gradients.

The rows of G [m, d] are gradients, K = G G^T is their Gram matrix, and F = damping * I + G^T G / s. The denominator s
is m in Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", arXiv
2107.03356. F [d, d] is never formed. F^-1 x takes one fp64 solve with the m x m matrix damping * I + K / s.

If x = G^T a is a combination of the rows, such as the newest gradient (a = e_j), the push-through identity gives
``F^-1 G^T a = G^T (damping * I + K / s)^-1 a``. It subtracts nothing, so nothing cancels. For any other x, Woodbury's
identity gives ``F^-1 x = x / damping - G^T (damping * I + K / s)^-1 G x / (damping * s)``. It subtracts, as do the
paper's two recursions (the dynamic one is in :mod:`leanstep.kernels.reference.fisher.inverse_fisher`). With fp32
gradients its error is about 2**-24 * |g|^2 / (s * damping) if x is close to a combination of the gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leanstep.kernels.op import op

OK = 0
JITTERS = 5  # status 1 to JITTERS: the number of the addition to the diagonal that worked
EIGEN = JITTERS + 1
EPS = 2.0**-53  # half a unit in the last place of fp64, in which K is summed and rows are combined

_FIRST_JITTER = 1e-12  # times the mean of the diagonal; ten times as much at each further attempt
# largest relative error of the result that rounding K and the combination of rows may cause
_TOLERATED = 1e-2
# rounding of K turns an eigenvalue of zero into at most this times eps times the largest eigenvalue
_NOISE = 8.0


class Coefficients(NamedTuple):
    """Coefficients of the window's rows, and how each system was solved.

    Attributes:
        values: fp64 [..., n].
        status: int32 [...]. ``OK`` (0): Cholesky. 1 to ``JITTERS``: Cholesky with a larger diagonal; attempt 1 adds
            1e-12 times the diagonal's mean, and each further attempt ten times as much. ``EIGEN``: eigenvalues.
    """

    values: Tensor
    status: Tensor


@torch.no_grad()
def window_coefficients(
    gram: Tensor, damping: float | Tensor, denominator: float, target: int | Tensor
) -> Coefficients:
    """The c with ``F^-1 G^T a = G^T c``: c = (damping * I + K / s)^-1 a, by the push-through identity.

    Args:
        gram: K, fp64 [n, n] of the n rows that are in use, or [..., n, n] for several windows. Not written.
        damping: > 0; a number, or a tensor of shape [...] on the device of ``gram``.
        denominator: s > 0: the window's size m, or the number n of rows in use.
        target: the row j for x = g_j (a = e_j, in every window), or a itself, [..., n].

    Returns:
        :class:`Coefficients`.

    Raises:
        ValueError: for sizes that do not match, a damping or denominator that is not positive, a row outside the
            window, or an entry of ``gram`` that is not finite.

    Notes:
        n^3 / 3 multiply-adds per window, and a copy of ``gram``. The host waits for the device once, to read which
        systems are badly conditioned.

        If gradients hardly differ and the damping is small compared with their squares, c has large entries whose rows
        cancel. An error of eps |g_i| |g_j| in K_ij, with eps = 2^-53, changes G^T c by at most
        ``eps * sqrt(tr K / (damping s)) / 2 * sum_i |c_i| |g_i|``. Rounding the combination changes it by at most
        ``eps * sum_i |c_i| |g_i|``. If both together exceed a hundredth of the result's norm ``sqrt(c^T K c)``, the
        system is solved with a larger diagonal, or by eigenvalues. The latter drops eigenvalues of K up to 8 eps times
        the largest: their combinations of rows are zero up to rounding and add nothing to G^T c.
    """
    _check(gram, damping, denominator)
    n = gram.shape[-1]
    if isinstance(target, int):
        if not 0 <= target < n:
            raise ValueError(f"window_coefficients: row {target} is outside the window of {n} rows")
        right = gram.new_zeros(gram.shape[:-1])
        right[..., target] = 1.0
    else:
        if target.shape != gram.shape[:-1]:
            raise ValueError(
                f"window_coefficients: expected a target of shape {tuple(gram.shape[:-1])}, got {tuple(target.shape)}"
            )
        right = target.to(torch.float64)
    if not isinstance(damping, Tensor):
        damping = torch.full((), damping, dtype=torch.float64, device=gram.device)
    return Coefficients(*_run(gram, right, damping, denominator))


@op(
    "inverse_fisher_solve",
    fake=lambda gram, right, *_: (torch.empty_like(right), right.new_empty(right.shape[:-1], dtype=torch.int32)),
)
def _run(gram: Tensor, right: Tensor, damping: Tensor, denominator: float) -> tuple[Tensor, Tensor]:
    matrix = gram / denominator
    matrix.diagonal(dim1=-2, dim2=-1).add_(damping.to(torch.float64).unsqueeze(-1))
    factor, info = torch.linalg.cholesky_ex(matrix)
    values = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    failed = (info != 0) | ~_is_accurate(gram, values, damping, denominator)
    status = torch.zeros(failed.shape, dtype=torch.int32, device="cpu")
    failed_on_host = failed.cpu()  # the one wait for the device
    if failed_on_host.any():
        dampings = damping.expand(failed.shape)
        for where in map(tuple, failed_on_host.nonzero().tolist()):
            solved = _solve_badly_conditioned(gram[where], right[where], dampings[where], denominator)
            values[where], status[where] = solved
    return values, status.to(gram.device, non_blocking=True)


def _is_accurate(gram: Tensor, values: Tensor, damping: Tensor, denominator: float) -> Tensor:
    """Whether the result is larger than what rounding K and the rows' combination makes of it; False for NaN.

    With A = damping * I + K / s, an error E of K changes G^T c by -G^T A^-1 E c / s. The norm of G^T A^-1 is at most
    max_x x / (damping + x^2 / s) = sqrt(s / damping) / 2, and that of E c at most eps sqrt(tr K) sum |c_i| |g_i|.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1)
    magnitude = (values.abs() * squares.sqrt()).sum(dim=-1)
    rounding = EPS * (1 + (squares.sum(dim=-1) / (damping * denominator)).sqrt() / 2) * magnitude
    squared_norm = (values * (gram @ values.unsqueeze(-1)).squeeze(-1)).sum(dim=-1)
    return (rounding == 0) | (rounding <= _TOLERATED * squared_norm.clamp_min(0).sqrt())


def _solve_badly_conditioned(gram: Tensor, right: Tensor, damping: Tensor, denominator: float) -> tuple[Tensor, int]:
    """Solve one system [n, n] with a little more damping or, if that fails, by its eigenvalues."""
    if not torch.isfinite(gram).all():
        raise ValueError(
            "the Gram matrix of the window has entries that are not finite: a gradient was not finite, or its squared "
            "norm exceeds fp64. Skip such gradients or clip them before they are stored."
        )
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    matrix = gram / denominator + damping * identity
    jitter = _FIRST_JITTER * matrix.diagonal().mean()
    for attempt in range(1, JITTERS + 1):
        factor, info = torch.linalg.cholesky_ex(matrix + jitter * identity)
        if not info:
            values = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
            if _is_accurate(gram, values, damping, denominator):
                return values, attempt
        jitter = jitter * 10
    eigenvalues, vectors = torch.linalg.eigh(gram)
    resolved = eigenvalues > _NOISE * EPS * eigenvalues[-1]
    inverse = torch.where(resolved, 1 / (damping + eigenvalues / denominator), 0.0)
    return vectors @ (inverse * (vectors.T @ right)), EIGEN


def _check(gram: Tensor, damping: float | Tensor, denominator: float) -> None:
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or not gram.shape[-1] or gram.dtype != torch.float64:
        raise ValueError(
            f"window_coefficients: expected a float64 Gram matrix [..., n, n], n >= 1; got {tuple(gram.shape)} in "
            f"{gram.dtype}"
        )
    # the value of a tensor is not checked, because reading it would wait for the device
    if not isinstance(damping, Tensor) and not 0 < damping < float("inf"):
        raise ValueError(f"window_coefficients: expected a damping > 0, got {damping}")
    if isinstance(damping, Tensor) and damping.dim() and damping.shape != gram.shape[:-2]:
        raise ValueError(
            f"window_coefficients: expected a damping of shape {tuple(gram.shape[:-2])}, got {tuple(damping.shape)}"
        )
    if not denominator > 0:
        raise ValueError(f"window_coefficients: expected a denominator > 0, got {denominator}")
