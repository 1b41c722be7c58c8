"""How an fp32 update meets a parameter of lower precision: the four ways, as plain torch.

``rounding`` names the way; ``rounding_state`` is the tensor it keeps beside the parameter:

* ``nearest``: the parameter is widened, updated in fp32 and rounded once. No state.
* ``stochastic``: rounded up or down with probability by distance (bf16 only), from a counter-based hash of the
  element's index and a seed, so that a step can be replayed. No state.
* ``kahan``: ``rounding_state`` (parameter's dtype) holds what rounding dropped; their sum carries
  about 16 bits.
* ``master``: ``rounding_state`` (fp32) is the weight; the parameter is its rounded copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic", "kahan", "master")

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # as signed 32-bit


def widen(param: Tensor, rounding_state: Tensor | None, rounding: str) -> Tensor:
    """The value of a parameter in the dtype the update is computed in (fp32, or fp64 for fp64 parameters)."""
    if rounding == "master":
        assert rounding_state is not None
        return rounding_state
    wide = param if param.dtype == torch.float64 else param.float()
    if rounding == "kahan":
        assert rounding_state is not None
        return wide + rounding_state.to(wide.dtype)
    return wide


def as_int32(value: Tensor | int, device: torch.device) -> Tensor:
    """The low 32 bits as int32."""
    return torch.as_tensor(value, device=device).to(torch.int32)


def hash32(index: Tensor, seed: Tensor | int) -> Tensor:
    """32 well-mixed bits for each index, as int32: two rounds of xor-shift and multiply, modulo 2**32.

    Args:
        index: integer tensor of element indices; the low 32 bits count.
        seed: integer tensor (0-d or of the index's shape) or int; the low 32 bits count.
    """
    # int32 products wrap; an arithmetic shift is made a logical one by masking the bits that came in
    x = index.to(torch.int32) ^ as_int32(seed, index.device)
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _MULTIPLIERS[0]
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _MULTIPLIERS[1]
    return x ^ ((x >> 16) & 0xFFFF)


def round_stochastic(value: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to bf16, up with the probability of the dropped fraction; the result is still fp32.

    The low 16 of ``bits`` are added to the fp32 pattern, then the upper half is kept: E[result] = value. Infinities
    and NaN pass unchanged.
    """
    pattern = (value.view(torch.int32) + (bits & 0xFFFF)) & -0x10000
    return torch.where(torch.isfinite(value), pattern.view(torch.float32), value)


def element_index(like: Tensor, offset: Tensor | int) -> Tensor:
    """Row-major index of every element of ``like``, plus ``offset`` (where this shard starts), modulo 2**32."""
    dtype = torch.int32 if like.numel() < 2**31 else torch.int64
    index = torch.arange(like.numel(), dtype=dtype, device=like.device).to(torch.int32)
    return index.view(like.shape) + as_int32(offset, like.device)


def narrow(
    value: Tensor, param: Tensor, rounding: str, seed: Tensor | int | None = None, offset: Tensor | int | None = None
) -> tuple[Tensor, Tensor | None]:
    """New contents of parameter and rounding state for the fp32 ``value``; ``copy_`` of them rounds."""
    if rounding == "stochastic" and param.dtype == torch.bfloat16:
        assert seed is not None
        return round_stochastic(value, hash32(element_index(value, 0 if offset is None else offset), seed)), None
    if rounding == "kahan":
        rounded = value.to(param.dtype)
        return rounded, (value - rounded.to(value.dtype)).to(param.dtype)
    if rounding == "master":
        return value, value
    return value, None
