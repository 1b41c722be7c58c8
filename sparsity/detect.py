"""The N:M pattern that a tensor obeys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leanstep.sparsity.patterns import NM

_LONGEST = 128  # groups, of those that are tried
# a pattern is one where this part of its places is filled, or where chance gives it less often than this
_FULL, _CHANCE = 0.99, 1e-6


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
    """The sparsest N:M that a tensor was made to obey; None for a dense one, and where zeros lie as chance puts them.

    Any zeros obey some pattern with groups long enough, such as 26:128. One is meant where N are nonzero in nearly
    every group, or where as many zeros, put anywhere, would break it with near certainty.
    """
    size, numel = weight.shape[dim], weight.numel()
    nonzero = weight.detach().movedim(dim, -1) != 0
    density = float(nonzero.double().mean()) if numel else 1.0
    if density == 1:
        return None
    best: NM | None = None
    for m in (m for m in range(2, min(size, _LONGEST) + 1) if size % m == 0):
        found = NM(int(nonzero.unflatten(-1, (-1, m)).sum(dim=-1).max()), m)
        if found.is_dense or (best is not None and found.n * best.m >= best.n * found.m):
            continue
        if density >= _FULL * found.density or _chance(found, density) ** (numel // m) < _CHANCE:
            best = found
    return best


def _chance(pattern: NM, density: float) -> float:
    """The probability that a group obeys a pattern whose entries are nonzero with a probability, each by itself."""
    n, m = pattern.n, pattern.m
    return min(1.0, sum(math.comb(m, k) * density**k * (1 - density) ** (m - k) for k in range(n + 1)))


def violations(weight: Tensor, pattern: NM, dim: int) -> int:
    """Groups along a dimension with more than N nonzeros (NaN is one); a short last one counts as filled with zeros."""
    return int((group_counts(weight, pattern.m, dim) > pattern.n).sum())


def group_counts(weight: Tensor, m: int, dim: int) -> Tensor:
    """Nonzeros of every group of m along a dimension, int64 [other dimensions, groups]."""
    nonzero = weight.detach().movedim(dim, -1) != 0
    padded = torch.nn.functional.pad(nonzero, (0, -nonzero.shape[-1] % m))
    return padded.unflatten(-1, (-1, m)).sum(dim=-1)
