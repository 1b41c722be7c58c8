"""The gated activation of a SwiGLU block and its gradient, as plain torch."""

import torch
from torch import Tensor


def swiglu(e: Tensor, u: Tensor) -> Tensor:
    """``silu(e) * u``, in fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(e.dtype, torch.float32)
    return (torch.nn.functional.silu(e.to(wide)) * u.to(wide)).to(e.dtype)


def swiglu_backward_(grad: Tensor, e: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``silu(e) * u`` and the gradients of e and u; the last overwrites ``grad``."""
    wide = torch.promote_types(e.dtype, torch.float32)
    g, x, v = grad.to(wide), e.to(wide), u.to(wide)
    s = torch.sigmoid(x)
    out, de, du = x * s * v, g * v * s * (1 + x * (1 - s)), g * (x * s)
    return out.to(e.dtype), de.to(e.dtype), grad.copy_(du)
