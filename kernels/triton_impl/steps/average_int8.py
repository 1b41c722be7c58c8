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
from leanstep.kernels.triton_impl._common import STATE_DTYPE, TL_DTYPE, aligned_pointer, load_tile, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import (
    Staging,
    device_rows,
    is_aligned,
    launches,
    on_device,
    seeds_and_offsets,
    warps,
)
from leanstep.kernels.triton_impl.steps._codes import SCALED, as_int8, coded, load_values, place, quantized, row_start

# blocks of a tile: 16 elements per thread, one 128-bit access for the codes
BLOCKS = 32
TILES = 2
THREADS = 256
# blocks of a masked tile, whose offsets and masks need registers
FEW = tl.constexpr(8)


@triton.jit
def _step_tile(
    g_ptr, c_ptr, s_ptr, o_ptr, offs, mask, s_offs, s_mask, pair, shift, seed, beta, omb, direction, skipped,
    OUTPUT: tl.constexpr, NESTEROV: tl.constexpr, UPDATE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Average one tile of blocks; `mask` is None for a whole tile."""
    m = load_values(c_ptr, s_ptr, offs, mask, s_offs, s_mask, FP8)
    g = to_float(load_tile(g_ptr + offs, mask)) * direction
    new = m
    if UPDATE:
        # a weight of 0 forgets infinities and NaNs
        new = tl.where(beta == 0, g, beta * m + omb * g)
        code, unit = quantized(new, pair, shift, seed, False, FP8)
        if skipped == 0:
            tl.store(c_ptr + offs, code, mask=mask)
            tl.store(s_ptr + s_offs, unit, mask=s_mask)
    if OUTPUT:
        if NESTEROV:
            new = beta * new + omb * g
        tl.store(o_ptr + offs, tl.where(skipped != 0, m, new), mask=mask)


@triton.jit
def average_step_int8_kernel(
    rows, programs, scalars, seeds, offsets, skip, direction,
    G_DTYPE: tl.constexpr, SKIP: tl.constexpr, OUTPUT: tl.constexpr, NESTEROV: tl.constexpr, UPDATE: tl.constexpr,
    FP8: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program k averages TILES * BLOCKS blocks of one tensor.

    A row is (g, codes, scales, output, blocks, columns, whole, index). In a whole tensor all tensors are aligned and no
    block is short.
    """
    entry = tl.load(programs + tl.program_id(0))
    row = rows + (entry >> 32) * 8
    first = (entry & 0xFFFFFFFF) * (TILES * BLOCKS)
    blocks = tl.minimum(tl.load(row + 4) - first, TILES * BLOCKS).to(tl.int32)
    i = tl.load(row + 7)
    beta = tl.load(scalars + 0)
    omb = tl.load(scalars + 1)
    seed = tl.load(seeds + i).to(tl.uint32)
    offset = tl.load(offsets + i)
    skipped = 0
    if SKIP:
        skipped = tl.load(skip + i)

    block = tl.arange(0, BLOCKS)[:, None]
    lane = tl.arange(0, 128)[None, :]
    shift = ((lane & 1) * 16).to(tl.uint32)
    # tiles of whole tensors need no mask and have a provable alignment: accesses are 128 bits wide
    whole = tl.where(tl.load(row + 6) != 0, blocks // BLOCKS, 0)
    # the entries of whole tensors are 128 times their blocks, also in the tensor of which they are rows
    pair = ((first * 128 + offset) // 2).to(tl.uint32)
    g_ptr = aligned_pointer(tl.load(row + 0), G_DTYPE) + first * 128
    c_ptr = aligned_pointer(tl.load(row + 1), tl.int8) + first * 128
    s_ptr = aligned_pointer(tl.load(row + 2), tl.float32) + first
    o_ptr = aligned_pointer(tl.load(row + 3), tl.float32) + first * 128
    for t in range(0, whole):
        near = t * BLOCKS + block
        _step_tile(
            g_ptr, c_ptr, s_ptr, o_ptr, near * 128 + lane, None, near, None,
            pair + (near * 64 + lane // 2).to(tl.uint32), shift, seed, beta, omb, direction, skipped,
            OUTPUT, NESTEROV, UPDATE, FP8,
        )  # fmt: skip
    # the tail, and other tensors; addresses are read again, because holding them would spill registers
    columns = tl.load(row + 5).to(tl.int32)
    per_row, first_column, start = row_start(first, columns)
    pair = ((offset // columns * per_row + first) * 64).to(tl.uint32)
    g_ptr = tl.load(row + 0).to(tl.pointer_type(G_DTYPE)) + start
    c_ptr = tl.load(row + 1).to(tl.pointer_type(tl.int8)) + start
    s_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + first
    o_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + start
    few = tl.arange(0, FEW)[:, None]
    for t in range(whole * BLOCKS // FEW, tl.cdiv(blocks, FEW)):
        near = t * FEW + few
        offs, mask = place(near, lane, first_column, columns, per_row, blocks)
        _step_tile(
            g_ptr, c_ptr, s_ptr, o_ptr, offs, mask, near, near < blocks,
            pair + (near * 64 + lane // 2).to(tl.uint32), shift, seed, beta, omb, direction, skipped,
            OUTPUT, NESTEROV, UPDATE, FP8,
        )  # fmt: skip


def average_step_int8(
    lists: Sequence[Sequence[Tensor]], skip: Tensor | None, options: StepOptions, *, nesterov: bool, update: bool
) -> None:
    """Update codes and scales, and write the outputs.

    Equals the definition, `leanstep.kernels.reference.steps.average_int8`, bit for bit.

    Args:
        lists: gradients, codes, scales, and outputs if there are any.
        skip: int32 [number of tensors], or None.
        options: of the step.
        nesterov, update: see `leanstep.kernels.steps.average_int8.average_step_int8`.
    """
    device = options.scalars.device
    staging = Staging()
    rows, keys, pieces = [], [], []
    for i, (g, c, s, *output) in enumerate(zip(*lists, strict=True)):
        code = c.dtype
        c, s = staging.write(as_int8(c)), staging.write(s)
        g = staging.read(g, g.dtype if g.dtype in TL_DTYPE else torch.float32)
        o = staging.write(output[0]) if output else None
        columns = g.shape[1:].numel()
        whole = columns % SCALED == 0 and is_aligned(g, c, s, o)
        addresses = (g.data_ptr(), c.data_ptr(), s.data_ptr(), 0 if o is None else o.data_ptr())
        rows.append((*addresses, s.numel(), columns, whole, i))
        keys.append((g.dtype, code))
        pieces.append(triton.cdiv(s.numel(), BLOCKS * TILES))
    if not any(pieces):
        return
    seeds, offsets = seeds_and_offsets(options, len(rows))
    table = device_rows(rows, device)
    direction = -1.0 if options.maximize else 1.0
    with on_device(device):
        for (dtype, code), programs in launches(keys, pieces, device):
            # fused multiply-adds would round differently from the definition
            average_step_int8_kernel[(programs.numel(),)](
                table, programs, options.scalars, seeds, offsets, seeds if skip is None else skip, direction,
                STATE_DTYPE[dtype], SKIP=skip is not None, OUTPUT=len(lists) > 3, NESTEROV=nesterov, UPDATE=update,
                FP8=code == FP8, BLOCKS=BLOCKS, TILES=TILES, num_warps=warps(THREADS), enable_fp_fusion=False,
            )  # fmt: skip
    staging.finish()


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
        average_step_int8(lists, flags, StepOptions(torch.zeros(2)), nesterov=nesterov, update=update)
    return {average_step_int8_kernel: _promise}


def _promise(launch: Launch) -> dict[str, Any]:
    g, constants = launch.dtype("G_DTYPE"), launch.constants
    names = [name.lower() for name in ("SKIP", "OUTPUT", "NESTEROV", "UPDATE") if constants[name]]
    read = 1 + (g.itemsize if constants["UPDATE"] or constants["NESTEROV"] else 0)
    return dict(
        label=coded(" ".join([f"g {g}", *names]), launch), elements=BLOCKS * SCALED,
        read=read, written=4 * constants["OUTPUT"] + constants["UPDATE"],
    )  # fmt: skip
