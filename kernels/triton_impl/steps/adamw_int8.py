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

# blocks of a tile: 8 elements per thread, 64 bits of codes
BLOCKS = 16
TILES = 2


@triton.jit
def _step_tile(pointers, scales, offs, mask, where, numbers, META: tl.constexpr):
    """Update one tile of blocks."""
    ROUNDING: tl.constexpr = META[0]
    FP8: tl.constexpr = META[1]
    p_ptr, g_ptr, m_ptr, v_ptr, e_ptr = pointers
    m_scales, v_scales = scales
    s_offs, s_mask, pair, shift, seed, index = where
    decay, beta1, omb1, beta2, omb2, eps, size, inverse_root, direction, aligned = numbers
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
    return 0


@triton.jit(do_not_specialize=["aligned"])
def adamw_step_int8_kernel(
    rows, programs, scalars, corrections, seeds, offsets, direction, aligned,
    P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, E_DTYPE: tl.constexpr, ROUNDING: tl.constexpr, FP8: tl.constexpr,
    BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program k updates TILES * BLOCKS blocks of one tensor: p, g, codes, square codes, rounding state; two scales."""
    row, first, blocks, i = program_of(rows, programs, 7, 2, TILES * BLOCKS)
    numbers = numbers_of(scalars, 6) + numbers_of(corrections + 2 * i, 2) + (direction, aligned)
    seed = tl.load(seeds + i).to(tl.uint32)
    offset = tl.load(offsets + i)
    DTYPES: tl.constexpr = (P_DTYPE, G_DTYPE, tl.int8, tl.uint8, E_DTYPE)
    META: tl.constexpr = (ROUNDING, FP8)
    over_blocks(_step_tile, row, first, blocks, seed, offset, numbers, DTYPES, 2, META, None, BLOCKS)


def adamw_step_int8(lists: Sequence[Sequence[Tensor]], options: StepOptions, corrections: Tensor) -> None:
    """Update all but the gradients in place.

    Equals the definition, `leanstep.kernels.reference.steps.adamw_int8`, bit for bit.

    Args:
        lists: parameters, gradients, codes, scales, square codes, square scales, and rounding states if there are any.
        options: of the step.
        corrections: [number of tensors, 2].
    """
    table = Table(options.scalars.device)
    staging = table.staging
    for p, g, codes, m_scales, v, v_scales, *state in zip(*lists, strict=True):
        p, g, e, rounds = staging.parameter(p, g, state[0] if state else None, options.rounding)
        m, v, m_scales, v_scales = (staging.write(t) for t in (as_int8(codes), v, m_scales, v_scales))
        key = (p.dtype, g.dtype, p.dtype if e is None else e.dtype, rounds, codes.dtype == FP8)
        table.add(key, (p, g, m, v, e), BLOCKS * TILES, [m_scales, v_scales])
    seeds, offsets = seeds_and_offsets(options, len(lists[0]))
    direction, aligned = -1.0 if options.maximize else 1.0, int(options.decay_where_aligned)
    for (*dtypes, rounds, fp8), launch in table.launches(adamw_step_int8_kernel):
        launch(
            options.scalars, corrections.contiguous(), seeds, offsets, direction, aligned,
            *(STATE_DTYPE[d] for d in dtypes), ROUNDING=rounds, FP8=fp8, BLOCKS=BLOCKS, TILES=TILES,
        )  # fmt: skip


def audit_launches() -> Promises:
    """Launch every configuration that the launcher above can choose, and return what the kernel promises."""
    shape = BLOCKS * TILES + 1, SCALED
    squares, scale = torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape[0], 1)
    for p_dtype, g_dtype, rounding, dtype in itertools.product(TL_DTYPE, TL_DTYPE, ROUNDINGS, (torch.int8, FP8)):
        p, g, codes = (torch.zeros(shape, dtype=kind) for kind in (p_dtype, g_dtype, dtype))
        lists = [[t] for t in (p, g, codes, scale, squares, scale.clone(), *zero_states(p, rounding))]
        adamw_step_int8(lists, StepOptions(torch.zeros(6), rounding), torch.zeros(1, 2))
    return {adamw_step_int8_kernel: _promise}


def _promise(launch: Launch) -> dict[str, Any]:
    p, g = (launch.dtype(name) for name in ("P_DTYPE", "G_DTYPE"))
    label = coded(f"p {p} g {g} {launch.constants['ROUNDING']}", launch)
    return dict(label=label, elements=BLOCKS * SCALED, **bytes_of(launch, state=2))
