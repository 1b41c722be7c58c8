"""Prepare a matrix for pruning by a score: magnitude, Wanda, SparseGPT, ALPS, M-FAC or a function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from leanstep.pruning.score.alps import ALPSPruner
from leanstep.pruning.score.base import NEEDS, SCOPES, LayerPruner, LayerStatistics, Ranking, zeros_first
from leanstep.pruning.score.obs import UPDATES, FisherPruner
from leanstep.pruning.score.sparsegpt import SparseGPTPruner
from leanstep.sparsity import NM, magnitude, magnitude_times_activation, nm_mask

ScoreFunction = Callable[[Tensor, LayerStatistics | None], Tensor]

# default scope of the mask, as in the papers
_SCOPE = {"magnitude": "matrix", "wanda": "row"}


def layer_pruner(
    weight: Tensor,
    score: str | ScoreFunction = "magnitude",
    statistics: LayerStatistics | None = None,
    *,
    scope: str | None = None,
    update: str = "exact",
    damping: float | None = None,
    block_size: int = 128,
    spacing: int = 1,
) -> LayerPruner:
    """Prepare one matrix for pruning to any number of levels.

    ===========  =========================================  ====================  ================================
    score        the smallest go first                      compared within       the other weights
    ===========  =========================================  ====================  ================================
    "magnitude"  |w_ij|                                     the matrix            stay
    "wanda"      |w_ij| ||X_j||_2                           a row                 stay
    "sparsegpt"  w_ij^2 / [U_jj]^2                          blocks of columns     compensate the pruned ones to
                                                                                  their left in the row
    "alps"       ADMM chooses the support           the matrix (``scope``)        least squares on the support
    "mfac"       w_q^2 / (2 [F^-1]_qq)                      the matrix            compensate the pruned ones of
                                                                                  their block (``update``)
    ===========  =========================================  ====================  ================================

    X_j are the inputs j of all tokens, U^T U = (X X^T + damping)^-1 is SparseGPT's Cholesky factor, F the empirical
    Fisher matrix. Zeros are pruned first.

    Args:
        weight: [out, in], floating; never written. :func:`leanstep.pruning.as_matrix` converts other layouts.
        score: one of the table, or a function of (weight in fp32, statistics) that gives scores [out, in] >= 0.
        statistics: with the fields that :data:`leanstep.pruning.score.base.NEEDS` lists for the score.
        scope: "matrix" or "row", for magnitude, Wanda, ALPS and functions (default: matrix); None: as in the table.
        update: "exact", "independent" or "none", for "mfac".
        damping: for "sparsegpt" and "alps" (None: 0.01), and "mfac" (None: 0.1): added to the diagonal, as a fraction
            of its mean.
        block_size: columns that SparseGPT prunes together, or weights per block of M-FAC's F.
        spacing: kernel positions of a convolution, else 1. N:M groups lie along its in-channels, which are ``spacing``
            columns apart in a flattened row.

    Returns:
        :class:`leanstep.pruning.LayerPruner`.

    Raises:
        ValueError: for an unknown score or option, statistics that are missing or do not fit the weight, or a damping
            that is too small for a Cholesky factor.

    References:
        Sun, Liu, Bair, Kolter, arXiv 2306.11695 (Wanda), equation 1; Frantar, Alistarh, arXiv 2301.00774 (SparseGPT),
        algorithm 1; Meng, Behdin, Wang, Mazumder, arXiv 2406.07831 (ALPS); Frantar, Kurtic, Alistarh, arXiv 2107.03356
        (M-FAC), section 3.

    Example:
        >>> pruner = layer_pruner(torch.tensor([[3.0, -1.0], [0.5, 2.0]]))
        >>> pruner.prune(2).weight.tolist(), pruner.prune("1:2").mask.tolist()
        ([[3.0, 0.0], [0.0, 2.0]], [[True, False], [False, True]])
    """
    _check_options(weight, score, statistics, scope, update, spacing)

    def make(matrix: Tensor, statistics: LayerStatistics | None) -> LayerPruner:
        if score == "sparsegpt":
            assert statistics is not None and statistics.gram is not None
            return SparseGPTPruner(
                matrix, statistics.gram, damping=0.01 if damping is None else damping, block_size=block_size
            )
        if score == "alps":
            assert statistics is not None and statistics.gram is not None
            return ALPSPruner(
                matrix,
                statistics.gram,
                damping=0.01 if damping is None else damping,
                scope=scope or "matrix",
                block_size=block_size,
            )
        if score == "mfac" and not bool(matrix.any()):
            # without a nonzero weight there is no Fisher matrix, and nothing to rank
            return ScoredPruner(matrix, lambda: _scores(matrix, "magnitude", None), "matrix")
        if score == "mfac":
            assert statistics is not None and statistics.gradients is not None
            return FisherPruner(
                matrix,
                statistics.gradients,
                damping=0.1 if damping is None else damping,
                block_size=block_size,
                update=update,
            )
        mask_scope = scope or (_SCOPE.get(score, "matrix") if isinstance(score, str) else "matrix")
        return ScoredPruner(matrix, lambda: _scores(matrix, score, statistics), mask_scope)

    if spacing > 1:
        return SpacedPruner(weight, spacing, make, statistics)
    return make(weight, statistics)


def _scores(matrix: Tensor, score: str | ScoreFunction, statistics: LayerStatistics | None) -> Tensor:
    """Scores for a pruner that leaves the other weights unchanged."""
    wide = matrix.detach().to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
    if callable(score):
        return score(wide, statistics)
    if score == "magnitude":
        return magnitude(wide)
    assert statistics is not None and statistics.square_sum is not None
    return magnitude_times_activation(wide, statistics.square_sum.sqrt().to(wide.device))


def _check_options(
    weight: Tensor,
    score: str | ScoreFunction,
    statistics: LayerStatistics | None,
    scope: str | None,
    update: str,
    spacing: int,
) -> None:
    if not callable(score) and score not in NEEDS:
        raise ValueError(f"layer_pruner: score must be one of {', '.join(NEEDS)}, or a function; got {score!r}")
    if scope is not None and (scope not in SCOPES or score in ("sparsegpt", "mfac")):
        raise ValueError(
            f"layer_pruner: scope {scope!r} is not supported for score {score!r}; 'matrix' and 'row' are for others"
        )
    if update not in UPDATES:
        raise ValueError(f"layer_pruner: update must be one of {', '.join(UPDATES)}, got {update!r}")
    if weight.dim() != 2 or spacing < 1 or weight.shape[1] % spacing:
        raise ValueError(
            f"layer_pruner: expected a weight [out, in] and a spacing that divides in; got {tuple(weight.shape)} and "
            f"{spacing}"
        )
    if callable(score):
        return
    rows, columns = weight.shape
    expected = {"square_sum": (columns,), "gram": (columns, columns), "gradients": ("m >= 1", rows * columns)}
    for field in NEEDS[score]:
        sums = None if statistics is None else getattr(statistics, field)
        if sums is None:
            raise ValueError(f"layer_pruner: score {score!r} needs statistics with {field} {expected[field]}")
        if sums.dim() != len(expected[field]) or sums.shape[-1] != expected[field][-1] or not sums.shape[0]:
            raise ValueError(
                f"layer_pruner: {field} of shape {tuple(sums.shape)} does not fit a weight of shape "
                f"{tuple(weight.shape)}; expected {expected[field]}"
            )


class ScoredPruner(LayerPruner):
    """Prunes the weights of lowest score and leaves the others as they are.

    Args:
        weight: [out, in].
        scores_of: gives scores like the weight, >= 0; called for each use, so that none is held.
        scope: "matrix" or "row"; see :class:`leanstep.pruning.score.base.Ranking`.
    """

    def __init__(self, weight: Tensor, scores_of: Callable[[], Tensor], scope: str):
        super().__init__(weight)
        self._scores_of, self._scope = scores_of, scope
        scores = scores_of()
        if scores.shape != weight.shape or not scores.is_floating_point():
            raise ValueError(
                f"expected floating scores of the weight's shape {tuple(weight.shape)}, got {tuple(scores.shape)} of "
                f"{scores.dtype}"
            )
        self._ranking: Ranking | None = None

    @property
    def scores(self) -> Tensor:
        """[out, in], computed at every access."""
        return self._scores_of().detach()

    def _prune_count(self, keep: int) -> tuple[Tensor, Tensor]:
        if self._ranking is None:
            # not of self: a cycle of references would hold this pruner until the next garbage collection
            scores_of, given = self._scores_of, self.given
            self._ranking = Ranking(lambda: zeros_first(scores_of().detach(), given), self._scope)
        return self.given, self._ranking.mask(keep)

    def _prune_nm(self, nm: NM) -> tuple[Tensor, Tensor]:
        return self.given, nm_mask(self.scores.masked_fill(self.given == 0, 0.0), nm)


class SpacedPruner(LayerPruner):
    """Wraps the pruner of a convolution, whose N:M groups lie along its in-channels: every k-th column.

    Args:
        weight: [out, channels * k], a convolution's weight with its rows flattened, k kernel positions per channel.
        spacing: k.
        make: weight, statistics -> pruner; called with the columns in the order [k, channels].
        statistics: in the order of the weight's columns.
    """

    def __init__(
        self,
        weight: Tensor,
        spacing: int,
        make: Callable[[Tensor, LayerStatistics | None], LayerPruner],
        statistics: LayerStatistics | None,
    ):
        super().__init__(weight)
        columns = torch.arange(weight.shape[1], device=weight.device).unflatten(0, (-1, spacing)).T.flatten()
        self._back, self._channels = columns.argsort(), weight.shape[1] // spacing
        self._inner = make(weight[:, columns], statistics and statistics.permuted(columns))

    @property
    def scores(self) -> Tensor:
        """[out, in], in the order of the weight's columns."""
        return self._inner.scores[:, self._back]

    def _prune_count(self, keep: int) -> tuple[Tensor, Tensor]:
        weight, mask = self._inner.prune(keep)
        return weight[:, self._back], mask[:, self._back]

    def _prune_nm(self, nm: NM) -> tuple[Tensor, Tensor]:
        if self._channels % nm.m:
            raise ValueError(f"groups of {nm.m} do not fill the {self._channels} in-channels of a convolution")
        weight, mask = self._inner.prune(nm)
        return weight[:, self._back], mask[:, self._back]
