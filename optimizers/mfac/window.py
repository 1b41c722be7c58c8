"""M-FAC's window on one process: its columns, and dense rows or blocks of rows."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from typing_extensions import override

from leanstep._torch import is_dtensor, join_parts, local_part, place_like
from leanstep.kernels.reference.fisher.gradient_window import wide_dtype
from leanstep.optimizers.common.sharding import first_index, locals_of, shard_of
from leanstep.optimizers.mfac import rule

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

STORAGES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}

# elements per fp64 copy: a window is never copied as a whole
_CHUNK_ELEMENTS = 1 << 18


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is fake, as when memory is estimated."""
    loaded = sys.modules.get("torch._subclasses.fake_tensor")
    return loaded is not None and isinstance(tensor, loaded.FakeTensor)


def mask_like(mask: Tensor, param: Tensor) -> Tensor:
    """Return a mask on the device and with the placements of its parameter, which may be sharded after it was made.

    A mask that is sharded already is returned as it is. Sends nothing.
    """
    same = mask.device == param.device and is_dtensor(mask) == is_dtensor(param)
    return mask if same else place_like(mask, param)


class Columns(NamedTuple):
    """The columns of one parameter's window on this process: one per weight of its shard."""

    shape: tuple[int, ...]  # of the shard
    groups: tuple[Any, ...] = ()  # as in common.sharding.Shard
    offset: int | None = 0  # common.sharding.first_index


def columns_of(param: Tensor) -> Columns:
    """Return this process's columns."""
    if not is_dtensor(param):
        return Columns(tuple(param.shape))
    shard = shard_of(param)
    return Columns(tuple(local_part(param).shape), shard.groups, first_index(shard))


def new_columns(param: Tensor, shape: Sequence[int], dtype: torch.dtype | None, *, lead: int = 1) -> Tensor:
    """Return zeros sharded like a parameter.

    Args:
        param: the parameter.
        shape: unsharded: ``lead`` sizes, then the parameter's, up to its sharded dimension at least.
        dtype: dtype of the zeros.
        lead: the number of sizes before the parameter's.
    """
    here = list(shape)
    for dim, (size, whole) in enumerate(zip(columns_of(param).shape, param.shape, strict=True), start=lead):
        if size != whole:
            here[dim] = size
    zeros = torch.zeros(here, dtype=dtype, device=local_part(param).device)
    if not is_dtensor(param):
        return zeros
    placements = [_shifted(p, lead) for p in cast("DTensor", param).placements]
    return join_parts(zeros, param, shape, placements)


def _shifted(placement: Any, by: int) -> Any:
    if placement.is_replicate():
        return placement
    if hasattr(placement, "split_factor"):
        return type(placement)(placement.dim + by, split_factor=placement.split_factor)
    return type(placement)(placement.dim + by)


class Piece(NamedTuple):
    """Consecutive columns of one parameter, in one or more blocks of equal length with a Gram matrix each."""

    param_index: int  # in the batch of scopes
    gram: int  # index of the first block's Gram matrix
    span: tuple[int, int] | None  # (start, end) in the flattened shard; None for all columns
    state: dict[str, Any]  # of the parameter
    blocks: int = 1


def pieces_of(param_index: int, first_gram: int, columns: Columns, state: Any, scope: str | int) -> list[Piece]:
    """Split a parameter's columns here into one piece of all complete blocks, and a partial block at either end."""
    if not isinstance(scope, int):
        return [Piece(param_index, first_gram, None, state)]
    assert columns.offset is not None  # MFAC refuses other shards before a step
    start, end = columns.offset, columns.offset + math.prod(columns.shape)
    first, last = -(-start // scope), end // scope  # the complete blocks
    pieces: list[Piece] = []
    for low, high, block in ((start, min(first * scope, end), start // scope), (max(last * scope, start), end, last)):
        if low < high and (first <= last or not pieces):
            pieces.append(Piece(param_index, first_gram + block, (low - start, high - start), state))
    if first < last:
        span = (first * scope - start, last * scope - start)
        pieces.append(Piece(param_index, first_gram + first, span, state, last - first))
    return pieces


class DenseRows:
    """Uncompressed rows of pieces of one device, dtype and set of process groups; base class of the other formats.

    A step calls :meth:`encode`, :meth:`squared_norms`, :meth:`dots`, :meth:`write` and :meth:`combine`, in this order.

    Args:
        pieces: in the order of the parameters.
        settings: settings of their scopes.
    """

    key: ClassVar[str] = "window"  # state key of a tensor with the dtype of stored rows

    def __init__(self, pieces: Sequence[Piece], settings: dict[str, Any]) -> None:
        self.pieces = pieces
        self.settings = settings
        self.grams = [piece.gram for piece in pieces]
        self.gram_count = max([piece.gram + piece.blocks for piece in pieces])
        self.rows: list[Tensor] = []
        self._bind_state()

    def _bind_state(self) -> None:
        self.windows = locals_of([p.state["window"] for p in self.pieces])

    def encode(self, vectors: Sequence[Tensor]) -> None:
        """Convert new rows to their stored format, without writing them."""
        dtype = self.windows[0].dtype
        self.rows = [v.reshape(piece.blocks, -1).to(dtype) for piece, v in zip(self.pieces, vectors, strict=True)]

    def dots(self, n: int) -> Tensor:
        """Return the dots of the first ``n`` stored rows with the new one, fp64 [grams, n]."""
        return rule.gram_row([w[:n] for w in self.windows], self.rows, self.grams)

    def squared_norms(self) -> Tensor:
        """Return the squared norms of the new rows, fp64 [grams]."""
        return rule.gram_row([r.reshape(1, -1) for r in self.rows], self.rows, self.grams).squeeze(1)

    def write(self, index: int, grams: set[int]) -> None:
        """Store the new rows of the given Gram matrices at ``index``."""
        indices = [i for i, gram in enumerate(self.grams) if gram in grams]
        if indices:
            torch._foreach_copy_(
                [self.windows[i][index] for i in indices],
                [self.rows[i].view(self.windows[i].shape[1:]) for i in indices],
            )

    def combine(self, coefficients: Tensor, out: list[Tensor]) -> None:
        """Write the first n rows, combined with ``coefficients`` [grams, n], to ``out``: one flat tensor per piece."""
        n = coefficients.shape[1]
        shaped = [o.view(w.shape[1:]) for o, w in zip(out, self.windows, strict=True)]
        rows = [w[:n] for w in self.windows]
        rule.direction(rows, coefficients[: self.gram_count], self.grams, shaped)


class BlockRows(DenseRows):
    """Uncompressed rows in blocks of columns; each block has its own Gram matrix.

    The blocks of a parameter, possibly thousands, are one more dimension of its window.
    """

    @override
    def _bind_state(self) -> None:
        self.windows = []
        for piece in self.pieces:
            window = local_part(piece.state["window"])
            assert piece.span is not None
            columns = window.view(window.shape[0], -1)[:, piece.span[0] : piece.span[1]]
            self.windows.append(columns.unflatten(1, (piece.blocks, -1)))

    @override
    def dots(self, n: int) -> Tensor:
        dots = torch.zeros(self.gram_count, n, dtype=torch.float64, device=self.windows[0].device)
        for piece, window, row in zip(self.pieces, self.windows, self.rows, strict=True):
            for chunk in _chunks(window):
                products = window[:n, chunk].to(torch.float64, copy=True).mul_(row[chunk])
                dots[piece.gram + chunk.start : piece.gram + chunk.stop] = products.sum(dim=-1).T
        return dots

    @override
    def squared_norms(self) -> Tensor:
        squares = torch.zeros(self.gram_count, 1, dtype=torch.float64, device=self.windows[0].device)
        for piece, row in zip(self.pieces, self.rows, strict=True):
            squares[_grams(piece), 0] = row.double().square().sum(dim=1)
        return squares.squeeze(1)

    @override
    def combine(self, coefficients: Tensor, out: list[Tensor]) -> None:
        n = coefficients.shape[1]
        for piece, window, result in zip(self.pieces, self.windows, out, strict=True):
            blocks = result.view(piece.blocks, -1)
            for chunk in _chunks(window):
                weights = coefficients[piece.gram + chunk.start : piece.gram + chunk.stop].T.double().unsqueeze(-1)
                blocks[chunk] = window[:n, chunk].to(torch.float64, copy=True).mul_(weights).sum(dim=0)


def _grams(piece: Piece) -> slice:
    return slice(piece.gram, piece.gram + piece.blocks)


def _chunks(window: Tensor) -> Iterator[slice]:
    """Yield ranges of blocks of a window [m, blocks, size], with about ``_CHUNK_ELEMENTS`` elements each."""
    m, blocks, size = window.shape
    count = max(1, _CHUNK_ELEMENTS // max(m * size, 1))
    return (slice(start, min(start + count, blocks)) for start in range(0, blocks, count))


def combination_dtype(state: dict[str, Any]) -> torch.dtype:
    """Return the dtype in which a parameter's rows are combined."""
    return wide_dtype(state["window" if "window" in state else "window_values"].dtype)
