"""N:M masks, one launch for all tensors of a list.

Bytes: scores are read and masks written once, 5 bytes per fp32 element. Contiguous groups of a power of two lie in the
registers of one thread, or of neighbours, with 128-bit accesses; groups of other lengths and along other axes are taken
lane by lane.

A magnitude is compared by its bits, which as integers are in the order of the numbers.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.triton_impl._common import TL_DTYPE, aligned_pointer, to_float
from leanstep.kernels.triton_impl._compile import AuditCase, pointer
from leanstep.kernels.triton_impl._multi_tensor import (
    by_key,
    device_programs,
    device_rows,
    is_aligned,
    on_device,
    warps,
)

# 16 elements per thread and tile: one 128-bit store of the mask
BLOCK, THREADS = 2048, 128
TILES = 8
# more rounds than this, and the threshold is found bit by bit
MOST_ROUNDS = 8
EXACT = (2, 4, 8, 16, 32, 64, 128)
# group lengths of the other kernel, up to which shorter ones are filled
PADDED = (8, 32, 128)


@triton.jit
def _keys(x):
    """Magnitudes as integers; every NaN is one number, larger than all others."""
    return tl.minimum(to_float(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)


@triton.jit
def _kept_by_rounds(keys, lane, m, rounds, dropping, AXIS: tl.constexpr):
    """The largest entry `rounds` times, of equal ones the last; or dropped the smallest, of equal ones the first."""
    keys = tl.where((dropping != 0) & (keys >= 0), 0x7FFFFFFF - keys, keys)
    place = tl.where(dropping != 0, m - 1 - lane, lane)
    for _ in range(0, rounds):
        best = tl.max(keys, AXIS, keep_dims=True)
        found = tl.max(tl.where(keys == best, place, -1), AXIS, keep_dims=True)
        keys = tl.where(place == found, -1, keys)
    return (keys == -1) != (dropping != 0)


@triton.jit
def _kept_by_threshold(keys, lane, n, AXIS: tl.constexpr):
    """The entries above the n-th largest, and the last ones that equal it: bit by bit, the key and then the place."""
    threshold = tl.sum(keys * 0, AXIS, keep_dims=True)
    for step in range(0, 31):
        trial = threshold | (1 << (30 - step))
        count = tl.sum((keys >= trial).to(tl.int32), AXIS, keep_dims=True)
        threshold = tl.where(count >= n, trial, threshold)
    # above all places where a key is above the threshold, below them where it is below
    place = tl.where(keys == threshold, lane, tl.where(keys > threshold, 128, -1))
    first = tl.sum(keys * 0, AXIS, keep_dims=True)
    for step in range(0, 7):
        trial = first | (1 << (6 - step))
        count = tl.sum((place >= trial).to(tl.int32), AXIS, keep_dims=True)
        first = tl.where(count >= n, trial, first)
    return place >= first


@triton.jit
def _kept(keys, lane, n, m, rounds, dropping, AXIS: tl.constexpr, LONG: tl.constexpr):
    """1 where an entry is kept; negative `rounds` stand for the threshold."""
    if LONG:
        if rounds < 0:
            kept = _kept_by_threshold(keys, lane, n, AXIS).to(tl.int8)
        else:
            kept = _kept_by_rounds(keys, lane, m, rounds, dropping, AXIS).to(tl.int8)
    else:
        kept = _kept_by_rounds(keys, lane, m, rounds, dropping, AXIS).to(tl.int8)
    return kept


@triton.jit(do_not_specialize=["n", "rounds", "dropping"])
def nm_mask_kernel(
    table, programs, n, rounds, dropping,
    S_DTYPE: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Contiguous groups of M, a power of two. A row of the table is (scores, mask, numel, aligned)."""
    entry = tl.load(programs + tl.program_id(0))
    row = table + (entry >> 32) * 4
    start = (entry & 0xFFFFFFFF) * (TILES * BLOCK)
    count = tl.minimum(tl.load(row + 2) - start, TILES * BLOCK).to(tl.int32)
    lane = tl.arange(0, M)[None, :]
    whole = tl.where(tl.load(row + 3) != 0, count // BLOCK, 0)
    s_ptr = aligned_pointer(tl.load(row + 0), S_DTYPE) + start
    k_ptr = aligned_pointer(tl.load(row + 1), tl.int8) + start
    for t in range(0, whole):
        offs = t * BLOCK + tl.arange(0, BLOCK)
        keys = tl.reshape(_keys(tl.load(s_ptr + offs)), [BLOCK // M, M])
        kept = _kept(keys, lane, n, M, rounds, dropping, 1, M >= 32)
        tl.store(k_ptr + offs, tl.reshape(kept, [BLOCK]))
    s_ptr = tl.load(row + 0).to(tl.pointer_type(S_DTYPE)) + start
    k_ptr = tl.load(row + 1).to(tl.pointer_type(tl.int8)) + start
    for t in range(whole, tl.cdiv(count, BLOCK)):
        group = t * (BLOCK // M) + tl.arange(0, BLOCK // M)[:, None]
        # of whole groups: one mask each, where one per element would not fit the registers
        mask = (group * M < count) & (lane < M)
        keys = _keys(tl.load(s_ptr + group * M + lane, mask=mask, other=0.0))
        tl.store(k_ptr + group * M + lane, _kept(keys, lane, n, M, rounds, dropping, 1, M >= 32), mask=mask)


@triton.jit(do_not_specialize=["n", "m", "rounds", "dropping"])
def nm_mask_strided_kernel(
    table, programs, n, m, rounds, dropping,
    S_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_T groups of any length up to BLOCK_M whose entries are `inner` elements apart.

    A row of the table is (scores, mask, groups, inner).
    """
    entry = tl.load(programs + tl.program_id(0))
    row = table + (entry >> 32) * 4
    s_ptr = tl.load(row + 0).to(tl.pointer_type(S_DTYPE))
    k_ptr = tl.load(row + 1).to(tl.pointer_type(tl.int8))
    inner = tl.load(row + 3)
    group = (entry & 0xFFFFFFFF) * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = group // inner * (m * inner) + group % inner
    lane = tl.arange(0, BLOCK_M)[:, None]
    offs = begin[None, :] + lane * inner
    mask = (group < tl.load(row + 2))[None, :] & (lane < m)
    # what fills a group up is never the largest and never the smallest
    keys = tl.where(lane < m, _keys(tl.load(s_ptr + offs, mask=mask, other=0.0)), -2)
    tl.store(k_ptr + offs, _kept(keys, lane, n, m, rounds, dropping, 0, BLOCK_M >= 32), mask=mask)


def nm_mask(scores: Sequence[Tensor], n: int, m: int, dim: int, out: Sequence[Tensor]) -> None:
    """Masks of contiguous scores of one dtype, none empty, into contiguous bool tensors.

    The definition is `leanstep.kernels.reference.nm_mask`; results are equal to it.
    """
    if n == m:
        for mask in out:
            mask.fill_(True)
        return
    device = scores[0].device
    inner = [math.prod(s.shape[dim % s.dim() + 1 :]) for s in scores]
    dropping = int(m - n < n)
    rounds = min(n, m - n)
    rounds = -1 if rounds > MOST_ROUNDS else rounds
    rows, keys, pieces = [], [], []
    for score, mask, apart in zip(scores, out, inner, strict=True):
        exact = apart == 1 and m in EXACT
        block = BLOCK * TILES if exact else BLOCK // _padded(m)
        last = (score.numel(), is_aligned(score, mask)) if exact else (score.numel() // m, apart)
        rows.append((score.data_ptr(), mask.data_ptr(), *last))
        keys.append(exact)
        pieces.append(triton.cdiv(last[0], block))
    table = device_rows(rows, device)
    with on_device(device):
        for exact, members in by_key(keys).items():
            programs = device_programs([p * member for p, member in zip(pieces, members, strict=True)], device)
            if exact:
                nm_mask_kernel[(programs.numel(),)](
                    table, programs, n, rounds, dropping, TL_DTYPE[scores[0].dtype],
                    M=m, BLOCK=BLOCK, TILES=TILES, num_warps=warps(THREADS),
                )  # fmt: skip
            else:
                nm_mask_strided_kernel[(programs.numel(),)](
                    table, programs, n, m, rounds, dropping, TL_DTYPE[scores[0].dtype],
                    BLOCK_M=_padded(m), BLOCK_T=BLOCK // _padded(m), num_warps=warps(THREADS),
                )  # fmt: skip


def _padded(m: int) -> int:
    return next(size for size in PADDED if m <= size)


def audit_cases() -> list[AuditCase]:
    """Every configuration that the launcher above can pick."""
    return [
        *(_exact_case(s, m) for s in TL_DTYPE for m in EXACT),
        *(_strided_case(s, m) for s in TL_DTYPE for m in PADDED),
    ]


def _exact_case(s: torch.dtype, m: int) -> AuditCase:
    return AuditCase(
        kernel=nm_mask_kernel,
        label=f"s {s} m {m}".replace("torch.", ""),
        arguments=dict(table=pointer("i64"), programs=pointer("i64"), n="i32", rounds="i32", dropping="i32"),
        constants=dict(S_DTYPE=TL_DTYPE[s], M=m, BLOCK=BLOCK, TILES=TILES),
        threads=THREADS,
        fp_fusion=True,
        elements=BLOCK,
        read=s.itemsize,
        written=1,
        wide=True,
        flat=True,
    )


def _strided_case(s: torch.dtype, m: int) -> AuditCase:
    return AuditCase(
        kernel=nm_mask_strided_kernel,
        label=f"s {s} up to {m}".replace("torch.", ""),
        arguments=dict(table=pointer("i64"), programs=pointer("i64"), n="i32", m="i32", rounds="i32", dropping="i32"),
        constants=dict(S_DTYPE=TL_DTYPE[s], BLOCK_M=m, BLOCK_T=BLOCK // m),
        threads=THREADS,
        fp_fusion=True,
        elements=BLOCK,
        read=s.itemsize,
        written=1,
    )
