"""p <- p * decay - step * (r_i G_ij c_j) on one matrix, as plain torch: the definition."""

from __future__ import annotations

from torch import Tensor

from leanstep.kernels.reference.rounding import narrow, widen


def scaled_update(mat: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """diag(rows) mat diag(cols) for mat [..., m, n], rows [..., m, 1], cols [..., 1, n], in the dtype of ``rows``."""
    return (rows * mat.to(rows.dtype)) * cols


def scaled_step(
    param: Tensor,
    mat: Tensor,
    rows: Tensor,
    cols: Tensor,
    extra: Tensor | None,
    *,
    hyper: Tensor,
    rounding: str = "nearest",
    seed: Tensor | int | None = None,
    offset: Tensor | int = 0,
) -> None:
    """Update ``param`` and ``extra`` in place; shapes as for :func:`scaled_update`; see ``kernels.scaled_step``."""
    weight = widen(param, extra, rounding)
    new_weight = weight * hyper[1] - hyper[0] * scaled_update(mat, rows, cols)
    new_param, new_extra = narrow(new_weight, param, rounding, seed, offset)
    param.copy_(new_param)
    if extra is not None and new_extra is not None:
        extra.copy_(new_extra)
