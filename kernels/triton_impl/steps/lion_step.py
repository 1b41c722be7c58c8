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
    index_in_whole,
    load_tile,
    parameter_value,
    random_bits,
    remainder,
    round_to,
    rounded_parameter,
    run_numbers,
    to_float,
    zero_states,
)
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import native_dtype, seeds_and_offsets
from leanstep.kernels.triton_impl.steps.engine import Table, bytes_of, numbers_of, over_elements, program_of

# 8 elements per thread and tile: one 128-bit access per 16-bit tensor, two per fp32 tensor
BLOCK = 2048
TILES = 4

# bits of the runtime argument `mode`; as constexpr, each flag would double the number of compiled kernels
MAXIMIZE, SKIP_NONFINITE, DECAY_WHERE_ALIGNED, CAUTIOUS = 1, 2, 4, 8


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


@triton.jit
def _step_tile(pointers, offs, mask, where, numbers, META: tl.constexpr):
    """Update one tile. Returns 1 where a non-finite gradient is skipped.

    `where` has the index in the whole tensor of element `start`, or with RUNS of the shard's first element.
    """
    ROUNDING: tl.constexpr = META[0]
    RUNS: tl.constexpr = META[1]
    p_ptr, g_ptr, m_ptr, e_ptr = pointers
    seed, index, start, elements, distance, count, slab = where
    scale, lr, decay, beta1, omb1, beta2, omb2, mode = numbers
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
    if ROUNDING == "kahan" or ROUNDING == "master" or ROUNDING == "split":
        e = remainder(value, p, e_old.dtype, ROUNDING)
        tl.store(e_ptr + offs, tl.where(skip, e_old, e), mask=mask)
    # last: before the state of a split weight, it would make code for sm_90 that needs the stack
    tl.store(p_ptr + offs, tl.where(skip, p_old, p), mask=mask)
    return skip.to(tl.int32)


@triton.jit(do_not_specialize=["mode"])
def lion_step_kernel(
    rows, programs, scalars, scales, seeds, offsets, all_runs, flags, mode,
    P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, M_DTYPE: tl.constexpr, E_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program k updates TILES * BLOCK elements of one tensor: p, g, m and the rounding state."""
    row, start, count, i = program_of(rows, programs, 4, 1, TILES * BLOCK)
    scale = tl.load(scales + i, mask=(mode & 8) != 0, other=1.0)
    numbers = (scale,) + numbers_of(scalars, 6) + (mode,)
    index = tl.load(offsets + i).to(tl.uint32)
    if not RUNS:
        index += start.to(tl.uint32)
    where = (tl.load(seeds + i).to(tl.uint32), index, start) + run_numbers(all_runs, i, RUNS)
    DTYPES: tl.constexpr = (P_DTYPE, G_DTYPE, M_DTYPE, E_DTYPE)
    META: tl.constexpr = (ROUNDING, RUNS)
    if over_elements(_step_tile, row, start, count, where, numbers, DTYPES, META, False, BLOCK) != 0:
        tl.store(flags + i, 1)


@triton.jit
def _agreement_tile(pointers, offs, mask, where, numbers, META: tl.constexpr):
    g_ptr, m_ptr = pointers
    beta1, omb1, mode = numbers
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
    """Count the elements of g and m whose update has the gradient's sign."""
    row, start, count, i = program_of(rows, programs, 2, 1, TILES * BLOCK)
    numbers = (tl.load(scalars + 2), tl.load(scalars + 3), mode)
    DTYPES: tl.constexpr = (G_DTYPE, M_DTYPE)
    # the sum of integers does not depend on their order
    agree = over_elements(_agreement_tile, row, start, count, (), numbers, DTYPES, (), True, BLOCK)
    tl.atomic_add(counts + i, agree.to(tl.int64))


def lion_step(lists: Sequence[Sequence[Tensor]], options: StepOptions) -> Tensor:
    """Update parameters, momenta and rounding states in place. int32 flags are 1 for tensors with skipped entries.

    Equals the definition, `leanstep.kernels.reference.steps.lion_step`, bit for bit.
    """
    scalars, count = options.scalars, len(lists[0])
    flags = torch.zeros(count, dtype=torch.int32, device=scalars.device)
    table = Table(scalars.device)
    for p, g, m, *state in zip(*lists, strict=True):
        p, g, e, rounds = table.staging.parameter(p, g, state[0] if state else None, options.rounding)
        m = table.staging.write(m, native_dtype(m.dtype, p.dtype, torch.bfloat16))
        key = (p.dtype, g.dtype, m.dtype, p.dtype if e is None else e.dtype, rounds)
        table.add(key, (p, g, m, e), BLOCK * TILES)
    scales = scalars if options.cautious_scale is None else options.cautious_scale
    seeds, offsets = seeds_and_offsets(options, count)
    runs = options.runs
    for (*dtypes, rounds), launch in table.launches(lion_step_kernel):
        launch(
            scalars, scales, seeds, offsets, offsets if runs is None else runs, flags, mode_of(options),
            *(STATE_DTYPE[d] for d in dtypes), ROUNDING=rounds, RUNS=runs is not None and rounds == "stochastic",
            BLOCK=BLOCK, TILES=TILES,
        )  # fmt: skip
    return flags


def mode_of(options: StepOptions) -> int:
    """The runtime argument `mode` of Lion's kernels."""
    mode = options.maximize * MAXIMIZE | options.skip_nonfinite * SKIP_NONFINITE
    return mode | options.decay_where_aligned * DECAY_WHERE_ALIGNED | (options.cautious_scale is not None) * CAUTIOUS


def lion_agreement(lists: Sequence[Sequence[Tensor]], options: StepOptions) -> Tensor:
    """Count the elements per tensor whose update has the sign of the gradient. Integer counts, returned as fp32."""
    device = options.scalars.device
    counts = torch.zeros(len(lists[0]), dtype=torch.int64, device=device)
    table = Table(device)
    for g, m in zip(*lists, strict=True):
        g = table.staging.read(g)
        m = table.staging.read(m, native_dtype(m.dtype, g.dtype, torch.bfloat16))
        table.add((g.dtype, m.dtype), (g, m), BLOCK * TILES)
    for dtypes, launch in table.launches(lion_agreement_kernel):
        launch(options.scalars, counts, mode_of(options), *(TL_DTYPE[d] for d in dtypes), BLOCK=BLOCK, TILES=TILES)
    return counts.to(torch.float32)


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return what the kernels promise."""
    for dtypes in itertools.product(TL_DTYPE, repeat=3):
        p, g, m = (torch.zeros(BLOCK * TILES + BLOCK + 1, dtype=dtype) for dtype in dtypes)
        lion_agreement([[g], [m]], StepOptions(torch.zeros(6)))
        for rounding in ROUNDINGS:
            for runs in (None, torch.ones(1, 4, dtype=torch.int64)) if rounding == "stochastic" else (None,):
                options = StepOptions(torch.zeros(6), rounding, runs=runs)
                lion_step([[t] for t in (p, g, m, *zero_states(p, rounding))], options)
    return {lion_step_kernel: _step_promise, lion_agreement_kernel: _agreement_promise}


def _step_promise(launch: Launch) -> dict[str, Any]:
    p, g, m = (launch.dtype(name) for name in ("P_DTYPE", "G_DTYPE", "M_DTYPE"))
    rounding, runs = launch.constants["ROUNDING"], " runs" * launch.constants["RUNS"]
    return dict(
        label=f"p {p} g {g} m {m} {rounding}{runs}".replace("torch.", ""), elements=BLOCK,
        # 8 bytes of split weights per thread; with runs, gfx942 has the loop of the tail in the main loop
        wide=rounding != "split" and not runs, flat=rounding != "split", **bytes_of(launch, state=m.itemsize),
    )  # fmt: skip


def _agreement_promise(launch: Launch) -> dict[str, Any]:
    g, m = launch.dtype("G_DTYPE"), launch.dtype("M_DTYPE")
    label = f"g {g} m {m}".replace("torch.", "")
    return dict(label=label, elements=BLOCK, read=g.itemsize + m.itemsize, written=0, wide=True, flat=True)
