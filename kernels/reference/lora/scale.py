"""DoRA's factor on the columns of an output, and what its gradient needs, as plain torch."""

import torch
from torch import Tensor


def lora_scale_(y: Tensor, c: Tensor, bias: Tensor | None) -> None:
    """``y = y * c + bias``, in place, rounded once."""
    scaled = y * c
    y.copy_(scaled if bias is None else scaled + bias)


def lora_scale_backward(
    g: Tensor, y: Tensor | None, c: Tensor, inner: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``g * c``, in ``inner`` if it is given, and the sums over rows of ``g * y`` and of g, in c's dtype."""
    wide = g.to(c.dtype)
    product = torch.zeros_like(wide) if y is None else wide * y.to(c.dtype)
    sums = product.sum(0), wide.sum(0)
    scaled = wide * c
    return scaled.to(g.dtype) if inner is None else inner.copy_(scaled), *sums
