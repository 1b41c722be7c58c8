"""AdamW with 8-bit moments as one launch for all tensors of a list.

Bytes: reads p, g, both codes, their scales and the rounding state once, and writes all but g once. A scale is 4 bytes
for 128 elements.
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

# blocks of a tile: 8 elements per thread, 64 bits of codes
BLOCKS = 16
TILES = 2
THREADS = 256
# blocks of a masked tile, whose offsets and masks need registers
FEW = tl.constexpr(8)


@triton.jit
def _step_tile(
    p_ptr, g_ptr, m_ptr, v_ptr, m_scales, v_scales, e_ptr, offs, mask, s_offs, s_mask, pair, shift, seed, index,
    decay, beta1, omb1, beta2, omb2, eps, size, inverse_root, direction, aligned, ROUNDING: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """Update one tile of blocks; `mask` is None for a whole tile."""
    g = to_float(load_tile(g_ptr + offs, mask)) * direction
    v = beta2 * load_values(v_ptr, v_scales, offs, mask, s_offs, s_mask, False) + (omb2 * g) * g
    # an infinite square would make its block NaN, which must stay NaN
    v = tl.where(v > 3.4028234663852886e38, 3.4028234663852886e38, v)
    code, unit = quantized(v, pair, shift, seed, True, False)
    tl.store(v_ptr + offs, code, mask=mask)
    tl.store(v_scales + s_offs, unit, mask=s_mask)
    m = beta1 * load_values(m_ptr, m_scales, offs, mask, s_offs, s_mask, FP8) + omb1 * g
    code, unit = quantized(m, pair, shift, seed, False, FP8)
    tl.store(m_ptr + offs, code, mask=mask)
    tl.store(m_scales + s_offs, unit, mask=s_mask)
    step = size * tl.div_rn(m, tl.sqrt_rn(v) * inverse_root + eps)

    p_old = load_tile(p_ptr + offs, mask)
    e_old = p_old
    if ROUNDING == "kahan" or ROUNDING == "master" or ROUNDING == "split":
        e_old = load_tile(e_ptr + offs, mask)
    value = parameter_value(p_old, e_old, ROUNDING)
    value = tl.where((aligned == 0) | (m * value >= 0), value * decay, value) - step
    p = rounded_parameter(value, random_bits(offs.to(tl.uint32) + index, seed), p_old.dtype, ROUNDING)
    tl.store(p_ptr + offs, p, mask=mask)
    if ROUNDING == "kahan" or ROUNDING == "master" or ROUNDING == "split":
        tl.store(e_ptr + offs, remainder(value, p, e_old.dtype, ROUNDING), mask=mask)


@triton.jit(do_not_specialize=["aligned"])
def adamw_step_int8_kernel(
    rows, programs, scalars, corrections, seeds, offsets, direction, aligned,
    P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, E_DTYPE: tl.constexpr, ROUNDING: tl.constexpr, FP8: tl.constexpr,
    BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program k updates TILES * BLOCKS blocks of one tensor.

    A row is (p, g, codes, square codes, their scales, rounding state, blocks, columns, whole, index). In a whole tensor
    all tensors are aligned and no block is short.
    """
    entry = tl.load(programs + tl.program_id(0))
    row = rows + (entry >> 32) * 11
    first = (entry & 0xFFFFFFFF) * (TILES * BLOCKS)
    blocks = tl.minimum(tl.load(row + 7) - first, TILES * BLOCKS).to(tl.int32)
    i = tl.load(row + 10)

    decay = tl.load(scalars + 0)
    beta1 = tl.load(scalars + 1)
    omb1 = tl.load(scalars + 2)
    beta2 = tl.load(scalars + 3)
    omb2 = tl.load(scalars + 4)
    eps = tl.load(scalars + 5)
    size = tl.load(corrections + 2 * i)
    inverse_root = tl.load(corrections + 2 * i + 1)
    seed = tl.load(seeds + i).to(tl.uint32)

    block = tl.arange(0, BLOCKS)[:, None]
    lane = tl.arange(0, 128)[None, :]
    shift = ((lane & 1) * 16).to(tl.uint32)
    # tiles of whole tensors need no mask and have a provable alignment: accesses are as wide as they can be
    whole = tl.where(tl.load(row + 9) != 0, blocks // BLOCKS, 0)
    # the entries of whole tensors are 128 times their blocks, also in the tensor of which they are rows
    entries = first * 128 + tl.load(offsets + i)
    index = entries.to(tl.uint32)
    pair = (entries // 2).to(tl.uint32)
    p_ptr = aligned_pointer(tl.load(row + 0), P_DTYPE) + first * 128
    g_ptr = aligned_pointer(tl.load(row + 1), G_DTYPE) + first * 128
    m_ptr = aligned_pointer(tl.load(row + 2), tl.int8) + first * 128
    v_ptr = aligned_pointer(tl.load(row + 3), tl.uint8) + first * 128
    m_scales = aligned_pointer(tl.load(row + 4), tl.float32) + first
    v_scales = aligned_pointer(tl.load(row + 5), tl.float32) + first
    e_ptr = aligned_pointer(tl.load(row + 6), E_DTYPE) + first * 128
    for t in range(0, whole):
        near = t * BLOCKS + block
        _step_tile(
            p_ptr, g_ptr, m_ptr, v_ptr, m_scales, v_scales, e_ptr, near * 128 + lane, None, near, None,
            pair + (near * 64 + lane // 2).to(tl.uint32), shift, seed, index,
            decay, beta1, omb1, beta2, omb2, eps, size, inverse_root, direction, aligned, ROUNDING, FP8,
        )  # fmt: skip
    # the tail, and other tensors; addresses are read again, because holding them would spill registers
    columns = tl.load(row + 8).to(tl.int32)
    per_row, first_column, start = row_start(first, columns)
    offset = tl.load(offsets + tl.load(row + 10))
    index = (start + offset).to(tl.uint32)
    pair = ((offset // columns * per_row + first) * 64).to(tl.uint32)
    p_ptr = tl.load(row + 0).to(tl.pointer_type(P_DTYPE)) + start
    g_ptr = tl.load(row + 1).to(tl.pointer_type(G_DTYPE)) + start
    m_ptr = tl.load(row + 2).to(tl.pointer_type(tl.int8)) + start
    v_ptr = tl.load(row + 3).to(tl.pointer_type(tl.uint8)) + start
    m_scales = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + first
    v_scales = tl.load(row + 5).to(tl.pointer_type(tl.float32)) + first
    e_ptr = tl.load(row + 6).to(tl.pointer_type(E_DTYPE)) + start
    few = tl.arange(0, FEW)[:, None]
    for t in range(whole * BLOCKS // FEW, tl.cdiv(blocks, FEW)):
        near = t * FEW + few
        offs, mask = place(near, lane, first_column, columns, per_row, blocks)
        _step_tile(
            p_ptr, g_ptr, m_ptr, v_ptr, m_scales, v_scales, e_ptr, offs, mask, near, near < blocks,
            pair + (near * 64 + lane // 2).to(tl.uint32), shift, seed, index,
            decay, beta1, omb1, beta2, omb2, eps, size, inverse_root, direction, aligned, ROUNDING, FP8,
        )  # fmt: skip


def adamw_step_int8(lists: Sequence[Sequence[Tensor]], corrections: Tensor, options: StepOptions) -> None:
    """Update all but the gradients in place.

    Equals the definition, `leanstep.kernels.reference.steps.adamw_int8`, bit for bit.

    Args:
        lists: parameters, gradients, codes, scales, square codes, square scales, and rounding states if there are any.
        corrections: [number of tensors, 2].
        options: of the step.
    """
    device = options.scalars.device
    staging = Staging()
    rows, keys, pieces = [], [], []
    for i, (p, g, m, m_scale, v, v_scale, *state) in enumerate(zip(*lists, strict=True)):
        code = m.dtype
        p, e, rounds = staging.rounded(p, state[0] if state else None, options.rounding)
        p, m, m_scale, v, v_scale = (staging.write(t) for t in (p, as_int8(m), m_scale, v, v_scale))
        g = staging.read(g, native_dtype(g.dtype, p.dtype))
        e = None if e is None else staging.write(e)
        columns = p.shape[1:].numel()
        tensors = (p, g, m, v, m_scale, v_scale, e)
        whole = columns % SCALED == 0 and is_aligned(*tensors)
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        rows.append((*addresses, m_scale.numel(), columns, whole, i))
        keys.append((p.dtype, g.dtype, p.dtype if e is None else e.dtype, rounds, code))
        pieces.append(triton.cdiv(m_scale.numel(), BLOCKS * TILES))
    if not any(pieces):
        return
    seeds, offsets = seeds_and_offsets(options, len(rows))
    table = device_rows(rows, device)
    direction = -1.0 if options.maximize else 1.0
    with on_device(device):
        for (*dtypes, rounds, code), programs in launches(keys, pieces, device):
            # fused multiply-adds would round differently from the definition
            adamw_step_int8_kernel[(programs.numel(),)](
                table, programs, options.scalars, corrections.contiguous(), seeds, offsets, direction,
                int(options.decay_where_aligned),
                *(STATE_DTYPE[d] for d in dtypes), ROUNDING=rounds, FP8=code == FP8, BLOCKS=BLOCKS,
                TILES=TILES, num_warps=warps(THREADS), enable_fp_fusion=False,
            )  # fmt: skip
    staging.finish()


def audit_launches() -> Promises:
    """Launch every configuration that the launcher above can choose, and return what the kernel promises."""
    shape = BLOCKS * TILES + 1, SCALED
    square_codes, square_scale = torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape[0], 1)
    for p_dtype, g_dtype, rounding, dtype in itertools.product(TL_DTYPE, TL_DTYPE, ROUNDINGS, (torch.int8, FP8)):
        codes = torch.zeros(shape, dtype=dtype)
        p, g, scale = (
            torch.zeros(size, dtype=kind)
            for size, kind in ((shape, p_dtype), (shape, g_dtype), ((shape[0], 1), torch.float32))
        )
        states = [[state] for state in zero_states(p, rounding)]
        lists = [[p], [g], [codes], [scale], [square_codes], [square_scale], *states]
        adamw_step_int8(lists, torch.zeros(1, 2), StepOptions(torch.zeros(6), rounding))
    return {adamw_step_int8_kernel: _promise}


def _promise(launch: Launch) -> dict[str, Any]:
    p, g, e = (launch.dtype(name) for name in ("P_DTYPE", "G_DTYPE", "E_DTYPE"))
    rounding = launch.constants["ROUNDING"]
    state = e.itemsize if has_state(rounding) else 0
    return dict(
        label=coded(f"p {p} g {g} {rounding}", launch), elements=BLOCKS * SCALED,
        read=p.itemsize + g.itemsize + 2 + state, written=p.itemsize + 2 + state,
    )  # fmt: skip
