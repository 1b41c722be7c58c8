"""SparseGPT: prune a matrix from left to right; the columns to the right compensate the error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from leanstep.pruning.score.base import LayerPruner, smallest, split_capped, zeros_first
from leanstep.sparsity import NM, nm_mask

# columns that are updated one by one, within a block
_STRIP = 16


class Rounding(Protocol):
    """Rounds what a sweep keeps, column by column.

    Attributes:
        columns: columns whose scales are chosen together; a multiple of 16, or 1.
    """

    columns: int

    def scale(self, weight: Tensor, mask: Tensor, precision: Tensor) -> None:
        """Choose scales for the next columns [columns, out] from their weights, mask, and weights of squared errors."""

    def nearest(self, column: Tensor) -> Tensor:
        """The column [out] of values with these scales that is nearest."""


class SparseGPTPruner(LayerPruner):
    """Prunes for the least squared error of the layer's output on its calibration inputs, a block of columns at a time.

    With H = X X^T + damping and the upper Cholesky factor U of its inverse (U^T U = H^-1), for each column j: the error
    ``e = w_:j / U_jj`` of its pruned weights updates the columns to its right, ``W_:k -= e U_jk``. The mask
    of a block, or of an N:M group, is chosen at its first column, from ``w_ij^2 / U_jj^2`` of the current weights.

    Args:
        weight: [out, in].
        gram: X X^T summed over the calibration tokens, [in, in]. Its scale does not matter.
        damping: added to the diagonal, as a fraction of its mean; > 0.
        block_size: columns whose mask is chosen together.

    Raises:
        ValueError: for values out of range, a gram matrix that is not finite, or no Cholesky factor.

    Notes:
        U is computed in float64 and kept in the dtype of the sweep: 4 in^2 bytes. Each level is a sweep of about
        ``out * in^2`` multiply-adds. Keeps exactly the requested count: after each block, the total of pruned
        weights is the share of the columns so far, rounded down. What a block with few nonzero weights cannot keep is
        shared by the others. Weights of inputs that are always zero are pruned first, as in the published code, and
        count among the zeros that were asked for; the published code sets all of them to zero, besides those. It also
        thresholds each block alone.

    References:
        Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774,
        algorithm 1.
    """

    def __init__(self, weight: Tensor, gram: Tensor, *, damping: float = 0.01, block_size: int = 128):
        super().__init__(weight)
        if not damping > 0 or block_size < 1:
            raise ValueError(f"SparseGPT: expected damping > 0 and block_size >= 1, got {damping} and {block_size}")
        self._block_size = block_size
        self._unused = gram.diagonal() == 0
        self._factor = inverse_factor(gram, damping).to(self.weight)

    @property
    def scores(self) -> Tensor:
        """``w_ij^2 / [H^-1]_jj``, of the original weights: the error of pruning one weight alone."""
        inverse_diagonal = self._factor.square().sum(dim=0)
        return self.weight.square() / inverse_diagonal * ~self._unused

    @property
    def factor(self) -> Tensor:
        """U, upper triangular [in, in]."""
        return self._factor

    def rounded(self, keep: int, rounding: Rounding) -> tuple[Tensor, Tensor]:
        """Weights and mask of ``keep`` weights, each kept one next to the nearest value of ``rounding``.

        A column's error is that of its zeros and of its rounding together, ``e = (w_:j - q_:j) / U_jj`` (section 3.5 of
        the paper).
        """
        return self._prune_count(keep, rounding)

    def _prune_count(self, keep: int, rounding: Rounding | None = None) -> tuple[Tensor, Tensor]:
        counts = self._block_counts(keep)

        def keep_share(start: int, scores: Tensor) -> Tensor:
            return ~smallest(scores, scores.numel() - counts[start // self._block_size])

        return self._sweep(self._block_size, keep_share, self._block_size, rounding)

    def _block_counts(self, keep: int) -> list[int]:
        """Weights that each block keeps: those of inputs that are always zero after all others, and zeros last."""

        def per_block(mask: Tensor) -> list[int]:
            return [int(part.sum()) for part in mask.split(self._block_size, dim=1)]

        used = self.weight != 0
        sizes, nonzero, live = map(per_block, (torch.ones_like(used), used, used & ~self._unused))
        if (spare := keep - sum(live)) <= 0:
            return split_capped(keep, sizes, live, _split_in_order)
        others, rest = ([a - b for a, b in zip(all_of, live, strict=True)] for all_of in (sizes, nonzero))
        return [a + b for a, b in zip(live, split_capped(spare, others, rest, _split_in_order), strict=True)]

    def _prune_nm(self, nm: NM) -> tuple[Tensor, Tensor]:
        block = max(self._block_size // nm.m, 1) * nm.m
        return self._sweep(block, lambda start, scores: nm_mask(scores.clamp(min=0), nm), nm.m)

    def _sweep(
        self,
        block: int,
        choose: Callable[[int, Tensor], Tensor],
        together: int,
        rounding: Rounding | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weights and mask; ``choose(start, scores)`` gives the mask of ``together`` columns from ``start`` on."""
        # transposed, so that a column is contiguous
        weight, factor = self.weight.t().clone(memory_format=torch.contiguous_format), self._factor
        mask = torch.ones_like(weight, dtype=torch.bool)
        diagonal = factor.diagonal()
        precision = diagonal[:, None].square().reciprocal()
        # columns whose mask is chosen together are up to date: they begin a block, or lie in one strip
        strip = _STRIP if together >= block else max(_STRIP // together, 1) * together
        for start in range(0, len(weight), block):
            stop = min(start + block, len(weight))
            errors = torch.empty_like(weight[start:stop])
            for first in range(start, stop, strip):
                last = min(first + strip, stop)
                for j in range(first, last):
                    if (j - start) % together == 0:
                        columns = slice(j, min(j + together, stop))
                        scores = (weight[columns].t() / diagonal[columns]).square() * ~self._unused[columns]
                        mask[columns] = choose(j, zeros_first(scores, self.weight[:, columns])).t()
                    error = errors[j - start]
                    if rounding is None:
                        torch.div(weight[j], diagonal[j], out=error).masked_fill_(mask[j], 0.0)
                    else:
                        if j % rounding.columns == 0:
                            columns = slice(j, j + rounding.columns)
                            rounding.scale(weight[columns], mask[columns], precision[columns])
                        values = rounding.nearest(weight[j]).masked_fill_(~mask[j], 0.0)
                        torch.sub(weight[j], values, out=error).div_(diagonal[j])
                    # within the strip column by column; the columns after it, and after the block, once, below
                    weight[j:last].addr_(factor[j, j:last], error, alpha=-1)
                passed = errors[first - start : last - start]
                weight[last:stop].addmm_(factor[first:last, last:stop].t(), passed, alpha=-1)
            weight[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
        # the updates also changed zeros: reset them
        return weight.t().contiguous().masked_fill_(self.weight == 0, 0.0), mask.t().contiguous()


def _split_in_order(keep: int, sizes: Sequence[int]) -> list[int]:
    """Weights that each block keeps: the pruned ones after each are the share of the sizes so far, rounded down."""
    whole = sum(sizes)
    pruned = [(whole - keep) * end // whole for end in itertools.accumulate(sizes, initial=0)]
    return [size - (after - before) for size, before, after in zip(sizes, pruned, pruned[1:], strict=False)]


def damped_gram(gram: Tensor, damping: float) -> Tensor:
    """gram with ``damping`` times its mean diagonal added to the diagonal.

    The diagonal of an input that is always zero is first set to the mean of the others (in the published code to 1), so
    that the result scales with gram. It is 1 where all inputs are zero. Returns a new float64 tensor. Raises ValueError
    for a gram matrix that is not finite.
    """
    if not bool(gram.isfinite().all()):
        raise ValueError("the sum of x x^T over the calibration tokens is not finite")
    matrix = gram.to(torch.float64, copy=True)
    diagonal = matrix.diagonal()
    unused = diagonal == 0
    diagonal[unused] = 1.0 if bool(unused.all()) else diagonal[~unused].mean()
    diagonal += damping * diagonal.mean()
    return matrix


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with U^T U = (gram + damping)^-1; float64."""
    # the damped matrix is freed before the second factor: 8 in^2 bytes each, and there are wide layers
    factor, info = torch.linalg.cholesky_ex(damped_gram(gram, damping))
    if not int(info):
        factor = torch.cholesky_inverse(factor)
        factor, info = torch.linalg.cholesky_ex(factor, upper=True)
    if int(info):
        raise ValueError(
            f"SparseGPT: x x^T with a damping of {damping:g} of its mean diagonal is not positive definite in float64; "
            "raise the damping"
        )
    return factor
