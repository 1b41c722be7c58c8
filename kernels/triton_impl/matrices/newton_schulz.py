"""Batched products whose results are symmetric: X X^T, and beta S + alpha L R of symmetric matrices that commute.

A program computes one tile on or below the diagonal and stores it twice, the second time mirrored. This takes half the
operations of a general product. Sums are fp32. Results are exactly symmetric.

Bytes: each tile of the result reads a block of rows of each factor, from the cache or memory. The base is read on and
below the diagonal. The result is written once.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.triton_impl._common import INTERPRETED, TL_DTYPE, round_to, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import has_aligned_rows, on_device, warps

# (BLOCK, BLOCK_K, threads). Unaligned sizes need smaller blocks, because storing single entries takes registers.
ALIGNED, UNALIGNED = (128, 64, 256), (64, 32, 256)
DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _tile_of(index):
    """(row, column) of tile number `index` in a lower triangle, counted by rows."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # rounding may have moved the square root across a whole number, up or down
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit
def _load(ptr, offs_m, offs_k, m, k, step, ROWS: tl.constexpr):
    """Load a tile of a matrix [m, k] whose rows (or, without ROWS, columns) are `step` apart; zero outside."""
    mask = (offs_m < m)[:, None] & (offs_k < k)[None, :]
    if ROWS:
        offsets = offs_m.to(tl.int64)[:, None] * step + offs_k[None, :]
    else:
        offsets = offs_m[:, None] + offs_k.to(tl.int64)[None, :] * step
    x = tl.load(ptr + offsets, mask=mask, other=0.0)  # [BLOCK, BLOCK_K]
    # the interpreter multiplies bfloat16 tiles wrongly
    if INTERPRETED:
        x = to_float(x)
    return x


@triton.jit(do_not_specialize=["beta", "alpha"])
def symmetric_product_kernel(
    left, right, base, out, m, k, left_b, left_step, right_b, right_step, base_b, beta, alpha,
    DTYPE: tl.constexpr, HAS_BASE: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of `alpha left right^T + beta base`, [m, m] and contiguous, from factors [m, k].

    If WIDE, sizes and strides other than 1 are multiples of 8. Rounding them down to multiples of 8 proves it to the
    compiler, which then uses 128-bit accesses.
    """
    batch = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _tile_of(tl.program_id(0))
    if WIDE:
        m, k = (m // 8) * 8, (k // 8) * 8
        left_b, right_b, base_b = (left_b // 8) * 8, (right_b // 8) * 8, (base_b // 8) * 8
        left_step, right_step = (left_step // 8) * 8, (right_step // 8) * 8
    offs_m = tile_m * BLOCK + tl.arange(0, BLOCK)
    offs_n = tile_n * BLOCK + tl.arange(0, BLOCK)
    left += batch * left_b
    right += batch * right_b
    sums = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x = _load(left, offs_m, offs_k, m, k, left_step, ROWS)
        y = _load(right, offs_n, offs_k, m, k, right_step, ROWS)
        sums = tl.dot(x, tl.trans(y), sums)
    sums *= alpha
    inside = (offs_m < m)[:, None] & (offs_n < m)[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * m + offs_n[None, :]
    if HAS_BASE:
        sums += beta * to_float(tl.load(base + batch * base_b + offsets, mask=inside, other=0.0))
    tile = round_to(sums, DTYPE)
    mirrored = tl.trans(tile)
    out += batch * m * m
    if tile_m == tile_n:
        # rounding of two factors' sums differs on the two sides of the diagonal: the lower side overwrites the upper
        tile = tl.where(offs_m[:, None] >= offs_n[None, :], tile, mirrored)
    else:
        inside_mirrored = (offs_n < m)[:, None] & (offs_m < m)[None, :]
        tl.store(out + offs_n.to(tl.int64)[:, None] * m + offs_m[None, :], mirrored, mask=inside_mirrored)
    tl.store(out + offsets, tile, mask=inside)


def gram(x: Tensor, out: Tensor) -> Tensor:
    """Write x x^T of [B, m, k] or [m, k] to the contiguous `out`. One of the last two strides of x must be 1."""
    return _launch(x, x, None, 0.0, 1.0, out)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write left right to another tensor `out`. Both are symmetric and contiguous, and commute."""
    return _launch(left, right, None, 0.0, 1.0, out)


def add_product(base: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float, out: Tensor) -> Tensor:
    """Write beta base + alpha left right to another `out`. All are symmetric and contiguous; the factors commute."""
    # the kernel computes left right^T, and right is symmetric
    return _launch(left, right, base, beta, alpha, out)


def _launch(left: Tensor, right: Tensor, base: Tensor | None, beta: float, alpha: float, out: Tensor) -> Tensor:
    rows = left.stride(-1) == 1
    if not rows and left.stride(-2) != 1:
        raise ValueError(f"symmetric product: expected a stride of 1 in the last two dimensions, got {left.stride()}")
    left, right = (t if t.dim() == 3 else t.unsqueeze(0) for t in (left, right))
    batch, m, k = left.shape
    wide = m % 8 == 0 and k % 8 == 0 and all(has_aligned_rows(t if rows else t.mT) for t in (left, right))
    block, block_k, threads = ALIGNED if wide else UNALIGNED
    base_step = 0 if base is None else m * m
    tiles = triton.cdiv(m, block)
    step = -2 if rows else -1
    with on_device(out.device):
        symmetric_product_kernel[(tiles * (tiles + 1) // 2, batch)](
            left, right, out if base is None else base, out, m, k, left.stride(0), left.stride(step),
            right.stride(0), right.stride(step), base_step, beta, alpha, DTYPE=TL_DTYPE[out.dtype],
            HAS_BASE=base is not None, ROWS=rows, WIDE=wide, BLOCK=block, BLOCK_K=block_k, num_warps=warps(threads),
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return what the kernels promise."""
    for dtype, side in itertools.product(DTYPES, (8, 7)):
        x = torch.zeros(side, side, dtype=dtype)
        gram(x, x)
        gram(x.mT, x)
        add_product(x, x, x, 1.0, 1.0, x)
    return {symmetric_product_kernel: _promise}


def _promise(launch: Launch) -> dict[str, Any]:
    dtype, constants = launch.dtype("DTYPE"), launch.constants
    # a product of symmetric matrices, or the Gram matrix of wide or of tall ones
    name = "symmetric" if constants["HAS_BASE"] else "wide" if constants["ROWS"] else "tall"
    return dict(
        label=f"{name} {dtype} {'aligned' if constants['WIDE'] else 'any sizes'}".replace("torch.", ""),
        # a turn of the loop reads a block of each factor and uses every element BLOCK times
        elements=2 * constants["BLOCK"] * constants["BLOCK_K"],
        read=dtype.itemsize,
        written=0,
    )
