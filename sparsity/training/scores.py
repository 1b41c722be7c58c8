"""Scores of weights for :func:`leanstep.sparsity.nm_mask`, and masks by the optimal brain surgeon."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from leanstep.kernels import BlockInverseFisher
from leanstep.sparsity.patterns import NM, as_pattern

# longest group for which _prune_exactly tries all sets
_MAX_EXACT_M = 8
# elements of the matrices solved in one call
_TILE = 1 << 22


def magnitude(weight: Tensor) -> Tensor:
    """Score each weight by its magnitude ``|weight|``, the default."""
    return weight.detach().abs()


def magnitude_times_activation(weight: Tensor, activation_norm: Tensor) -> Tensor:
    """``|weight| * norm`` for a weight [out, in] and the norms [in] of the inputs over a calibration set.

    Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), arXiv
    2306.11695, equation 1.

    Raises:
        ValueError: unless there is one norm per input.
    """
    if activation_norm.shape != weight.shape[-1:]:
        raise ValueError(
            f"magnitude_times_activation: expected one norm per input, shape {tuple(weight.shape[-1:])}, got "
            f"{tuple(activation_norm.shape)}"
        )
    return weight.detach().abs() * activation_norm.detach().to(weight.dtype)


def magnitude_times_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """``|weight * gradient|``: the first-order change of the loss when a weight is set to zero.

    Molchanov, Tyree, Karras, Aila, Kautz, "Pruning Convolutional Neural Networks for Resource Efficient Inference",
    arXiv 1611.06440.

    Raises:
        ValueError: for shapes that differ.
    """
    if gradient.shape != weight.shape:
        raise ValueError(
            f"magnitude_times_gradient: expected a gradient of shape {tuple(weight.shape)}, got {tuple(gradient.shape)}"
        )
    return (weight.detach() * gradient.detach().to(weight.dtype)).abs()


class ObsMask(NamedTuple):
    """A mask by the optimal brain surgeon.

    Attributes:
        mask: bool, the weight's shape; False for pruned weights.
        loss: fp64 [out, in / M], the increase of the loss's quadratic model after pruning a group and updating the
            other weights of its block optimally.
    """

    mask: Tensor
    loss: Tensor


def nm_obs_mask(weight: Tensor, inverse_fisher: BlockInverseFisher, pattern: NM | str) -> ObsMask:
    """Prune the M - N weights of every group that increase the loss least, by the inverse Fisher matrix.

    A group holds M consecutive inputs of one output. Pruning a set S of M - N of them increases the loss by
    ``1/2 w_S^T ([F^-1]_SS)^-1 w_S`` if all other weights are updated optimally. For M <= 8, the mask is exact, the
    minimum over all sets S. For longer groups, it is greedy, one weight after the other.

    Args:
        weight: [out, in]; not written.
        inverse_fisher: inverse Fisher matrix of the weight's gradients, flattened row by row: ``out * in`` columns. M
            divides the size of its blocks.
        pattern: N:M; M divides ``in``.

    Returns:
        :class:`ObsMask`.

    Raises:
        ValueError: for shapes that do not match, or M that does not divide ``in`` or the size of the blocks.

    Notes:
        Computes in float64. The exact mask solves C(M, N) systems of size M - N per group. Groups are independent.

    References:
        Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon" (1992); Kurtic et al.,
        "The Optimal BERT Surgeon", arXiv 2203.07259, for groups.
    """
    pattern = as_pattern(pattern)
    if weight.dim() != 2 or weight.shape[1] % pattern.m:
        raise ValueError(
            f"nm_obs_mask: expected a weight [out, in] with {pattern.m} dividing in, got {tuple(weight.shape)}"
        )
    if inverse_fisher.rows.shape[1] != weight.numel():
        raise ValueError(
            f"nm_obs_mask: the inverse Fisher matrix has {inverse_fisher.rows.shape[1]} columns, the weight of shape "
            f"{tuple(weight.shape)} has {weight.numel()} entries"
        )
    prune_groups = _prune_greedily if pattern.m > _MAX_EXACT_M else _prune_exactly
    groups = weight.detach().to(torch.float64).reshape(-1, pattern.m)
    inverses = inverse_fisher.sub_blocks(pattern.m)
    keep = torch.empty(groups.shape, dtype=torch.bool, device=weight.device)
    loss = torch.empty(len(groups), dtype=torch.float64, device=weight.device)
    height = max(1, _TILE // pattern.m**2)
    for start in range(0, len(groups), height):
        tile = slice(start, start + height)
        keep[tile], loss[tile] = prune_groups(groups[tile], inverses[tile], pattern)
    return ObsMask(keep.view(weight.shape), loss.view(weight.shape[0], -1))


def _prune_exactly(groups: Tensor, inverses: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """Masks [g, M] and losses [g] of the best set; ties go to the first set, which prunes lower indices."""
    keep = torch.ones(groups.shape, dtype=torch.bool, device=groups.device)
    best = groups.new_full((len(groups),), torch.inf)
    pruned = pattern.m - pattern.n
    if not pruned:
        return keep, groups.new_zeros(len(groups))
    for indices in combinations(range(pattern.m), pruned):
        # 1/2 w_S^T ([F^-1]_SS)^-1 w_S
        pruned_set = torch.tensor(indices, device=groups.device)
        weights, blocks = groups[:, pruned_set], inverses[:, pruned_set.unsqueeze(1), pruned_set]
        loss = (weights * torch.linalg.solve(blocks, weights.unsqueeze(-1)).squeeze(-1)).sum(dim=-1) / 2
        better = loss < best
        best = torch.where(better, loss, best)
        mask = torch.ones(pattern.m, dtype=torch.bool, device=groups.device)
        mask[list(indices)] = False
        keep = torch.where(better.unsqueeze(1), mask, keep)
    return keep, best


def _prune_greedily(groups: Tensor, inverses: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """Prune one weight at a time: update the other weights, and eliminate its row and column of the inverse."""
    w, inverse = groups.clone(), inverses.clone()
    keep = torch.ones(groups.shape, dtype=torch.bool, device=groups.device)
    total = groups.new_zeros(len(groups))
    group = torch.arange(len(groups), device=groups.device)
    for _ in range(pattern.m - pattern.n):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        saliency = torch.where(keep, w.square() / (2 * diagonal), torch.inf)
        index = saliency.argmin(dim=1)
        total += saliency[group, index]
        keep[group, index] = False
        column, pivot = inverse[group, :, index], diagonal[group, index]
        w = w - column * (w[group, index] / pivot).unsqueeze(1)
        inverse = inverse - column.unsqueeze(2) * column.unsqueeze(1) / pivot.view(-1, 1, 1)
        # the pruned diagonal is now a rounding error: avoid dividing by it
        inverse[group, index, index] = 1
    return keep, total
