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
# makes the random bits of squares independent of those of momenta
_SQUARES = 0x5BD1E995


def scale_shape(shape: torch.Size) -> tuple[int, int]:
    """Return the shape of the scales of a tensor of two or more dimensions: (rows, blocks of a row)."""
    return shape[0], -(-shape[1:].numel() // BLOCK)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of ``codes`` [rows, ...] with fp32 ``scales`` [rows, blocks], in fp32 or fp64."""
    return _entries(decode(_blocks(codes), scales.unsqueeze(-1), dtype), codes)


def quantize(
    values: Tensor, seed: Tensor | int, offset: Tensor | int = 0, *, squares: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (codes, scales) of fp32 or fp64 ``values`` [rows, ...]: int8, or uint8 for squares.

    Args:
        seed: of the random bits, an unsigned 32-bit number.
        offset: index of the first entry in the whole tensor, if ``values`` are some of its rows.
        squares: the values are averages of squares.
    """
    blocks = _blocks(values)
    rows, count, _ = blocks.shape
    scales, inverses = scales_of(blocks.abs().amax(dim=-1, keepdim=True), squares=squares)
    first_row = offset // max(values.shape[1:].numel(), 1)
    pairs = torch.arange(rows * count * (BLOCK // 2), device=blocks.device) + first_row * count * (BLOCK // 2)
    bits = random_bits(pairs, seed, squares=squares)
    random = torch.stack([bits & 0xFFFF, (bits >> 16) & 0xFFFF], dim=-1).view(blocks.shape)
    return _entries(encode(blocks, inverses, random, squares=squares), values), scales.squeeze(-1)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of codes, in fp32 or fp64; the fp32 scales of their blocks broadcast to the codes."""
    wide = codes.to(torch.int32)
    z = ((wide.abs() + _ONE) << _DROPPED).view(torch.float32)
    magnitudes = (z - 1).to(dtype) * scales.to(dtype)
    return torch.where(wide < 0, -magnitudes, magnitudes)


def scales_of(largest: Tensor, *, squares: bool) -> tuple[Tensor, Tensor]:
    """Return the fp32 scales of blocks with these largest magnitudes, and their inverses.

    The inverse is 0 where the block becomes 0 or NaN.
    """
    scales = largest.float() * (1.0 / ((_LARGEST_SQUARE if squares else _LARGEST) - 1.0))
    usable = torch.isfinite(scales) & (scales >= _SMALLEST_SCALE)
    inverses = torch.where(usable, 1.0 / scales, 0.0)
    return torch.where(torch.isfinite(scales), torch.where(usable, scales, 0.0), torch.nan), inverses


def encode(values: Tensor, inverses: Tensor, random: Tensor, *, squares: bool) -> Tensor:
    """Return the codes of values.

    Args:
        values: fp32 or fp64.
        inverses: of the scales, from :func:`scales_of`; broadcast to the values.
        random: 16 random bits for each value. The bits of 1 + |value| / scale below its code are the probability of
            rounding up.
    """
    z = (1.0 + values.abs() * inverses).float()
    codes = ((z.view(torch.int32) + (random << (_DROPPED - 16))) >> _DROPPED) - _ONE
    codes = codes.clamp(max=255 if squares else 127)
    if squares:
        codes = torch.where(values > 0, codes.clamp(min=1), 0)
    codes = torch.where(values < 0, -codes, codes)
    return torch.where(inverses > 0, codes, 0).to(torch.uint8 if squares else torch.int8)


def random_bits(pairs: Tensor, seed: Tensor | int, *, squares: bool) -> Tensor:
    """Return 32 random bits for every pair of neighbours of a block: its first entry takes the lower half.

    Pairs count along blocks and rows of the whole tensor; short blocks have 64 pairs, too. The complement of the seed
    makes the bits independent of those that round parameters.
    """
    return hash32(pairs, ~(seed ^ _SQUARES if squares else seed))


def _blocks(tensor: Tensor) -> Tensor:
    """Cut rows into blocks, [rows, blocks, BLOCK], the last block of a row padded with zeros."""
    rows, blocks = scale_shape(tensor.shape)
    flat = tensor.reshape(rows, tensor.shape[1:].numel())
    return torch.nn.functional.pad(flat, (0, blocks * BLOCK - flat.shape[1])).view(rows, blocks, BLOCK)


def _entries(blocks: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_blocks` for a tensor of the shape of ``like``."""
    return blocks.flatten(1)[:, : like.shape[1:].numel()].reshape(like.shape)
