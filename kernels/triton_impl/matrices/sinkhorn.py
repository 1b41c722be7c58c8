"""One square-root Sinkhorn iteration over a list of matrices, in one sweep of each matrix.

A program computes the row scales of a block of rows of one matrix, and adds their squares to the column sums. Rows of
up to `MAX_TILE` columns fit in registers, so every element is loaded once. Wider rows are swept twice (three times in
the first iteration, which searches the largest entries), a few rows at a time, so later sweeps read the cache.

Bytes: each matrix is read from memory once. A second kernel adds the partial column sums in fixed order, so results do
not depend on scheduling. The sums are written and read once: 4 bytes per column and block of at least `ROWS` rows. This
is 1/64 (fp32) or 1/32 (16-bit) of the matrix, and also the extra memory of a call.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.triton_impl._common import TL_DTYPE, aligned_pointer, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import (
    device_programs,
    device_rows,
    has_aligned_rows,
    launches,
    on_device,
    warps,
)

# columns of a register tile -> (rows, threads): 16 elements per thread, which spill on no target
TILES = {512: (8, 256), 1024: (4, 256), 2048: (2, 256), 4096: (1, 256), 8192: (1, 512)}
MAX_TILE = max(TILES)
# widths for unaligned rows: one element per access costs more than a tile's idle part, so fewer widths suffice
UNALIGNED_TILES = (1024, 4096, 8192)
WIDER = 0
WIDE, WIDE_ROWS, WIDE_THREADS = 2048, 2, 512
ROWS = 64  # rows of a block, at least
MAX_BLOCKS = 512  # row blocks per matrix, which the second kernel adds up
REDUCE_ROWS, REDUCE_COLS, REDUCE_THREADS = 16, 128, 256

_FP32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _row_scale(r_prev, sum_of_squares, inv_cols):
    """r_prev / sqrt(mean square); 0 for a zero row, NaN for NaN, and finite for a subnormal row."""
    q = sum_of_squares * inv_cols
    # makes an infinite sum NaN; its scale would be 0
    q += q - q
    r = r_prev / tl.sqrt(tl.where(q == 0, 1.0, q))
    return tl.where(q == 0, 0.0, tl.where(r > _FP32_MAX, _FP32_MAX, r))


@triton.jit
def _first_scale(largest):
    """1 / the row's largest magnitude, 0 for a zero row. 2**-127 is the smallest number with a finite inverse."""
    return tl.where(largest > 0, 1.0 / tl.where(largest > 2.0**-127, largest, 2.0**-127), 0.0)


@triton.jit
def _inverse(total):
    total = total.to(tl.float32)
    return tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def _matrix(row, batch, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to a matrix of the batch, its number of columns and its strides.

    An aligned matrix has rows of unit stride that start on 16-byte boundaries, and its numbers are multiples of 8.
    Rounding them down proves it to the compiler, and that the column mask does not split 128-bit accesses.
    """
    n = tl.load(row + 2).to(tl.int32)
    stride_b = tl.load(row + 3)
    stride_m = tl.load(row + 4)
    stride_n = tl.load(row + 5)
    address = tl.load(row + 0)
    if ALIGNED:
        n = (n // 8) * 8
        ptr = aligned_pointer(address, DTYPE) + batch * ((stride_b // 8) * 8)
        stride_m = (stride_m // 8) * 8
        stride_n = 1
    else:
        ptr = address.to(tl.pointer_type(DTYPE)) + batch * stride_b
    return ptr, n, stride_m, stride_n


@triton.jit
def _row_block(table, programs):
    """The program's row of the table, piece of all row blocks, matrix of the batch, first row and number of rows."""
    entry = tl.load(programs + tl.program_id(0))
    row = table + (entry >> 32) * 16
    piece = (entry & 0xFFFFFFFF).to(tl.int32)
    blocks = tl.load(row + 9).to(tl.int32)
    per_block = tl.load(row + 10)
    start = (piece % blocks) * per_block
    count = tl.minimum(tl.load(row + 1) - start, per_block).to(tl.int32)
    return row, piece, piece // blocks, start, count


@triton.jit
def _partial_sums(row, partial, piece):
    """Pointer to a row block's column sums. Offset and pitch are multiples of 8, which the rounding proves."""
    return partial + (tl.load(row + 8) // 8) * 8 + piece * ((tl.load(row + 13) // 8) * 8)


@triton.jit(do_not_specialize=["first"])
def sinkhorn_tile_kernel(
    table, programs, rows, cols, partial, first,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Iterate on a block of rows of at most BLOCK_N columns, with BLOCK_M rows at a time in registers.

    A row of the table is (address, m, n, stride_b, stride_m, stride_n, rows offset, cols offset, partial offset,
    blocks, rows per block, n, rows_total, partial pitch, column blocks, 0).
    """
    row, piece, batch, start, count = _row_block(table, programs)
    g_ptr, n, stride_m, stride_n = _matrix(row, batch, DTYPE, ALIGNED)
    inv_cols = _inverse(tl.load(row + 11))

    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    known = offs_n < tl.where(first != 0, 0, n)
    c = tl.load(cols + tl.load(row + 7) + batch * tl.load(row + 2) + offs_n, mask=known, other=1.0)
    r_ptr = rows + tl.load(row + 6) + batch * tl.load(row + 1) + start
    g_ptr += start * stride_m
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for t in range(0, tl.cdiv(count, BLOCK_M)):
        offs_m = t * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < count
        mask = mask_m[:, None] & mask_n[None, :]
        g = tl.load(g_ptr + offs_m[:, None] * stride_m + offs_n[None, :] * stride_n, mask=mask, other=0.0)
        g = to_float(g)  # [BLOCK_M, BLOCK_N]
        if first != 0:
            r_prev = _first_scale(tl.max(tl.abs(g), 1))
        else:
            r_prev = tl.load(r_ptr + offs_m, mask=mask_m, other=0.0)
        x = (g * r_prev[:, None]) * c[None, :]
        r = _row_scale(r_prev, tl.sum(x * x, 1), inv_cols)
        tl.store(r_ptr + offs_m, r, mask=mask_m)
        y = g * r[:, None]
        sums += y * y
    tl.store(_partial_sums(row, partial, piece) + offs_n, tl.sum(sums, 0), mask=mask_n)


@triton.jit
def _sweep_for_largest(g_ptr, mask_m, n, stride_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    largest = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for j in range(0, n, BLOCK_N):
        offs_n = j + tl.arange(0, BLOCK_N)
        mask = mask_m[:, None] & (offs_n < n)[None, :]
        g = to_float(tl.load(g_ptr + offs_n[None, :] * stride_n, mask=mask, other=0.0))
        largest = tl.maximum(largest, tl.abs(g))
    return tl.max(largest, 1)


@triton.jit
def _sweep_for_rows(
    g_ptr, r_prev, c_ptr, known, mask_m, n, stride_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for j in range(0, n, BLOCK_N):
        offs_n = j + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n
        c = tl.load(c_ptr + offs_n, mask=offs_n < known, other=1.0)
        g = to_float(tl.load(g_ptr + offs_n[None, :] * stride_n, mask=mask_m[:, None] & mask_n[None, :], other=0.0))
        x = (g * r_prev[:, None]) * c[None, :]
        sums += x * x
    return tl.sum(sums, 1)


@triton.jit(do_not_specialize=["first"])
def sinkhorn_wide_kernel(
    table, programs, rows, cols, partial, first,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Like `sinkhorn_tile_kernel`, for rows that do not fit in registers; BLOCK_M whole rows at a time."""
    row, piece, batch, start, count = _row_block(table, programs)
    g_ptr, n, stride_m, stride_n = _matrix(row, batch, DTYPE, ALIGNED)
    inv_cols = _inverse(tl.load(row + 11))
    known = tl.where(first != 0, 0, n)
    c_ptr = cols + tl.load(row + 7) + batch * tl.load(row + 2)
    r_ptr = rows + tl.load(row + 6) + batch * tl.load(row + 1) + start
    sum_ptr = _partial_sums(row, partial, piece)
    g_ptr += start * stride_m
    for t in range(0, tl.cdiv(count, BLOCK_M)):
        offs_m = t * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < count
        g_rows = g_ptr + offs_m[:, None] * stride_m
        if first != 0:
            r_prev = _first_scale(_sweep_for_largest(g_rows, mask_m, n, stride_n, BLOCK_M, BLOCK_N))
        else:
            r_prev = tl.load(r_ptr + offs_m, mask=mask_m, other=0.0)
        sum_of_squares = _sweep_for_rows(g_rows, r_prev, c_ptr, known, mask_m, n, stride_n, BLOCK_M, BLOCK_N)
        r = _row_scale(r_prev, sum_of_squares, inv_cols)
        tl.store(r_ptr + offs_m, r, mask=mask_m)
        for j in range(0, n, BLOCK_N):
            offs_n = j + tl.arange(0, BLOCK_N)
            mask_n = offs_n < n
            g = tl.load(g_rows + offs_n[None, :] * stride_n, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
            y = to_float(g) * r[:, None]
            # the memory is uninitialised until the first rows have been written
            so_far = tl.load(sum_ptr + offs_n, mask=offs_n < tl.where(t > 0, n, 0), other=0.0)
            tl.store(sum_ptr + offs_n, so_far + tl.sum(y * y, 0), mask=mask_n)
        # the next turn adds to sums that other threads of this program may have written
        tl.debug_barrier()


@triton.jit
def sinkhorn_reduce_kernel(
    table, programs, partial, colmeans, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Add the row blocks' column sums in fixed order and divide by the rows; 0 for a matrix without rows."""
    entry = tl.load(programs + tl.program_id(0))
    row = table + (entry >> 32) * 16
    piece = (entry & 0xFFFFFFFF).to(tl.int32)
    column_blocks = tl.load(row + 14).to(tl.int32)
    batch = piece // column_blocks
    n = tl.load(row + 2)
    blocks = tl.load(row + 9).to(tl.int32)
    pitch = (tl.load(row + 13) // 8) * 8
    offs_n = (piece % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum_ptr = _partial_sums(row, partial, batch * blocks)
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for t in range(0, tl.cdiv(blocks, BLOCK_M)):
        offs_m = t * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m < blocks)[:, None] & (offs_n < n)[None, :]
        sums += tl.load(sum_ptr + offs_m[:, None] * pitch + offs_n[None, :], mask=mask, other=0.0)
    means = tl.sum(sums, 0) * _inverse(tl.load(row + 12))
    tl.store(colmeans + tl.load(row + 7) + batch * n + offs_n, means, mask=offs_n < n)


def sinkhorn_pass(
    mats: Sequence[Tensor],
    rows: Tensor,
    cols: Tensor,
    rows_total: Sequence[int],
    first: bool,
) -> Tensor:
    """Overwrite `rows` with this iteration's row scales. Return the column means under these scales.

    Args:
        mats: matrices [B, m, n] or [m, n] of fp32, bf16 or fp16, with any strides.
        rows: row scales, fp32, B * m entries per matrix, matrix by matrix; read unless `first`, then overwritten.
        cols: column scales, fp32, B * n entries per matrix; read unless `first`.
        rows_total: rows of the whole matrices, of which `mats` may be shards.
        first: start from r = 1 / max_j |G_ij| and c = 1.

    Returns:
        fp32, laid out as `cols`: (1 / rows_total) * sum_i (r_i G_ij)^2.
    """
    colmeans = torch.empty_like(cols)
    table, keys, blocks, column_blocks, size = _table(mats, rows_total)
    partial = torch.empty(size, dtype=torch.float32, device=rows.device)
    if not table:
        return colmeans
    device_table = device_rows(table, rows.device)
    with on_device(rows.device):
        for key, programs in launches(keys, blocks, rows.device):
            kernel, constants, threads = _configuration(*key)
            kernel[(programs.numel(),)](
                device_table, programs, rows, cols, partial, int(first), **constants, num_warps=warps(threads),
                enable_fp_fusion=True,
            )  # fmt: skip
        programs = device_programs(column_blocks, rows.device)
        if programs is not None:
            sinkhorn_reduce_kernel[(programs.numel(),)](
                device_table, programs, partial, colmeans, BLOCK_M=REDUCE_ROWS, BLOCK_N=REDUCE_COLS,
                num_warps=warps(REDUCE_THREADS), enable_fp_fusion=True,
            )  # fmt: skip
    return colmeans


def _table(mats: Sequence[Tensor], rows_total: Sequence[int]):
    """Return, per matrix, table row, configuration and both numbers of programs; and the length of `partial`."""
    table, keys, blocks, column_blocks = [], [], [], []
    row_offset = col_offset = partial_offset = 0
    for mat, m_total in zip(mats, rows_total, strict=True):
        mat = mat.detach() if mat.dim() == 3 else mat.detach().unsqueeze(0)
        b, m, n = mat.shape
        per_block = _round_up(max(ROWS, triton.cdiv(m, MAX_BLOCKS)), 16)
        row_blocks, pitch = triton.cdiv(m, per_block), _round_up(n, 8)
        n_blocks = triton.cdiv(n, REDUCE_COLS)
        table.append(
            (mat.data_ptr(), m, n, *mat.stride(), row_offset, col_offset, partial_offset, row_blocks, per_block,
             n, m_total, pitch, n_blocks, 0)
        )  # fmt: skip
        aligned = has_aligned_rows(mat)
        widths = TILES if aligned else UNALIGNED_TILES
        keys.append((mat.dtype, aligned, next((width for width in widths if n <= width), WIDER)))
        blocks.append(b * row_blocks)
        column_blocks.append(b * n_blocks)
        row_offset += b * m
        col_offset += b * n
        partial_offset += b * row_blocks * pitch
    return table, keys, blocks, column_blocks, partial_offset


def _round_up(value: int, multiple: int) -> int:
    return triton.cdiv(value, multiple) * multiple


def _configuration(dtype: torch.dtype, aligned: bool, width: int):
    """Kernel, constants and threads for a tile width; WIDER means rows that fit in no tile."""
    constants = {"DTYPE": TL_DTYPE[dtype], "ALIGNED": aligned}
    if width == WIDER:
        return sinkhorn_wide_kernel, constants | {"BLOCK_M": WIDE_ROWS, "BLOCK_N": WIDE}, WIDE_THREADS
    block_m, threads = TILES[width]
    return sinkhorn_tile_kernel, constants | {"BLOCK_M": block_m, "BLOCK_N": width}, threads


def audit_launches() -> Promises:
    """Launch every configuration that `sinkhorn_pass` can choose, and return what the kernels promise."""
    for dtype in TL_DTYPE:
        for n in (*TILES, MAX_TILE + 8, *(width - 1 for width in UNALIGNED_TILES), MAX_TILE + 1):
            sinkhorn_pass([torch.zeros(1, ROWS + 1, n, dtype=dtype)], torch.zeros(ROWS + 1), torch.zeros(n), [1], True)
    promises = dict.fromkeys((sinkhorn_tile_kernel, sinkhorn_wide_kernel), _pass_promise)
    return promises | {sinkhorn_reduce_kernel: _reduce_promise}


def _pass_promise(launch: Launch) -> dict[str, Any]:
    g, aligned = launch.dtype("DTYPE"), launch.constants["ALIGNED"]
    elements = launch.constants["BLOCK_M"] * launch.constants["BLOCK_N"]
    promise = dict(elements=elements, read=g.itemsize, wide=aligned)
    label = f"g {g} {'aligned' if aligned else 'any strides'}".replace("torch.", "")
    if launch.kernel is sinkhorn_tile_kernel:
        return promise | dict(label=f"{label} {launch.constants['BLOCK_N']}", written=0)
    # Read from the cache: G for the row sums and for the column sums, c, and the partial sums. Written: the partial
    # sums, which stay in the cache.
    again = 2 * g.itemsize + 8 / WIDE_ROWS
    return promise | dict(label=f"{label} wider", written=4 / WIDE_ROWS, cached=again, sweeps=3)


def _reduce_promise(launch: Launch) -> dict[str, Any]:
    return dict(label="partial sums", elements=REDUCE_ROWS * REDUCE_COLS, read=4, written=0)
