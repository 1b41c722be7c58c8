"""N:M masks from scores, as plain torch: the definition that the fast versions are tested against."""

import torch
from torch import Tensor


def nm_mask(scores: Tensor, n: int, m: int, dim: int) -> Tensor:
    """True at the n entries of largest magnitude of every m consecutive ones along ``dim``; of equal ones the last.

    NaN is larger than anything, so a diverged model is not taken for a pruned one.
    """
    dim %= scores.dim()
    groups = scores.detach().abs().unflatten(dim, (-1, m))
    kept = groups.argsort(dim=dim + 1, stable=True).narrow(dim + 1, m - n, n)
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(dim + 1, kept, True).flatten(dim, dim + 1)
