"""DoRA's norms in one pass over a 16-bit weight.

Bytes: reads the weight, B and a matrix of B's size once. Every program reads A from the cache. Each fp32 number of A is
split into three bf16 numbers, whose sum has all of its 24 bits. Their products with a bf16 weight are exact and are
summed in fp32. An fp16 weight is split into two bf16 numbers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.reference.lora import norms as reference
from leanstep.kernels.triton_impl._common import INTERPRETED, round_to, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import on_device, warps

# columns of a tile, and rows of a program by padded rank: with more rows, A is read less often, but by fewer programs
BLOCK_K, THREADS = 64, 256
ROWS = {16: 32, 64: 64}
_DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _rounded(x):
    """Round to bf16, for a product. The interpreter keeps fp32, because its bf16 products are wrong."""
    rounded = round_to(x, tl.bfloat16)
    return to_float(rounded) if INTERPRETED else rounded


@triton.jit
def _products(w, a, sums, HALF: tl.constexpr):
    """``sums + w a^T`` for w with 8 significant bits (11 if HALF) and a with 24."""
    high = _rounded(w)
    a1 = _rounded(a)
    rest = a - to_float(a1)
    a2 = _rounded(rest)
    a3 = _rounded(rest - to_float(a2))
    # small terms first
    sums = tl.dot(high, tl.trans(a3), sums)
    if HALF:
        low = _rounded(w - to_float(high))
        sums = tl.dot(low, tl.trans(a2), sums)
        sums = tl.dot(low, tl.trans(a1), sums)
    sums = tl.dot(high, tl.trans(a2), sums)
    return tl.dot(high, tl.trans(a1), sums)


@triton.jit(do_not_specialize=["m", "tiles", "r", "scale"])
def lora_norms_kernel(
    w_ptr, a_ptr, b_ptr, mix_ptr, squares_ptr, out_ptr, m, tiles, r, scale,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The norms of BLOCK_M rows, each of ``tiles`` tiles."""
    # shows the compiler a multiple of BLOCK_K, so that it uses wide accesses
    n = tiles * BLOCK_K
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    rows = offs_m.to(tl.int64)[:, None]
    inside, ranks = offs_m < m, offs_r < r
    cross = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(0, n, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        w = to_float(tl.load(w_ptr + rows * n + offs_k[None, :], mask=inside[:, None], other=0.0))
        a = tl.load(a_ptr + offs_r.to(tl.int64)[:, None] * n + offs_k[None, :], mask=ranks[:, None], other=0.0)
        cross = _products(w, a, cross, HALF)
    at = rows * r + offs_r[None, :]
    mask = inside[:, None] & ranks[None, :]
    b = tl.load(b_ptr + at, mask=mask, other=0.0)
    mix = tl.load(mix_ptr + at, mask=mask, other=0.0)
    added = tl.sum((2 * scale * cross + mix) * b, 1)
    total = tl.load(squares_ptr + offs_m, mask=inside, other=0.0) + added
    # a NaN stays NaN
    total = tl.where(total < 0, 0.0, total)
    tl.store(out_ptr + offs_m, tl.sqrt_rn(total), mask=inside)


def lora_norms(weight: Tensor, a: Tensor, b: Tensor, mix: Tensor, scale: float, squares: Tensor) -> Tensor:
    """As reference/lora/norms.py, for a, b, mix and squares in fp32."""
    (m, n), r = weight.shape, len(a)
    block_r = next((block for block in ROWS if r <= block), None)
    if weight.dtype not in _DTYPES or block_r is None or n % BLOCK_K or not weight.is_contiguous():
        return reference.lora_norms(weight, a, b, mix, scale, squares)
    norms, rows = torch.empty_like(squares), ROWS[block_r]
    with on_device(weight.device):
        lora_norms_kernel[(triton.cdiv(m, rows),)](
            weight, a.contiguous(), b.contiguous(), mix, squares.contiguous(), norms, m, n // BLOCK_K, r, scale,
            HALF=weight.dtype == torch.float16, BLOCK_M=rows, BLOCK_K=BLOCK_K, BLOCK_R=block_r,
            num_warps=warps(THREADS), enable_fp_fusion=True,
        )  # fmt: skip
    return norms


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return their promises."""
    for dtype in _DTYPES:
        for r in ROWS:
            rows = ROWS[r] + 1
            weight, a, b = torch.zeros(rows, BLOCK_K, dtype=dtype), torch.zeros(r, BLOCK_K), torch.zeros(rows, r)
            lora_norms(weight, a, b, torch.zeros(rows, r), 1.0, torch.zeros(rows))
    return {lora_norms_kernel: _promise}


def _promise(launch: Launch) -> dict[str, Any]:
    dtype, rows, block_r = launch.dtype("w_ptr"), launch.constants["BLOCK_M"], launch.constants["BLOCK_R"]
    tile = rows * BLOCK_K
    return dict(
        label=f"{launch.arguments['w_ptr'].strip('*')} rank {block_r}",
        elements=tile,
        # counts B, the matrix of its size, the squares and the norms once per tile, though they move once per program
        read=dtype.itemsize + (8 * block_r + 4) * rows / tile,
        written=4 * rows / tile,
        cached=4 * block_r * BLOCK_K / tile,
    )
