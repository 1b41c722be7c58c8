"""Launchers of linear.cpp (few tokens, from the packed matrix), linear_many.cpp (expanded tiles) and the BLAS.

And of dense.cpp: few tokens, from a dense matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from leanstep._torch import uses_instructions
from leanstep.kernels.cpp_impl._build import SPARSE_TYPES, as_c, call, library, why_not_cpp
from leanstep.kernels.matrices.dense_product import product, why_not_onednn
from leanstep.kernels.reference.sparse.bitmask import row_tiles

# up to this number of tokens, the packed product runs: it is as fast as expanded tiles at about 28 tokens
FEW = 24
# up to this number of tokens, and with AVX2 from this number of entries on, dense.cpp multiplies faster than torch does
FEW_DENSE, LEAST_DENSE = 8, 2**20
# tokens of one product by linear_many.cpp, at most
MANY = 1024
# rows of a tile are whole blocks of the BLAS
BLOCK = 64
_CODES = {torch.int8: "int8_t", torch.uint8: "int4"}
# by the number of instructions.cpp
AVX2, AVX512, BF16 = 1, 2, 3
INSTRUCTIONS = ("plain loops", "AVX2", "AVX-512", "AVX-512 VBMI2 and BF16", "NEON")


def bitmask_linear(
    x: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, bias: Tensor | None, scales: Tensor | None
) -> Tensor:
    """``x W^T + bias`` for row-major parts."""
    tokens, columns = x.shape
    rows, count = mask.shape[0], _count(values)
    out = x.new_empty(tokens, rows)
    if tokens <= FEW or not runs_on_blas(x):
        matrix, macros = (values, mask, offsets, _contiguous(bias), *_scales(scales)), _macros(x, values)
        if tokens <= FEW:
            call("sparse/linear", "bitmask_linear", macros, x, *matrix, out, tokens, count, rows, columns)
            return out
        for begin, end in token_chunks(tokens):
            arguments = (x[begin:end], *matrix, out[begin:end], end - begin, count, rows, columns)
            call("sparse/linear_many", "bitmask_linear_many", macros, *arguments)
        return out
    for begin, end, tile in _tiles(x, values, mask, offsets, columns, scales):
        out[:, begin:end] = product(x, tile.T, None if bias is None else bias[begin:end])
    return out


class Prepared:
    """Products of few tokens with one matrix, whose parts are looked at and converted once. A copy is None."""

    def __init__(self, x: Tensor, parts: Sequence[Tensor | None]) -> None:
        values, mask, _offsets, _bias, scales = self._parts = parts
        assert values is not None and mask is not None
        self._key, self._columns, self._rows = self._identities(x, parts), x.shape[-1], mask.shape[0]
        self._product = library("sparse/linear", _macros(x, values)).bitmask_linear
        self._matrix = list(map(as_c, (*parts[:4], *_scales(scales))))
        self._sizes = list(map(as_c, (_count(values), self._rows, self._columns)))

    def fits(self, x: Tensor, parts: Sequence[Tensor | None]) -> bool:
        """Whether the parts are the same tensors at the same addresses, and x is alike, with few tokens."""
        return 0 < x.numel() <= FEW * self._columns and x.is_contiguous() and self._identities(x, parts) == self._key

    def __call__(self, x: Tensor) -> Tensor:
        """``x W^T + bias`` for x [..., columns]."""
        out, tokens = x.new_empty(*x.shape[:-1], self._rows), as_c(x.numel() // self._columns)
        self._product(as_c(x), *self._matrix, as_c(out), tokens, *self._sizes, torch.get_num_threads())
        return out

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    @staticmethod
    def _identities(x: Tensor, parts: Sequence[Tensor | None]) -> list[object]:
        places = [None if part is None else (id(part), part.data_ptr()) for part in parts]
        return [x.dtype, x.device, x.shape[-1], *places]


def bitmask_linear_backward(
    grad: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, columns: int, scales: Tensor | None
) -> Tensor:
    """``grad W``, with sums over tiles in fp32."""
    sums = grad.new_zeros(len(grad), columns, dtype=torch.float32)
    for begin, end, tile in _tiles(grad, values, mask, offsets, columns, scales):
        sums += product(grad[:, begin:end], tile)
    return sums.to(grad.dtype)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` for a dense row-major W, which is read once per 8 tokens."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    call("sparse/dense", "dense_linear", _macros(x, x), x, weight, _contiguous(bias), out, x.shape[0], *weight.shape)
    return out


def is_faster_than_torch(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`dense_linear` is faster than torch's product, for x [..., in]."""
    tokens = x.numel() // x.shape[-1]
    if tokens > FEW_DENSE or why_not_cpp() is not None:
        return False
    by = library("sparse/instructions", {}).instructions()
    if x.dtype is torch.bfloat16 and (by == BF16 or (by == AVX2 and weight.numel() >= LEAST_DENSE)):
        return tokens == 1 or not uses_instructions("amx_tile")
    # MKL is slow on AMD processors, and the fast one elsewhere
    return by == BF16 and x.dtype is torch.float32 and why_not_onednn() is None


def runs_on_blas(x: Tensor) -> bool:
    """Whether the BLAS multiplies tiles of the matrix: without AVX-512, or where it has matrix units of 16 bits."""
    if not has_avx512():
        return True
    return x.dtype is not torch.float32 and uses_instructions("amx_tile")


def has_avx512() -> bool:
    """Whether the products use AVX-512 on this processor."""
    return library("sparse/instructions", {}).instructions() in (AVX512, BF16)


def token_chunks(tokens: int) -> Iterator[tuple[int, int]]:
    """Bounds of equal chunks of at most MANY tokens; the laid out copy of x and the sums are that large."""
    count = -(-tokens // MANY)
    size = -(-tokens // (count * 32)) * 32
    for begin in range(0, tokens, size):
        yield begin, min(begin + size, tokens)


def instructions() -> str:
    """Name the instructions of this processor that the products use."""
    return INSTRUCTIONS[library("sparse/instructions", {}).instructions()]


def _tiles(
    x: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, columns: int, scales: Tensor | None
) -> Iterator[tuple[int, int, Tensor]]:
    """Expand the matrix to x's dtype, a tile of rows at a time, all in the same memory."""
    buffer, both_scales, macros = None, _scales(scales), _macros(x, values)
    for begin, end in row_tiles(mask.shape[0], columns, BLOCK):
        if buffer is None:
            buffer = x.new_empty(end - begin, columns)
        arguments = (values, mask, offsets, *both_scales, buffer, _count(values), mask.shape[0], columns, begin, end)
        call("sparse/linear", "bitmask_expand", macros, *arguments)
        yield begin, end, buffer[: end - begin]


def _macros(x: Tensor, values: Tensor) -> dict[str, str | int]:
    return {"X": SPARSE_TYPES[x.dtype], "VALUE": _CODES.get(values.dtype) or SPARSE_TYPES[values.dtype]}


def _scales(scales: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Scales of rows, and scales of blocks."""
    scales = _contiguous(scales)
    return (scales, None) if scales is None or scales.dim() == 1 else (None, scales)


def _count(values: Tensor) -> int:
    return 2 * values.shape[0] if values.dtype is torch.uint8 else values.shape[0]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
