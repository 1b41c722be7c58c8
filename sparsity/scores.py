"""What a weight is worth: scores for :func:`leanstep.sparsity.nm_mask`, and masks by the optimal brain surgeon."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from leanstep.kernels import BlockInverseFisher
from leanstep.sparsity.patterns import NM, as_pattern

# groups whose sets are all tried, at most this long and with at most so many sets; longer ones are pruned greedily
_MAX_EXACT_M = 8
# elements of the matrices that are solved at a time
_TILE = 1 << 22


def magnitude(weight: Tensor) -> Tensor:
    """The size of a weight, ``|weight|``: the default score."""
    return weight.detach().abs()


def magnitude_times_activation(weight: Tensor, activation_norm: Tensor) -> Tensor:
    """``|weight| * norm`` for a weight [out, in] and the norms [in] of the inputs over a calibration set.

    Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), arXiv
    2306.11695, equation 1.

    Raises:
        ValueError: where the norms are not one per input.
    """
    if activation_norm.shape != weight.shape[-1:]:
        raise ValueError(
            f"magnitude_times_activation: expected one norm per input, shape {tuple(weight.shape[-1:])}, got "
            f"{tuple(activation_norm.shape)}"
        )
    return weight.detach().abs() * activation_norm.detach().to(weight.dtype)


def magnitude_times_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """``|weight * gradient|``: the change of the loss, to first order, when a weight is set to zero.

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
        mask: bool, the weight's shape; True where a weight is kept.
        loss: fp64 [out, in / M], the increase of the quadratic model of the loss when the group's pruned weights are
            zero and all weights of its block that may move have moved.
    """

    mask: Tensor
    loss: Tensor


def nm_obs_mask(
    weight: Tensor, inverse_fisher: BlockInverseFisher, pattern: NM | str, *, method: str = "auto"
) -> ObsMask:
    """Prune the M - N weights of every group that the loss misses least, by the inverse Fisher matrix.

    For a group Q of M consecutive inputs of one output and a set S of M - N of them, the loss increases by
    ``1/2 w_S^T ([F^-1]_SS)^-1 w_S``, all other weights being free to make up for it. The mask is exact per group:
    the minimum over all sets S, tried one by one, where M <= 8; greedy, one weight after the other, otherwise.

    Args:
        weight: [out, in]; not written.
        inverse_fisher: of the weight's gradients, flattened row by row: ``out * in`` columns, with blocks that M
            divides.
        pattern: N:M; M divides ``in``.
        method: "exact", "greedy", or "auto".

    Returns:
        :class:`ObsMask`.

    Raises:
        ValueError: for shapes that do not match, M that does not divide ``in``, or "exact" for M > 8.

    Notes:
        float64. Exact: C(M, N) systems of size M - N per group. Groups are pruned independently of one another.

    References:
        Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon" (1992); Kurtic et al.,
        "The Optimal BERT Surgeon", arXiv 2203.07259, for groups.
    """
    pattern = as_pattern(pattern)
    if method not in ("auto", "exact", "greedy"):
        raise ValueError(f"nm_obs_mask: method must be 'auto', 'exact' or 'greedy', got {method!r}")
    if weight.dim() != 2 or weight.shape[1] % pattern.m:
        raise ValueError(
            f"nm_obs_mask: expected a weight [out, in] with {pattern.m} dividing in, got {tuple(weight.shape)}"
        )
    if inverse_fisher.rows.shape[1] != weight.numel():
        raise ValueError(
            f"nm_obs_mask: the inverse Fisher matrix has {inverse_fisher.rows.shape[1]} columns, the weight of shape "
            f"{tuple(weight.shape)} has {weight.numel()} entries"
        )
    if method == "exact" and pattern.m > _MAX_EXACT_M:
        raise ValueError(f"nm_obs_mask: method 'exact' takes groups of up to {_MAX_EXACT_M}, the pattern is {pattern}")
    choose = _choose_greedily if method == "greedy" or pattern.m > _MAX_EXACT_M else _choose_exactly
    groups = weight.detach().to(torch.float64).reshape(-1, pattern.m)
    inverses = inverse_fisher.sub_blocks(pattern.m)
    keep = torch.empty(groups.shape, dtype=torch.bool, device=weight.device)
    loss = torch.empty(len(groups), dtype=torch.float64, device=weight.device)
    height = max(1, _TILE // pattern.m**2)
    for start in range(0, len(groups), height):
        part = slice(start, start + height)
        keep[part], loss[part] = choose(groups[part], inverses[part], pattern)
    return ObsMask(keep.view(weight.shape), loss.view(weight.shape[0], -1))


def set_losses(groups: Tensor, inverses: Tensor, sets: Tensor) -> Tensor:
    """``1/2 w_S^T ([F^-1]_SS)^-1 w_S`` for groups [g, M], their inverse blocks [g, M, M], and sets [s, k]: [g, s]."""
    chosen = groups[:, sets]
    sub = inverses[:, sets.unsqueeze(2), sets.unsqueeze(1)]
    return (chosen * torch.linalg.solve(sub, chosen.unsqueeze(-1)).squeeze(-1)).sum(dim=-1) / 2


def _choose_exactly(groups: Tensor, inverses: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """Masks [g, M] and losses [g]: the best of all sets; of equal ones the first, which prunes lower indices."""
    keep = torch.ones(groups.shape, dtype=torch.bool, device=groups.device)
    best = groups.new_full((len(groups),), torch.inf)
    pruned = pattern.m - pattern.n
    if not pruned:
        return keep, groups.new_zeros(len(groups))
    for places in combinations(range(pattern.m), pruned):
        loss = set_losses(groups, inverses, torch.tensor([places], device=groups.device)).squeeze(1)
        better = loss < best
        best = torch.where(better, loss, best)
        mask = torch.ones(pattern.m, dtype=torch.bool, device=groups.device)
        mask[list(places)] = False
        keep = torch.where(better.unsqueeze(1), mask, keep)
    return keep, best


def _choose_greedily(groups: Tensor, inverses: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """As :func:`_choose_exactly`, one weight at a time: after each, the others move and its row and column go."""
    w, inverse = groups.clone(), inverses.clone()
    keep = torch.ones(groups.shape, dtype=torch.bool, device=groups.device)
    total = groups.new_zeros(len(groups))
    each = torch.arange(len(groups), device=groups.device)
    for _ in range(pattern.m - pattern.n):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        saliency = torch.where(keep, w.square() / (2 * diagonal), torch.inf)
        place = saliency.argmin(dim=1)
        total += saliency[each, place]
        keep[each, place] = False
        column, pivot = inverse[each, :, place], diagonal[each, place]
        w = w - column * (w[each, place] / pivot).unsqueeze(1)
        inverse = inverse - column.unsqueeze(2) * column.unsqueeze(1) / pivot.view(-1, 1, 1)
        # what was pruned must not come back as a quotient of two roundings
        inverse[each, place, place] = 1
    return keep, total
