"""8-bit codes of momenta and of averages of squares, as `leanstep.kernels.reference.quantization` defines them."""

import triton
import triton.language as tl

from leanstep.kernels.triton_impl._common import random_bits

# elements with one scale
SCALED = 128


@triton.jit
def value_of(code, scale):
    """fp32 value of codes: their magnitudes are bits 19 to 26 of the fp32 pattern of 1 + |value| / scale."""
    code = code.to(tl.int32)
    pattern = (tl.abs(code) + 2032) << 19
    magnitude = (pattern.to(tl.float32, bitcast=True) - 1.0) * scale
    # bits in place of selections, whose masks would take more scalar registers than gfx942 has
    return (magnitude.to(tl.int32, bitcast=True) ^ (code & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def quantized(m, pair, shift, seed, SQUARES: tl.constexpr):
    """Codes of a tile of momenta, or of squares, [blocks, SCALED], and the scales [blocks, 1]."""
    # patterns without signs are ordered: finite numbers, infinity, NaNs
    largest = tl.max(m.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    if SQUARES:
        scale = largest.to(tl.float32, bitcast=True) * (1.0 / 63487.0)
        seed = seed ^ 0x5BD1E995
    else:
        scale = largest.to(tl.float32, bitcast=True) * (1.0 / 247.0)
    finite = scale < float("inf")
    usable = finite & (scale >= 7.888609052210118e-31)  # 2**-100
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)
    z = 1.0 + tl.abs(m) * inverse
    random = random_bits(pair, seed ^ 0xFFFFFFFF)
    random = (random >> shift) & 0xFFFF
    pattern = z.to(tl.int32, bitcast=True) + (random.to(tl.int32) << 3)
    if SQUARES:
        # a square above 0 never has code 0
        code = tl.maximum(tl.minimum((pattern >> 19) - 2032, 255), (m > 0).to(tl.int32))
        code = tl.where(usable, code, 0).to(tl.uint8)
    else:
        sign = m.to(tl.int32, bitcast=True) >> 31
        code = tl.where(usable, (tl.minimum((pattern >> 19) - 2032, 127) ^ sign) - sign, 0).to(tl.int8)
    return code, tl.where(finite, tl.where(usable, scale, 0.0), float("nan"))


@triton.jit
def place(block, lane, first_column, columns, per_row, blocks):
    """Offsets and mask of blocks [n, 1] (relative to a program's first) whose program begins at a column of a row."""
    index = first_column // 128 + block
    column = index % per_row * 128
    offs = index // per_row * columns + column - first_column + lane
    return offs, (lane < columns - column) & (block < blocks)
