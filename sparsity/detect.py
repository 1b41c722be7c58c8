"""The N:M pattern that a tensor obeys."""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.sparsity.patterns import NM

_LONGEST = 128  # groups, of those that are tried


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


def violations(weight: Tensor, pattern: NM, dim: int) -> int:
    """Groups along a dimension with more than N nonzeros (NaN is one); a short last one counts as filled with zeros."""
    return int((group_counts(weight, pattern.m, dim) > pattern.n).sum())


def group_counts(weight: Tensor, m: int, dim: int) -> Tensor:
    """Nonzeros of every group of m along a dimension, int64 [other dimensions, groups]."""
    nonzero = weight.detach().movedim(dim, -1) != 0
    padded = torch.nn.functional.pad(nonzero, (0, -nonzero.shape[-1] % m))
    return padded.unflatten(-1, (-1, m)).sum(dim=-1)
