"""Norms of the rows of a weight plus its adapter, without forming ``B A``, in plain torch."""

import torch
from torch import Tensor

from leanstep.kernels.matrices.dense_product import product

# rows of the weight that are widened at a time
ROWS = 2048


def lora_norms(weight: Tensor, a: Tensor, b: Tensor, mix: Tensor, scale: float, squares: Tensor) -> Tensor:
    """Roots of ``squares + ((2 scale) weight a^T + mix) . b``, row by row, in the dtype of ``squares``."""
    cross = torch.cat([product(rows.to(a.dtype), a.t()) for rows in weight.split(ROWS)])
    total = squares + cross.mul_(2 * scale).add_(mix).mul_(b).sum(1)
    # not in place: the sum of a sharded weight may be partial, and is reduced here
    return total.clamp(min=0).sqrt_()
