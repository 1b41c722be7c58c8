"""Masked weights with decay in plain torch: the definition."""

import torch
from torch import Tensor


def nm_apply(weight: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    """``weight`` where the mask is True, ``alpha * weight`` elsewhere; exactly +0 there if alpha = 0."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    decayed = (weight.to(wide) * alpha.to(wide)).to(weight.dtype)
    # 0 * inf is NaN, and 0 * (negative) is -0
    return torch.where(mask, weight, torch.where(alpha == 0, torch.zeros_like(decayed), decayed))
