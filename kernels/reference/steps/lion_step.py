"""Lion, one tensor at a time, as plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels.reference.rounding import narrow, widen
from leanstep.kernels.steps.common import StepOptions


def interpolate(grad: Tensor, exp_avg: Tensor, options: StepOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient, momentum, c = beta1 * momentum + (1 - beta1) * gradient) in the dtype of the scalars."""
    _, _, beta1, one_minus_beta1, *_ = options.scalars
    gradient = grad.to(beta1.dtype)
    if options.maximize:
        gradient = -gradient
    momentum = exp_avg.to(beta1.dtype)
    return gradient, momentum, beta1 * momentum + one_minus_beta1 * gradient


def lion_step(
    param: Tensor, grad: Tensor, exp_avg: Tensor, rounding_state: Tensor | None = None, *, options: StepOptions
) -> Tensor | None:
    """Update ``param``, ``exp_avg`` and ``rounding_state`` in place; see :func:`leanstep.kernels.lion_step`.

    Args:
        options: of one tensor, from :meth:`StepOptions.of`.

    Returns:
        0-d bool: whether the gradient has a non-finite entry. None without ``skip_nonfinite``.
    """
    lr, decay, _, _, beta2, one_minus_beta2 = options.scalars
    gradient, momentum, c = interpolate(grad, exp_avg, options)
    update = torch.sign(c)
    if options.cautious_scale is not None:
        update = torch.where(update * gradient > 0, update * options.cautious_scale, 0.0)
    weight = widen(param, rounding_state, options.rounding)
    decayed = weight * decay
    if options.decay_where_aligned:
        decayed = torch.where(update * weight >= 0, decayed, weight)
    new_weight = decayed - lr * update
    new_momentum = beta2 * momentum + one_minus_beta2 * gradient
    position = (options.seeds, options.offsets, options.runs)
    new_param, new_state = narrow(new_weight, param, options.rounding, *position)
    finite = torch.isfinite(gradient)
    if options.skip_nonfinite:
        new_param = torch.where(finite, new_param, param.to(new_param.dtype))
        new_momentum = torch.where(finite, new_momentum, momentum)
        if rounding_state is not None and new_state is not None:
            new_state = torch.where(finite, new_state, rounding_state)
    param.copy_(new_param)
    exp_avg.copy_(new_momentum)
    if rounding_state is not None and new_state is not None:
        rounding_state.copy_(new_state)
    return ~finite.all() if options.skip_nonfinite else None


def lion_agreement(grad: Tensor, exp_avg: Tensor, options: StepOptions) -> Tensor:
    """Count the entries whose update sign(c) agrees with the gradient, as a 0-d fp32 tensor."""
    gradient, _, c = interpolate(grad, exp_avg, options)
    agrees = torch.sign(c) * gradient > 0
    if options.skip_nonfinite:
        agrees = agrees & torch.isfinite(gradient)
    return agrees.sum().to(torch.float32)
