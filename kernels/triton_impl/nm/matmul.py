"""Products with a compressed N:M matrix: every row of the matrix gathers its entries of a few rows of x.

Bytes: each tile of rows of x reads values and indices once, 5 bytes per stored fp32 weight, 3 in 16 bits. It gathers
one entry of x per stored weight and row from the cache. Products of many rows use the decompressed matrix, because
tensor cores do not gather.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.reference.nm.matmul import decompress
from leanstep.kernels.triton_impl._common import TL_DTYPE, round_to, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import on_device, warps

THREADS = 128
# rows of x in a tile -> rows of the matrix and stored weights of each in a tile
TILES = {1: (16, 64), 4: (16, 32)}
# from this number of rows of x on, the dense product runs
MANY = 32


@triton.jit(do_not_specialize=["tokens", "rows", "length", "n", "m"])
def nm_matmul_kernel(
    x_ptr, v_ptr, i_ptr, out_ptr, tokens, rows, length, n, m, stride_x,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of x times BLOCK_O rows of the matrix; `length` is the number of stored weights of a row."""
    offs_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_o = (offs_o < rows)[None, :, None]
    mask_t = (offs_t < tokens)[:, None, None]
    begin = offs_o.to(tl.int64)[None, :, None] * length
    begin_x = offs_t.to(tl.int64)[:, None, None] * stride_x
    sums = tl.zeros([BLOCK_T, BLOCK_O, BLOCK_K], dtype=tl.float32)
    for k in range(0, length, BLOCK_K):
        offs_k = (k + tl.arange(0, BLOCK_K))[None, None, :]
        mask = mask_o & (offs_k < length)
        v = to_float(tl.load(v_ptr + begin + offs_k, mask=mask, other=0.0))
        index = tl.load(i_ptr + begin + offs_k, mask=mask, other=0).to(tl.int32)
        column = offs_k // n * m + index
        x = to_float(tl.load(x_ptr + begin_x + column, mask=mask & mask_t, other=0.0))
        sums += x * v
    total = tl.sum(sums, 2)
    at = offs_t.to(tl.int64)[:, None] * rows + offs_o[None, :]
    mask = (offs_t < tokens)[:, None] & (offs_o < rows)[None, :]
    tl.store(out_ptr + at, round_to(total, out_ptr.dtype.element_ty), mask=mask)


def nm_matmul(x: Tensor, values: Tensor, indices: Tensor, m: int) -> Tensor:
    """`x W^T` for x [t, in] and compressed W, of one dtype and not empty."""
    tokens, (rows, groups, n) = x.shape[0], values.shape
    if tokens >= MANY:
        return x @ decompress(values, indices, m).T
    x, values, indices = x.contiguous(), values.contiguous(), indices.contiguous()
    out = x.new_empty(tokens, rows)
    block_t = 1 if tokens == 1 else 4
    block_o, block_k = TILES[block_t]
    with on_device(x.device):
        nm_matmul_kernel[(triton.cdiv(rows, block_o), triton.cdiv(tokens, block_t))](
            x, values, indices, out, tokens, rows, groups * n, n, m, x.stride(0),
            BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_K=block_k, num_warps=warps(THREADS), enable_fp_fusion=True,
        )  # fmt: skip
    return out


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return their promises."""
    for dtype, tokens in itertools.product(TL_DTYPE, (1, 2)):
        values = torch.zeros(40, 2, 1, dtype=dtype)
        nm_matmul(torch.zeros(tokens, 8, dtype=dtype), values, values.to(torch.uint8), 4)
    return {nm_matmul_kernel: _promise}


def _promise(launch: Launch) -> dict[str, Any]:
    dtype, block_t = launch.dtype("x_ptr"), launch.constants["BLOCK_T"]
    return dict(
        label=f"x {dtype} {block_t} rows".replace("torch.", ""),
        elements=launch.constants["BLOCK_O"] * launch.constants["BLOCK_K"],
        read=dtype.itemsize + 1,
        written=0,
        # the gathered entries of x; a tile of several rows also reads values and indices once per further row
        cached=dtype.itemsize * block_t + (block_t - 1) * (dtype.itemsize + 1),
    )
