"""Lion's update and its agreement count, each as one launch for all tensors of a list.

Bytes: `lion_step` reads p, g, m and the rounding state once: Kahan remainder, fp32 master, or difference of a split
weight. It writes p, m and the rounding state once. `lion_agreement` reads g and m once.
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
    has_state,
    index_in_whole,
    load_tile,
    parameter_value,
    pointer_to,
    random_bits,
    remainder,
    round_to,
    rounded_parameter,
    run_numbers,
    to_float,
    zero_states,
)
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import (
    Staging,
    device_rows,
    is_aligned,
    launches,
    native_dtype,
    on_device,
    seeds_and_offsets,
    warps,
)

# 8 elements per thread and tile: one 128-bit access per 16-bit tensor, two per fp32 tensor
BLOCK = 2048
TILES = 4
THREADS = 256

# bits of the runtime argument `mode`; as constexpr, each flag would double the number of compiled kernels
MAXIMIZE, SKIP_NONFINITE, DECAY_WHERE_ALIGNED, CAUTIOUS = 1, 2, 4, 8


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


@triton.jit
def _step_tile(
    p_ptr, g_ptr, m_ptr, e_ptr, offs, mask, seed, index, start, elements, distance, count, slab, scale, lr, decay,
    beta1, omb1, beta2, omb2, mode, ROUNDING: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Update one tile; `mask` is None for a whole tile. Returns 1 where a non-finite gradient is skipped.

    `index` is the index in the whole tensor of element `start`, or with RUNS of the shard's first element.
    """
    g = to_float(load_tile(g_ptr + offs, mask))
    m_old = load_tile(m_ptr + offs, mask)
    p_old = load_tile(p_ptr + offs, mask)
    e_old = p_old
    if ROUNDING == "kahan" or ROUNDING == "master" or ROUNDING == "split":
        e_old = load_tile(e_ptr + offs, mask)

    g = tl.where((mode & 1) != 0, -g, g)
    skip = ((mode & 2) != 0) & ~(tl.abs(g) < float("inf"))
    m = to_float(m_old)
    u = _sign(beta1 * m + omb1 * g)
    u = tl.where(((mode & 8) == 0) | (u * g > 0), u * scale, 0.0)
    # before the parameter is computed, which needs as many registers
    m = round_to(beta2 * m + omb2 * g, m_old.dtype)
    tl.store(m_ptr + offs, tl.where(skip, m_old, m), mask=mask)

    value = parameter_value(p_old, e_old, ROUNDING)
    decayed = tl.where(((mode & 4) == 0) | (u * value >= 0), value * decay, value)
    value = decayed - lr * u

    if RUNS:
        local = index_in_whole(start, offs, elements, distance, count, slab)
    else:
        local = offs.to(tl.uint32)
    random = random_bits(local + index, seed)
    p = rounded_parameter(value, random, p_old.dtype, ROUNDING)
    tl.store(p_ptr + offs, tl.where(skip, p_old, p), mask=mask)
    if ROUNDING == "kahan" or ROUNDING == "master" or ROUNDING == "split":
        e = remainder(value, p, e_old.dtype, ROUNDING)
        tl.store(e_ptr + offs, tl.where(skip, e_old, e), mask=mask)
    return skip.to(tl.int32)


@triton.jit(do_not_specialize=["mode"])
def lion_step_kernel(
    rows, programs, scalars, scales, seeds, offsets, all_runs, flags, mode,
    P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, M_DTYPE: tl.constexpr, E_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program k updates TILES * BLOCK elements of one tensor.

    A row is (p, g, m, rounding state, numel, aligned, index, 0).
    """
    entry = tl.load(programs + tl.program_id(0))
    row = rows + (entry >> 32) * 8
    start = (entry & 0xFFFFFFFF) * (TILES * BLOCK)
    count = tl.minimum(tl.load(row + 4) - start, TILES * BLOCK).to(tl.int32)
    i = tl.load(row + 6)

    lr = tl.load(scalars + 0)
    decay = tl.load(scalars + 1)
    beta1 = tl.load(scalars + 2)
    omb1 = tl.load(scalars + 3)
    beta2 = tl.load(scalars + 4)
    omb2 = tl.load(scalars + 5)
    scale = tl.load(scales + i, mask=(mode & 8) != 0, other=1.0)
    seed = tl.load(seeds + i).to(tl.uint32)
    elements, distance, runs, slab = run_numbers(all_runs, i, RUNS)
    index = tl.load(offsets + i).to(tl.uint32)
    if not RUNS:
        index += start.to(tl.uint32)

    lane = tl.arange(0, BLOCK)
    skipped = tl.zeros([BLOCK], dtype=tl.int32)
    # Whole tiles of aligned tensors need no mask and have a provable alignment: accesses are 128 bits wide. Then the
    # tail, and unaligned tensors; addresses are read again, because holding them would spill registers.
    whole = tl.where(tl.load(row + 5) != 0, count // BLOCK, 0)
    for TAIL in tl.static_range(2):
        p_ptr = pointer_to(tl.load(row + 0), P_DTYPE, TAIL == 0) + start
        g_ptr = pointer_to(tl.load(row + 1), G_DTYPE, TAIL == 0) + start
        m_ptr = pointer_to(tl.load(row + 2), M_DTYPE, TAIL == 0) + start
        e_ptr = pointer_to(tl.load(row + 3), E_DTYPE, TAIL == 0) + start
        for t in range(whole if TAIL else 0, tl.cdiv(count, BLOCK) if TAIL else whole):
            offs = t * BLOCK + lane
            skipped |= _step_tile(
                p_ptr, g_ptr, m_ptr, e_ptr, offs, offs < count if TAIL else None, seed, index, start, elements,
                distance, runs, slab, scale, lr, decay, beta1, omb1, beta2, omb2, mode, ROUNDING, RUNS,
            )  # fmt: skip
    if tl.max(skipped, 0) != 0:
        tl.store(flags + tl.load(row + 6), 1)


@triton.jit
def _agreement_tile(g_ptr, m_ptr, offs, mask, beta1, omb1, mode):
    g = to_float(load_tile(g_ptr + offs, mask))
    m = to_float(load_tile(m_ptr + offs, mask))
    g = tl.where((mode & 1) != 0, -g, g)
    skip = ((mode & 2) != 0) & ~(tl.abs(g) < float("inf"))
    u = _sign(beta1 * m + omb1 * g)
    return ((u * g > 0) & ~skip).to(tl.int32)


@triton.jit(do_not_specialize=["mode"])
def lion_agreement_kernel(
    rows, programs, scalars, counts, mode,
    G_DTYPE: tl.constexpr, M_DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Count the elements whose update has the gradient's sign. A row is (g, m, numel, aligned, index, 0)."""
    entry = tl.load(programs + tl.program_id(0))
    row = rows + (entry >> 32) * 6
    start = (entry & 0xFFFFFFFF) * (TILES * BLOCK)
    count = tl.minimum(tl.load(row + 2) - start, TILES * BLOCK).to(tl.int32)
    beta1 = tl.load(scalars + 2)
    omb1 = tl.load(scalars + 3)

    lane = tl.arange(0, BLOCK)
    agree = tl.zeros([BLOCK], dtype=tl.int32)
    whole = tl.where(tl.load(row + 3) != 0, count // BLOCK, 0)
    for TAIL in tl.static_range(2):
        g_ptr = pointer_to(tl.load(row + 0), G_DTYPE, TAIL == 0) + start
        m_ptr = pointer_to(tl.load(row + 1), M_DTYPE, TAIL == 0) + start
        for t in range(whole if TAIL else 0, tl.cdiv(count, BLOCK) if TAIL else whole):
            offs = t * BLOCK + lane
            agree += _agreement_tile(g_ptr, m_ptr, offs, offs < count if TAIL else None, beta1, omb1, mode)
    # the sum of integers does not depend on their order
    tl.atomic_add(counts + tl.load(row + 4), tl.sum(agree, 0).to(tl.int64))


def lion_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    rounding_state: Sequence[Tensor],
    options: StepOptions,
) -> Tensor:
    """Update `params`, `exp_avgs` and `rounding_state` in place. int32 flags are 1 for tensors with skipped entries.

    Equals the definition, `leanstep.kernels.reference.steps.lion_step`, bit for bit.
    """
    scalars, device = options.scalars, options.scalars.device
    flags = torch.zeros(len(params), dtype=torch.int32, device=device)
    staging = Staging()
    rows, keys, pieces = [], [], []
    for i, (p, g, m) in enumerate(zip(params, grads, exp_avgs, strict=True)):
        p, e, rounds = staging.rounded(p, rounding_state[i] if rounding_state else None, options.rounding)
        p = staging.write(p)
        g = staging.read(g, native_dtype(g.dtype, p.dtype))
        m = staging.write(m, native_dtype(m.dtype, p.dtype, torch.bfloat16))
        e = None if e is None else staging.write(e)
        aligned = is_aligned(p, g, m, e)
        rows.append(
            (p.data_ptr(), g.data_ptr(), m.data_ptr(), 0 if e is None else e.data_ptr(), p.numel(), aligned, i, 0)
        )
        keys.append((p.dtype, g.dtype, m.dtype, p.dtype if e is None else e.dtype, rounds))
        pieces.append(triton.cdiv(p.numel(), BLOCK * TILES))
    if not any(pieces):
        return flags
    scales = scalars if options.cautious_scale is None else options.cautious_scale
    seeds, offsets = seeds_and_offsets(options, len(params))
    runs = options.runs
    table = device_rows(rows, device)
    with on_device(device):
        for (*dtypes, rounds), programs in launches(keys, pieces, device):
            # fused multiply-adds would round differently from the definition
            lion_step_kernel[(programs.numel(),)](
                table, programs, scalars, scales, seeds, offsets, offsets if runs is None else runs, flags,
                mode_of(options), *(STATE_DTYPE[d] for d in dtypes), ROUNDING=rounds,
                RUNS=runs is not None and rounds == "stochastic", BLOCK=BLOCK, TILES=TILES,
                num_warps=warps(THREADS), enable_fp_fusion=False,
            )  # fmt: skip
    staging.finish()
    return flags


def mode_of(options: StepOptions) -> int:
    """The runtime argument `mode` of Lion's kernels."""
    mode = options.maximize * MAXIMIZE | options.skip_nonfinite * SKIP_NONFINITE
    return mode | options.decay_where_aligned * DECAY_WHERE_ALIGNED | (options.cautious_scale is not None) * CAUTIOUS


def lion_agreement(grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], options: StepOptions) -> Tensor:
    """Count the elements per tensor whose update has the sign of the gradient. Integer counts, returned as fp32."""
    device = options.scalars.device
    counts = torch.zeros(len(grads), dtype=torch.int64, device=device)
    staging = Staging()
    rows, keys, pieces = [], [], []
    for i, (g, m) in enumerate(zip(grads, exp_avgs, strict=True)):
        g = staging.read(g)
        m = staging.read(m, native_dtype(m.dtype, g.dtype, torch.bfloat16))
        rows.append((g.data_ptr(), m.data_ptr(), g.numel(), is_aligned(g, m), i, 0))
        keys.append((g.dtype, m.dtype))
        pieces.append(triton.cdiv(g.numel(), BLOCK * TILES))
    if any(pieces):
        table = device_rows(rows, device)
        with on_device(device):
            for dtypes, programs in launches(keys, pieces, device):
                lion_agreement_kernel[(programs.numel(),)](
                    table, programs, options.scalars, counts, mode_of(options), *(TL_DTYPE[d] for d in dtypes),
                    BLOCK=BLOCK, TILES=TILES, num_warps=warps(THREADS), enable_fp_fusion=False,
                )  # fmt: skip
    staging.finish()
    return counts.to(torch.float32)


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return what the kernels promise."""
    for dtypes in itertools.product(TL_DTYPE, repeat=3):
        p, g, m = (torch.zeros(BLOCK * TILES + BLOCK + 1, dtype=dtype) for dtype in dtypes)
        lion_agreement([g], [m], StepOptions(torch.zeros(6)))
        for rounding in ROUNDINGS:
            for runs in (None, torch.ones(1, 4, dtype=torch.int64)) if rounding == "stochastic" else (None,):
                options = StepOptions(torch.zeros(6), rounding, runs=runs)
                lion_step([p], [g], [m], zero_states(p, rounding), options)
    return {lion_step_kernel: _step_promise, lion_agreement_kernel: _agreement_promise}


def _step_promise(launch: Launch) -> dict[str, Any]:
    p, g, m, e = (launch.dtype(name) for name in ("P_DTYPE", "G_DTYPE", "M_DTYPE", "E_DTYPE"))
    rounding, runs = launch.constants["ROUNDING"], " runs" * launch.constants["RUNS"]
    state = e.itemsize if has_state(rounding) else 0
    return dict(
        label=f"p {p} g {g} m {m} {rounding}{runs}".replace("torch.", ""), elements=BLOCK,
        # 8 bytes of split weights per thread; with runs, gfx942 has the loop of the tail in the main loop
        wide=rounding != "split" and not runs, flat=rounding != "split",
        read=p.itemsize + g.itemsize + m.itemsize + state, written=p.itemsize + m.itemsize + state,
    )  # fmt: skip


def _agreement_promise(launch: Launch) -> dict[str, Any]:
    g, m = launch.dtype("G_DTYPE"), launch.dtype("M_DTYPE")
    label = f"g {g} m {m}".replace("torch.", "")
    return dict(label=label, elements=BLOCK, read=g.itemsize + m.itemsize, written=0, wide=True, flat=True)
