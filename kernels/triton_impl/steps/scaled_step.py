"""The update of SinkGD, `p = p * decay - step * (r_i * G_ij) * c_j`, as one launch for all matrices of a list.

Bytes: reads G and p and writes p, once each. It also reads and writes the rounding state: Kahan remainder, fp32 master,
or difference of a split weight. The scale vectors come from the cache. A small launch first searches the column scales
for NaN: 4 bytes per column.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.steps.common import StepOptions
from leanstep.kernels.triton_impl._common import (
    ROUNDINGS,
    STATE_DTYPE,
    TL_DTYPE,
    aligned_pointer,
    has_state,
    index_in_whole,
    load_tile,
    parameter_value,
    random_bits,
    remainder,
    rounded_parameter,
    run_numbers,
    to_float,
    zero_states,
)
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import (
    Staging,
    device_programs,
    device_rows,
    has_aligned_rows,
    launches,
    native_dtype,
    on_device,
    seeds_and_offsets,
    warps,
)

# 8 elements per thread. A program walks down ROWS rows of one column strip
BLOCK_M, BLOCK_N = 8, 256
ROWS = 32
THREADS = 256
SCAN, SCAN_THREADS = 1024, 128


@triton.jit
def column_nan_kernel(table, programs, bad, flags, BLOCK: tl.constexpr):
    """Write whether column scales have a NaN: to `bad` per matrix of the batch, to `flags` per tensor."""
    entry = tl.load(programs + tl.program_id(0))
    row = table + (entry >> 32) * 24
    batch = entry & 0xFFFFFFFF
    n = tl.load(row + 4)
    c_ptr = tl.load(row + 15).to(tl.pointer_type(tl.float32)) + batch * n
    is_nan = tl.zeros([BLOCK], dtype=tl.int32)
    for j in range(0, n.to(tl.int32), BLOCK):
        offs = j + tl.arange(0, BLOCK)
        c = tl.load(c_ptr + offs, mask=offs < n, other=0.0)
        is_nan |= (c != c).to(tl.int32)
    any_nan = tl.max(is_nan, 0)
    tl.store(bad + tl.load(row + 18) + batch, any_nan)
    if any_nan != 0:
        # several matrices of a batch may write the same value
        tl.store(flags + tl.load(row + 19), 1)


@triton.jit
def _strided(row, field, batch, start, ADDRESS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the program's first row, and the strides of rows and columns."""
    address = tl.load(row + ADDRESS)
    stride_b = tl.load(row + field)
    stride_m = tl.load(row + field + 1)
    if ALIGNED:
        # an aligned matrix has strides that are multiples of 8; the rounding proves it to the compiler
        stride_b = (stride_b // 8) * 8
        stride_m = (stride_m // 8) * 8
        stride_n = 1
        ptr = aligned_pointer(address, DTYPE)
    else:
        stride_n = tl.load(row + field + 2)
        ptr = address.to(tl.pointer_type(DTYPE))
    return ptr + batch * stride_b + start * stride_m, stride_m, stride_n


# `cautious` as constexpr would double the number of compiled kernels
@triton.jit(do_not_specialize=["cautious"])
def scaled_step_kernel(
    table, programs, scalars, seeds, offsets, runs, bad, cautious,
    P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, E_DTYPE: tl.constexpr, ROUNDING: tl.constexpr, RUNS: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Update ROWS rows of a strip of BLOCK_N columns. If `cautious`, decay only where update and value agree in sign.

    A row of the table is (p, g, rounding state addresses, m, n, strides of the three, row scales, column scales
    addresses, row blocks, column blocks, bad offset, index, 0, 0, 0, 0).
    """
    entry = tl.load(programs + tl.program_id(0))
    row = table + (entry >> 32) * 24
    piece = (entry & 0xFFFFFFFF).to(tl.int32)
    row_blocks = tl.load(row + 16).to(tl.int32)
    column_blocks = tl.load(row + 17).to(tl.int32)
    strip = piece // column_blocks
    batch = strip // row_blocks
    if tl.load(bad + tl.load(row + 18) + batch) == 0:
        m = tl.load(row + 3)
        n = tl.load(row + 4)
        start = (strip % row_blocks).to(tl.int64) * ROWS
        count = tl.minimum(m - start, ROWS).to(tl.int32)
        offs_n = (piece % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        c_ptr = tl.load(row + 15).to(tl.pointer_type(tl.float32)) + batch * n
        c = tl.load(c_ptr + offs_n, mask=offs_n < n, other=0.0)
        r_ptr = tl.load(row + 14).to(tl.pointer_type(tl.float32)) + batch * m + start
        p_ptr, p_stride_m, p_stride_n = _strided(row, 5, batch, start, 0, P_DTYPE, ALIGNED)
        g_ptr, g_stride_m, g_stride_n = _strided(row, 8, batch, start, 1, G_DTYPE, ALIGNED)
        e_ptr, e_stride_m, e_stride_n = _strided(row, 11, batch, start, 2, E_DTYPE, ALIGNED)
        step = tl.load(scalars + 0)
        decay = tl.load(scalars + 1)
        i = tl.load(row + 19)
        seed = tl.load(seeds + i).to(tl.uint32)
        offset = tl.load(offsets + i).to(tl.uint32)
        first = (batch * m + start) * n
        elements, distance, run_count, slab = run_numbers(runs, i, RUNS)
        if ALIGNED:
            mask_n = offs_n < (n.to(tl.int32) // 8) * 8
        else:
            mask_n = offs_n < n.to(tl.int32)
        for t in range(0, tl.cdiv(count, BLOCK_M)):
            offs_m = t * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m = offs_m < count
            mask = mask_m[:, None] & mask_n[None, :]
            r = tl.load(r_ptr + offs_m, mask=mask_m, other=0.0)
            p_ptrs = p_ptr + offs_m[:, None] * p_stride_m + offs_n[None, :] * p_stride_n
            e_ptrs = e_ptr + offs_m[:, None] * e_stride_m + offs_n[None, :] * e_stride_n
            g = load_tile(g_ptr + offs_m[:, None] * g_stride_m + offs_n[None, :] * g_stride_n, mask)
            # [BLOCK_M, BLOCK_N]
            p_old = load_tile(p_ptrs, mask)
            e_old = p_old
            if ROUNDING == "kahan" or ROUNDING == "master" or ROUNDING == "split":
                e_old = load_tile(e_ptrs, mask)
            u = (r[:, None] * to_float(g)) * c[None, :]
            value = parameter_value(p_old, e_old, ROUNDING)
            value = tl.where((cautious == 0) | (u * value >= 0), value * decay, value) - step * u
            # index of an element in the whole tensor, modulo 2**32
            local = offs_m.to(tl.uint32)[:, None] * n.to(tl.uint32) + offs_n.to(tl.uint32)[None, :]
            if RUNS:
                index = index_in_whole(first, local, elements, distance, run_count, slab)
            else:
                index = local + first.to(tl.uint32)
            p = rounded_parameter(value, random_bits(index + offset, seed), P_DTYPE, ROUNDING)
            tl.store(p_ptrs, p, mask=mask)
            if ROUNDING == "kahan" or ROUNDING == "master" or ROUNDING == "split":
                tl.store(e_ptrs, remainder(value, p, E_DTYPE, ROUNDING), mask=mask)


def scaled_step(lists: Sequence[Sequence[Tensor]], options: StepOptions) -> Tensor:
    """Update `params` and `rounding_state` ([B, m, n] or [m, n], any strides) in place from `mats` of the same shapes.

    `rows` and `cols` are fp32 [B, m] and [B, n], or [m] and [n]. With `skip_nonfinite`, matrices with a NaN column
    scale do not change; the returned int32 flags are 1 for tensors with such a matrix.

    Equals the definition, `leanstep.kernels.reference.steps.scaled_step`, bit for bit.
    """
    device, params = options.scalars.device, lists[0]
    flags = torch.zeros(len(params), dtype=torch.int32, device=device)
    staging = Staging()
    table, keys, pieces, batches = _table(lists, options.rounding, staging)
    if not any(pieces):
        return flags
    bad = torch.zeros(sum(batches), dtype=torch.int32, device=device)
    seeds, offsets = seeds_and_offsets(options, len(params))
    runs = options.runs
    device_table = device_rows(table, device)
    with on_device(device):
        scans = device_programs(batches, device) if options.skip_nonfinite else None
        if scans is not None:
            column_nan_kernel[(scans.numel(),)](
                device_table, scans, bad, flags, BLOCK=SCAN, num_warps=warps(SCAN_THREADS), enable_fp_fusion=False
            )
        for (*dtypes, rounds, aligned), programs in launches(keys, pieces, device):
            # fused multiply-adds would round differently from the definition
            scaled_step_kernel[(programs.numel(),)](
                device_table, programs, options.scalars, seeds, offsets, offsets if runs is None else runs, bad,
                int(options.decay_where_aligned), *(STATE_DTYPE[d] for d in dtypes), rounds,
                runs is not None and rounds == "stochastic", aligned, ROWS=ROWS, BLOCK_M=_rows_at_once(aligned),
                BLOCK_N=BLOCK_N, num_warps=warps(THREADS), enable_fp_fusion=False,
            )  # fmt: skip
    staging.finish()
    return flags


def _rows_at_once(aligned: bool) -> int:
    """Rows of a tile: half as many for any strides, whose addresses take registers."""
    return BLOCK_M if aligned else BLOCK_M // 2


def _table(lists: Sequence[Sequence[Tensor]], rounding: str, staging: Staging):
    """Return, per tensor, table row, configuration, number of programs and number of matrices."""
    table, keys, pieces, batches = [], [], [], []
    for i, (p, g, r, c, *state) in enumerate(zip(*lists, strict=True)):
        p, e, rounds = staging.rounded(p, state[0] if state else None, rounding)
        g = staging.hold(g.detach().to(native_dtype(g.dtype, p.dtype, torch.bfloat16)))
        p, g, e = (t.detach() if t.dim() == 3 else t.detach().unsqueeze(0) for t in (p, g, p if e is None else e))
        b, m, n = p.shape
        row_blocks, column_blocks = triton.cdiv(m, ROWS), triton.cdiv(n, BLOCK_N)
        table.append(
            (p.data_ptr(), g.data_ptr(), e.data_ptr(), m, n, *p.stride(), *g.stride(), *e.stride(),
             *(staging.read(scales).data_ptr() for scales in (r, c)), row_blocks, column_blocks, sum(batches), i, 0, 0,
             0, 0)
        )  # fmt: skip
        keys.append((p.dtype, g.dtype, e.dtype, rounds, all(has_aligned_rows(t) for t in (p, g, e))))
        pieces.append(b * row_blocks * column_blocks)
        batches.append(b)
    return table, keys, pieces, batches


def audit_launches() -> Promises:
    """Launch every configuration that `scaled_step` can choose, and return what the kernels promise."""
    # rows that start on 16-byte boundaries, and rows that do not
    for p_dtype, g_dtype, rounding, n in itertools.product(TL_DTYPE, TL_DTYPE, ROUNDINGS, (8, 7)):
        p, g = torch.zeros(ROWS + 1, n, dtype=p_dtype), torch.zeros(ROWS + 1, n, dtype=g_dtype)
        for runs in (None, torch.ones(1, 4, dtype=torch.int64)) if rounding == "stochastic" else (None,):
            options = StepOptions(torch.zeros(2), rounding, runs=runs)
            lists = [[t] for t in (p, g, torch.ones(ROWS + 1), torch.ones(n), *zero_states(p, rounding))]
            scaled_step(lists, options)
    return {scaled_step_kernel: _step_promise, column_nan_kernel: _scan_promise}


def _step_promise(launch: Launch) -> dict[str, Any]:
    p, g, e = (launch.dtype(name) for name in ("P_DTYPE", "G_DTYPE", "E_DTYPE"))
    rounding, aligned = launch.constants["ROUNDING"], launch.constants["ALIGNED"]
    runs = " runs" * launch.constants["RUNS"]
    state = e.itemsize if has_state(rounding) else 0
    return dict(
        label=f"p {p} g {g} {rounding}{runs} {'aligned' if aligned else 'any strides'}".replace("torch.", ""),
        elements=_rows_at_once(aligned) * BLOCK_N,
        read=g.itemsize + state + p.itemsize,
        written=p.itemsize + state,
        # 8 bytes of split weights per thread
        wide=aligned and rounding != "split",
    )


def _scan_promise(launch: Launch) -> dict[str, Any]:
    return dict(label="column scales", elements=SCAN, read=4, written=0)
