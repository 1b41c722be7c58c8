"""N:M masks, one or two launches for all tensors of a list.

Bytes: reads the scores and writes the masks once, 5 bytes per fp32 element. Contiguous groups whose length is a power
of two lie in the registers of one thread, or of neighbours, with 128-bit accesses. A second kernel takes the rest lane
by lane: incomplete blocks, groups of other lengths, and groups along other axes.

Magnitudes are compared by their bits, which as integers have the order of the numbers. So one kernel serves both 16-bit
formats.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.nm.mask import INFINITE
from leanstep.kernels.triton_impl._common import aligned_pointer
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import device_programs, device_rows, is_aligned, on_device, warps

# 16 elements per thread and tile: one 128-bit store of the mask
BLOCK, THREADS = 2048, 128
TILES = 8
# groups of at least LONG entries that need more rounds than this find the threshold bit by bit
MOST_ROUNDS, LONG = 8, 64
EXACT = (2, 4, 8, 16, 32, 64, 128)
# group lengths of the strided kernel; shorter groups are padded
PADDED = (8, 32, 128)
WORDS = {4: tl.int32, 2: tl.int16}


@triton.jit
def _keys(x, infinite):
    """Magnitudes as integers; all NaNs become one number, larger than all others."""
    if x.dtype == tl.int16:
        magnitude = x.to(tl.int32) & 0x7FFF
    else:
        magnitude = x & 0x7FFFFFFF
    return tl.minimum(magnitude, infinite + 1)


@triton.jit
def _largest_by_rounds(keys, lane, m, rounds, dropping, AXIS: tl.constexpr):
    """Take the largest entry `rounds` times, of equals the last. Or drop the smallest one, of equals the first."""
    keys = tl.where((dropping != 0) & (keys >= 0), 0x7FFFFFFF - keys, keys)
    index = tl.where(dropping != 0, m - 1 - lane, lane)
    for _ in range(0, rounds):
        best = tl.max(keys, AXIS, keep_dims=True)
        best_index = tl.max(tl.where(keys == best, index, -1), AXIS, keep_dims=True)
        keys = tl.where(index == best_index, -1, keys)
    return (keys == -1) != (dropping != 0)


@triton.jit
def _largest_by_threshold(keys, lane, n, AXIS: tl.constexpr, BITS: tl.constexpr):
    """Take the n largest entries, of equals the last. Finds the smallest key, then its first index, bit by bit."""
    threshold = tl.sum(keys * 0, AXIS, keep_dims=True)
    for step in range(0, BITS):
        trial = threshold | (1 << (BITS - 1 - step))
        count = tl.sum((keys >= trial).to(tl.int32), AXIS, keep_dims=True)
        threshold = tl.where(count >= n, trial, threshold)
    # larger than all indices where the key is above the threshold, smaller where it is below
    index = tl.where(keys == threshold, lane, tl.where(keys > threshold, 128, -1))
    first = tl.sum(keys * 0, AXIS, keep_dims=True)
    for step in range(0, 7):
        trial = first | (1 << (6 - step))
        count = tl.sum((index >= trial).to(tl.int32), AXIS, keep_dims=True)
        first = tl.where(count >= n, trial, first)
    return index >= first


@triton.jit
def _selection(keys, lane, n, m, rounds, dropping, AXIS: tl.constexpr, WORD: tl.constexpr, THRESHOLD: tl.constexpr):
    """1 where an entry is kept."""
    if THRESHOLD:
        selected = _largest_by_threshold(keys, lane, n, AXIS, WORD.primitive_bitwidth - 1)
    else:
        selected = _largest_by_rounds(keys, lane, m, rounds, dropping, AXIS)
    return selected.to(tl.int8)


@triton.jit(do_not_specialize=["n", "rounds", "dropping", "infinite"])
def nm_mask_kernel(
    table, programs, n, rounds, dropping, infinite,
    WORD: tl.constexpr, THRESHOLD: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES blocks of contiguous groups of M, a power of two. A row of the table is (scores, mask, blocks)."""
    entry = tl.load(programs + tl.program_id(0))
    row = table + (entry >> 32) * 3
    first = (entry & 0xFFFFFFFF) * TILES
    s_ptr = aligned_pointer(tl.load(row + 0), WORD) + first * BLOCK
    k_ptr = aligned_pointer(tl.load(row + 1), tl.int8) + first * BLOCK
    lane = tl.arange(0, M)[None, :]
    for t in range(0, tl.minimum(tl.load(row + 2) - first, TILES).to(tl.int32)):
        offs = t * BLOCK + tl.arange(0, BLOCK)
        keys = tl.reshape(_keys(tl.load(s_ptr + offs), infinite), [BLOCK // M, M])
        selected = _selection(keys, lane, n, M, rounds, dropping, 1, WORD, THRESHOLD)
        tl.store(k_ptr + offs, tl.reshape(selected, [BLOCK]))


@triton.jit(do_not_specialize=["n", "m", "rounds", "dropping", "infinite"])
def nm_mask_strided_kernel(
    table, programs, n, m, rounds, dropping, infinite,
    WORD: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_T groups of any length up to BLOCK_M whose entries are `inner` elements apart.

    A row of the table is (scores, mask, groups, inner).
    """
    entry = tl.load(programs + tl.program_id(0))
    row = table + (entry >> 32) * 4
    s_ptr = tl.load(row + 0).to(tl.pointer_type(WORD))
    k_ptr = tl.load(row + 1).to(tl.pointer_type(tl.int8))
    inner = tl.load(row + 3)
    group = (entry & 0xFFFFFFFF) * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = group // inner * (m * inner) + group % inner
    lane = tl.arange(0, BLOCK_M)[:, None]
    offs = begin[None, :] + lane * inner
    mask = (group < tl.load(row + 2))[None, :] & (lane < m)
    # the padding of a group is neither the largest nor the smallest entry
    keys = tl.where(lane < m, _keys(tl.load(s_ptr + offs, mask=mask, other=0), infinite), -2)
    tl.store(k_ptr + offs, _selection(keys, lane, n, m, rounds, dropping, 0, WORD, THRESHOLD), mask=mask)


def nm_mask(scores: Sequence[Tensor], n: int, m: int, dim: int, out: Sequence[Tensor]) -> None:
    """Masks of contiguous scores of one dtype, none empty, into contiguous bool tensors.

    Equals the definition, `leanstep.kernels.reference.nm.mask`.
    """
    if n == m:
        for mask in out:
            mask.fill_(True)
        return
    whole, rest = [], []
    for score, mask in zip(scores, out, strict=True):
        inner = math.prod(score.shape[dim % score.dim() + 1 :])
        exact = inner == 1 and m in EXACT and is_aligned(score, mask)
        blocks = score.numel() // BLOCK if exact else 0
        if blocks:
            whole.append((score.data_ptr(), mask.data_ptr(), blocks))
        groups = (score.numel() - blocks * BLOCK) // m
        if groups:
            begin = blocks * BLOCK
            rest.append((score.data_ptr() + begin * score.itemsize, mask.data_ptr() + begin, groups, inner))
    dropping, rounds = int(m - n < n), min(n, m - n)
    threshold = _padded(m) >= LONG and rounds > MOST_ROUNDS
    selection = (rounds, dropping, INFINITE[scores[0].dtype], WORDS[scores[0].itemsize], threshold)
    device = scores[0].device
    with on_device(device):
        if whole:
            programs = device_programs([triton.cdiv(blocks, TILES) for *_, blocks in whole], device)
            nm_mask_kernel[(programs.numel(),)](
                device_rows(whole, device), programs, n, *selection,
                M=m, BLOCK=BLOCK, TILES=TILES, num_warps=warps(THREADS), enable_fp_fusion=True,
            )  # fmt: skip
        if rest:
            height = BLOCK // _padded(m)
            programs = device_programs([triton.cdiv(groups, height) for _, _, groups, _ in rest], device)
            nm_mask_strided_kernel[(programs.numel(),)](
                device_rows(rest, device), programs, n, m, *selection,
                BLOCK_M=_padded(m), BLOCK_T=height, num_warps=warps(THREADS), enable_fp_fusion=True,
            )  # fmt: skip


def _padded(m: int) -> int:
    return next(size for size in PADDED if m <= size)


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return their promises."""
    for dtype, m in itertools.product((torch.float32, torch.bfloat16), sorted({*EXACT, *PADDED})):
        for n in {1, m // 2}:
            for blocks in (BLOCK * TILES + BLOCK, m):  # whole blocks of adjacent groups, and a group alone
                score = torch.zeros(blocks, dtype=dtype)
                nm_mask([score], n, m, 0, [score.bool()])
    return {nm_mask_kernel: _promise, nm_mask_strided_kernel: _promise}


def _promise(launch: Launch) -> dict[str, Any]:
    constants, exact = launch.constants, launch.kernel is nm_mask_kernel
    itemsize = next(size for size, word in WORDS.items() if word == constants["WORD"])
    lengths = f"m {constants['M']}" if exact else f"up to {constants['BLOCK_M']}"
    label = f"s {8 * itemsize} bits {lengths}{' threshold' if constants['THRESHOLD'] else ''}"
    return dict(label=label, elements=BLOCK, read=itemsize, written=1, wide=exact, flat=exact)
