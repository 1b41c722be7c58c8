"""What the elementwise steps share: the walk of a program over its tensor, the table of pointers, and the launches.

A rule is a `tile` function, which loads, computes and stores one tile, and a kernel that names it:

    @triton.jit
    def _tile(pointers, offs, mask, where, numbers, META: tl.constexpr):
        ...
        return result  # int32 per element, or 0 if the rule has none

    @triton.jit
    def kernel(rows, programs, ...):
        row, start, count, i = program_of(rows, programs, 2, 1, TILES * BLOCK)
        result = over_elements(_tile, row, start, count, ...)

`where` is what the kernel gives, such as seed and index, and `META` has the rule's constants. `over_blocks` walks over
blocks of 8-bit codes: its tile also takes the pointers to scales, after `pointers`.
`mask` is None for the tiles of aligned tensors, which are most. Their accesses are 128 bits wide, because the alignment
of the pointers can be proved. A second loop takes the tail and unaligned tensors.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.triton_impl._common import has_state, pointer_to
from leanstep.kernels.triton_impl._compile import Launch
from leanstep.kernels.triton_impl._multi_tensor import Staging, device_rows, is_aligned, launches, on_device, warps
from leanstep.kernels.triton_impl.steps._codes import SCALED, place, row_start

THREADS = 256
# blocks of a masked tile, whose offsets and masks need registers
FEW = tl.constexpr(8)


@triton.jit
def program_of(rows, programs, POINTERS: tl.constexpr, SIZES: tl.constexpr, LENGTH: tl.constexpr):
    """The program's row of the table, the first of its LENGTH pieces, their number, and its tensor's index.

    A row has the addresses of POINTERS tensors, SIZES sizes, whether the tensor is whole, and its index.
    """
    entry = tl.load(programs + tl.program_id(0))
    row = rows + (entry >> 32) * (POINTERS + SIZES + 2)
    start = (entry & 0xFFFFFFFF) * LENGTH
    count = tl.minimum(tl.load(row + POINTERS) - start, LENGTH).to(tl.int32)
    return row, start, count, tl.load(row + POINTERS + SIZES + 1)


@triton.jit
def numbers_of(scalars, COUNT: tl.constexpr):
    """The first COUNT of the rule's numbers."""
    numbers = ()
    for k in tl.static_range(COUNT):
        numbers = numbers + (tl.load(scalars + k),)
    return numbers


@triton.jit
def _pointers(row, FIRST: tl.constexpr, DTYPES: tl.constexpr, start, ALIGNED: tl.constexpr):
    """Pointers to the tensors whose addresses begin at field FIRST of a row, moved by `start`."""
    pointers = ()
    for k in tl.static_range(len(DTYPES)):
        pointers = pointers + (pointer_to(tl.load(row + FIRST + k), DTYPES[k], ALIGNED) + start,)
    return pointers


@triton.jit
def over_elements(
    tile: tl.constexpr, row, start, count, where, numbers,
    DTYPES: tl.constexpr, META: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Call `tile` on the program's elements. Returns the sum of its results with COUNT, else whether one is not 0."""
    lane = tl.arange(0, BLOCK)
    results = tl.zeros([BLOCK], dtype=tl.int32)
    whole = tl.where(tl.load(row + len(DTYPES) + 1) != 0, count // BLOCK, 0)
    # addresses are read again for the tail, because holding them would spill registers
    for TAIL in tl.static_range(2):
        pointers = _pointers(row, 0, DTYPES, start, TAIL == 0)
        for t in range(whole if TAIL else 0, tl.cdiv(count, BLOCK) if TAIL else whole):
            offs = t * BLOCK + lane
            result = tile(pointers, offs, offs < count if TAIL else None, where, numbers, META)
            results = results + result if COUNT else results | result
    return tl.sum(results, 0) if COUNT else tl.max(results, 0)


@triton.jit
def over_blocks(
    tile: tl.constexpr, row, first, blocks, seed, offset, numbers,
    DTYPES: tl.constexpr, SCALES: tl.constexpr, META: tl.constexpr, COUNT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Call `tile` on the program's blocks of SCALED elements. Returns as `over_elements`, and 0 if COUNT is None.

    A row has the addresses of tensors of DTYPES, then of SCALES tensors of fp32 scales. In a whole tensor all are
    aligned and no block is short.
    """
    block = tl.arange(0, BLOCKS)[:, None]
    lane = tl.arange(0, 128)[None, :]
    shift = ((lane & 1) * 16).to(tl.uint32)
    results = tl.zeros([BLOCKS, 128], dtype=tl.int32)
    whole = tl.where(tl.load(row + len(DTYPES) + SCALES + 2) != 0, blocks // BLOCKS, 0)
    # the entries of whole tensors are 128 times their blocks, also in the tensor of which they are rows
    entries = first * 128 + offset
    index = entries.to(tl.uint32)
    pair = (entries // 2).to(tl.uint32)
    pointers = _pointers(row, 0, DTYPES, first * 128, True)
    scales = _pointers(row, len(DTYPES), (tl.float32,) * SCALES, first, True)
    for t in range(0, whole):
        near = t * BLOCKS + block
        pairs = pair + (near * 64 + lane // 2).to(tl.uint32)
        where = (near, None, pairs, shift, seed, index)
        result = tile(pointers, scales, near * 128 + lane, None, where, numbers, META)
        results = results + result if COUNT else results | result
    # the tail, and other tensors; addresses are read again, because holding them would spill registers
    columns = tl.load(row + len(DTYPES) + SCALES + 1).to(tl.int32)
    per_row, first_column, start = row_start(first, columns)
    index = (start + offset).to(tl.uint32)
    pair = ((offset // columns * per_row + first) * 64).to(tl.uint32)
    pointers = _pointers(row, 0, DTYPES, start, False)
    scales = _pointers(row, len(DTYPES), (tl.float32,) * SCALES, first, False)
    few = tl.arange(0, FEW)[:, None]
    results_few = tl.zeros([FEW, 128], dtype=tl.int32)
    for t in range(whole * BLOCKS // FEW, tl.cdiv(blocks, FEW)):
        near = t * FEW + few
        offs, mask = place(near, lane, first_column, columns, per_row, blocks)
        pairs = pair + (near * 64 + lane // 2).to(tl.uint32)
        where = (near, near < blocks, pairs, shift, seed, index)
        result = tile(pointers, scales, offs, mask, where, numbers, META)
        results_few = results_few + result if COUNT else results_few | result
    if COUNT is None:
        return 0
    elif COUNT:
        return tl.sum(tl.sum(results, 1), 0) + tl.sum(tl.sum(results_few, 1), 0)
    else:
        return tl.max(tl.max(results, 1), 0) | tl.max(tl.max(results_few, 1), 0)


class Table:
    """The table of a step's launches: a row per tensor, as :func:`program_of` reads it, and a launch per key.

    Attributes:
        staging: holds the tensors of the rows.
    """

    def __init__(self, device: torch.device):
        self.staging = Staging()
        self._device = device
        self._rows: list[tuple[int, ...]] = []
        self._keys: list[Hashable] = []
        self._pieces: list[int] = []

    def add(self, key: Hashable, tensors: Sequence[Tensor | None], length: int, scales: Sequence[Tensor] = ()) -> None:
        """Add a row of contiguous tensors, whose programs take ``length`` elements; with scales, blocks of codes."""
        first = tensors[0]
        assert first is not None
        everything = (*tensors, *scales)
        addresses = [0 if t is None else t.data_ptr() for t in everything]
        whole, sizes = is_aligned(*everything), [first.numel()]
        if scales:
            columns = first.shape[1:].numel()
            whole, sizes = whole and columns % SCALED == 0, [scales[0].numel(), columns]
        self._rows.append((*addresses, *sizes, whole, len(self._rows)))
        self._keys.append(key)
        self._pieces.append(triton.cdiv(sizes[0], length))

    def launches(self, kernel: Any) -> Iterator[tuple[Any, Callable[..., Any]]]:
        """Yield, per key, the key and what launches ``kernel`` on its tensors. Then write staged copies back."""
        if any(self._pieces):
            rows = device_rows(self._rows, self._device)
            with on_device(self._device):
                for key, programs in launches(self._keys, self._pieces, self._device):
                    # fused multiply-adds would round differently from the definition
                    how = {"num_warps": warps(THREADS), "enable_fp_fusion": False}
                    yield key, functools.partial(kernel[(programs.numel(),)], rows, programs, **how)
        self.staging.finish()


def bytes_of(launch: Launch, *, state: int = 0) -> dict[str, int]:
    """Bytes per element that a step of parameters promises: it writes all that it reads, but for the gradient.

    Args:
        launch: of the kernel.
        state: bytes of the optimizer's state.
    """
    p, g, e = (launch.dtype(name) for name in ("P_DTYPE", "G_DTYPE", "E_DTYPE"))
    written = p.itemsize + state + (e.itemsize if has_state(launch.constants["ROUNDING"]) else 0)
    return {"read": written + g.itemsize, "written": written}
