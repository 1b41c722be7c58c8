"""How an fp32 update meets a parameter of lower precision: the four ways, as plain torch.

``rounding`` names the way; ``extra`` is the tensor it keeps beside the parameter:

* ``nearest``: the parameter is widened, updated in fp32 and rounded once. No extra.
* ``stochastic``: rounded up or down with probability by distance (bf16 only), from a counter-based hash of the
  element's index and a seed, so that a step can be replayed. No extra.
* ``kahan``: ``extra`` (parameter's dtype) holds what rounding dropped; parameter + extra carry about 16 bits.
* ``master``: ``extra`` (fp32) is the weight; the parameter is its rounded copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic", "kahan", "master")

_U32 = 0xFFFFFFFF


def widen(param: Tensor, extra: Tensor | None, rounding: str) -> Tensor:
    """The value of a parameter in the dtype the update is computed in (fp32, or fp64 for fp64 parameters)."""
    if rounding == "master":
        assert extra is not None
        return extra
    wide = param if param.dtype == torch.float64 else param.float()
    if rounding == "kahan":
        assert extra is not None
        return wide + extra.to(wide.dtype)
    return wide


def hash32(index: Tensor, seed: Tensor | int) -> Tensor:
    """32 well-mixed bits for each index: two rounds of xor-shift and multiply, in int64 arithmetic modulo 2**32.

    Args:
        index: int64 tensor of element indices; the low 32 bits count.
        seed: int64 tensor (0-d) or int holding an unsigned 32-bit value.
    """
    x = (index & _U32) ^ seed
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _U32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _U32
    return x ^ (x >> 16)


def round_stochastic(value: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to bf16, up with the probability of the dropped fraction.

    The low 16 of ``bits`` are added to the fp32 pattern, then the upper half is kept: E[result] = value. Infinities
    and NaN pass unchanged.
    """
    pattern = value.view(torch.int32).to(torch.int64) & _U32
    pattern = (pattern + (bits & 0xFFFF)) & 0xFFFF0000
    # two's complement: values of 2**31 and more are negative int32
    pattern = torch.where(pattern >= 2**31, pattern - 2**32, pattern).to(torch.int32)
    rounded = pattern.view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value).to(torch.bfloat16)


def element_index(like: Tensor, offset: Tensor | int) -> Tensor:
    """Row-major index of every element of ``like``, plus ``offset`` (where this shard starts in the whole tensor)."""
    return torch.arange(like.numel(), device=like.device).view(like.shape) + offset


def narrow(
    value: Tensor, param: Tensor, rounding: str, seed: Tensor | int | None = None, offset: Tensor | int = 0
) -> tuple[Tensor, Tensor | None]:
    """New contents of (parameter, extra) for the fp32 ``value``, to be written with ``copy_`` (which rounds)."""
    if rounding == "stochastic" and param.dtype == torch.bfloat16:
        assert seed is not None
        return round_stochastic(value, hash32(element_index(value, offset), seed)), None
    if rounding == "kahan":
        rounded = value.to(param.dtype)
        return rounded, (value - rounded.to(value.dtype)).to(param.dtype)
    if rounding == "master":
        return value, value
    return value, None
