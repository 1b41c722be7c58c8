"""DoRA's factor on the columns of an output, and its gradient, as plain torch."""

import torch
from torch import Tensor


def lora_scale_(y: Tensor, c: Tensor, bias: Tensor | None) -> None:
    """``y = y * c + bias``, in place, rounded once."""
    scaled = y * c
    y.copy_(scaled if bias is None else scaled + bias)


def lora_scale_backward(g: Tensor, y: Tensor | None, c: Tensor, inner: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``g * c``, in ``inner`` if given, and the sum of ``g * y`` over the rows, in c's dtype."""
    wide = g.to(c.dtype)
    sums = (torch.zeros_like(wide) if y is None else wide * y.to(c.dtype)).sum(0)
    scaled = wide * c
    return scaled.to(g.dtype) if inner is None else inner.copy_(scaled), sums
