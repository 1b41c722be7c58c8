"""The optimal brain surgeon with M-FAC's Fisher matrix: saliencies, and updates of the remaining weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from leanstep.kernels import BlockInverseFisher
from leanstep.pruning.score.base import LayerPruner, Ranking, zeros_first
from leanstep.sparsity import NM, nm_obs_mask

UPDATES = ("exact", "independent", "none")
# most float64 elements of gradients in memory at a time
_TILE = 1 << 23


class FisherPruner(LayerPruner):
    """Prunes the weights of least saliency ``w_q^2 / (2 [F^-1]_qq)``, and updates the others of their block.

    F = damping + G^T G / m of the gradients, block by block. The increase of the quadratic model of the loss is
    ``1/2 d^T F d`` for a change d. With S the pruned set of a block:

    * "exact": the least increase, ``d = -F^-1_{:S} (F^-1_SS)^-1 w_S``; the loss rises by
      ``1/2 w_S^T (F^-1_SS)^-1 w_S``.
    * "independent": ``d = F^-1 t`` with ``t_q = -w_q / [F^-1]_qq`` on S: the sum of the updates for single weights.
      S is then set to zero, as in the published code. The increase is not the least, and can exceed that of "none".
    * "none": the others do not change.

    An N:M mask takes the best set of each group alone (:func:`leanstep.sparsity.nm_obs_mask`).

    Args:
        weight: [out, in].
        gradients: G [m, out * in].
        damping: > 0, added to F's diagonal, as a fraction of the mean diagonal entry of G^T G / m. The published
            code adds an absolute 1e-5, so that its mask depends on the scale of the loss and on the batch size.
        block_size: weights of a block, consecutive in the flattened matrix; at most all of them.
        update: a name of the list above.

    Raises:
        ValueError: for values out of range, gradients that are not finite or all zero at the nonzero weights, or a
            damping too small.

    Notes:
        Gradients of zero weights are set to zero, which excludes these weights. Memory besides the gradients: that of
        :class:`leanstep.kernels.BlockInverseFisher`. Computes in float64.

    References:
        Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", arXiv
        2107.03356, section 3; Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon"
        (1992).
    """

    def __init__(
        self, weight: Tensor, gradients: Tensor, *, damping: float = 0.1, block_size: int = 128, update: str = "exact"
    ):
        super().__init__(weight)
        if not damping > 0 or block_size < 1:
            raise ValueError(f"FisherPruner: expected damping > 0 and block_size >= 1, got {damping} and {block_size}")
        nonzero = (self.weight != 0).flatten()
        rows = gradients.detach()
        if not bool(nonzero.all()):
            rows = rows * nonzero
        # row by row: no float64 copy of them all
        mean_square = sum(float(row.to(torch.float64).square().mean()) for row in rows) / len(rows)
        if not 0 < mean_square < torch.inf:
            raise ValueError(
                "FisherPruner: expected finite gradients of the nonzero weights, not all 0; the mean of their squares "
                f"is {mean_square}"
            )
        self._update, self._damping = update, damping * mean_square
        self._fisher = BlockInverseFisher(rows, damping=self._damping, block_size=min(block_size, weight.numel()))
        self._diagonal = self._fisher.diagonal()
        self._ranking: Ranking | None = None

    @property
    def scores(self) -> Tensor:
        """``w_q^2 / (2 [F^-1]_qq)``, fp64 [out, in]: the increase of the loss when one weight is pruned alone."""
        return self.weight.to(torch.float64).square() / (2 * self._diagonal.view_as(self.weight))

    def _prune_count(self, keep: int) -> tuple[Tensor, Tensor]:
        if self._ranking is None:
            self._ranking = Ranking(lambda: zeros_first(self.scores, self.weight))
        return self._updated(self._ranking.mask(keep))

    def _prune_nm(self, nm: NM) -> tuple[Tensor, Tensor]:
        if self._fisher.block_size % nm.m:
            raise ValueError(
                f"FisherPruner: blocks of {self._fisher.block_size} weights split groups of {nm.m}: "
                f"use a block_size that {nm.m} divides"
            )
        return self._updated(nm_obs_mask(self.weight, self._fisher, nm).mask)

    def _updated(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        flat, remaining = self.weight.to(torch.float64).flatten(), mask.flatten()
        if self._update == "independent":
            flat = flat + self._fisher.solve(torch.where(remaining, 0.0, -flat / self._diagonal))
        elif self._update == "exact":
            flat = flat + self._least_increase(flat, remaining)
        updated = flat.view_as(self.weight).masked_fill(self.weight == 0, 0.0)
        return updated.to(self.weight.dtype), mask

    def _least_increase(self, flat: Tensor, remaining: Tensor) -> Tensor:
        """The change of the ``remaining`` weights R that raises the loss least when the others S become zero.

        Solves the ridge regression ``min |G_R d_R - v|^2 + damping * m * |d_R|^2`` with ``v = G_S w_S``. Of its primal
        and dual form, takes the one with the smaller matrix.
        """
        change = torch.zeros_like(flat)
        m = self._fisher.rows.shape[0]
        for window, tile in self._blocks():
            w, r = flat[window].view(tile.shape[0], -1, 1), remaining[window].view(tile.shape[0], 1, -1)
            v = tile @ (w * ~r.mT)
            tile = tile * r
            dual = m < tile.shape[2]
            matrix = tile @ tile.mT if dual else tile.mT @ tile
            matrix.diagonal(dim1=1, dim2=2).add_(self._damping * m)
            factor = torch.linalg.cholesky(matrix)
            solved = tile.mT @ torch.cholesky_solve(v, factor) if dual else torch.cholesky_solve(tile.mT @ v, factor)
            change[window] = solved.flatten()
        return change

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(slice of weights, their gradients, float64 [blocks, m, width]), some blocks of one width at a time."""
        rows, width = self._fisher.rows, self._fisher.block_size
        m, d = rows.shape
        many = max(1, _TILE // (m * width)) * width
        whole = d // width * width
        for start in range(0, whole, many):
            window = slice(start, min(start + many, whole))
            yield window, rows[:, window].unflatten(1, (-1, width)).transpose(0, 1).to(torch.float64)
        if whole < d:
            yield slice(whole, d), rows[:, whole:].unsqueeze(0).to(torch.float64)
