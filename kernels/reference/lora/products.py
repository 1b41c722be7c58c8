"""The r-wide products of a low-rank adapter under seeded dropout, as plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels.reference.rounding import hash32


def seed_key(seed: int) -> int:
    """Hash a 64-bit seed to the signed 32-bit key of an element's hash."""
    key = _hash((seed & 0xFFFFFFFF) ^ _hash((seed >> 32) & 0xFFFFFFFF))
    return key - 2**32 if key >= 2**31 else key


def _hash(x: int) -> int:
    """``hash32`` of :mod:`leanstep.kernels.reference.rounding` for one unsigned Python number."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def keep_mask(shape: torch.Size, p: float, seed: int, device: torch.device) -> Tensor:
    """True where dropout keeps an element: its hash is at least p * 2**32."""
    index = torch.arange(shape.numel(), dtype=torch.int64, device=device)
    key = seed_key(seed) ^ hash32(index >> 32, 0)
    return ((hash32(index, key).to(torch.int64) & 0xFFFFFFFF) >= threshold(p)).view(shape)


def threshold(p: float) -> int:
    """Elements with a hash below this are dropped."""
    return round(p * 2**32)


def gain(p: float) -> float:
    """The factor of kept elements: 1 / (1 - p), which preserves the mean; 0 for p = 1."""
    return 1 / (1 - p) if p < 1 else 0.0


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """``x / (1 - p)`` where the mask is True, 0 elsewhere; rounded once, from fp32 or fp64."""
    if p == 0:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.where(keep_mask(x.shape, p, seed, x.device), x.to(wide) * gain(p), 0.0).to(x.dtype)


def lora_down(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """``dropout(x) a^T``."""
    return dropout(x, p, seed) @ a.t()


def lora_down_backward(x: Tensor, e: Tensor, a: Tensor | None, p: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """``e^T dropout(x)``; with ``a``, also ``dropout(x) a^T``."""
    dropped = dropout(x, p, seed)
    return e.t() @ dropped, None if a is None else dropped @ a.t()


def lora_up_(y: Tensor, h: Tensor, b: Tensor, scale: float, p: float, seed: int) -> None:
    """``y += dropout(scale h b)``, in place."""
    if p == 0:
        y.addmm_(h, b, alpha=scale)
    else:
        y += dropout(torch.mm(h, b), p, seed).mul_(scale)
