"""Five ways to round an fp32 update to a parameter of lower precision, as plain torch.

``rounding`` selects the way. ``rounding_state`` is a tensor that three of them need for every parameter:

* ``nearest``: the parameter is widened, updated in fp32 and rounded once.
* ``stochastic``: rounds up or down at random; the nearer value is more likely (bf16 only). The random bits are a hash
  of the element's index and a seed, so a step can be replayed.
* ``kahan``: ``rounding_state`` (parameter's dtype) holds the rounding error. Both together have about 16 bits.
* ``master``: ``rounding_state`` (fp32) is the weight. The parameter is its rounded copy.
* ``split``: the weight has the upper 24 bits of fp32, rounded to nearest, so the error is at most 2**-16 of a normal
  value (bf16 only). The parameter is the bf16 number nearest to it, and ``rounding_state`` (int8) is the difference of
  the two patterns. Halves are rounded away from zero. Zeros, infinities and NaN have no difference: a weight below
  2**-134 is 0.

A parameter may be written from outside between two steps, as by ``model.load_state_dict``. An entry that the rounding
state no longer rounds to is such an entry: its value is the parameter's, and its rounding state is dropped. ``split``
has no bit to spare for this. Every pair is valid, and the difference of an older weight moves a written one by at most
half the distance to the next bf16 number: a step never undoes what was written. It never moves a zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic", "kahan", "master", "split")

# A rounding error is at most half the distance to the next number. Shrunk a little, it changes no rounding.
_SHRINK = 127 / 128

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # as signed 32-bit


def widen(param: Tensor, rounding_state: Tensor | None, rounding: str) -> Tensor:
    """Return the value of a parameter in the dtype of the update: fp64 for fp64 parameters, else fp32."""
    wide = param if param.dtype == torch.float64 else param.float()
    if rounding == "master":
        assert rounding_state is not None
        return torch.where(rounded_to(rounding_state, param.dtype) == param, rounding_state, wide)
    if rounding == "kahan":
        assert rounding_state is not None
        error = rounding_state.to(wide.dtype)
        return torch.where(rounded_to(wide + error * _SHRINK, param.dtype) == param, wide + error, wide)
    if rounding == "split" and param.dtype == torch.bfloat16:
        assert rounding_state is not None
        joined = (wide.view(torch.int32) + (rounding_state.to(torch.int32) << 8)).view(torch.float32)
        return torch.where(torch.isfinite(wide) & (wide != 0), joined, wide)
    return wide


def rounded_to(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to ``dtype``, also in code that torch.compile's inductor generates.

    After a plain conversion, inductor computes on with the unrounded fp32 value. The integer operation prevents that.
    """
    rounded = value.to(dtype)
    if dtype.itemsize == 2 and torch.compiler.is_compiling():
        return (rounded.view(torch.int16) & -1).view(dtype)
    return rounded


def as_int32(value: Tensor | int, device: torch.device) -> Tensor:
    """Convert the low 32 bits to int32."""
    return torch.as_tensor(value, device=device).to(torch.int32)


def hash32(index: Tensor, seed: Tensor | int) -> Tensor:
    """Hash each index to 32 well-mixed bits, as int32: two rounds of xor-shift and multiply, modulo 2**32.

    Args:
        index: integer tensor of element indices; the low 32 bits count.
        seed: integer tensor (0-d or of the index's shape) or int; the low 32 bits count.
    """
    # int32 products wrap; masks turn arithmetic shifts into logical ones
    x = index.to(torch.int32) ^ as_int32(seed, index.device)
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _MULTIPLIERS[0]
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _MULTIPLIERS[1]
    return x ^ ((x >> 16) & 0xFFFF)


def hash_number(index: int, seed: int) -> int:
    """Return :func:`hash32` of Python numbers, as an unsigned number."""
    x = (index ^ seed) & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * _MULTIPLIERS[0] & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * _MULTIPLIERS[1] & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_stochastic(value: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to a bf16 value, still stored in fp32. The dropped fraction is the probability of rounding up.

    Adds the low 16 of ``bits`` to the fp32 pattern and clears the lower half, so E[result] = value. Infinities and NaN
    do not change.
    """
    pattern = (value.view(torch.int32) + (bits & 0xFFFF)) & -0x10000
    return torch.where(torch.isfinite(value), pattern.view(torch.float32), value)


def index_in_whole(index: Tensor | int, runs: Tensor | Sequence[int]) -> Any:
    """Return the indices of a shard's elements in its whole tensor, less that of the first element.

    ``runs``: four numbers, see :class:`leanstep.kernels.StepOptions`.
    """
    elements, distance, count, slab = runs
    run = index // elements
    return run // count * slab + run % count * distance + index % elements


def element_index(like: Tensor, offset: Tensor | int, runs: Tensor | None = None) -> Tensor:
    """Return the row-major index of every element in its whole tensor, modulo 2**32.

    ``offset``: index of the first element of a shard. ``runs``: see :func:`index_in_whole`; None: the shard is one run.
    """
    if runs is not None:
        local = torch.arange(like.numel(), device=like.device)
        return as_int32(index_in_whole(local, runs) + offset, like.device).view(like.shape)
    dtype = torch.int32 if like.numel() < 2**31 else torch.int64
    index = torch.arange(like.numel(), dtype=dtype, device=like.device).to(torch.int32)
    return index.view(like.shape) + as_int32(offset, like.device)


def narrow(
    value: Tensor,
    param: Tensor,
    rounding: str,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    runs: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the parameter's and the state's new values for the fp32 ``value``. The caller's ``copy_`` rounds them."""
    if rounding == "stochastic" and param.dtype == torch.bfloat16:
        assert seed is not None
        return round_stochastic(value, hash32(element_index(value, 0 if offset is None else offset, runs), seed)), None
    if rounding == "kahan":
        rounded = rounded_to(value, param.dtype)
        return rounded, (value - rounded.to(value.dtype)).to(param.dtype)
    if rounding == "master":
        return value, value
    if rounding == "split" and param.dtype == torch.bfloat16:
        return split(value)
    return value, None


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """Round fp32 to 24 bits; return the nearest bf16 number, still stored in fp32, and the int8 difference."""
    # the largest payload of a NaN would overflow
    pattern = torch.where(torch.isnan(value), torch.nan, value).view(torch.int32) + 0x80
    return ((pattern + 0x8000) & -0x10000).view(torch.float32), ((pattern << 16) >> 24).to(torch.int8)
