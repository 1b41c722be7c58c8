"""The window of M-FAC as it is stored: whole rows (here), sparse rows, or rows of low rank.

A :class:`Part` is a list of pieces of rows that live on one device in one form, and the operations that a step needs:
take a new row, its dots with the rows that are there, write it, and combine rows. A piece belongs to one Gram matrix,
whose number is its slot; results come per slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels import linear_combination, row_dots
from leanstep.kernels.fisher.gradient_window import largest_magnitude
from leanstep.kernels.reference.fisher.gradient_window import row_scale, wide_dtype
from leanstep.optimizers.common.sharding import local
from leanstep.optimizers.mfac.columns import Columns, new_columns

STORAGES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Piece(NamedTuple):
    """A run of one parameter's columns.

    Attributes:
        member: place of the parameter in the list of the step.
        slot: which Gram matrix its columns count in; of the first of several blocks.
        span: the columns of the flattened part held here; None for all of them.
        state: of the parameter.
        blocks: how many equally long blocks the columns are, in consecutive slots.
    """

    member: int
    slot: int
    span: tuple[int, int] | None
    state: dict[str, Any]
    blocks: int = 1

    def scaled(self, vector: Tensor, factors: Tensor) -> Tensor:
        """The flat vector of the piece, times its slots' factors."""
        if self.blocks == 1:
            return vector * factors[self.slot]
        by_block = vector.view(self.blocks, -1) * factors[self.slot : self.slot + self.blocks].unsqueeze(1)
        return by_block.view(-1)


class Part:
    """Pieces of rows of one form, device and dtype, cut over the same processes; of whole rows, unless derived.

    Args:
        pieces: in the order of the parameters.
        settings: of their scopes.
        scales: fp32 [G, m] of rows stored in fp16; None otherwise.
    """

    def __init__(self, pieces: Sequence[Piece], settings: dict[str, Any], scales: Tensor | None = None) -> None:
        self.pieces = pieces
        self.settings = settings
        self.slots = [piece.slot for piece in pieces]
        self.top = max(piece.slot + piece.blocks for piece in pieces)
        self.scales = None if scales is None else scales[: self.top]
        self.rows: list[Tensor] = []
        self._open()

    def _open(self) -> None:
        self.windows = [local(p.state["window"]) for p in self.pieces]

    def largest(self, vectors: Sequence[Tensor]) -> Tensor:
        """fp32 [slots]: the largest magnitude of every slot's new row in these columns."""
        found = [torch.zeros((), device=vectors[0].device) for _ in range(self.top)]
        for slot, vector in zip(self.slots, vectors, strict=True):
            found[slot] = torch.maximum(found[slot], largest_magnitude([vector], vector))
        return torch.stack(found)

    def take(self, vectors: Sequence[Tensor], largest: Tensor | None = None) -> None:
        """Bring a new row into the form in which it would be stored. Nothing is written yet.

        ``largest``: fp32 [G], over all processes; only with scales.
        """
        dtype = self.windows[0].dtype
        if self.scales is None:
            self.rows = [v.to(dtype) for v in vectors]
            return
        assert largest is not None
        self.factors = row_scale(largest[: self.scales.shape[0]])
        inverse = self.factors.reciprocal()
        self.rows = [(v.float() * inverse[slot]).to(dtype) for v, slot in zip(vectors, self.slots, strict=True)]

    def dots(self, live: int) -> Tensor:
        """fp64 [slots, live]: dots of the rows that are stored with the new row."""
        return self._scaled(row_dots(self._live(live), self.rows, scales=self._scales(live), groups=self.slots))

    def own(self) -> Tensor:
        """fp64 [slots]: squared norm of the new row."""
        found = row_dots([r.reshape(1, -1) for r in self.rows], self.rows, groups=self.slots)
        return self._scaled(self._scaled(found)).squeeze(1)

    def norms(self, vectors: Sequence[Tensor]) -> Tensor:
        """fp64 [slots]: squared norms of any vectors."""
        wide = [v.to(wide_dtype(v.dtype)) for v in vectors]
        return row_dots([v.reshape(1, -1) for v in wide], wide, groups=self.slots).squeeze(1)

    def dots_with(self, vectors: Sequence[Tensor], live: int) -> Tensor:
        """fp64 [slots, live]: dots of the rows that are stored with any vector."""
        return row_dots(self._live(live), vectors, scales=self._scales(live), groups=self.slots)

    def write(self, index: int, slots: set[int]) -> None:
        """Store the new row at ``index``, in the slots given."""
        chosen = [i for i, slot in enumerate(self.slots) if slot in slots]
        if not chosen:
            return
        torch._foreach_copy_(
            [self.windows[i][index] for i in chosen],
            [self.rows[i].view(self.windows[i].shape[1:]) for i in chosen],
        )

    def combine(self, coefficients: Tensor, out: list[Tensor]) -> None:
        """Write the combinations of the first n rows with ``coefficients`` [G, n] into ``out``, flat, one a piece."""
        live = coefficients.shape[1]
        coefficients = coefficients[: self.top]
        linear_combination(
            self._live(live), coefficients, scales=self._scales(live), groups=self.slots,
            out=[o.view(w.shape[1:]) for o, w in zip(out, self.windows, strict=True)],
        )  # fmt: skip

    def _live(self, count: int) -> list[Tensor]:
        return [w[:count] for w in self.windows]

    def _scales(self, live: int) -> Tensor | None:
        return None if self.scales is None else self.scales[:, :live].contiguous()

    def _scaled(self, dots: Tensor) -> Tensor:
        return dots if self.scales is None else dots * self.factors.to(torch.float64).unsqueeze(1)


def init_dense(state: dict[str, Any], param: Tensor, columns: Columns, settings: dict[str, Any]) -> None:
    """Create ``window`` [m, *shape]."""
    dtype = storage_dtype(settings, param)
    state["window"] = new_columns(param, columns, param.shape, dtype, window=settings["window"])


def dense_bytes(param: Tensor, columns: Columns, settings: dict[str, Any]) -> int:
    """Bytes of the window of the columns held here."""
    return settings["window"] * math.prod(columns.shape) * storage_dtype(settings, param).itemsize


def storage_dtype(settings: dict[str, Any], param: Tensor) -> torch.dtype:
    """The dtype of stored rows: as asked, else bf16 for sparse rows, fp64 for fp64 parameters, fp32 for the rest."""
    if settings["storage"] is not None:
        return STORAGES[settings["storage"]]
    if settings["compression"] == "topk":
        return torch.bfloat16
    return torch.float64 if param.dtype == torch.float64 else torch.float32
