"""Compressed N:M matrices and products with them, in plain torch: the definition."""

import torch
from torch import Tensor


def compress(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The n entries of every m along the last dimension that hold the nonzeros: values and indices, ascending.

    A group of fewer nonzeros is filled with its -0 entries, then with its first zeros.
    """
    groups = weight.detach().unflatten(-1, (-1, m))
    # nonzeros first, then -0, whose sign is kept, then zeros; equal ranks in order
    rank = torch.where(groups != 0, 0, torch.where(groups.signbit(), 1, 2))
    indices = rank.argsort(dim=-1, stable=True)[..., :n].sort(dim=-1).values
    return groups.gather(-1, indices), indices.to(torch.uint8)


def decompress(values: Tensor, indices: Tensor, m: int) -> Tensor:
    """The dense [..., G * m] that values and indices [..., G, n] stand for."""
    dense = values.new_zeros(*values.shape[:-1], m)
    return dense.scatter_(-1, indices.to(torch.int64), values).flatten(-2)


def nm_matmul(x: Tensor, values: Tensor, indices: Tensor, m: int) -> Tensor:
    """``x W^T`` for x [t, in] and W [out, in] compressed; in fp32, or fp64 where the inputs are."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ decompress(values.to(wide), indices, m).T).to(x.dtype)
