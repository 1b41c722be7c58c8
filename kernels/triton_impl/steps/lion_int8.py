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
    aligned_pointer,
    has_state,
    load_tile,
    parameter_value,
    random_bits,
    remainder,
    rounded_parameter,
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
from leanstep.kernels.triton_impl.steps._codes import SCALED, as_int8, coded, load_values, place, quantized, row_start
from leanstep.kernels.triton_impl.steps.lion_step import mode_of

# blocks of a tile. 16 elements per thread: one 128-bit access for the codes. With a rounding state they would spill
# registers, so 8 elements per thread: 64 bits of codes, 128 bits of 16-bit tensors.
BLOCKS = {"nearest": 32, "stochastic": 32, "kahan": 16, "master": 16, "split": 16}
TILES = 2
THREADS = 256


def _blocks(rounding: str, p_dtype: torch.dtype, g_dtype: torch.dtype, *, fp8: bool) -> int:
    """Blocks of a tile. Of 16-bit parameters with fp32 gradients and fp8 codes, sm_80 holds 8 elements per thread."""
    return 16 if fp8 and p_dtype.itemsize < g_dtype.itemsize else BLOCKS[rounding]


# blocks of a masked tile, whose offsets and masks need registers
FEW = tl.constexpr(8)


@triton.jit
def _step_tile(
    p_ptr, g_ptr, c_ptr, s_ptr, e_ptr, offs, mask, s_offs, s_mask, pair, shift, seed, index, scale,
    lr, decay, beta1, omb1, beta2, omb2, mode, ROUNDING: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Update one tile of blocks; `mask` is None for a whole tile. Returns 1 where a non-finite gradient is skipped."""
    g = to_float(load_tile(g_ptr + offs, mask))
    m = load_values(c_ptr, s_ptr, offs, mask, s_offs, s_mask, FP8)
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
    tl.store(s_ptr + s_offs, new_unit, mask=s_mask)

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
    """Program k updates TILES * BLOCKS blocks of one tensor.

    A row is (p, g, codes, scales, rounding state, blocks, columns, whole, index, 0). In a whole tensor all tensors are
    aligned and no block is short.
    """
    entry = tl.load(programs + tl.program_id(0))
    row = rows + (entry >> 32) * 10
    first = (entry & 0xFFFFFFFF) * (TILES * BLOCKS)
    blocks = tl.minimum(tl.load(row + 5) - first, TILES * BLOCKS).to(tl.int32)
    i = tl.load(row + 8)

    lr = tl.load(scalars + 0)
    decay = tl.load(scalars + 1)
    beta1 = tl.load(scalars + 2)
    omb1 = tl.load(scalars + 3)
    beta2 = tl.load(scalars + 4)
    omb2 = tl.load(scalars + 5)
    scale = tl.load(scales + i, mask=(mode & 8) != 0, other=1.0)
    seed = tl.load(seeds + i).to(tl.uint32)

    block = tl.arange(0, BLOCKS)[:, None]
    lane = tl.arange(0, 128)[None, :]
    shift = ((lane & 1) * 16).to(tl.uint32)
    skipped = tl.zeros([BLOCKS, 128], dtype=tl.int32)
    # tiles of whole tensors need no mask and have a provable alignment: accesses are 128 bits wide
    whole = tl.where(tl.load(row + 7) != 0, blocks // BLOCKS, 0)
    # the entries of whole tensors are 128 times their blocks, also in the tensor of which they are rows
    entries = first * 128 + tl.load(offsets + i)
    index = entries.to(tl.uint32)
    pair = (entries // 2).to(tl.uint32)
    p_ptr = aligned_pointer(tl.load(row + 0), P_DTYPE) + first * 128
    g_ptr = aligned_pointer(tl.load(row + 1), G_DTYPE) + first * 128
    c_ptr = aligned_pointer(tl.load(row + 2), tl.int8) + first * 128
    s_ptr = aligned_pointer(tl.load(row + 3), tl.float32) + first
    e_ptr = aligned_pointer(tl.load(row + 4), E_DTYPE) + first * 128
    for t in range(0, whole):
        near = t * BLOCKS + block
        skipped |= _step_tile(
            p_ptr, g_ptr, c_ptr, s_ptr, e_ptr, near * 128 + lane, None, near, None,
            pair + (near * 64 + lane // 2).to(tl.uint32), shift, seed, index, scale,
            lr, decay, beta1, omb1, beta2, omb2, mode, ROUNDING, FP8,
        )  # fmt: skip
    # the tail, and other tensors; addresses are read again, because holding them would spill registers
    columns = tl.load(row + 6).to(tl.int32)
    per_row, first_column, start = row_start(first, columns)
    offset = tl.load(offsets + tl.load(row + 8))
    index = (start + offset).to(tl.uint32)
    pair = ((offset // columns * per_row + first) * 64).to(tl.uint32)
    p_ptr = tl.load(row + 0).to(tl.pointer_type(P_DTYPE)) + start
    g_ptr = tl.load(row + 1).to(tl.pointer_type(G_DTYPE)) + start
    c_ptr = tl.load(row + 2).to(tl.pointer_type(tl.int8)) + start
    s_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + first
    e_ptr = tl.load(row + 4).to(tl.pointer_type(E_DTYPE)) + start
    few = tl.arange(0, FEW)[:, None]
    skipped_few = tl.zeros([FEW, 128], dtype=tl.int32)
    for t in range(whole * BLOCKS // FEW, tl.cdiv(blocks, FEW)):
        near = t * FEW + few
        offs, mask = place(near, lane, first_column, columns, per_row, blocks)
        skipped_few |= _step_tile(
            p_ptr, g_ptr, c_ptr, s_ptr, e_ptr, offs, mask, near, near < blocks,
            pair + (near * 64 + lane // 2).to(tl.uint32), shift, seed, index, scale,
            lr, decay, beta1, omb1, beta2, omb2, mode, ROUNDING, FP8,
        )  # fmt: skip
    if tl.max(tl.max(skipped, 1), 0) | tl.max(tl.max(skipped_few, 1), 0) != 0:
        tl.store(flags + tl.load(row + 8), 1)


@triton.jit
def _agreement_tile(g_ptr, c_ptr, s_ptr, offs, mask, s_offs, s_mask, beta1, omb1, mode, FP8: tl.constexpr):
    g = to_float(load_tile(g_ptr + offs, mask))
    m = load_values(c_ptr, s_ptr, offs, mask, s_offs, s_mask, FP8)
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
    """Count the elements whose update has the gradient's sign.

    A row is (g, codes, scales, blocks, columns, whole, index, 0).
    """
    entry = tl.load(programs + tl.program_id(0))
    row = rows + (entry >> 32) * 8
    first = (entry & 0xFFFFFFFF) * (TILES * BLOCKS)
    blocks = tl.minimum(tl.load(row + 3) - first, TILES * BLOCKS).to(tl.int32)
    beta1 = tl.load(scalars + 2)
    omb1 = tl.load(scalars + 3)

    block = tl.arange(0, BLOCKS)[:, None]
    lane = tl.arange(0, 128)[None, :]
    agree = tl.zeros([BLOCKS, 128], dtype=tl.int32)
    whole = tl.where(tl.load(row + 5) != 0, blocks // BLOCKS, 0)
    g_ptr = aligned_pointer(tl.load(row + 0), G_DTYPE) + first * 128
    c_ptr = aligned_pointer(tl.load(row + 1), tl.int8) + first * 128
    s_ptr = aligned_pointer(tl.load(row + 2), tl.float32) + first
    for t in range(0, whole):
        near = t * BLOCKS + block
        agree += _agreement_tile(g_ptr, c_ptr, s_ptr, near * 128 + lane, None, near, None, beta1, omb1, mode, FP8)
    columns = tl.load(row + 4).to(tl.int32)
    per_row, first_column, start = row_start(first, columns)
    g_ptr = tl.load(row + 0).to(tl.pointer_type(G_DTYPE)) + start
    c_ptr = tl.load(row + 1).to(tl.pointer_type(tl.int8)) + start
    s_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + first
    few = tl.arange(0, FEW)[:, None]
    agree_few = tl.zeros([FEW, 128], dtype=tl.int32)
    for t in range(whole * BLOCKS // FEW, tl.cdiv(blocks, FEW)):
        near = t * FEW + few
        offs, mask = place(near, lane, first_column, columns, per_row, blocks)
        agree_few += _agreement_tile(g_ptr, c_ptr, s_ptr, offs, mask, near, near < blocks, beta1, omb1, mode, FP8)
    # the sum of integers does not depend on their order
    tl.atomic_add(
        counts + tl.load(row + 6), (tl.sum(tl.sum(agree, 1), 0) + tl.sum(tl.sum(agree_few, 1), 0)).to(tl.int64)
    )


def lion_step_int8(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    rounding_state: Sequence[Tensor],
    options: StepOptions,
) -> Tensor:
    """Update all but `grads` in place. int32 flags are 1 for tensors with skipped entries.

    Equals the definition, `leanstep.kernels.reference.steps.lion_int8`, bit for bit.
    """
    scalars, device = options.scalars, options.scalars.device
    flags = torch.zeros(len(params), dtype=torch.int32, device=device)
    staging = Staging()
    rows, keys, pieces = [], [], []
    for i, (p, g, c, s) in enumerate(zip(params, grads, codes, scales, strict=True)):
        p, e, rounds = staging.rounded(p, rounding_state[i] if rounding_state else None, options.rounding)
        p, c, s = (staging.write(t) for t in (p, as_int8(c), s))
        g = staging.read(g, native_dtype(g.dtype, p.dtype))
        e = None if e is None else staging.write(e)
        columns = p.shape[1:].numel()
        whole = columns % SCALED == 0 and is_aligned(p, g, c, s, e)
        addresses = (p.data_ptr(), g.data_ptr(), c.data_ptr(), s.data_ptr(), 0 if e is None else e.data_ptr())
        rows.append((*addresses, s.numel(), columns, whole, i, 0))
        keys.append((p.dtype, g.dtype, p.dtype if e is None else e.dtype, rounds, codes[i].dtype))
        blocks = _blocks(rounds, p.dtype, g.dtype, fp8=codes[i].dtype == FP8)
        pieces.append(triton.cdiv(s.numel(), blocks * TILES))
    if not any(pieces):
        return flags
    cautious = scalars if options.cautious_scale is None else options.cautious_scale
    seeds, offsets = seeds_and_offsets(options, len(params))
    table = device_rows(rows, device)
    with on_device(device):
        for (*dtypes, rounds, code), programs in launches(keys, pieces, device):
            fp8 = code == FP8
            # fused multiply-adds would round differently from the definition
            lion_step_int8_kernel[(programs.numel(),)](
                table, programs, scalars, cautious, seeds, offsets, flags, mode_of(options),
                *(STATE_DTYPE[d] for d in dtypes), ROUNDING=rounds, FP8=fp8,
                BLOCKS=_blocks(rounds, dtypes[0], dtypes[1], fp8=fp8), TILES=TILES,
                num_warps=warps(THREADS), enable_fp_fusion=False,
            )  # fmt: skip
    staging.finish()
    return flags


def lion_agreement_int8(
    grads: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor], options: StepOptions
) -> Tensor:
    """Count the elements per tensor whose update has the sign of the gradient. Integer counts, returned as fp32."""
    device = options.scalars.device
    counts = torch.zeros(len(grads), dtype=torch.int64, device=device)
    staging = Staging()
    rows, keys, pieces = [], [], []
    for i, tensors in enumerate(zip(grads, codes, scales, strict=True)):
        g, c, s = (staging.read(as_int8(t)) for t in tensors)
        columns = g.shape[1:].numel()
        whole = columns % SCALED == 0 and is_aligned(g, c, s)
        rows.append((g.data_ptr(), c.data_ptr(), s.data_ptr(), s.numel(), columns, whole, i, 0))
        keys.append((g.dtype, codes[i].dtype))
        pieces.append(triton.cdiv(s.numel(), BLOCKS["nearest"] * TILES))
    if any(pieces):
        table = device_rows(rows, device)
        with on_device(device):
            for (dtype, code), programs in launches(keys, pieces, device):
                lion_agreement_int8_kernel[(programs.numel(),)](
                    table, programs, options.scalars, counts, mode_of(options), TL_DTYPE[dtype], code == FP8,
                    BLOCKS=BLOCKS["nearest"], TILES=TILES, num_warps=warps(THREADS), enable_fp_fusion=False,
                )  # fmt: skip
    staging.finish()
    return counts.to(torch.float32)


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return what the kernels promise."""
    blocks = BLOCKS["nearest"] * TILES + 1
    scales = torch.zeros(blocks, 1)
    for p_dtype, g_dtype, dtype in itertools.product(TL_DTYPE, TL_DTYPE, (torch.int8, FP8)):
        codes = torch.zeros(blocks, SCALED, dtype=dtype)
        p, g = torch.zeros(blocks, SCALED, dtype=p_dtype), torch.zeros(blocks, SCALED, dtype=g_dtype)
        lion_agreement_int8([g], [codes], [scales], StepOptions(torch.zeros(6)))
        for rounding in ROUNDINGS:
            lion_step_int8([p], [g], [codes], [scales], zero_states(p, rounding), StepOptions(torch.zeros(6), rounding))
    return {lion_step_int8_kernel: _step_promise, lion_agreement_int8_kernel: _agreement_promise}


def _step_promise(launch: Launch) -> dict[str, Any]:
    p, g, e = (launch.dtype(name) for name in ("P_DTYPE", "G_DTYPE", "E_DTYPE"))
    rounding = launch.constants["ROUNDING"]
    state = e.itemsize if has_state(rounding) else 0
    blocks = launch.constants["BLOCKS"]
    return dict(
        label=coded(f"p {p} g {g} {rounding}", launch), elements=blocks * SCALED, wide=blocks == BLOCKS["nearest"],
        read=p.itemsize + g.itemsize + 1 + state, written=p.itemsize + 1 + state,
    )  # fmt: skip


def _agreement_promise(launch: Launch) -> dict[str, Any]:
    g = launch.dtype("G_DTYPE")
    return dict(
        label=coded(f"g {g}", launch), elements=BLOCKS["nearest"] * SCALED, read=g.itemsize + 1, written=0, wide=True
    )
