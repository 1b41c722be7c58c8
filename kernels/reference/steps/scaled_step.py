"""p <- p * decay - step * (r_i G_ij c_j) on one matrix, as plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels.reference.rounding import narrow, widen
from leanstep.kernels.steps.common import StepOptions


def scaled_update(mat: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """diag(rows) mat diag(cols) for mat [..., m, n], rows [..., m, 1], cols [..., 1, n], in the dtype of ``rows``."""
    return (rows * mat.to(rows.dtype)) * cols


def scaled_step(
    param: Tensor, mat: Tensor, rows: Tensor, cols: Tensor, rounding_state: Tensor | None = None, *,
    options: StepOptions,
) -> None:  # fmt: skip
    """Update ``param`` and ``rounding_state`` in place; see :func:`leanstep.kernels.scaled_step`.

    Args:
        options: of one tensor, from :meth:`StepOptions.of`. The caller handles ``skip_nonfinite``.
    """
    step, decay = options.scalars
    weight = widen(param, rounding_state, options.rounding)
    update = scaled_update(mat, rows.unsqueeze(-1), cols.unsqueeze(-2))
    decayed = weight * decay
    if options.decay_where_aligned:
        decayed = torch.where(update * weight >= 0, decayed, weight)
    new_weight = decayed - step * update
    position = (options.seeds, options.offsets, options.runs)
    new_param, new_state = narrow(new_weight, param, options.rounding, *position)
    param.copy_(new_param)
    if rounding_state is not None and new_state is not None:
        rounding_state.copy_(new_state)
