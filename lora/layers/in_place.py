"""What is added to a product and multiplied into it: in its own memory, except where somebody may hold on to that."""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels import lora_scale_, lora_up_
from leanstep.kernels._modes import in_dispatch_mode


def add_product(y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """``y + scale h b``, for y [M, m], h [M, r] and b [r, m]."""
    return torch.addmm(y, h, b, alpha=scale) if in_dispatch_mode() else lora_up_(y, h, b, scale)


def add(y: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
    """``y + scale z``."""
    return torch.add(y, z, alpha=scale) if in_dispatch_mode() else y.add_(z, alpha=scale)


def scale_columns(y: Tensor, c: Tensor, bias: Tensor | None = None, keep: bool = False) -> Tensor:
    """``y c + bias``, computed in c's dtype and rounded once; a tensor of its own where y is to be kept as it is."""
    if in_dispatch_mode():
        scaled = y * c
        return (scaled if bias is None else scaled + bias).to(y.dtype)
    return lora_scale_(y.clone() if keep else y, c, bias)
