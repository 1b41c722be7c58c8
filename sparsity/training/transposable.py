"""Masks that are N:M along both dimensions, so that a matrix and its transpose are N:M sparse.

Each M x M tile keeps N entries of every row and column and maximises the sum of their scores. This is a transportation
problem with integral solutions. A solution is optimal if and only if no cycle of exchanges between unpruned and pruned
entries has a positive gain. Canceling all such cycles (Klein, "A primal method for minimal cost flows", 1967) makes any
solution optimal.
"""

from __future__ import annotations

import functools
from itertools import combinations, product

import torch
from torch import Tensor

from leanstep.sparsity.patterns import NM, as_pattern

METHODS = ("auto", "exact", "greedy")
# largest tile side that "auto" solves exactly
_MAX_EXACT_M = 16
# elements in one batch of tiles
_TILE = 1 << 22
# gains below this fraction of a tile's largest score are rounding errors
_TOLERANCE = 1e-12


def transposable_mask(scores: Tensor, pattern: NM | str, *, method: str = "auto") -> Tensor:
    """Keep N entries of every row and column of every M x M tile, so that the mask and its transpose are N:M.

    Args:
        scores: [..., out, in], floating, compared by magnitude; not written. M divides ``out`` and ``in``.
        pattern: N:M.
        method: "exact": the maximal sum of scores in every tile (2:4 tries all 90 masks, others cancel cycles).
            "greedy": take the largest scores while row and column have room, then fill the gaps by the best exchanges;
            reaches at least half of the maximal sum (``benchmarks/sparsity/mask.py`` measures it). "auto": exact up to
            M = 16.

    Returns:
        bool, the shape of ``scores``; exactly N True entries per group along both dimensions.

    Raises:
        ValueError: for another method, or M that does not divide both dimensions.

    Notes:
        Computes in float64. Deterministic; in the greedy method, ties go to higher indices.

    References:
        Hubara, Chmiel, Island, Banner, Naor, Soudry, "Accelerated Sparse Neural Training: A Provable and Efficient
        Method to Find N:M Transposable Masks", arXiv 2102.08124 (transposable masks, the greedy method's bound).

    Example:
        Train under transposable masks. Scores of 1 at N entries of each group select exactly these entries.

        >>> def score(layer, weight):
        ...     return transposable_mask(weight, layer.transform.pattern).to(weight.dtype)
        >>> controller = sparsify(torch.nn.Linear(8, 8), "2:4", score=score)
    """
    pattern = as_pattern(pattern)
    n, m = pattern.n, pattern.m
    if method not in METHODS:
        raise ValueError(f"transposable_mask: method must be one of {', '.join(METHODS)}, got {method!r}")
    if scores.dim() < 2 or scores.shape[-1] % m or scores.shape[-2] % m:
        raise ValueError(
            f"transposable_mask: tiles of {m} x {m} do not fill scores of shape {tuple(scores.shape)}; both of the "
            "last two dimensions must be multiples"
        )
    if n in (0, m):
        return torch.full(scores.shape, n == m, dtype=torch.bool, device=scores.device)
    exact = method == "exact" or (method == "auto" and m <= _MAX_EXACT_M)
    # [..., out / M, M, in / M, M] -> tiles [t, M, M]
    split = scores.detach().unflatten(-1, (-1, m)).unflatten(-3, (-1, m)).transpose(-3, -2)
    tiles = split.reshape(-1, m, m)
    mask = torch.empty(tiles.shape, dtype=torch.bool, device=scores.device)
    height = max(1, _TILE // (m * m * min(n, m - n) if (n, m) != (2, 4) else 90))
    for start in range(0, len(tiles), height):
        values = tiles[start : start + height].abs().to(torch.float64)
        if exact and (n, m) == (2, 4):
            best = _best_of_90(values)
        else:
            best = fill(values, greedy(values, n), n)
            if exact:
                best = cancel_cycles(values, best)
        mask[start : start + height] = best
    return mask.view(split.shape).transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)


@functools.cache
def patterns_2_4() -> Tensor:
    """All 90 masks of a 4 x 4 tile with two entries in every row and column: bool [90, 4, 4]."""
    rows = [[j in columns for j in range(4)] for columns in combinations(range(4), 2)]
    tiles = [tile for tile in product(rows, repeat=4) if all(sum(column) == 2 for column in zip(*tile, strict=True))]
    return torch.tensor(tiles)


def _best_of_90(values: Tensor) -> Tensor:
    masks = patterns_2_4().to(values.device)
    sums = values.flatten(1) @ masks.flatten(1).to(values.dtype).T
    # ties go to the first mask; argmax does not define its choice
    best = sums == sums.max(dim=1, keepdim=True).values
    indices = torch.arange(len(masks), device=values.device)
    return masks[torch.where(best, indices, len(masks)).min(dim=1).values.clamp_max(len(masks) - 1)]


def greedy(values: Tensor, n: int) -> Tensor:
    """Masks of tiles [t, M, M]: take entries by descending value while their row and column hold fewer than n."""
    count, m, _ = values.shape
    order = values.flatten(1).argsort(dim=1, stable=True).flip(1)
    mask = torch.zeros(count, m * m, dtype=torch.bool, device=values.device)
    rows = torch.zeros(count, m, dtype=torch.int64, device=values.device)
    columns = rows.clone()
    for index in order.unbind(1):
        row, column = (index // m).unsqueeze(1), (index % m).unsqueeze(1)
        room = (rows.gather(1, row) < n) & (columns.gather(1, column) < n)
        rows.scatter_add_(1, row, room.long())
        columns.scatter_add_(1, column, room.long())
        mask.scatter_(1, index.unsqueeze(1), room)
    return mask.view(values.shape)


def fill(values: Tensor, mask: Tensor, n: int) -> Tensor:
    """Complete greedy masks to n entries in every row and column by the best exchanges.

    If row i and column j lack an entry, the mask already contains (i, j), or greedy would have taken it. So the mask
    contains an entry (k, c) that can be exchanged for (i, c) and (k, j). Row k and column c stay full, so the argument
    holds again.
    """
    mask = mask.clone()
    while True:
        rows_lack, columns_lack = mask.sum(dim=2) < n, mask.sum(dim=1) < n
        todo = rows_lack.any(dim=1).nonzero().squeeze(1)
        if not len(todo):
            return mask
        s, tiles = values[todo], mask[todo]
        i = rows_lack[todo].int().argmax(dim=1)
        j = columns_lack[todo].int().argmax(dim=1)
        tile = torch.arange(len(todo), device=values.device)
        # gain of exchanging (k, c): s[i, c] + s[k, j] - s[k, c]
        gain = s[tile, i].unsqueeze(1) + s[tile, :, j].unsqueeze(2) - s
        allowed = tiles & ~tiles[tile, i].unsqueeze(1) & ~tiles[tile, :, j].unsqueeze(2)
        best = gain.masked_fill(~allowed, -torch.inf).flatten(1).argmax(dim=1)
        k, c = best // s.shape[2], best % s.shape[2]
        tiles[tile, k, c] = False
        tiles[tile, i, c] = True
        tiles[tile, k, j] = True
        mask[todo] = tiles


def cancel_cycles(values: Tensor, mask: Tensor) -> Tensor:
    """Improve masks of tiles [t, M, M] to the best ones with the same row and column sums."""
    mask = mask.clone()
    todo = torch.arange(len(mask), device=mask.device)
    while len(todo):
        tiles = mask[todo]
        improved = _cancel_one_each(values[todo], tiles)
        todo = todo[improved]
        mask[todo] = tiles[improved]
    return mask


def _cancel_one_each(values: Tensor, mask: Tensor) -> Tensor:
    """Cancel one cycle of positive gain in each tile, in place; returns a mask of the tiles that had one.

    An edge from row p to row q moves an entry of q to p, in the column with the largest gain. Bellman-Ford detects
    cycles of positive gain: some row still improves after M rounds, and its predecessors lead to the cycle.
    """
    count, m, _ = values.shape
    gain, columns = _edges(values, mask)
    tolerance = _TOLERANCE * values.flatten(1).amax(dim=1).view(-1, 1)
    length = values.new_zeros(count, m)
    predecessors = torch.arange(m, device=values.device).expand(count, m).clone()
    for _ in range(m):
        best, previous = (length.unsqueeze(2) + gain).max(dim=1)
        better = best > length + tolerance
        length = torch.where(better, best, length)
        predecessors = torch.where(better, previous, predecessors)
        if not better.any():
            return better.any(dim=1)
    tile = torch.arange(count, device=values.device)
    row = better.int().argmax(dim=1)
    for _ in range(m):
        row = predecessors[tile, row]
    return _use_cycle(mask, row, predecessors, gain, columns, tolerance.squeeze(1)) & better.any(dim=1)


def _edges(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """gain[t, p, q]: max of values[p, c] - values[q, c] over columns c with an entry in q and none in p; the best c."""
    n = int(mask[0, 0].sum())
    m = values.shape[1]
    # the columns of each row's entries, [t, q, n]
    columns = mask.to(torch.int8).argsort(dim=2, descending=True, stable=True)[..., :n]
    candidates = columns.unsqueeze(1).expand(-1, m, -1, -1)
    open_values = values.masked_fill(mask, -torch.inf)
    gained = open_values.unsqueeze(2).expand(-1, -1, m, -1).gather(3, candidates)
    gain, index = (gained - values.gather(2, columns).unsqueeze(1)).max(dim=3)
    return gain, candidates.gather(3, index.unsqueeze(3)).squeeze(3)


def _use_cycle(
    mask: Tensor, start: Tensor, predecessors: Tensor, gain: Tensor, columns: Tensor, tolerance: Tensor
) -> Tensor:
    """Exchange along each tile's cycle of predecessors through row ``start`` if it gains; returns the changed tiles."""
    tile = torch.arange(len(mask), device=mask.device)
    changed = mask.clone()
    total = gain.new_zeros(len(mask))
    active = torch.ones_like(total, dtype=torch.bool)
    row = start
    for _ in range(mask.shape[1]):
        previous = predecessors[tile, row]
        column = columns[tile, previous, row]
        changed[tile, previous, column] |= active
        changed[tile, row, column] &= ~active
        total += torch.where(active, gain[tile, previous, row], 0)
        row = previous
        active = active & (row != start)
    useful = total > tolerance
    mask[useful] = changed[useful]
    return useful
