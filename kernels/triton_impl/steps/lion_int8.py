"""Lion with an 8-bit momentum, and its agreement count, each as one launch for all tensors of a list.

Bytes: `lion_step_int8` reads p, g, codes, scales and the rounding state once. It writes all but g once.
`lion_agreement_int8` reads g, codes and scales once. A scale is 4 bytes for 128 elements.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.reference.quantization import FP8
from leanstep.kernels.steps.common import StepOptions
from leanstep.kernels.triton_impl._common import (
    ROUNDINGS,
    STATE_DTYPE,
    TL_DTYPE,
    load_tile,
    parameter_value,
    random_bits,
    remainder,
    rounded_parameter,
    to_float,
    zero_states,
)
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import seeds_and_offsets
from leanstep.kernels.triton_impl.steps._codes import SCALED, as_int8, coded, load_values, quantized
from leanstep.kernels.triton_impl.steps.engine import Table, bytes_of, numbers_of, over_blocks, program_of
from leanstep.kernels.triton_impl.steps.lion_step import mode_of

# blocks of a tile. 16 elements per thread: one 128-bit access for the codes. With a rounding state they would spill
# registers, so 8 elements per thread: 64 bits of codes, 128 bits of 16-bit tensors.
BLOCKS = {"nearest": 32, "stochastic": 32, "kahan": 16, "master": 16, "split": 16}
TILES = 2


def _blocks(rounding: str, p_dtype: torch.dtype, g_dtype: torch.dtype, *, fp8: bool) -> int:
    """Blocks of a tile. Of 16-bit parameters with fp32 gradients and fp8 codes, sm_80 holds 8 elements per thread."""
    return 16 if fp8 and p_dtype.itemsize < g_dtype.itemsize else BLOCKS[rounding]


@triton.jit
def _step_tile(pointers, scales, offs, mask, where, numbers, META: tl.constexpr):
    """Update one tile of blocks. Returns 1 where a non-finite gradient is skipped."""
    ROUNDING: tl.constexpr = META[0]
    FP8: tl.constexpr = META[1]
    p_ptr, g_ptr, c_ptr, e_ptr = pointers
    s_offs, s_mask, pair, shift, seed, index = where
    scale, lr, decay, beta1, omb1, beta2, omb2, mode = numbers
    g = to_float(load_tile(g_ptr + offs, mask))
    m = load_values(c_ptr, scales[0], offs, mask, s_offs, s_mask, FP8)
    g = tl.where((mode & 1) != 0, -g, g)
    skip = ((mode & 2) != 0) & ~(tl.abs(g) < float("inf"))
    c = beta1 * m + omb1 * g
    u = tl.where(c > 0, 1.0, 0.0) - tl.where(c < 0, 1.0, 0.0)
    u = tl.where(((mode & 8) == 0) | (u * g > 0), u * scale, 0.0)
    m = tl.where(skip, m, beta2 * m + omb2 * g)
    # NaN marks skipped elements until the parameter is written
    u = tl.where(skip, float("nan"), u)
    # before the parameter is read, which needs as many registers
    new_code, new_unit = quantized(m, pair, shift, seed, False, FP8)
    tl.store(c_ptr + offs, new_code, mask=mask)
    tl.store(scales[0] + s_offs, new_unit, mask=s_mask)

    p_old = load_tile(p_ptr + offs, mask)
    e_old = p_old
    if ROUNDING == "kahan" or ROUNDING == "master" or ROUNDING == "split":
        e_old = load_tile(e_ptr + offs, mask)
    value = parameter_value(p_old, e_old, ROUNDING)
    decayed = tl.where(((mode & 4) == 0) | (u * value >= 0), value * decay, value)
    value = decayed - lr * u
    p = rounded_parameter(value, random_bits(offs.to(tl.uint32) + index, seed), p_old.dtype, ROUNDING)
    tl.store(p_ptr + offs, tl.where(u == u, p, p_old), mask=mask)
    if ROUNDING == "kahan" or ROUNDING == "master" or ROUNDING == "split":
        e = remainder(value, p, e_old.dtype, ROUNDING)
        tl.store(e_ptr + offs, tl.where(u == u, e, e_old), mask=mask)
    return skip.to(tl.int32)


@triton.jit(do_not_specialize=["mode"])
def lion_step_int8_kernel(
    rows, programs, scalars, scales, seeds, offsets, flags, mode,
    P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, E_DTYPE: tl.constexpr, ROUNDING: tl.constexpr, FP8: tl.constexpr,
    BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program k updates TILES * BLOCKS blocks of one tensor: p, g, codes, the rounding state; and scales."""
    row, first, blocks, i = program_of(rows, programs, 5, 2, TILES * BLOCKS)
    scale = tl.load(scales + i, mask=(mode & 8) != 0, other=1.0)
    numbers = (scale,) + numbers_of(scalars, 6) + (mode,)
    seed = tl.load(seeds + i).to(tl.uint32)
    offset = tl.load(offsets + i)
    DTYPES: tl.constexpr = (P_DTYPE, G_DTYPE, tl.int8, E_DTYPE)
    META: tl.constexpr = (ROUNDING, FP8)
    if over_blocks(_step_tile, row, first, blocks, seed, offset, numbers, DTYPES, 1, META, False, BLOCKS) != 0:
        tl.store(flags + i, 1)


@triton.jit
def _agreement_tile(pointers, scales, offs, mask, where, numbers, META: tl.constexpr):
    g_ptr, c_ptr = pointers
    beta1, omb1, mode = numbers
    g = to_float(load_tile(g_ptr + offs, mask))
    m = load_values(c_ptr, scales[0], offs, mask, where[0], where[1], META[0])
    g = tl.where((mode & 1) != 0, -g, g)
    c = beta1 * m + omb1 * g
    # the gradient with the sign of its product with the update; 0 where the update is 0
    agreement = (tl.where(c > 0, 1.0, 0.0) - tl.where(c < 0, 1.0, 0.0)) * g
    most = tl.where((mode & 2) != 0, 3.4028234663852886e38, float("inf"))
    return ((agreement > 0) & (agreement <= most)).to(tl.int32)


@triton.jit(do_not_specialize=["mode"])
def lion_agreement_int8_kernel(
    rows, programs, scalars, counts, mode,
    G_DTYPE: tl.constexpr, FP8: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Count the elements of g and the codes whose update has the gradient's sign."""
    row, first, blocks, _ = program_of(rows, programs, 3, 2, TILES * BLOCKS)
    numbers = (tl.load(scalars + 2), tl.load(scalars + 3), mode)
    DTYPES: tl.constexpr = (G_DTYPE, tl.int8)
    META: tl.constexpr = (FP8,)
    agree = over_blocks(_agreement_tile, row, first, blocks, 0, 0, numbers, DTYPES, 1, META, True, BLOCKS)
    # the sum of integers does not depend on their order
    # the index is read at the end: held over the walk, it would spill on gfx942
    tl.atomic_add(counts + tl.load(row + 6), agree.to(tl.int64))


def lion_step_int8(lists: Sequence[Sequence[Tensor]], options: StepOptions) -> Tensor:
    """Update all but the gradients in place. int32 flags are 1 for tensors with skipped entries.

    Equals the definition, `leanstep.kernels.reference.steps.lion_int8`, bit for bit.
    """
    scalars, count = options.scalars, len(lists[0])
    flags = torch.zeros(count, dtype=torch.int32, device=scalars.device)
    table = Table(scalars.device)
    for p, g, codes, s, *state in zip(*lists, strict=True):
        p, g, e, rounds = table.staging.parameter(p, g, state[0] if state else None, options.rounding)
        c, s = table.staging.write(as_int8(codes)), table.staging.write(s)
        fp8 = codes.dtype == FP8
        blocks = _blocks(rounds, p.dtype, g.dtype, fp8=fp8)
        key = (p.dtype, g.dtype, p.dtype if e is None else e.dtype, rounds, fp8, blocks)
        table.add(key, (p, g, c, e), blocks * TILES, [s])
    cautious = scalars if options.cautious_scale is None else options.cautious_scale
    seeds, offsets = seeds_and_offsets(options, count)
    for (*dtypes, rounds, fp8, blocks), launch in table.launches(lion_step_int8_kernel):
        launch(
            scalars, cautious, seeds, offsets, flags, mode_of(options), *(STATE_DTYPE[d] for d in dtypes),
            ROUNDING=rounds, FP8=fp8, BLOCKS=blocks, TILES=TILES,
        )  # fmt: skip
    return flags


def lion_agreement_int8(lists: Sequence[Sequence[Tensor]], options: StepOptions) -> Tensor:
    """Count the elements per tensor whose update has the sign of the gradient. Integer counts, returned as fp32."""
    device = options.scalars.device
    counts = torch.zeros(len(lists[0]), dtype=torch.int64, device=device)
    table = Table(device)
    for tensors in zip(*lists, strict=True):
        g, c, s = (table.staging.read(as_int8(t)) for t in tensors)
        table.add((g.dtype, tensors[1].dtype == FP8), (g, c), BLOCKS["nearest"] * TILES, [s])
    for (dtype, fp8), launch in table.launches(lion_agreement_int8_kernel):
        launch(
            options.scalars, counts, mode_of(options), TL_DTYPE[dtype], FP8=fp8, BLOCKS=BLOCKS["nearest"], TILES=TILES
        )
    return counts.to(torch.float32)


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return what the kernels promise."""
    blocks = BLOCKS["nearest"] * TILES + 1
    scales = torch.zeros(blocks, 1)
    for p_dtype, g_dtype, dtype in itertools.product(TL_DTYPE, TL_DTYPE, (torch.int8, FP8)):
        p, g, codes = (torch.zeros(blocks, SCALED, dtype=kind) for kind in (p_dtype, g_dtype, dtype))
        lion_agreement_int8([[g], [codes], [scales]], StepOptions(torch.zeros(6)))
        for rounding in ROUNDINGS:
            states = [[state] for state in zero_states(p, rounding)]
            lion_step_int8([[p], [g], [codes], [scales], *states], StepOptions(torch.zeros(6), rounding))
    return {lion_step_int8_kernel: _step_promise, lion_agreement_int8_kernel: _agreement_promise}


def _step_promise(launch: Launch) -> dict[str, Any]:
    p, g = (launch.dtype(name) for name in ("P_DTYPE", "G_DTYPE"))
    blocks, label = launch.constants["BLOCKS"], coded(f"p {p} g {g} {launch.constants['ROUNDING']}", launch)
    wide = blocks == BLOCKS["nearest"]
    return dict(label=label, elements=blocks * SCALED, wide=wide, **bytes_of(launch, state=1))


def _agreement_promise(launch: Launch) -> dict[str, Any]:
    g = launch.dtype("G_DTYPE")
    return dict(
        label=coded(f"g {g}", launch), elements=BLOCKS["nearest"] * SCALED, read=g.itemsize + 1, written=0, wide=True
    )
