"""M-FAC's rule, one function per line of the formula in :class:`leanstep.optimizers.MFAC`, in its order.

With the last n gradients as the rows of G, K = G G^T, and the newest gradient g::

    damping_at           damping of this step
    denominator          s
    gram_row             the row of K that belongs to g
    write_gram_row       K with that row and column replaced
    coefficients         c = (damping * I + K / s)^-1 e_newest
    decrease_and_norm    g . u and |u|, from K and c alone
    shortening           min(1, max_update_norm / |u|)
    direction            u = G^T c = F^-1 g
    average              v = momentum * v + (1 - momentum) * u

The last line, p = p * (1 - lr * weight_decay) - lr * v, is :func:`leanstep.kernels.scaled_step`, which also rounds.
u equals F^-1 g with F = damping * I + G^T G / s by the push-through identity
(damping * I + G^T G / s)^-1 G^T = G^T (damping * I + G G^T / s)^-1: nothing is subtracted, so nothing cancels. Any
floating dtype, float64 included; everything of size n or n x n is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import Coefficients, linear_combination, row_dots, window_coefficients


def _sigmoid(t: float) -> float:
    """A logistic curve over [-6, 6], scaled to 0 and 1 at its ends."""
    low, high, here = (1 / (1 + math.exp(-x)) for x in (-6.0, 6.0, 12.0 * t - 6.0))
    return (here - low) / (high - low)


# share of the way from the first damping to the last, at share t of the steps
CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "quadratic": lambda t: t * t,
    "circular": lambda t: 1.0 - math.sqrt(1.0 - t * t),
    "sigmoid": _sigmoid,
}


def damping_at(damping: float, schedule: Sequence[Any] | None, step: int, lr: float | Tensor) -> float:
    """The damping of a step, counted from 0: ``damping`` without a schedule.

    ``schedule``: (curve, steps, last), or ("lr", rate) for damping * lr / rate.
    """
    if schedule is None:
        return damping
    if schedule[0] == "lr":
        # a rate of 0, at the start of a warm-up, would leave no damping at all
        return damping * max(float(lr) / schedule[1], 1e-6)
    curve, steps, last = schedule
    share = min(step / steps, 1.0)
    if curve == "exponential":
        return damping * (last / damping) ** share
    return damping + (last - damping) * CURVES[curve](share)


def denominator(scaling: str, window: int, rows: int) -> int:
    """s: the window's size, or with ``scaling="count"`` the number of rows in it."""
    return window if scaling == "window" else rows


def gram_row(
    windows: Sequence[Tensor],
    gradient: Sequence[Tensor],
    scales: Tensor | None = None,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """G g, fp64 [n], or [grams, n] with ``groups``; one block of columns per parameter. Reads the window once."""
    return row_dots(windows, gradient, scales=scales, groups=groups)


def write_gram_row(gram: Tensor, row: Tensor, index: int) -> None:
    """Replace row and column ``index`` of K [grams, m, m] by ``row`` [grams, n], in place."""
    gram[:, index, : row.shape[1]] = row
    gram[:, : row.shape[1], index] = row


def coefficients(gram: Tensor, damping: float, denominator: float, newest: int) -> Coefficients:
    """c = (damping * I + K / s)^-1 e_newest, fp64 [..., n], and how each system was solved."""
    return window_coefficients(gram, damping, denominator, newest)


def decrease_and_norm(gram: Tensor, coefficients: Tensor, newest: int) -> tuple[Tensor, Tensor]:
    """g . u = (K c)_newest, which is the decrease of the loss per unit of lr, and |u| = sqrt(c^T K c); both [...]."""
    product = (gram @ coefficients.unsqueeze(-1)).squeeze(-1)
    return product[..., newest], (product * coefficients).sum(dim=-1).clamp_min(0.0).sqrt()


def shortening(norm: Tensor, limit: float) -> Tensor:
    """The factor that brings an update of this norm to at most ``limit``."""
    return torch.where(norm > limit, limit / norm, 1.0)


def direction(
    windows: Sequence[Tensor],
    coefficients: Tensor,
    scales: Tensor | None = None,
    groups: Sequence[int] | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """u = G^T c, one block of columns per parameter. Reads the window once."""
    return linear_combination(windows, coefficients, scales=scales, groups=groups, out=out)


def average(buffer: Tensor, update: Tensor, momentum: float) -> Tensor:
    """v = momentum * v + (1 - momentum) * u, as a new tensor."""
    return buffer.lerp(update.to(buffer.dtype), 1.0 - momentum)
