"""AdamW with 8-bit moments, one tensor at a time, as plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels.reference.quantization import dequantize, quantize
from leanstep.kernels.reference.rounding import narrow, widen
from leanstep.kernels.steps.common import StepOptions


def adamw_step_int8(
    param: Tensor,
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    square_codes: Tensor,
    square_scales: Tensor,
    corrections: Tensor,
    rounding_state: Tensor | None = None,
    *,
    options: StepOptions,
) -> None:
    """Update all but ``grad`` in place; see :func:`leanstep.kernels.steps.adamw_int8.adamw_step_int8`.

    Args:
        corrections: [2], of this tensor.
        options: of one tensor, from :meth:`StepOptions.of`.
    """
    assert options.seeds is not None
    dtype = options.scalars.dtype
    average, square = dequantize(codes, scales, dtype), dequantize(square_codes, square_scales, dtype)
    average, square = adamw_step(param, grad, average, square, corrections, rounding_state, options=options)
    offset = 0 if options.offsets is None else options.offsets
    for old, new in (((codes, scales), average), ((square_codes, square_scales), square)):
        for tensor, value in zip(old, quantize(new, options.seeds, offset, dtype=old[0].dtype), strict=True):
            tensor.copy_(value)


def adamw_step(
    param: Tensor,
    grad: Tensor,
    average: Tensor,
    square: Tensor,
    corrections: Tensor,
    rounding_state: Tensor | None = None,
    *,
    options: StepOptions,
) -> tuple[Tensor, Tensor]:
    """Update the parameter and its rounding state in place, and return the new moments, in fp32 or fp64."""
    decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps = options.scalars
    size, inverse_root = corrections
    gradient = grad.to(decay.dtype)
    if options.maximize:
        gradient = -gradient
    average = beta1 * average + one_minus_beta1 * gradient
    square = beta2 * square + (one_minus_beta2 * gradient) * gradient
    # an infinite square would make its block NaN
    square = square.clamp(max=torch.finfo(torch.float32).max)
    # torch's root of fp32 may differ from the nearest number in the last bit
    root = square.double().sqrt().to(square.dtype)
    weight = widen(param, rounding_state, options.rounding)
    decayed = weight * decay
    if options.decay_where_aligned:
        decayed = torch.where(average * weight >= 0, decayed, weight)
    new_weight = decayed - size * (average / (root * inverse_root + eps))
    new_param, new_state = narrow(new_weight, param, options.rounding, options.seeds, options.offsets, options.runs)
    param.copy_(new_param)
    if rounding_state is not None and new_state is not None:
        rounding_state.copy_(new_state)
    return average, square
