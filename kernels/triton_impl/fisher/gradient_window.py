"""Dot products of a window's rows with a vector, and combinations of its rows: one launch each for all blocks.

Bytes: `row_dots` reads every window once. It reads the vector once from memory, then once per `BLOCK_M` rows from the
cache. A second kernel adds the sums of `TILES * BLOCK_N` columns in fixed order: 8 bytes per row and 8192 columns.
`linear_combination` reads every window once and writes its result once.

All sums run in fp64, as in reference/fisher/gradient_window.py: one conversion and one multiply-add per element of the
window. Data-centre GPUs do this at the speed of their memory. On GPUs whose fp64 has 1/64 of the speed of fp32, data
sheets predict 0.6 to 1 times the speed of memory for fp32 rows, and half of that for 16-bit rows.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.triton_impl._common import TL_DTYPE, pointer_to, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import Staging, device_rows, is_aligned, launches, on_device, warps

# 16 elements per thread and tile
BLOCK_M, BLOCK_N, THREADS = 8, 512, 256
TILES = 16
REDUCE_CHUNKS, REDUCE_ROWS, REDUCE_THREADS = 16, 32, 128


@triton.jit
def eights(number, ALIGNED: tl.constexpr):
    """Round a number of columns, or the distance of two rows, down to a multiple of 8 if rows are ALIGNED.

    Such a number is a multiple of 8 already. The rounding proves to the compiler that rows start on 16-byte boundaries,
    and that column masks do not split 128-bit accesses.
    """
    if ALIGNED:
        number = (number // 8) * 8
    return number


@triton.jit
def dots_tile(table, programs, m, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """The program's row of a table of WIDTH columns, its chunk of columns, and its BLOCK_M rows of the window."""
    entry = tl.load(programs + tl.program_id(0))
    piece = (entry & 0xFFFFFFFF).to(tl.int32)
    row_blocks = tl.cdiv(m, BLOCK_M)
    offs_m = (piece % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    return table + (entry >> 32) * WIDTH, piece // row_blocks, offs_m, offs_m < m


@triton.jit(do_not_specialize=["m"])
def window_dots_kernel(
    table, programs, partial, m,
    G_DTYPE: tl.constexpr, X_DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of TILES * BLOCK_N columns. A row of the table is (window, vector, n, pitch, first chunk, 0)."""
    row, chunk, offs_m, mask_m = dots_tile(table, programs, m, 6, BLOCK_M)
    pitch = eights(tl.load(row + 3), ALIGNED)
    start = chunk.to(tl.int64) * (TILES * BLOCK_N)
    count = eights(tl.minimum(tl.load(row + 2) - start, TILES * BLOCK_N).to(tl.int32), ALIGNED)
    g_rows = pointer_to(tl.load(row + 0), G_DTYPE, ALIGNED) + start + offs_m.to(tl.int64)[:, None] * pitch
    x_ptr = pointer_to(tl.load(row + 1), X_DTYPE, ALIGNED) + start

    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float64)
    for t in range(0, tl.cdiv(count, BLOCK_N)):
        offs_n = t * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < count
        x = to_float(tl.load(x_ptr + offs_n, mask=mask_n, other=0.0))
        g = to_float(tl.load(g_rows + offs_n[None, :], mask=mask_m[:, None] & mask_n[None, :], other=0.0))
        sums += g.to(tl.float64) * x.to(tl.float64)[None, :]
    at = (tl.load(row + 4) + chunk) * m + offs_m
    tl.store(partial + at, tl.sum(sums, 1), mask=mask_m)


@triton.jit(do_not_specialize=["m"])
def window_reduce_kernel(table, partial, dots, m, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """Sum the chunks of one group for BLOCK_R rows, in fp64. A row of the table is (first chunk, chunks)."""
    row = table + tl.program_id(1) * 2
    first = tl.load(row + 0)
    chunks = tl.load(row + 1).to(tl.int32)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    sums = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float64)
    for t in range(0, tl.cdiv(chunks, BLOCK_C)):
        offs_c = t * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (offs_c < chunks)[:, None] & (offs_r < m)[None, :]
        part = tl.load(partial + (first + offs_c)[:, None] * m + offs_r[None, :], mask=mask, other=0.0)
        sums += part
    tl.store(dots + tl.program_id(1).to(tl.int64) * m + offs_r, tl.sum(sums, 0), mask=offs_r < m)


@triton.jit(do_not_specialize=["m"])
def window_combination_kernel(
    table, programs, coefficients, m,
    G_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All rows of BLOCK_N columns. A row of the table is (window, out, n, pitch, group, 0)."""
    entry = tl.load(programs + tl.program_id(0))
    row = table + (entry >> 32) * 6
    start = (entry & 0xFFFFFFFF) * BLOCK_N
    pitch = eights(tl.load(row + 3), ALIGNED)
    count = eights(tl.minimum(tl.load(row + 2) - start, BLOCK_N).to(tl.int32), ALIGNED)
    g_ptr = pointer_to(tl.load(row + 0), G_DTYPE, ALIGNED)
    out_ptr = pointer_to(tl.load(row + 1), tl.float32, ALIGNED)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < count
    c_ptr = coefficients + tl.load(row + 4) * m
    lane = tl.arange(0, BLOCK_M)
    g_rows = g_ptr + start + lane.to(tl.int64)[:, None] * pitch + offs_n[None, :]

    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float64)
    for t in range(0, tl.cdiv(m, BLOCK_M)):
        offs_m = t * BLOCK_M + lane
        mask_m = offs_m < m
        c = tl.load(c_ptr + offs_m, mask=mask_m, other=0.0)
        g = to_float(tl.load(g_rows, mask=mask_m[:, None] & mask_n[None, :], other=0.0))
        sums += c[:, None] * g.to(tl.float64)
        g_rows += BLOCK_M * pitch
    tl.store(out_ptr + start + offs_n, tl.sum(sums, 0).to(tl.float32), mask=mask_n)


def row_dots(windows: Sequence[Tensor], vectors: Sequence[Tensor], groups: Sequence[int], count: int) -> Tensor:
    """Dot products of the rows of windows [m, n] with vectors [n]: fp64 [count, m]."""
    device, m = windows[0].device, windows[0].shape[0]
    staging = Staging()
    dtype = windows[0].dtype if all(v.dtype == windows[0].dtype for v in vectors) else torch.float32
    order = sorted(range(len(windows)), key=lambda b: groups[b])  # a group's chunks lie side by side
    rows, keys, pieces, chunks = [], [], [], [0] * count
    for b in order:
        window = _dense_rows(windows[b], staging)
        n, pitch = window.shape[1], window.stride(0)
        vector = staging.read(vectors[b], dtype)
        rows.append((window.data_ptr(), vector.data_ptr(), n, pitch, sum(chunks), 0))
        keys.append(is_aligned(window, vector) and n % 8 == 0 and pitch % 8 == 0)
        chunks[groups[b]] += triton.cdiv(n, TILES * BLOCK_N)
        pieces.append(triton.cdiv(n, TILES * BLOCK_N) * triton.cdiv(m, BLOCK_M))
    partial = torch.empty(sum(chunks) * m, dtype=torch.float64, device=device)
    table = device_rows(rows, device)
    with on_device(device):
        for aligned, programs in launches(keys, pieces, device):
            window_dots_kernel[(programs.numel(),)](
                table, programs, partial, m,
                TL_DTYPE[windows[0].dtype], TL_DTYPE[dtype], aligned,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, TILES=TILES, num_warps=warps(THREADS), enable_fp_fusion=True,
            )  # fmt: skip
    staging.finish()
    return reduce_chunks(partial, chunks, m)


def _dense_rows(window: Tensor, staging: Staging) -> Tensor:
    """Return the window, or a copy if its rows are not dense. Rows may be apart, as in a slice of columns."""
    return staging.hold(window) if window.stride(1) == 1 or window.shape[1] == 1 else staging.read(window)


def reduce_chunks(partial: Tensor, chunks: Sequence[int], m: int) -> Tensor:
    """Sum the chunks of each group: fp64 [sum of chunks, m] to fp64 [G, m]. `chunks` counts those of each group."""
    device = partial.device
    dots = torch.empty(len(chunks), m, dtype=torch.float64, device=device)
    firsts = [sum(chunks[:g]) for g in range(len(chunks))]
    with on_device(device):
        window_reduce_kernel[(triton.cdiv(m, REDUCE_ROWS), len(chunks))](
            device_rows(list(zip(firsts, chunks, strict=True)), device), partial, dots, m,
            BLOCK_C=REDUCE_CHUNKS, BLOCK_R=REDUCE_ROWS, num_warps=warps(REDUCE_THREADS), enable_fp_fusion=True,
        )  # fmt: skip
    return dots


def linear_combination(
    windows: Sequence[Tensor], coefficients: Tensor, groups: Sequence[int], out: Sequence[Tensor]
) -> None:
    """Write the combinations of the rows of windows [m, n] with fp64 coefficients [G, m] to fp32 `out`, [n] each."""
    device, m = windows[0].device, windows[0].shape[0]
    staging = Staging()
    coefficients = coefficients.contiguous()
    rows, keys, pieces = [], [], []
    for window, result, group in zip(windows, out, groups, strict=True):
        window = _dense_rows(window, staging)
        n, pitch = window.shape[1], window.stride(0)
        rows.append((window.data_ptr(), result.data_ptr(), n, pitch, group, 0))
        keys.append(is_aligned(window, result) and n % 8 == 0 and pitch % 8 == 0)
        pieces.append(triton.cdiv(n, BLOCK_N))
    table = device_rows(rows, device)
    with on_device(device):
        for aligned, programs in launches(keys, pieces, device):
            window_combination_kernel[(programs.numel(),)](
                table, programs, coefficients, m, TL_DTYPE[windows[0].dtype], aligned,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps(THREADS), enable_fp_fusion=True,
            )  # fmt: skip
    staging.finish()


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return what the kernels promise."""
    # rows that start on 16-byte boundaries, and rows that do not
    for dtype, n in itertools.product(TL_DTYPE, (BLOCK_N + 8, BLOCK_N + 7)):
        window, vector = torch.zeros(BLOCK_M + 1, n, dtype=dtype), torch.zeros(n)
        for x in (vector.to(dtype), vector):
            row_dots([window], [x], [0], 1)
        linear_combination([window], torch.zeros(1, BLOCK_M + 1, dtype=torch.float64), [0], [vector])
    promises = {window_dots_kernel: _dots_promise, window_combination_kernel: _promise}
    return promises | {window_reduce_kernel: _reduce_promise}


def _dots_promise(launch: Launch) -> dict[str, Any]:
    x = launch.dtype("X_DTYPE")
    return _promise(launch, f" x {x}") | dict(cached=x.itemsize / BLOCK_M)


def _promise(launch: Launch, vector: str = "") -> dict[str, Any]:
    g, aligned = launch.dtype("G_DTYPE"), launch.constants["ALIGNED"]
    label = f"g {g}{vector} {'aligned' if aligned else 'any start'}".replace("torch.", "")
    return dict(label=label, elements=BLOCK_M * BLOCK_N, read=g.itemsize, written=0, wide=aligned)


def _reduce_promise(launch: Launch) -> dict[str, Any]:
    return dict(label="partial sums", elements=REDUCE_CHUNKS * REDUCE_ROWS, read=8, written=0)
