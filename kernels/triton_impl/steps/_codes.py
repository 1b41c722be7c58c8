"""8-bit codes of momenta and of averages of squares, as `leanstep.kernels.reference.quantization` defines them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.triton_impl._common import random_bits
from leanstep.kernels.triton_impl._compile import Launch

# elements with one scale
SCALED = 128


def as_int8(codes: Tensor) -> Tensor:
    """Codes as bytes. Kernels convert fp8 in integers: not every GPU has the format."""
    return codes.view(torch.int8) if codes.dtype == torch.float8_e4m3fn else codes


def coded(label: str, launch: Launch) -> str:
    """The audit's label of a launch, with the codes if they are not int8."""
    return label.replace("torch.", "") + " fp8" * launch.constants["FP8"]


@triton.jit
def value_of(code, scale, FP8: tl.constexpr):
    """fp32 value of codes: their magnitudes are bits 19 to 26 of the fp32 pattern of 1 + |value| / scale; or fp8."""
    code = code.to(tl.int32)
    if FP8:
        magnitude = code & 0x7F
        # ones where the number is subnormal: it has the bits of its sum with 2**-6, but for the exponent
        small = (magnitude - 8) >> 31
        pattern = (magnitude + 960 + (small & 8)) << 20
        unit = pattern.to(tl.float32, bitcast=True) - (small & 0x3C800000).to(tl.float32, bitcast=True)
        value = unit * scale
    else:
        pattern = (tl.abs(code) + 2032) << 19
        value = (pattern.to(tl.float32, bitcast=True) - 1.0) * scale
    # bits in place of selections, whose masks would take more scalar registers than gfx942 has
    return (value.to(tl.int32, bitcast=True) ^ (code & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def load_values(c_ptr, s_ptr, offs, mask, s_offs, s_mask, FP8: tl.constexpr):
    """fp32 values of a tile of codes; the masks are None for a whole tile."""
    if mask is None:
        code = tl.load(c_ptr + offs)
        scale = tl.load(s_ptr + s_offs)
    else:
        code = tl.load(c_ptr + offs, mask=mask, other=0)
        scale = tl.load(s_ptr + s_offs, mask=s_mask, other=0.0)
    return value_of(code, scale, FP8)


@triton.jit
def quantized(m, pair, shift, seed, SQUARES: tl.constexpr, FP8: tl.constexpr):
    """Codes of a tile of momenta, or of squares, [blocks, SCALED], and the scales [blocks, 1]."""
    # patterns without signs are ordered: finite numbers, infinity, NaNs
    largest = tl.max(m.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    if SQUARES:
        scale = largest.to(tl.float32, bitcast=True) * (1.0 / 63487.0)
        seed = seed ^ 0x5BD1E995
    elif FP8:
        scale = largest.to(tl.float32, bitcast=True) * (1.0 / 448.0)
    else:
        scale = largest.to(tl.float32, bitcast=True) * (1.0 / 247.0)
    finite = scale < float("inf")
    usable = finite & (scale >= 7.888609052210118e-31)  # 2**-100
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)
    random = random_bits(pair, seed ^ 0xFFFFFFFF)
    random = (random >> shift) & 0xFFFF
    if FP8:
        z = tl.abs(m) * inverse
        small = (z.to(tl.int32, bitcast=True) - 0x3C800000) >> 31
        z += (small & 0x3C800000).to(tl.float32, bitcast=True)
        pattern = z.to(tl.int32, bitcast=True) + (random.to(tl.int32) << 4)
    else:
        z = 1.0 + tl.abs(m) * inverse
        pattern = z.to(tl.int32, bitcast=True) + (random.to(tl.int32) << 3)
    if FP8:
        code = tl.minimum((pattern >> 20) - 960 - (small & 8), 126) | ((m.to(tl.int32, bitcast=True) >> 24) & 0x80)
        code = tl.where(usable, code, 0).to(tl.uint8).to(tl.int8, bitcast=True)
    elif SQUARES:
        # a square above 0 never has code 0
        code = tl.maximum(tl.minimum((pattern >> 19) - 2032, 255), (m > 0).to(tl.int32))
        code = tl.where(usable, code, 0).to(tl.uint8)
    else:
        sign = m.to(tl.int32, bitcast=True) >> 31
        code = tl.where(usable, (tl.minimum((pattern >> 19) - 2032, 127) ^ sign) - sign, 0).to(tl.int8)
    return code, tl.where(finite, tl.where(usable, scale, 0.0), float("nan"))


@triton.jit
def row_start(first, columns):
    """Blocks of a row of `columns`, the column of block `first`, and the offset of its first element."""
    per_row = (columns + 127) // 128
    first_column = (first % per_row).to(tl.int32) * 128
    return per_row, first_column, first // per_row * columns + first_column


@triton.jit
def place(block, lane, first_column, columns, per_row, blocks):
    """Offsets and mask of blocks [n, 1] (relative to a program's first) whose program begins at a column of a row."""
    index = first_column // 128 + block
    column = index % per_row * 128
    offs = index // per_row * columns + column - first_column + lane
    return offs, (lane < columns - column) & (block < blocks)
