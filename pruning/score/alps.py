"""ALPS: choose the support of a matrix by ADMM, then solve least squares on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from leanstep.pruning.score.base import LayerPruner, Ranking, smallest
from leanstep.pruning.score.sparsegpt import SparseGPTPruner, damped_gram
from leanstep.sparsity import NM, nm_mask

# scores [out, in] -> bool [out, in], the support of the largest scores
Projection = Callable[[Tensor], Tensor]

# ADMM compares supports, and raises rho, after this many iterations
_INTERVAL = 3
_MOST_ITERATIONS = 300
# growth of rho by the fraction of the support that changed, as in the published code
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
# added to A where its inverse preconditions conjugate gradients
_SHIFT = 0.01
# conjugate gradients stop at this residual, relative to the gradient of the empty support
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class ALPSPruner(LayerPruner):
    """Prunes for the least squared error of the layer's output on its calibration inputs, over support and weights.

    With H = X X^T + damping and the scales ``s_j = sqrt(H_jj)``, solves the problem for ``B = W diag(s)``, whose
    matrix ``A = diag(1/s) H diag(1/s)`` has a diagonal of ones:

    1. ADMM on ``min tr((B - B') A (B - B')^T)`` with ``B = D`` and D in the set of sparse matrices, from
       ``D = P(B')`` and ``V = 0``; B' are the dense weights and P keeps the largest entries:
       ``B = (B' A - V + rho D) (A + rho)^-1``, ``D = P(B + V / rho)``, ``V = V + rho (B - D)``. Every three iterations
       rho grows, until the support of D stays the same (:func:`admm_support`).
    2. The least squares of the same objective over all matrices with that support (:func:`least_squares`).
    3. If the dense weights on the support of ``P(B')``, or SparseGPT's result, have a lower objective, step 2 is
       solved on their support instead. The objective, which includes the damping, is thus never above either's.

    Args:
        weight: [out, in].
        gram: X X^T summed over the calibration tokens, [in, in]. Its scale does not matter.
        damping: added to the diagonal, as a fraction of its mean; > 0.
        scope: "matrix" compares all weights, "row" those of a row; N:M compares those of a group. SparseGPT's result
            is not compared with "row", because its rows keep different counts.
        block_size: of the SparseGPT sweep.

    Raises:
        ValueError: for another scope, values out of range, or a gram matrix that is not finite.

    Notes:
        The eigenvectors of A are computed in float64 and kept in the dtype of the iterations, 4 in^2 bytes. Each level
        takes up to 300 iterations of ``out * in^2`` multiply-adds and a sweep of SparseGPT. The least squares run by
        conjugate gradients, to a residual of 1e-5 (fp64: 1e-10), not for the published ten iterations. Unlike the
        published code, ADMM does not start again with a smaller rho where the first iterations change nothing. Weights
        of inputs that are always zero are pruned first.

    References:
        Meng, Behdin, Wang, Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
        Models", arXiv 2406.07831.
    """

    def __init__(
        self, weight: Tensor, gram: Tensor, *, damping: float = 0.01, scope: str = "matrix", block_size: int = 128
    ):
        super().__init__(weight)
        self._scope = scope
        self._sparsegpt = SparseGPTPruner(weight, gram, damping=damping, block_size=block_size)
        self._unused = gram.diagonal() == 0
        wide = damped_gram(gram, damping)
        scales = wide.diagonal().sqrt()
        wide = wide / scales / scales[:, None]
        eigenvalues, vectors = torch.linalg.eigh(wide)
        self._gram, self._scales = wide.to(self.weight), scales.to(self.weight)
        self._eigen = (eigenvalues.clamp(min=0).to(self.weight), vectors.to(self.weight))
        # contiguous: products then round alike for a matrix and for a transposed view of it
        self._dense = (self.weight * self._scales).contiguous()

    @property
    def scores(self) -> Tensor:
        """``w_ij^2 H_jj``: the error of pruning one weight alone, without an update of the others."""
        return self._dense.square() * ~self._unused

    def objective(self, weight: Tensor) -> Tensor:
        """``tr((W - W') H (W - W')^T)`` for a matrix W [out, in], with the damping in H; W' are the given weights."""
        change = (weight.to(self.weight) - self.weight) * self._scales
        return ((change @ self._gram) * change).sum()

    def _prune_count(self, keep: int) -> tuple[Tensor, Tensor]:
        def project(scores: Tensor) -> Tensor:
            ordered = torch.where(self._unused, 0.0, scores).masked_fill(self.weight == 0, -1.0)
            if self._scope == "row":
                return Ranking(lambda: ordered, "row").mask(keep)
            return ~smallest(ordered, ordered.numel() - keep)

        return self._prune_to(project, keep)

    def _prune_nm(self, nm: NM) -> tuple[Tensor, Tensor]:
        def project(scores: Tensor) -> Tensor:
            return nm_mask(torch.where(self._unused, 0.0, scores).masked_fill(self.weight == 0, 0.0), nm)

        return self._prune_to(project, nm)

    def _prune_to(self, project: Projection, level: int | NM) -> tuple[Tensor, Tensor]:
        start = project(self._dense.square())
        if not bool((~start & (self.weight != 0)).any()):
            return self.given, start
        support = admm_support(self._gram, self._eigen, self._dense, project)
        solution = self._solve(support)
        rivals = [(self.weight * start, start)]
        if isinstance(level, NM) or self._scope == "matrix":
            rivals.append(self._sparsegpt.prune(level))
        objective = self.objective(solution)
        for weight, mask in rivals:
            if self.objective(weight) < objective:
                support, solution = mask, self._solve(mask)
                objective = self.objective(solution)
        return solution, support

    def _solve(self, support: Tensor) -> Tensor:
        """The weights of least objective on a support; zeros of the given weights stay zero."""
        return least_squares(self._gram, self._eigen, self._dense, support & (self.weight != 0)) / self._scales


def admm_support(
    gram: Tensor, eigen: tuple[Tensor, Tensor], dense: Tensor, project: Projection, rho: float = 0.1
) -> Tensor:
    """The support at which ADMM arrives, bool [out, in]; see :class:`ALPSPruner`.

    Args:
        gram: A, [in, in], symmetric, with a diagonal of ones.
        eigen: its eigenvalues [in] and eigenvectors [in, in].
        dense: B', [out, in].
        project: P.
        rho: the first penalty.

    Stops when three iterations change no entry of the support, or after 300.
    """
    eigenvalues, vectors = eigen
    target = dense @ gram
    previous = support = project(dense.square())
    sparse, dual = dense * support, torch.zeros_like(dense)
    inverse = (vectors / (eigenvalues + rho)) @ vectors.T
    for iteration in range(1, _MOST_ITERATIONS + 1):
        # B + V / rho
        shifted = torch.addmm(dual, torch.add(target, sparse, alpha=rho).sub_(dual), inverse, beta=1 / rho)
        support = project(shifted.square())
        sparse = shifted * support
        dual = torch.sub(shifted, sparse).mul_(rho)  # V + rho (B - D)
        if iteration % _INTERVAL:
            continue
        changed = int((support ^ previous).sum()) / max(int(support.sum()), 1)
        if not changed:
            break
        rho *= next(growth for least, growth in _GROWTH if changed >= least)
        inverse = (vectors / (eigenvalues + rho)) @ vectors.T
        previous = support
    return support


def least_squares(gram: Tensor, eigen: tuple[Tensor, Tensor], dense: Tensor, support: Tensor) -> Tensor:
    """``argmin tr((B - B') A (B - B')^T)`` over the matrices B that are zero outside ``support``, [out, in].

    Conjugate gradients on all rows at once, from B' on the support. The paper's preconditioner, A's diagonal, is one
    here; this one is ``(A + 0.01)^-1`` on the support: fewer iterations, of two products in place of one.

    Args:
        gram: A, [in, in], positive definite, with a diagonal of ones.
        eigen: its eigenvalues [in] and eigenvectors [in, in].
        dense: B', [out, in].
        support: bool [out, in].
    """
    eigenvalues, vectors = eigen
    inverse = (vectors / (eigenvalues + _SHIFT)) @ vectors.T
    inside, tiny = support.to(dense.dtype), torch.finfo(dense.dtype).tiny
    solution = dense * inside
    residual = ((dense - solution) @ gram).mul_(inside)
    limit = _TOLERANCE[dense.dtype] * (dense @ gram).mul_(inside).norm(dim=1)
    direction, before = torch.zeros_like(dense), torch.ones_like(limit)
    for _ in range(gram.shape[0]):  # exact after as many steps, but for rounding
        if bool((residual.norm(dim=1) <= limit).all()):
            break
        steepest = (residual @ inverse).mul_(inside)
        product = torch.linalg.vecdot(residual, steepest)
        # a row without a residual has no direction, and takes no step
        direction = torch.addcmul(steepest, (product / before).unsqueeze(1), direction)
        change = (direction @ gram).mul_(inside)
        step = (product / torch.linalg.vecdot(direction, change).clamp(min=tiny)).unsqueeze(1)
        solution.addcmul_(step, direction)
        residual.addcmul_(step, change, value=-1)
        before = product.clamp(min=tiny)
    return solution
