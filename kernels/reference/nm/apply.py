"""Masked weights with decay, and their gradient, in plain torch: the definition."""

import torch
from torch import Tensor


def nm_apply(weight: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    """``weight`` where the mask is True, ``alpha * weight`` elsewhere; exactly +0 there if alpha = 0."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    decayed = (weight.to(wide) * alpha.to(wide)).to(weight.dtype)
    # 0 * inf is NaN, and 0 * (negative) is -0
    return torch.where(mask, weight, torch.where(alpha == 0, torch.zeros_like(decayed), decayed))


def nm_apply_backward(
    grad: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, grad_flow: str, srste_lambda: float
) -> Tensor:
    """Gradient of the weight from the masked weight's; see :func:`leanstep.kernels.nm_apply_backward`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    pruned = grad.to(wide)
    if grad_flow == "decay":
        pruned = pruned * alpha.to(wide)
    elif grad_flow == "fixed":
        pruned = torch.zeros_like(pruned)
    if srste_lambda:
        pruned = pruned + srste_lambda * weight.to(wide)
    return torch.where(mask, grad.to(weight.dtype), pruned.to(weight.dtype))
