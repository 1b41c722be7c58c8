"""Dot products of a sparse window's rows with a vector, and combinations of its rows: one launch each for all blocks.

Bytes: both read values and indices once, 4 bytes per entry in bf16. They gather from, or add to, one block of a dense
vector at a time, which stays in the cache. The dot products read 4 more bytes per entry from it. The combination, whose
sums are fp64, reads and writes 8. A program of the combination adds all rows of one block in order. So no two programs
add to the same element, and results repeat bit for bit. All sums run in fp64, as in gradient_window.py.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.reference.fisher.sparse_window import SparseLayout
from leanstep.kernels.triton_impl._common import TL_DTYPE, pointer_to, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import Staging, device_rows, is_aligned, launches, on_device, warps
from leanstep.kernels.triton_impl.fisher.gradient_window import dots_tile, eights, reduce_chunks

BLOCK_M, BLOCK_N, THREADS = 8, 256, 256
TILES = 8
# entries of a row's block that are added at a time -> threads; longer blocks take several turns of the widest
WIDTHS = {64: 64, 256: 128, 1024: 256}


@triton.jit(do_not_specialize=["m"])
def sparse_dots_kernel(
    table, programs, partial, m,
    V_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of TILES * BLOCK_N entries.

    A row of the table is (values, indices, vector, k, entries per block, elements per block, first chunk, 0).
    """
    row, chunk, offs_m, mask_m = dots_tile(table, programs, m, 8, BLOCK_M)
    k = eights(tl.load(row + 3), ALIGNED)
    v_ptr = pointer_to(tl.load(row + 0), V_DTYPE, ALIGNED)
    i_ptr = pointer_to(tl.load(row + 1), tl.int16, ALIGNED)
    x_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    per_block = tl.load(row + 4).to(tl.int32)
    block = tl.load(row + 5)
    start = chunk.to(tl.int64) * (TILES * BLOCK_N)
    count = eights(tl.minimum(k - start, TILES * BLOCK_N).to(tl.int32), ALIGNED)
    # start // per_block and its remainder; a division in 64 bits takes a stack. A block has at most 2^15 entries
    left = chunk % per_block * (TILES * BLOCK_N)
    first, rest = (chunk // per_block).to(tl.int64) * (TILES * BLOCK_N) + left // per_block, left % per_block
    at = offs_m.to(tl.int64)[:, None] * k + start

    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float64)
    for t in range(0, tl.cdiv(count, BLOCK_N)):
        offs_n = t * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = mask_m[:, None] & (offs_n < count)[None, :]
        i = tl.load(i_ptr + at + offs_n[None, :], mask=mask, other=0)
        v = to_float(tl.load(v_ptr + at + offs_n[None, :], mask=mask, other=0.0))
        begin = (first + (rest + offs_n) // per_block) * block
        x = tl.load(x_ptr + begin[None, :] + i, mask=mask, other=0.0)
        sums += v.to(tl.float64) * x.to(tl.float64)
    at_m = (tl.load(row + 6) + chunk) * m + offs_m
    tl.store(partial + at_m, tl.sum(sums, 1), mask=mask_m)


@triton.jit(do_not_specialize=["m"])
def sparse_combination_kernel(
    table, programs, coefficients, m, V_DTYPE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All rows of one block. A row of the table is (values, indices, sums, k, entries per block, elements per block,
    numel, group).
    """
    entry = tl.load(programs + tl.program_id(0))
    row = table + (entry >> 32) * 8
    piece = entry & 0xFFFFFFFF
    k = tl.load(row + 3)
    per_block = tl.load(row + 4)
    block = tl.load(row + 5)
    size = tl.minimum(tl.load(row + 6) - piece * block, block).to(tl.int32)
    count = tl.minimum(k - piece * per_block, per_block).to(tl.int32)
    v_ptr = tl.load(row + 0).to(tl.pointer_type(V_DTYPE)) + piece * per_block
    i_ptr = tl.load(row + 1).to(tl.pointer_type(tl.int16)) + piece * per_block
    sums_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float64)) + piece * block
    c_ptr = coefficients + tl.load(row + 7) * m
    lane = tl.arange(0, BLOCK_K)

    zeros = tl.zeros([BLOCK_K], dtype=tl.float64)
    for j in range(0, size, BLOCK_K):
        tl.store(sums_ptr + j + lane, zeros, mask=j + lane < size)
    for row_number in range(0, m):
        # other threads of this program may have written the sums that this one reads next
        tl.debug_barrier()
        c = tl.load(c_ptr + row_number)
        for j in range(0, count, BLOCK_K):
            mask = j + lane < count
            i = tl.load(i_ptr + j + lane, mask=mask, other=0).to(tl.int32)
            v = to_float(tl.load(v_ptr + j + lane, mask=mask, other=0.0)).to(tl.float64)
            # no index occurs twice in a row
            so_far = tl.load(sums_ptr + i, mask=mask, other=0.0)
            tl.store(sums_ptr + i, so_far + v * c, mask=mask)
        v_ptr += k
        i_ptr += k


def row_dots(
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    layouts: Sequence[SparseLayout],
    vectors: Sequence[Tensor],
    groups: Sequence[int],
    count: int,
) -> Tensor:
    """Dot products of the rows of sparse windows with vectors [numel]: fp64 [count, m]."""
    device, m = values[0].device, values[0].shape[0]
    staging = Staging()
    rows, keys, pieces, chunks = [], [], [], [0] * count
    for b in sorted(range(len(values)), key=lambda b: groups[b]):  # a group's chunks lie side by side
        v, i, x = staging.read(values[b]), staging.read(indices[b]), staging.read(vectors[b], torch.float32)
        layout = layouts[b]
        numbers = (layout.k, max(layout.per_block, 1), layout.block)
        rows.append((v.data_ptr(), i.data_ptr(), x.data_ptr(), *numbers, sum(chunks), 0))
        keys.append(is_aligned(v, i) and layout.k % 8 == 0)
        chunks[groups[b]] += triton.cdiv(layout.k, TILES * BLOCK_N)
        pieces.append(triton.cdiv(layout.k, TILES * BLOCK_N) * triton.cdiv(m, BLOCK_M))
    partial = torch.empty(sum(chunks) * m, dtype=torch.float64, device=device)
    table = device_rows(rows, device)
    with on_device(device):
        for aligned, programs in launches(keys, pieces, device):
            sparse_dots_kernel[(programs.numel(),)](
                table, programs, partial, m, TL_DTYPE[values[0].dtype], aligned,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, TILES=TILES, num_warps=warps(THREADS), enable_fp_fusion=True,
            )  # fmt: skip
    staging.finish()
    return reduce_chunks(partial, chunks, m)


def linear_combination(
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    layouts: Sequence[SparseLayout],
    coefficients: Tensor,
    groups: Sequence[int],
    out: Sequence[Tensor],
) -> None:
    """Write the combinations of the sparse rows with fp64 coefficients [G, m] to fp32 `out`, [numel] each."""
    device, m = values[0].device, values[0].shape[0]
    staging = Staging()
    coefficients = coefficients.contiguous()
    rows, keys, pieces = [], [], []
    sums = [torch.empty(layout.numel, dtype=torch.float64, device=device) for layout in layouts]
    for value, index, layout, group, total in zip(values, indices, layouts, groups, sums, strict=True):
        v, i = staging.read(value), staging.read(index)
        numbers = (layout.k, layout.per_block, layout.block, layout.numel)
        rows.append((v.data_ptr(), i.data_ptr(), total.data_ptr(), *numbers, group))
        keys.append(next((width for width in WIDTHS if layout.per_block <= width), max(WIDTHS)))
        pieces.append(triton.cdiv(layout.numel, layout.block))
    table = device_rows(rows, device)
    with on_device(device):
        for width, programs in launches(keys, pieces, device):
            # fused multiply-adds would round differently from the definition
            sparse_combination_kernel[(programs.numel(),)](
                table, programs, coefficients, m, TL_DTYPE[values[0].dtype], width,
                num_warps=warps(WIDTHS[width]), enable_fp_fusion=False,
            )  # fmt: skip
    staging.finish()
    torch._foreach_copy_(list(out), sums)


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return what the kernels promise."""
    for dtype, per_block in itertools.product(TL_DTYPE, (*WIDTHS, 7)):  # 7: rows that do not start on 16 bytes
        values, indices = torch.zeros(2, per_block, dtype=dtype), torch.zeros(2, per_block, dtype=torch.int16)
        layout = SparseLayout(numel=2048, block=2048, per_block=per_block, last=0)
        dense = torch.zeros(2048)
        row_dots([values], [indices], [layout], [dense], [0], 1)
        linear_combination([values], [indices], [layout], torch.zeros(1, 2, dtype=torch.float64), [0], [dense])
    return {sparse_dots_kernel: _dots_promise, sparse_combination_kernel: _combination_promise}


def _dots_promise(launch: Launch) -> dict[str, Any]:
    v, aligned = launch.dtype("V_DTYPE"), launch.constants["ALIGNED"]
    label = f"v {v} {'aligned' if aligned else 'any start'}".replace("torch.", "")
    return dict(label=label, elements=BLOCK_M * BLOCK_N, read=v.itemsize + 2, written=0, cached=4, wide=aligned)


def _combination_promise(launch: Launch) -> dict[str, Any]:
    v, width = launch.dtype("V_DTYPE"), launch.constants["BLOCK_K"]
    # the written bytes are the block's sums, which stay in the cache
    label = f"v {v} {width}".replace("torch.", "")
    return dict(label=label, elements=width, read=v.itemsize + 2, written=8, cached=8)
