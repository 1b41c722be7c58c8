"""8-bit codes of a tensor, with one fp32 scale for every 128 neighbours of a row, as plain torch: the definition.

A row is all that one index of the first dimension selects, so a shard along dimension 0 has whole blocks.

* A code is the sign of a value and 7 bits of the floating-point number z = 1 + |value| / scale: 3 bits of exponent and
  4 of mantissa. Neighbours are 3 % to 6 % of z apart, so entries down to a thousandth of the block's largest survive.
* scale = largest magnitude of the block / 247, so z is at most 248, which has code 127; -128 is no code.
  A block with a scale below 2**-100 becomes 0. A block with an infinite or NaN entry becomes NaN.
* Rounding is stochastic, because nearest loses slow changes: a momentum of weight 0.99 moves by 1 % of its distance to
  the gradient, less than half the distance between codes. In fp64, with gradients of constant size of which half change
  their sign for good, four of five of these signs never arrive in a momentum that is rounded to nearest. All arrive
  with stochastic rounding, whose mean is the value. In pure noise it changes the sign of 2 % of Lion's updates.
  ``tests/kernels/test_lion_int8.py`` measures both.
* Averages of squares have no sign and codes of 8 bits: 4 bits of exponent, so z is at most 63488, and 4 of mantissa.
  Rounding is unbiased for the squares. An entry above 0 never has code 0: AdamW would divide a momentum by eps alone.
  ``tests/kernels/test_adamw_int8.py`` measures their errors.
* Codes of dtype ``torch.float8_e4m3fn`` are the value / scale in that format, with scale = largest magnitude / 448,
  its largest number; NaN is no code. Neighbours are 6 % to 12 % apart, twice as far as above, and entries down to
  4e-6 of the block's largest survive. Rounding is stochastic, too. ``tests/kernels/test_fp8_codes.py`` measures both.
  Kernels convert in integers, so hardware needs no such format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels.reference.rounding import hash32

BLOCK = 128

# smallest scale whose inverse, and a value times this inverse, are finite
_SMALLEST_SCALE = 2.0**-100
_LARGEST = 248.0
_LARGEST_SQUARE = 63488.0
_DROPPED = 19  # bits of z below the code
_ONE = 0x3F800000 >> _DROPPED
FP8 = torch.float8_e4m3fn
_LARGEST_FP8 = 448.0
_DROPPED_FP8 = 20
_SMALLEST_NORMAL = 2.0**-6
# codes of normal numbers are the bits of fp32 above the dropped ones, with this much less exponent
_EXPONENT_FP8 = 960
# makes the random bits of squares independent of those of momenta
_SQUARES = 0x5BD1E995


def scale_shape(shape: torch.Size) -> tuple[int, int]:
    """Return the shape of the scales of a tensor of two or more dimensions: (rows, blocks of a row)."""
    return shape[0], -(-shape[1:].numel() // BLOCK)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of ``codes`` [rows, ...] with fp32 ``scales`` [rows, blocks], in fp32 or fp64."""
    return _entries(_blocks(_units(codes)).to(dtype) * scales.unsqueeze(-1).to(dtype), codes)


def quantize(
    values: Tensor, seed: Tensor | int, offset: Tensor | int = 0, *, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """Return (codes, scales) of fp32 or fp64 ``values`` [rows, ...].

    Args:
        seed: of the random bits, an unsigned 32-bit number.
        offset: index of the first entry in the whole tensor, if ``values`` are some of its rows.
        dtype: of the codes: int8 or float8_e4m3fn; uint8 for averages of squares.
    """
    blocks = _blocks(values)
    rows, count, _ = blocks.shape
    scales, inverses = scales_of(blocks.abs().amax(dim=-1, keepdim=True), dtype)
    first_row = offset // max(values.shape[1:].numel(), 1)
    pairs = torch.arange(rows * count * (BLOCK // 2), device=blocks.device) + first_row * count * (BLOCK // 2)
    bits = random_bits(pairs, seed, dtype)
    random = torch.stack([bits & 0xFFFF, (bits >> 16) & 0xFFFF], dim=-1).view(blocks.shape)
    return _entries(encode(blocks, inverses, random, dtype), values), scales.squeeze(-1)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of codes, in fp32 or fp64; the fp32 scales of their blocks broadcast to the codes."""
    return _units(codes).to(dtype) * scales.to(dtype)


def _units(codes: Tensor) -> Tensor:
    """Return the values of codes in units of their scales, exactly, in fp32."""
    if codes.dtype == FP8:
        return codes.float()
    wide = codes.to(torch.int32)
    magnitudes = ((wide.abs() + _ONE) << _DROPPED).view(torch.float32) - 1
    return torch.where(wide < 0, -magnitudes, magnitudes)


def scales_of(largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the fp32 scales of blocks with these largest magnitudes, and their inverses, for codes of a dtype.

    The inverse is 0 where the block becomes 0 or NaN.
    """
    most = _LARGEST_FP8 if dtype == FP8 else (_LARGEST_SQUARE if dtype == torch.uint8 else _LARGEST) - 1.0
    scales = largest.float() * (1.0 / most)
    usable = torch.isfinite(scales) & (scales >= _SMALLEST_SCALE)
    inverses = torch.where(usable, 1.0 / scales, 0.0)
    return torch.where(torch.isfinite(scales), torch.where(usable, scales, 0.0), torch.nan), inverses


def encode(values: Tensor, inverses: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the codes of values.

    Args:
        values: fp32 or fp64.
        inverses: of the scales, from :func:`scales_of`; broadcast to the values.
        random: 16 random bits for each value. The bits of 1 + |value| / scale below its code, or of |value| / scale in
            fp8, are the probability of rounding up.
        dtype: of the codes, as for :func:`quantize`.
    """
    if dtype == FP8:
        return _encode_fp8(values, inverses, random)
    z = (1.0 + values.abs() * inverses).float()
    codes = ((z.view(torch.int32) + (random << (_DROPPED - 16))) >> _DROPPED) - _ONE
    codes = codes.clamp(max=255 if dtype == torch.uint8 else 127)
    if dtype == torch.uint8:
        codes = torch.where(values > 0, codes.clamp(min=1), 0)
    codes = torch.where(values < 0, -codes, codes)
    return torch.where(inverses > 0, codes, 0).to(dtype)


def _encode_fp8(values: Tensor, inverses: Tensor, random: Tensor) -> Tensor:
    units = (values.abs() * inverses).float()
    # the sum of a subnormal number and the smallest normal one has the steps of subnormal numbers
    small = units < _SMALLEST_NORMAL
    pattern = torch.where(small, units + _SMALLEST_NORMAL, units).view(torch.int32)
    codes = ((pattern + (random << (_DROPPED_FP8 - 16))) >> _DROPPED_FP8) - _EXPONENT_FP8
    codes = torch.where(small, codes - 8, codes).clamp(max=126)
    codes = torch.where(torch.signbit(values), codes + 128, codes)
    return torch.where(inverses > 0, codes, 0).to(torch.uint8).view(FP8)


def random_bits(pairs: Tensor, seed: Tensor | int, dtype: torch.dtype) -> Tensor:
    """Return 32 random bits for every pair of neighbours of a block: its first entry takes the lower half.

    Pairs count along blocks and rows of the whole tensor; short blocks have 64 pairs, too. The complement of the seed
    makes the bits independent of those that round parameters.
    """
    return hash32(pairs, ~(seed ^ _SQUARES if dtype == torch.uint8 else seed))


def _blocks(tensor: Tensor) -> Tensor:
    """Cut rows into blocks, [rows, blocks, BLOCK], the last block of a row padded with zeros."""
    rows, blocks = scale_shape(tensor.shape)
    flat = tensor.reshape(rows, tensor.shape[1:].numel())
    return torch.nn.functional.pad(flat, (0, blocks * BLOCK - flat.shape[1])).view(rows, blocks, BLOCK)


def _entries(blocks: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_blocks` for a tensor of the shape of ``like``."""
    return blocks.flatten(1)[:, : like.shape[1:].numel()].reshape(like.shape)
