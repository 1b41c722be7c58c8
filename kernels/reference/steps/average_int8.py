"""An average in 8 bits, one tensor at a time, as plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels.reference.quantization import dequantize, quantize
from leanstep.kernels.steps.common import StepOptions


def average_step_int8(
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    output: Tensor | None,
    skip: Tensor | None,
    *,
    options: StepOptions,
    nesterov: bool,
    update: bool,
) -> None:
    """Update codes and scales, and write the output; see :func:`leanstep.kernels.steps.average_int8.average_step_int8`.

    Args:
        skip: 0-d, of this tensor.
        options: of one tensor, from :meth:`StepOptions.of`.
    """
    assert options.seeds is not None
    old = dequantize(codes, scales, options.scalars.dtype)
    average, result = averages(old, grad, options, nesterov=nesterov, update=update)
    if skip is not None:
        result = torch.where(skip > 0, old, result)
    if output is not None:
        output.copy_(result)
    if not update:
        return
    offset = 0 if options.offsets is None else options.offsets
    new = quantize(average, options.seeds, offset, dtype=codes.dtype)
    for tensor, value in zip((codes, scales), new, strict=True):
        tensor.copy_(value if skip is None else torch.where(skip > 0, tensor, value))


def averages(old: Tensor, grad: Tensor, options: StepOptions, *, nesterov: bool, update: bool) -> tuple[Tensor, Tensor]:
    """Return the new average and the output, of old values in fp32 or fp64."""
    beta, one_minus_beta = options.scalars
    gradient = grad.to(beta.dtype)
    if options.maximize:
        gradient = -gradient
    average = old
    if update:
        # a weight of 0 forgets infinities and NaNs
        average = torch.where(beta == 0, gradient, beta * old + one_minus_beta * gradient)
    return average, beta * average + one_minus_beta * gradient if nesterov else average
