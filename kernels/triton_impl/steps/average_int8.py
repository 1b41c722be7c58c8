"""Averages in 8 bits as one launch for all tensors of a list.

Bytes: reads g, the codes and their scales once. Writes the outputs, the codes and the scales once, where there are
outputs and an update. A scale is 4 bytes for 128 elements.
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
from leanstep.kernels.triton_impl._common import STATE_DTYPE, TL_DTYPE, load_tile, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import seeds_and_offsets
from leanstep.kernels.triton_impl.steps._codes import SCALED, as_int8, coded, load_values, quantized
from leanstep.kernels.triton_impl.steps.engine import Table, numbers_of, over_blocks, program_of

# blocks of a tile: 16 elements per thread, one 128-bit access for the codes
BLOCKS = 32
TILES = 2


@triton.jit
def _step_tile(pointers, scales, offs, mask, where, numbers, META: tl.constexpr):
    """Average one tile of blocks."""
    OUTPUT: tl.constexpr = META[0]
    NESTEROV: tl.constexpr = META[1]
    UPDATE: tl.constexpr = META[2]
    FP8: tl.constexpr = META[3]
    g_ptr, c_ptr, o_ptr = pointers
    s_offs, s_mask, pair, shift, seed, _ = where
    beta, omb, direction, skipped = numbers
    m = load_values(c_ptr, scales[0], offs, mask, s_offs, s_mask, FP8)
    g = to_float(load_tile(g_ptr + offs, mask)) * direction
    new = m
    if UPDATE:
        # a weight of 0 forgets infinities and NaNs
        new = tl.where(beta == 0, g, beta * m + omb * g)
        code, unit = quantized(new, pair, shift, seed, False, FP8)
        if skipped == 0:
            tl.store(c_ptr + offs, code, mask=mask)
            tl.store(scales[0] + s_offs, unit, mask=s_mask)
    if OUTPUT:
        if NESTEROV:
            new = beta * new + omb * g
        tl.store(o_ptr + offs, tl.where(skipped != 0, m, new), mask=mask)
    return 0


@triton.jit
def average_step_int8_kernel(
    rows, programs, scalars, seeds, offsets, skip, direction,
    G_DTYPE: tl.constexpr, SKIP: tl.constexpr, OUTPUT: tl.constexpr, NESTEROV: tl.constexpr, UPDATE: tl.constexpr,
    FP8: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program k averages TILES * BLOCKS blocks of one tensor: g, codes, output; and scales."""
    row, first, blocks, i = program_of(rows, programs, 4, 2, TILES * BLOCKS)
    skipped = 0
    if SKIP:
        skipped = tl.load(skip + i)
    numbers = numbers_of(scalars, 2) + (direction, skipped)
    seed = tl.load(seeds + i).to(tl.uint32)
    offset = tl.load(offsets + i)
    DTYPES: tl.constexpr = (G_DTYPE, tl.int8, tl.float32)
    META: tl.constexpr = (OUTPUT, NESTEROV, UPDATE, FP8)
    over_blocks(_step_tile, row, first, blocks, seed, offset, numbers, DTYPES, 1, META, None, BLOCKS)


def average_step_int8(
    lists: Sequence[Sequence[Tensor]], options: StepOptions, skip: Tensor | None, nesterov: bool, update: bool
) -> None:
    """Update codes and scales, and write the outputs.

    Equals the definition, `leanstep.kernels.reference.steps.average_int8`, bit for bit.

    Args:
        lists: gradients, codes, scales, and outputs if there are any.
        options: of the step.
        skip: int32 [number of tensors], or None.
        nesterov, update: see `leanstep.kernels.steps.average_int8.average_step_int8`.
    """
    table = Table(options.scalars.device)
    staging = table.staging
    for g, codes, s, *output in zip(*lists, strict=True):
        c, s = staging.write(as_int8(codes)), staging.write(s)
        g = staging.read(g, g.dtype if g.dtype in TL_DTYPE else torch.float32)
        o = staging.write(output[0]) if output else None
        table.add((g.dtype, codes.dtype == FP8), (g, c, o), BLOCKS * TILES, [s])
    seeds, offsets = seeds_and_offsets(options, len(lists[0]))
    direction = -1.0 if options.maximize else 1.0
    for (dtype, fp8), launch in table.launches(average_step_int8_kernel):
        launch(
            options.scalars, seeds, offsets, seeds if skip is None else skip, direction, STATE_DTYPE[dtype],
            SKIP=skip is not None, OUTPUT=len(lists) > 3, NESTEROV=nesterov, UPDATE=update, FP8=fp8, BLOCKS=BLOCKS,
            TILES=TILES,
        )  # fmt: skip


def audit_launches() -> Promises:
    """Launch every configuration that the launcher above can choose, and return what the kernel promises."""
    shape = BLOCKS * TILES + 1, SCALED
    scale, skip = torch.zeros(shape[0], 1), torch.zeros(1, dtype=torch.int32)
    # (output, nesterov, update) of SinkGD and LANTON
    modes = ((True, False, True), (True, True, True), (False, False, True), (True, False, False), (True, True, False))
    kinds = itertools.product(TL_DTYPE, (None, skip), modes, (torch.int8, FP8))
    for g_dtype, flags, (output, nesterov, update), dtype in kinds:
        g, codes = torch.zeros(shape, dtype=g_dtype), torch.zeros(shape, dtype=dtype)
        lists = [[g], [codes], [scale], *([[torch.zeros(shape)]] if output else [])]
        average_step_int8(lists, StepOptions(torch.zeros(2)), flags, nesterov, update)
    return {average_step_int8_kernel: _promise}


def _promise(launch: Launch) -> dict[str, Any]:
    g, constants = launch.dtype("G_DTYPE"), launch.constants
    names = [name.lower() for name in ("SKIP", "OUTPUT", "NESTEROV", "UPDATE") if constants[name]]
    read = 1 + (g.itemsize if constants["UPDATE"] or constants["NESTEROV"] else 0)
    return dict(
        label=coded(" ".join([f"g {g}", *names]), launch), elements=BLOCKS * SCALED,
        read=read, written=4 * constants["OUTPUT"] + constants["UPDATE"],
    )  # fmt: skip
