"""The r-wide products with dropout. A hash computes the mask as x is read, so that it is never stored.

Bytes: reads x once, or reads and writes y once. Every program reads the factors from the cache. The kernels take 16-bit
matrices and ranks up to 64. fp32 products would lose digits on tensor cores, and larger ranks do not fit in registers.
For these, dropout(x) is stored and the BLAS multiplies it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.reference.lora.products import gain, seed_key, threshold
from leanstep.kernels.triton_impl._common import INTERPRETED, TL_DTYPE, load_tile, random_bits, round_to, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import on_device, warps

BLOCK, THREADS = 2048, 256
# rows and columns of a tile of x or y
BLOCK_M, BLOCK_K, DOT_THREADS = 64, 64, 256
# the same in lora_down, which also holds the sums of all ranks in registers; larger tiles would spill
DOWN_M, DOWN_K = 32, 32
RANKS = (16, 64)
# rows of x that one program sums into a gradient
CHUNK = 1024


@triton.jit
def _survives(index, key, limit):
    """Whether dropout keeps the element at a 64-bit row-major index; key and limit are uint32."""
    high = random_bits((index >> 32).to(tl.uint32), tl.zeros([], dtype=tl.uint32))
    return random_bits(index.to(tl.uint32), key ^ high) >= limit


@triton.jit
def _operand(x, DTYPE: tl.constexpr):
    """Convert to DTYPE, for a product. The interpreter keeps fp32, because its bf16 products are wrong."""
    return to_float(x) if INTERPRETED else x.to(DTYPE)


@triton.jit
def _dropout_tile(x_ptr, out_ptr, start, offs, mask, key, limit, gain):
    x = to_float(load_tile(x_ptr + offs, mask)) * gain
    survives = _survives(start + offs, key, limit)
    tl.store(out_ptr + offs, round_to(tl.where(survives, x, 0.0), out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["numel", "key", "limit", "gain"])
def lora_dropout_kernel(x_ptr, out_ptr, numel: tl.int64, key, limit, gain, BLOCK: tl.constexpr):
    """dropout(x) of BLOCK elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    key, limit = key.to(tl.uint32, bitcast=True), limit.to(tl.uint32, bitcast=True)
    if start + BLOCK <= numel:
        _dropout_tile(x_ptr + start, out_ptr + start, start, lane, None, key, limit, gain)
    else:
        _dropout_tile(x_ptr + start, out_ptr + start, start, lane, lane < numel - start, key, limit, gain)


@triton.jit
def _dropped(x_ptr, offs_m, offs_n, rows, columns, key, limit, gain):
    """A tile of dropout(x), rounded as in the definition."""
    at = offs_m.to(tl.int64)[:, None] * columns + offs_n[None, :]
    mask = (offs_m < rows)[:, None] & (offs_n < columns)[None, :]
    x = to_float(tl.load(x_ptr + at, mask=mask, other=0.0)) * gain
    return round_to(tl.where(_survives(at, key, limit), x, 0.0), x_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["rows", "n", "r", "key", "limit", "gain"])
def lora_down_kernel(
    x_ptr, a_ptr, h_ptr, rows, n, r, key, limit, gain,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of dropout(x) a^T."""
    key, limit = key.to(tl.uint32, bitcast=True), limit.to(tl.uint32, bitcast=True)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    dtype = x_ptr.dtype.element_ty
    sums = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(0, n, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = _dropped(x_ptr, offs_m, offs_k, rows, n, key, limit, gain)
        mask = (offs_r < r)[:, None] & (offs_k < n)[None, :]
        a = tl.load(a_ptr + offs_r.to(tl.int64)[:, None] * n + offs_k[None, :], mask=mask, other=0.0)
        sums = tl.dot(_operand(x, dtype), tl.trans(_operand(a, dtype)), sums)
    at = offs_m.to(tl.int64)[:, None] * r + offs_r[None, :]
    tl.store(h_ptr + at, round_to(sums, dtype), mask=(offs_m < rows)[:, None] & (offs_r < r)[None, :])


@triton.jit(do_not_specialize=["rows", "n", "r", "key", "limit", "gain"])
def lora_down_backward_kernel(
    x_ptr, e_ptr, out_ptr, rows, n, r, key, limit, gain,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BLOCK_K columns of e^T dropout(x), over CHUNK rows; out is [chunks, r, n] in fp32."""
    key, limit = key.to(tl.uint32, bitcast=True), limit.to(tl.uint32, bitcast=True)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    dtype = x_ptr.dtype.element_ty
    sums = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for start in range(0, CHUNK, BLOCK_M):
        offs_m = tl.program_id(1) * CHUNK + start + tl.arange(0, BLOCK_M)
        x = _dropped(x_ptr, offs_m, offs_k, rows, n, key, limit, gain)
        mask = (offs_m < rows)[:, None] & (offs_r < r)[None, :]
        e = tl.load(e_ptr + offs_m.to(tl.int64)[:, None] * r + offs_r[None, :], mask=mask, other=0.0)
        sums = tl.dot(tl.trans(_operand(e, dtype)), _operand(x, dtype), sums)
    at = (tl.program_id(1).to(tl.int64) * r + offs_r)[:, None] * n + offs_k[None, :]
    tl.store(out_ptr + at, sums, mask=(offs_r < r)[:, None] & (offs_k < n)[None, :])


@triton.jit(do_not_specialize=["rows", "m", "r", "scale", "key", "limit", "gain"])
def lora_up_kernel(
    y_ptr, h_ptr, b_ptr, rows, m, r, step_r, step_m, scale, key, limit, gain,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of y += dropout(scale h b), in place."""
    key, limit = key.to(tl.uint32, bitcast=True), limit.to(tl.uint32, bitcast=True)
    # one dimension, row by row: the others of a grid have at most 65535 programs
    tiles = tl.cdiv(m, BLOCK_N)
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    dtype = y_ptr.dtype.element_ty
    mask_h = (offs_m < rows)[:, None] & (offs_r < r)[None, :]
    h = tl.load(h_ptr + offs_m.to(tl.int64)[:, None] * r + offs_r[None, :], mask=mask_h, other=0.0)
    mask_b = (offs_r < r)[:, None] & (offs_n < m)[None, :]
    offs_b = offs_r.to(tl.int64)[:, None] * step_r + offs_n.to(tl.int64)[None, :] * step_m
    b = tl.load(b_ptr + offs_b, mask=mask_b, other=0.0)
    product = tl.dot(_operand(h, dtype), _operand(b, dtype)) * (scale * gain)
    at = offs_m.to(tl.int64)[:, None] * m + offs_n[None, :]
    mask = (offs_m < rows)[:, None] & (offs_n < m)[None, :]
    y = to_float(tl.load(y_ptr + at, mask=mask, other=0.0)) + tl.where(_survives(at, key, limit), product, 0.0)
    tl.store(y_ptr + at, round_to(y, dtype), mask=mask)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """`x / (1 - p)` where the mask is True, 0 elsewhere; x row-major. Equal to the definition bit for bit."""
    out = torch.empty_like(x)
    with on_device(x.device):
        lora_dropout_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x, out, x.numel(), *_scalars(p, seed), BLOCK=BLOCK, num_warps=warps(THREADS), enable_fp_fusion=False
        )
    return out


def lora_down(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """`dropout(x) a^T`; x row-major."""
    (rows, n), r = x.shape, a.shape[0]
    if _block_r(x, r) is None:
        return dropout(x, p, seed) @ a.t()
    h = x.new_empty(rows, r)
    with on_device(x.device):
        lora_down_kernel[(triton.cdiv(rows, DOWN_M),)](
            x, a.contiguous(), h, rows, n, r, *_scalars(p, seed), BLOCK_M=DOWN_M, BLOCK_K=DOWN_K,
            BLOCK_R=_block_r(x, r), num_warps=warps(DOT_THREADS), enable_fp_fusion=True,
        )  # fmt: skip
    return h


def lora_down_backward(x: Tensor, e: Tensor, a: Tensor | None, p: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """`e^T dropout(x)`; with `a`, also `dropout(x) a^T`; x row-major."""
    (rows, n), r = x.shape, e.shape[1]
    if _block_r(x, r) is None:
        dropped = dropout(x, p, seed)
        return e.t() @ dropped, None if a is None else dropped @ a.t()
    chunks = triton.cdiv(rows, CHUNK)
    sums = x.new_empty(chunks, r, n, dtype=torch.float32)
    with on_device(x.device):
        lora_down_backward_kernel[(triton.cdiv(n, BLOCK_K), chunks)](
            x, e.contiguous(), sums, rows, n, r, *_scalars(p, seed), BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K,
            BLOCK_R=_block_r(x, r), CHUNK=CHUNK, num_warps=warps(DOT_THREADS), enable_fp_fusion=True,
        )  # fmt: skip
    return sums.sum(0).to(x.dtype), None if a is None else lora_down(x, a, p, seed)


def lora_up_(y: Tensor, h: Tensor, b: Tensor, scale: float, p: float, seed: int) -> None:
    """`y += dropout(scale h b)`, in place; y row-major."""
    (rows, m), r = y.shape, h.shape[1]
    if _block_r(y, r) is None:
        y.add_(dropout(h @ b, p, seed), alpha=scale)
        return
    with on_device(y.device):
        lora_up_kernel[(triton.cdiv(m, BLOCK_K) * triton.cdiv(rows, BLOCK_M),)](
            y, h.contiguous(), b, rows, m, r, *b.stride(), scale, *_scalars(p, seed), BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_K, BLOCK_R=_block_r(y, r), num_warps=warps(DOT_THREADS), enable_fp_fusion=True,
        )  # fmt: skip


def _block_r(x: Tensor, r: int) -> int | None:
    """The tile width for a rank, or None if the BLAS computes the product."""
    if x.dtype == torch.float32:
        return None
    return next((block for block in RANKS if r <= block), None)


def _scalars(p: float, seed: int) -> tuple[int, int, float]:
    """Key and threshold as signed 32-bit numbers, and the gain."""
    limit = min(threshold(p), 2**32 - 1)
    return seed_key(seed), limit - 2**32 if limit >= 2**31 else limit, gain(p)


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return their promises."""
    for dtype in TL_DTYPE:
        dropout(torch.empty(2**31, dtype=dtype, device="meta"), 0.5, 1)
        for r in RANKS if dtype != torch.float32 else ():
            x, a, h = (torch.zeros(shape, dtype=dtype) for shape in ((BLOCK_M + 1, 16), (r, 16), (BLOCK_M + 1, r)))
            lora_down_backward(x, h, a, 0.5, 1)
            lora_up_(x, h, a, 1.0, 0.5, 1)
    products = dict.fromkeys((lora_down_kernel, lora_down_backward_kernel, lora_up_kernel), _product_promise)
    return products | {lora_dropout_kernel: _dropout_promise}


def _dropout_promise(launch: Launch) -> dict[str, Any]:
    size = launch.dtype("x_ptr").itemsize
    return dict(label=launch.arguments["x_ptr"].strip("*"), elements=BLOCK, read=size, written=size)


def _product_promise(launch: Launch) -> dict[str, Any]:
    name = {lora_down_kernel: "down", lora_down_backward_kernel: "backward", lora_up_kernel: "up"}[launch.kernel]
    block_r, large = launch.constants["BLOCK_R"], "y_ptr" if name == "up" else "x_ptr"
    rows, columns = (DOWN_M, DOWN_K) if name == "down" else (BLOCK_M, BLOCK_K)
    tile, size = rows * columns, launch.dtype(large).itemsize
    # bytes of the factors read per tile, and bytes written per tile (down, backward: once, at a program's end)
    factors = {"down": columns, "backward": rows, "up": rows + columns}[name] * block_r * size
    written = {"down": rows * block_r * size / tile, "backward": block_r * BLOCK_K * 4 / tile, "up": size}[name]
    label = f"{name} {launch.arguments[large].strip('*')} rank {block_r}"
    return dict(label=label, elements=tile, read=size, written=written, cached=factors / tile)
