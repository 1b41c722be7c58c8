"""The grid of a ggml type: where the codes of a block lie, and which values they stand for.

ggml chooses the scales of a block, and can write no block of given codes. What a code means is therefore asked of its
reader: a bit whose flip changes one value alone belongs to the code of that value.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from leanstep._gguf.ggml import TYPES, dequantize, quantize

# of a value between the lowest and the highest of its grid; ggml computes in fp32
_SAME = 1e-5
# blocks whose bits are flipped
_SAMPLES = 3


@dataclass(frozen=True)
class Grid:
    """The codes of a type whose values are rounded one by one.

    Attributes:
        type: its name.
        bits: int64 [block, width], the bits of each value's code in the block's bytes, the lowest first.
        codes: int64 [levels], the codes in the order of their values.
        shares: fp32 [levels], increasing from 0 to 1: where each value lies between those of the first and the last.
    """

    type: str
    bits: Tensor
    codes: Tensor
    shares: Tensor

    def ends(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the first and of the last code with the scales of some blocks, each fp32 [blocks, block]."""
        block = len(self.bits)
        low, high = (dequantize(self.with_code(data, int(code)), self.type, block) for code in self.codes[[0, -1]])
        return low, high - low

    def nearest(self, values: Tensor, low: Tensor, span: Tensor) -> Tensor:
        """Number of the level that is nearest to each value, int64; ``low`` and ``span`` are of :meth:`ends`."""
        return torch.bucketize(torch.where(span == 0, 0.0, (values - low) / span), self._middles)

    @cached_property
    def _middles(self) -> Tensor:
        return (self.shares[1:] + self.shares[:-1]) / 2

    def filled(self, data: Tensor, codes: Tensor) -> Tensor:
        """Blocks, uint8 [blocks, bytes], with other codes, int64 [blocks, block]."""
        codes, flat = codes.to(torch.uint8), _unpacked(data)
        for place, bits in enumerate(self.bits.T):
            flat[:, bits] = (codes >> place) & 1
        return _packed(flat)

    def with_code(self, data: Tensor, code: int) -> Tensor:
        """Blocks, uint8 [blocks, bytes], with one code for all values."""
        every = self.filled(torch.zeros_like(data[:1]), torch.full((1, len(self.bits)), 2 ** self.bits.shape[1] - 1))
        this = self.filled(torch.zeros_like(data[:1]), torch.full((1, len(self.bits)), code))
        return data & ~every | this


@cache
def grid_of(type: str) -> Grid | None:
    """The grid of a type; None where codes are those of several values together, which ggml alone can choose."""
    block, size = TYPES[type].block, TYPES[type].size
    samples = quantize(
        torch.randn(_SAMPLES, block, generator=torch.Generator().manual_seed(0)), type, torch.ones(block)
    )
    changed = torch.zeros(8 * size, block, dtype=torch.bool)
    for data in samples.split(1):  # the sign of a zero changes nothing
        flipped = _unpacked(data).repeat(8 * size, 1)
        flipped.diagonal().bitwise_xor_(1)
        changed |= dequantize(_packed(flipped), type, block) != dequantize(data, type, block)
    owners = [changed[:, value] & (changed.sum(dim=1) == 1) for value in range(block)]
    widths = {int(owner.sum()) for owner in owners}
    if len(widths) != 1 or not (width := widths.pop()):
        return None
    bits = torch.stack([owner.nonzero().flatten() for owner in owners])
    unordered = Grid(type, bits, torch.arange(2**width), torch.empty(0))
    # the lowest bit changes a value least; with all other bits 0
    zero, *singles = (
        dequantize(unordered.with_code(data, int(code)), type, block) for code in [0, *(1 << torch.arange(width))]
    )
    order = torch.stack([(single - zero).abs() for single in singles], dim=1)[0].argsort(dim=0)
    bits = bits.gather(1, order.T)
    unordered = Grid(type, bits, torch.arange(2**width), torch.empty(0))
    values = torch.cat([dequantize(unordered.with_code(data, int(code)), type, block) for code in range(2**width)])
    codes = values[:, 0].argsort()
    ordered = values[codes]
    shares = (ordered - ordered[0]) / (ordered[-1] - ordered[0])
    if not bool(((shares - shares[:, :1]).abs() < _SAME).all()):
        return None
    return Grid(type, bits, codes, shares[:, 0].contiguous())


def _unpacked(data: Tensor) -> Tensor:
    """Bits of bytes, uint8 [rows, 8 bytes], the lowest of each byte first."""
    return torch.from_numpy(np.unpackbits(data.numpy(), axis=1, bitorder="little"))


def _packed(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(bits.numpy(), axis=1, bitorder="little"))
