"""Lion, one tensor at a time, as plain torch: the definition that the fast versions are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels.reference.rounding import narrow, widen


def interpolate(grad: Tensor, exp_avg: Tensor, hyper: Tensor, maximize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient, momentum, c = beta1 * momentum + (1 - beta1) * gradient) in the dtype of ``hyper``."""
    wide = hyper.dtype
    gradient = grad.to(wide)
    if maximize:
        gradient = -gradient
    momentum = exp_avg.to(wide)
    return gradient, momentum, hyper[2] * momentum + hyper[3] * gradient


def lion_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    extra: Tensor | None,
    *,
    hyper: Tensor,
    rounding: str = "nearest",
    cautious_scale: Tensor | None = None,
    decay_where_aligned: bool = False,
    maximize: bool = False,
    skip_nonfinite: bool = True,
    seed: Tensor | int | None = None,
    offset: Tensor | int = 0,
) -> Tensor | None:
    """Update ``param``, ``exp_avg`` and ``extra`` in place; see :func:`leanstep.kernels.steps.lion_step`.

    Args:
        hyper: 1-D [lr, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2], fp32 (fp64 for fp64 parameters).
        cautious_scale: 0-d factor of the entries whose update agrees with the gradient; None turns caution off.

    Returns:
        0-d bool: a gradient entry was not finite. None without ``skip_nonfinite``.
    """
    gradient, momentum, c = interpolate(grad, exp_avg, hyper, maximize)
    update = torch.sign(c)
    if cautious_scale is not None:
        update = torch.where(update * gradient > 0, update * cautious_scale, 0.0)
    weight = widen(param, extra, rounding)
    decayed = weight * hyper[1]
    if decay_where_aligned:
        decayed = torch.where(update * weight >= 0, decayed, weight)
    new_weight = decayed - hyper[0] * update
    new_momentum = hyper[4] * momentum + hyper[5] * gradient
    new_param, new_extra = narrow(new_weight, param, rounding, seed, offset)
    if skip_nonfinite:
        finite = torch.abs(gradient) < float("inf")
        new_param = torch.where(finite, new_param, param.to(new_param.dtype))
        new_momentum = torch.where(finite, new_momentum, momentum)
        if extra is not None and new_extra is not None:
            new_extra = torch.where(finite, new_extra, extra)
    param.copy_(new_param)
    exp_avg.copy_(new_momentum)
    if extra is not None and new_extra is not None:
        extra.copy_(new_extra)
    if not skip_nonfinite:
        return None
    # x - x is 0 for finite x and NaN otherwise. The term in the new momentum is 0 as well (it is finite unless it was
    # not before): it makes the sum depend on the loop above, so that the compiler reads every tensor only once.
    zero = gradient - gradient + 0.0 * new_momentum
    return zero.sum() != 0


def lion_agreement(
    grad: Tensor, exp_avg: Tensor, *, hyper: Tensor, maximize: bool = False, skip_nonfinite: bool = True
) -> Tensor:
    """Number of entries whose update sign(c) agrees with the gradient, as a 0-d fp32 tensor."""
    gradient, _, c = interpolate(grad, exp_avg, hyper, maximize)
    agrees = torch.sign(c) * gradient > 0
    if skip_nonfinite:
        agrees = agrees & (torch.abs(gradient) < float("inf"))
    return agrees.sum().to(torch.float32)
