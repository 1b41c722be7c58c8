"""Compressed N:M matrices and products with them, in plain torch: the definition."""

import torch
from torch import Tensor


def compress(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Values and ascending indices of n entries in every group of m along the last dimension.

    Takes the nonzeros, then -0 entries, then the first zeros.
    """
    groups = weight.detach().unflatten(-1, (-1, m))
    # a stable sort: entries of equal rank stay in order
    rank = torch.where(groups != 0, 0, torch.where(groups.signbit(), 1, 2))
    indices = rank.argsort(dim=-1, stable=True)[..., :n].sort(dim=-1).values
    return groups.gather(-1, indices), indices.to(torch.uint8)


def decompress(values: Tensor, indices: Tensor, m: int) -> Tensor:
    """Expand values and indices [..., G, n] to the dense [..., G * m]."""
    dense = values.new_zeros(*values.shape[:-1], m)
    return dense.scatter_(-1, indices.to(torch.int64), values).flatten(-2)


def nm_matmul(x: Tensor, values: Tensor, indices: Tensor, m: int) -> Tensor:
    """``x W^T`` for x [t, in] and compressed W [out, in], computed in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ decompress(values.to(wide), indices, m).T).to(x.dtype)
