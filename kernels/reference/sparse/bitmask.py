"""Matrices as nonzero values and bit masks, in plain torch: the definition."""

from collections.abc import Iterator

import torch
from torch import Tensor

WORD = 32
# columns whose 4-bit codes share a scale
BLOCK = 64
# entries of a matrix that are expanded at a time
TILE = 1 << 20


def row_tiles(rows: int, columns: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """Bounds of tiles of rows with about TILE entries; all but the last have a multiple of ``step`` rows."""
    height = max(1, TILE // max(1, columns) // step) * step
    for begin in range(0, rows, height):
        yield begin, min(begin + height, rows)


def words(columns: int) -> int:
    """Words of the mask of a row."""
    return -(-columns // WORD)


def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, mask and offsets of a matrix. Everything but +0 is a value."""
    rows, columns = weight.shape
    mask = torch.empty(rows, words(columns), dtype=torch.int32, device=weight.device)
    shifts = torch.arange(WORD, dtype=torch.int32, device=weight.device)
    values, counts = [], []
    for begin, end in row_tiles(rows, columns):
        tile = weight[begin:end]
        stored = (tile != 0) | tile.signbit()
        values.append(tile[stored])
        counts.append(stored.sum(dim=1))
        bits = torch.nn.functional.pad(stored.to(torch.int32), (0, mask.shape[1] * WORD - columns))
        mask[begin:end] = (bits.unflatten(1, (-1, WORD)) << shifts).sum(dim=2, dtype=torch.int32)
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
    if rows:
        torch.cumsum(torch.cat(counts), 0, out=offsets[1:])
    return torch.cat(values) if values else weight.new_empty(0), mask, offsets


def bits_of(mask: Tensor, columns: int) -> Tensor:
    """The bits [rows, columns] of a mask, as bool."""
    shifts = torch.arange(WORD, dtype=torch.int32, device=mask.device)
    return (mask.unsqueeze(-1) >> shifts).bitwise_and_(1).flatten(1)[:, :columns].bool()


def blocks(columns: int) -> int:
    """Blocks of a row, with a scale each."""
    return -(-columns // BLOCK)


def word_counts(mask: Tensor) -> Tensor:
    """Bits that are set in each word of a mask, int32."""
    # sums of neighbouring groups of 1, 2, 4 and 8 bits; each constant also clears the copies of a shifted sign
    counts = mask - ((mask >> 1) & 0x55555555)
    counts = (counts & 0x33333333) + ((counts >> 2) & 0x33333333)
    counts = (counts + (counts >> 4)) & 0x0F0F0F0F
    return (counts * 0x01010101) >> 24


def row_counts(mask: Tensor) -> Tensor:
    """Bits that are set in each row of a mask, int64."""
    return word_counts(mask).sum(dim=1)


def block_counts(mask: Tensor) -> Tensor:
    """Bits that are set in each block of each row of a mask, int64 [rows, blocks]."""
    counts = torch.nn.functional.pad(word_counts(mask), (0, mask.shape[1] % 2))
    return counts.unflatten(1, (-1, BLOCK // WORD)).sum(dim=2)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes of 4 bits, two in a uint8, the first one in the lower half."""
    pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(torch.uint8).unflatten(0, (-1, 2)) & 15
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack_codes(packed: Tensor, first: int, last: int) -> Tensor:
    """Codes first..last of :func:`pack_codes`, int8."""
    pairs = packed[first // 2 : (last + 1) // 2]
    codes = torch.stack([pairs & 15, pairs >> 4], dim=1).flatten()[first % 2 :][: last - first]
    return (codes ^ 8).view(torch.int8) - 8


def unpack_rows(
    values: Tensor, mask: Tensor, offsets: Tensor, scales: Tensor | None, out: Tensor, begin: int, end: int
) -> None:
    """Write rows begin..end of the matrix to ``out`` [end - begin, columns]: value * scale, rounded once."""
    first, last = int(offsets[begin]), int(offsets[end])
    if scales is None:
        entries = values[first:last]
    elif values.dtype is torch.uint8:
        counts = block_counts(mask[begin:end]).flatten()
        entries = unpack_codes(values, first, last).float()
        entries = entries * scales[begin:end].flatten().float().repeat_interleave(counts)
    else:
        counts = offsets[begin : end + 1].diff()
        entries = values[first:last].to(scales.dtype) * scales[begin:end].repeat_interleave(counts)
    out.zero_()
    out[bits_of(mask[begin:end], out.shape[1])] = entries.to(out.dtype)


def quantize(values: Tensor, offsets: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of 8 bits and a scale for each row: the largest magnitude of the row has the code 127 or -127."""
    scales = (_largest(values, offsets) / 127).to(torch.float32) if scales is None else scales
    return _codes(values, offsets, scales, 127), scales


def quantize_int4(values: Tensor, mask: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of 4 bits, packed, and a bf16 scale for each block: its largest magnitude has the code 7 or -7."""
    counts = block_counts(mask)
    offsets = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))
    scales = (_largest(values, offsets) / 7).to(torch.bfloat16) if scales is None else scales
    return pack_codes(_codes(values, offsets, scales.flatten(), 7)), scales.view(counts.shape)


def _largest(values: Tensor, offsets: Tensor) -> Tensor:
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.segment_reduce(values.to(wide).abs(), "max", offsets=offsets, initial=0)


def _codes(values: Tensor, offsets: Tensor, scales: Tensor, most: int) -> Tensor:
    wide = torch.promote_types(values.dtype, torch.float32)
    ratios = values.to(wide) / scales.to(wide).repeat_interleave(offsets.diff())
    # a segment of zeros has the scale 0
    return ratios.nan_to_num(0.0, most, -most).round().clamp_(-most, most).to(torch.int8)
