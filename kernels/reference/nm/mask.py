"""N:M masks from scores, in plain torch: the definition."""

import torch
from torch import Tensor


def nm_mask(scores: Tensor, n: int, m: int, dim: int) -> Tensor:
    """True at the n entries of largest magnitude in every group of m along ``dim``; of equal ones the last.

    NaN counts as larger than any number.
    """
    dim %= scores.dim()
    groups = scores.detach().abs().unflatten(dim, (-1, m))
    largest = groups.argsort(dim=dim + 1, stable=True).narrow(dim + 1, m - n, n)
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(dim + 1, largest, True).flatten(dim, dim + 1)
