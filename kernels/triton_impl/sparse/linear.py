"""Products with matrices of values and bit masks: a program per few rows of the matrix and rows of x.

Bytes: each tile of rows of x reads mask and values once: 1/8 byte per entry of the matrix, and the values' bytes per
nonzero. Neighbouring lanes take neighbouring columns, and thus neighbouring values. The index of a value is the number
of bits before its own. Many rows of x use expanded tiles, because tensor cores need them.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.matrices.dense_product import product
from leanstep.kernels.reference.sparse.bitmask import row_tiles
from leanstep.kernels.triton_impl._common import TL_DTYPE, round_to, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import on_device, warps

THREADS = 128
# rows of x in a tile -> rows of the matrix and words of the mask of each in a tile
TILES = {1: (4, 16), 4: (4, 8)}
# up to this number of rows of x, the packed product runs
FEW = 16
# rows of an expanded tile are whole blocks of the BLAS
BLOCK = 64
WORD = tl.constexpr(32)


@triton.jit
def count_bits(x):
    """Bits that are set in each int32: sums of groups of 1, 2, 4 and 8 bits."""
    # each constant also clears the copies of a shifted sign
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def expanded(
    v_ptr, m_ptr, s_ptr, begin, offs_o, w, rows, words, count,
    INT4: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Values [BLOCK_O, BLOCK_W * WORD] of the words from `w` on, as fp32, and where the values of later words begin."""
    offs_w = w + tl.arange(0, BLOCK_W)
    mask = (offs_o < rows)[:, None] & (offs_w < words)[None, :]
    bits = tl.load(m_ptr + offs_o.to(tl.int64)[:, None] * words + offs_w[None, :], mask=mask, other=0)
    counts = count_bits(bits)
    first = begin[:, None] + tl.cumsum(counts, 1) - counts
    lane = tl.arange(0, WORD)[None, None, :]
    index = first[:, :, None] + count_bits(bits[:, :, None] & ((1 << lane) - 1))
    # damaged masks and offsets must not read outside of the values
    stored = (((bits[:, :, None] >> lane) & 1) != 0) & (index >= 0) & (index < count)
    if INT4:
        # two codes in a byte, in two's complement; two words of the mask share a scale
        byte = tl.load(v_ptr + index // 2, mask=stored, other=0).to(tl.int32)
        codes = ((byte >> (index % 2 * 4).to(tl.int32)) & 15) ^ 8
        scales = s_ptr + offs_o.to(tl.int64)[:, None] * ((words + 1) // 2) + offs_w[None, :] // 2
        scale = to_float(tl.load(scales, mask=mask, other=0.0))
        v = tl.where(stored, (codes - 8).to(tl.float32) * scale[:, :, None], 0.0)
    else:
        v = to_float(tl.load(v_ptr + index, mask=stored, other=0))
    return tl.reshape(v, [BLOCK_O, BLOCK_W * WORD]), begin + tl.sum(counts, 1)


@triton.jit(do_not_specialize=["tokens", "rows", "columns", "words", "count"])
def bitmask_linear_kernel(
    x_ptr, v_ptr, m_ptr, o_ptr, b_ptr, s_ptr, out_ptr, tokens, rows, columns, words, count,
    HAS_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr, INT4: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of x times BLOCK_O rows of the matrix, BLOCK_W words of the mask at a time."""
    offs_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = tl.load(o_ptr + offs_o, mask=offs_o < rows, other=0)
    x_rows = x_ptr + offs_t.to(tl.int64)[:, None] * columns
    sums = tl.zeros([BLOCK_T, BLOCK_O, BLOCK_W * WORD], dtype=tl.float32)
    for w in range(0, words, BLOCK_W):
        v, begin = expanded(v_ptr, m_ptr, s_ptr, begin, offs_o, w, rows, words, count, INT4, BLOCK_O, BLOCK_W)
        column = (tl.arange(0, BLOCK_W * WORD) + w * WORD)[None, :]
        x = to_float(tl.load(x_rows + column, mask=(column < columns) & (offs_t < tokens)[:, None], other=0.0))
        sums += x[:, None, :] * v[None, :, :]
    total = tl.sum(sums, 2)
    if HAS_SCALES:
        total = total * tl.load(s_ptr + offs_o, mask=offs_o < rows, other=0.0)[None, :]
    if HAS_BIAS:
        total = total + to_float(tl.load(b_ptr + offs_o, mask=offs_o < rows, other=0.0))[None, :]
    at = out_ptr + offs_t.to(tl.int64)[:, None] * rows + offs_o[None, :]
    mask = (offs_t < tokens)[:, None] & (offs_o < rows)[None, :]
    tl.store(at, round_to(total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first", "rows", "columns", "words", "count"])
def bitmask_expand_kernel(
    v_ptr, m_ptr, o_ptr, s_ptr, out_ptr, first, rows, columns, words, count,
    HAS_SCALES: tl.constexpr, INT4: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Rows `first` to `rows` of the matrix, row-major; BLOCK_O of them."""
    offs_o = first + tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    begin = tl.load(o_ptr + offs_o, mask=offs_o < rows, other=0)
    to = out_ptr + (offs_o - first).to(tl.int64)[:, None] * columns
    for w in range(0, words, BLOCK_W):
        v, begin = expanded(v_ptr, m_ptr, s_ptr, begin, offs_o, w, rows, words, count, INT4, BLOCK_O, BLOCK_W)
        if HAS_SCALES:
            v = v * tl.load(s_ptr + offs_o, mask=offs_o < rows, other=0.0)[:, None]
        column = (tl.arange(0, BLOCK_W * WORD) + w * WORD)[None, :]
        mask = (offs_o < rows)[:, None] & (column < columns)
        tl.store(to + column, round_to(v, out_ptr.dtype.element_ty), mask=mask)


def bitmask_linear(
    x: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, bias: Tensor | None, scales: Tensor | None
) -> Tensor:
    """`x W^T + bias` for row-major parts, none empty but the values."""
    tokens, (rows, words), columns = len(x), mask.shape, x.shape[1]
    out = x.new_empty(tokens, rows)
    if tokens > FEW:
        for begin, end, tile in _tiles(x, values, mask, offsets, columns, scales):
            out[:, begin:end] = product(x, tile.T, None if bias is None else bias[begin:end])
        return out
    block_t = 1 if tokens == 1 else 4
    block_o, block_w = TILES[block_t]
    if values.dtype is torch.uint8:
        # masks of larger tiles of 4-bit codes spill on gfx942
        block_w //= 2
    with on_device(x.device):
        bitmask_linear_kernel[(triton.cdiv(rows, block_o), triton.cdiv(tokens, block_t))](
            x, values, mask, offsets, x if bias is None else bias.contiguous(),
            offsets if scales is None else scales.contiguous(), out, tokens, rows, columns, words, _count(values),
            HAS_BIAS=bias is not None, **_scale_flags(values, scales),
            BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_W=block_w, num_warps=warps(THREADS), enable_fp_fusion=True,
        )  # fmt: skip
    return out


def bitmask_linear_backward(
    grad: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, columns: int, scales: Tensor | None
) -> Tensor:
    """`grad W`, with sums over tiles in fp32."""
    sums = grad.new_zeros(len(grad), columns, dtype=torch.float32)
    for begin, end, tile in _tiles(grad, values, mask, offsets, columns, scales):
        sums += product(grad[:, begin:end], tile)
    return sums.to(grad.dtype)


def _tiles(
    x: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, columns: int, scales: Tensor | None
) -> Iterator[tuple[int, int, Tensor]]:
    """Expand the matrix to x's dtype, a tile of rows at a time, all in the same memory."""
    buffer = None
    for begin, end in row_tiles(len(mask), columns, BLOCK):
        if buffer is None:
            buffer = x.new_empty(end - begin, columns)
        block_o, block_w = TILES[4]
        with on_device(x.device):
            bitmask_expand_kernel[(triton.cdiv(end - begin, block_o),)](
                values, mask, offsets, offsets if scales is None else scales.contiguous(), buffer,
                begin, end, columns, mask.shape[1], _count(values), **_scale_flags(values, scales),
                BLOCK_O=block_o, BLOCK_W=block_w, num_warps=warps(THREADS), enable_fp_fusion=True,
            )  # fmt: skip
        yield begin, end, buffer[: end - begin]


def _count(values: Tensor) -> int:
    return 2 * len(values) if values.dtype is torch.uint8 else len(values)


def _scale_flags(values: Tensor, scales: Tensor | None) -> dict[str, bool]:
    """Whether rows have scales, and whether blocks of 4-bit codes have them."""
    int4 = values.dtype is torch.uint8
    return {"HAS_SCALES": scales is not None and not int4, "INT4": int4}


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return their promises."""
    mask, offsets, scales = torch.zeros(9, 1, dtype=torch.int32), torch.zeros(10, dtype=torch.int64), torch.zeros(9)
    blocks = torch.zeros(9, 1, dtype=torch.bfloat16)
    kinds: tuple[tuple[torch.dtype | None, Tensor | None], ...] = (
        (None, None), (torch.int8, scales), (torch.uint8, blocks)
    )  # fmt: skip
    for dtype, (codes, of_codes), tokens in itertools.product(TL_DTYPE, kinds, (1, 2, FEW + 1)):
        values = torch.zeros(8, dtype=codes or dtype)
        x, bias = torch.zeros(tokens, 32, dtype=dtype), torch.zeros(9, dtype=dtype)
        bitmask_linear(x, values, mask, offsets, None if tokens == 1 else bias, of_codes)
    return {bitmask_linear_kernel: _promise, bitmask_expand_kernel: _promise}


def _promise(launch: Launch) -> dict[str, Any]:
    out = launch.dtype("out_ptr")
    codes = {"*i8": torch.int8, "*u8": torch.uint8}.get(launch.arguments["v_ptr"])
    stored = codes or launch.dtype("v_ptr")
    rows, tokens = launch.constants["BLOCK_O"], launch.constants.get("BLOCK_T", 0)
    label = f"v {stored} out {out} {tokens} rows" if tokens else f"v {stored} out {out}"
    # two lanes share a byte of two codes, and two words the scale of 64 columns
    int4 = codes is torch.uint8
    value, shared = (1 / 2 + 2 / 64, 1 / 2 + 2 / 64) if int4 else (stored.itemsize, 0)
    return dict(
        label=label.replace("torch.", ""),
        elements=rows * launch.constants["BLOCK_W"] * WORD.value,
        # at no sparsity: a value and a bit; and x, which all programs share, once per rows of the matrix
        read=value + 1 / 8,
        written=0 if tokens else out.itemsize,
        cached=out.itemsize * tokens / rows + shared,
    )
