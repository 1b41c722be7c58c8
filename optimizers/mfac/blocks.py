"""Windows of blocks: runs of equally long blocks of a parameter's columns, each with a Gram matrix of its own.

A parameter may have thousands of blocks; they are worked on together, as one more dimension of its window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from leanstep.kernels.reference.fisher.gradient_window import row_scale
from leanstep.optimizers.common.sharding import local
from leanstep.optimizers.mfac.window import Part

# elements that are widened at a time: a window is never copied whole
_CHUNK_ELEMENTS = 1 << 20


class BlockPart(Part):
    """Pieces that are runs of blocks. Products and sums run in fp64, as those of whole windows do."""

    def _open(self) -> None:
        self.windows = []
        for piece in self.pieces:
            window = local(piece.state["window"])
            assert piece.span is not None
            columns = window.view(window.shape[0], -1)[:, piece.span[0] : piece.span[1]]
            self.windows.append(columns.unflatten(1, (piece.blocks, -1)))

    def largest(self, vectors: Sequence[Tensor]) -> Tensor:
        found = torch.zeros(self.top, device=vectors[0].device)
        for piece, vector in zip(self.pieces, vectors, strict=True):
            found[piece.slot : piece.slot + piece.blocks] = vector.view(piece.blocks, -1).abs().amax(dim=1)
        return found

    def take(self, vectors: Sequence[Tensor], largest: Tensor | None = None) -> None:
        dtype = self.windows[0].dtype
        blocks = [v.reshape(piece.blocks, -1) for piece, v in zip(self.pieces, vectors, strict=True)]
        if self.scales is None:
            self.rows = [b.to(dtype) for b in blocks]
            return
        assert largest is not None
        self.factors = row_scale(largest[: self.top])
        inverse = self.factors.reciprocal().unsqueeze(1)
        self.rows = [
            (b.float() * inverse[piece.slot : piece.slot + piece.blocks]).to(dtype)
            for piece, b in zip(self.pieces, blocks, strict=True)
        ]

    def dots(self, live: int) -> Tensor:
        return self._scaled(self.dots_with(self.rows, live))

    def own(self) -> Tensor:
        return self._scaled(self._scaled(self.norms(self.rows).unsqueeze(1))).squeeze(1)

    def norms(self, vectors: Sequence[Tensor]) -> Tensor:
        found = torch.zeros(self.top, dtype=torch.float64, device=vectors[0].device)
        for piece, vector in zip(self.pieces, vectors, strict=True):
            wide = vector.reshape(piece.blocks, -1).double()
            found[piece.slot : piece.slot + piece.blocks] = wide.square().sum(dim=1)
        return found

    def dots_with(self, vectors: Sequence[Tensor], live: int) -> Tensor:
        found = torch.zeros(self.top, live, dtype=torch.float64, device=vectors[0].device)
        for piece, window, vector in zip(self.pieces, self.windows, vectors, strict=True):
            blocks = vector.reshape(piece.blocks, -1)
            for chunk in _chunks(window):
                products = window[:live, chunk].double() * blocks[chunk].double()
                found[piece.slot + chunk.start : piece.slot + chunk.stop] = products.sum(dim=-1).T
        return found if self.scales is None else found * self.scales[:, :live]

    def combine(self, coefficients: Tensor, out: list[Tensor]) -> None:
        live = coefficients.shape[1]
        stored = coefficients[: self.top] if self.scales is None else coefficients[: self.top] * self.scales[:, :live]
        for piece, window, result in zip(self.pieces, self.windows, out, strict=True):
            blocks = result.view(piece.blocks, -1)
            for chunk in _chunks(window):
                weights = stored[piece.slot + chunk.start : piece.slot + chunk.stop].T.double().unsqueeze(-1)
                blocks[chunk] = (window[:live, chunk].double() * weights).sum(dim=0)


def _chunks(window: Tensor) -> Iterator[slice]:
    """Ranges of blocks of a window [m, blocks, size] with about ``_CHUNK_ELEMENTS`` elements each."""
    m, blocks, size = window.shape
    count = max(1, _CHUNK_ELEMENTS // max(m * size, 1))
    return (slice(start, min(start + count, blocks)) for start in range(0, blocks, count))
