"""Lion with an 8-bit momentum, one tensor at a time, as plain torch: the definition."""

from __future__ import annotations

from torch import Tensor

from leanstep.kernels.reference.quantization import dequantize, quantize
from leanstep.kernels.reference.steps import lion_step as lion
from leanstep.kernels.steps.common import StepOptions


def lion_step_int8(
    param: Tensor,
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    rounding_state: Tensor | None = None,
    *,
    options: StepOptions,
) -> Tensor | None:
    """Update all but ``grad`` in place; see :func:`leanstep.kernels.lion_step_int8`.

    Args:
        options: of one tensor, from :meth:`StepOptions.of`.

    Returns:
        As :func:`leanstep.kernels.reference.steps.lion_step.lion_step`.
    """
    assert options.seeds is not None
    momentum = dequantize(codes, scales, options.scalars.dtype)
    flag = lion.lion_step(param, grad, momentum, rounding_state, options=options)
    offset = 0 if options.offsets is None else options.offsets
    new_codes, new_scales = quantize(momentum, options.seeds, offset, dtype=codes.dtype)
    codes.copy_(new_codes)
    scales.copy_(new_scales)
    return flag


def lion_agreement_int8(grad: Tensor, codes: Tensor, scales: Tensor, options: StepOptions) -> Tensor:
    """Count the entries whose update agrees with the gradient in sign, as a 0-d fp32 tensor."""
    return lion.lion_agreement(grad, dequantize(codes, scales, options.scalars.dtype), options)
