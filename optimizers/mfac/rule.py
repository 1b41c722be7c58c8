"""M-FAC's rule: one function per line of the formula in :class:`leanstep.optimizers.MFAC`, in its order.

The last n gradients are the rows of G, g is the newest one, and K = G G^T. a is the damping with its shrinkage.
:func:`leanstep.kernels.scaled_step` computes the last line, p = p * (1 - lr * weight_decay) - lr * v, and rounds.
u = F^-1 g with F = a * I + G^T G / s, by the push-through identity
(a * I + G^T G / s)^-1 G^T = G^T (a * I + G G^T / s)^-1. This form has no subtraction, hence no
cancellation. Gradients may have any floating dtype, float64 included; K and c are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from leanstep.kernels import Coefficients, linear_combination, row_dots, window_coefficients


def denominator(scaling: str, window: int, rows: int) -> int:
    """Return s: the window's size, or with ``scaling="count"`` the number of its rows so far."""
    return window if scaling == "window" else rows


def shrinkage_at(gram: Tensor, shrinkage: float, weights: Tensor) -> Tensor:
    """Return shrinkage * tr(K) / (n^2 d): a share 1 / n of F's mean eigenvalue. ``gram`` [grams, n, n], d [grams]."""
    return gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1) * shrinkage / (gram.shape[-1] * weights)


def gram_row(
    windows: Sequence[Tensor],
    gradient: Sequence[Tensor],
    groups: Sequence[int] | None = None,
) -> Tensor:
    """Return G g, fp64 [n], or [grams, n] with ``groups``. Every list has one block of columns per parameter.

    Reads the window once.
    """
    return row_dots(windows, gradient, groups=groups)


def write_gram_row(gram: Tensor, row: Tensor, index: int) -> None:
    """Write ``row`` [grams, n] to row and column ``index`` of K [grams, m, m], in place."""
    gram[:, index, : row.shape[1]] = row
    gram[:, : row.shape[1], index] = row


def coefficients(gram: Tensor, damping: float | Tensor, denominator: float, newest: int) -> Coefficients:
    """Return c = (damping * I + K / s)^-1 e_newest, fp64 [..., n], and the status of each solve."""
    return window_coefficients(gram, damping, denominator, newest)


def decrease_and_norm(gram: Tensor, coefficients: Tensor, newest: int) -> tuple[Tensor, Tensor]:
    """Return g . u = (K c)_newest, the predicted decrease of the loss per unit of lr, and |u| = sqrt(c^T K c)."""
    product = (gram @ coefficients.unsqueeze(-1)).squeeze(-1)
    return product[..., newest], (product * coefficients).sum(dim=-1).clamp_min(0.0).sqrt()


def direction(
    windows: Sequence[Tensor],
    coefficients: Tensor,
    groups: Sequence[int] | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return u = G^T c, one block of columns per parameter. Reads the window once."""
    return linear_combination(windows, coefficients, groups=groups, out=out)


def average(buffer: Tensor, update: Tensor, momentum: float) -> Tensor:
    """Return momentum * v + (1 - momentum) * u as a new tensor."""
    return buffer.lerp(update.to(buffer.dtype), 1.0 - momentum)
