"""The N:M pattern that a tensor obeys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leanstep.sparsity.patterns import NM

_LONGEST = 128  # groups, of those that are tried
# a pattern is one where this part of its places is filled, or where chance gives it once in a million tensors
_FULL, _SURE = 0.99, math.log(1e6)
# rows longer than this are no groups themselves
_ROW = 32


def tightest(weight: Tensor, dim: int) -> NM | None:
    """The N:M of lowest density that a tensor obeys along a dimension, with the smallest M; None for a dense one."""
    size = weight.shape[dim]
    nonzero = weight.detach().movedim(dim, -1) != 0
    if not weight.numel() or bool(nonzero.all()):
        return None
    best: NM | None = None
    for m in (m for m in range(2, min(size, _LONGEST) + 1) if size % m == 0):
        found = NM(int(nonzero.unflatten(-1, (-1, m)).sum(dim=-1).max()), m)
        if not found.is_dense and (best is None or found.n * best.m < best.n * found.m):
            best = found
    return best


def pattern_of(weight: Tensor, dim: int) -> NM | None:
    """The N:M that a tensor was made to obey; None for a dense one, and where zeros lie as chance puts them.

    Any zeros obey some pattern with groups long enough, such as 26:128. One is meant where N are nonzero in nearly
    every group, or where as many zeros, put anywhere, would break it with near certainty; of several, the one that
    they would break most surely. As many zeros in every row of a wide matrix, as Wanda leaves them, are no pattern of
    groups.
    """
    size, numel = weight.shape[dim], weight.numel()
    nonzero = weight.detach().movedim(dim, -1) != 0
    density = float(nonzero.double().mean()) if numel else 1.0
    if density == 1:
        return None
    best, surest = None, -1.0
    longest = min(size if size <= _ROW else size // 2, _LONGEST)
    for m in (m for m in range(2, longest + 1) if size % m == 0):
        found = NM(int(nonzero.unflatten(-1, (-1, m)).sum(dim=-1).max()), m)
        if found.is_dense:
            continue
        evidence = numel // m * _evidence(found, density, size)
        if evidence > surest and (density >= _FULL * found.density or evidence > _SURE):
            best, surest = found, evidence
    return best


def _evidence(pattern: NM, density: float, size: int) -> float:
    """-log of the probability that a group obeys a pattern in a row of a size, whose nonzeros lie anywhere in it."""
    n, m, kept = pattern.n, pattern.m, round(density * size)
    # of a row's nonzeros, a group gets a share without replacement: what Wanda leaves in each row is the same number
    ways = sum(math.comb(kept, k) * math.comb(size - kept, m - k) for k in range(n + 1))
    return max(0.0, math.log(math.comb(size, m)) - math.log(max(ways, 1)))


def violations(weight: Tensor, pattern: NM, dim: int) -> int:
    """Groups along a dimension with more than N nonzeros (NaN is one); a short last one counts as filled with zeros."""
    return int((group_counts(weight, pattern.m, dim) > pattern.n).sum())


def group_counts(weight: Tensor, m: int, dim: int) -> Tensor:
    """Nonzeros of every group of m along a dimension, int64 [other dimensions, groups]."""
    nonzero = weight.detach().movedim(dim, -1) != 0
    padded = torch.nn.functional.pad(nonzero, (0, -nonzero.shape[-1] % m))
    return padded.unflatten(-1, (-1, m)).sum(dim=-1)
