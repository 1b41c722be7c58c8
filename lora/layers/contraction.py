"""The cheaper order of a layer's products: through the factors, or through the materialised ``W + s B A``.

For M rows, a weight (m, n) and rank r; a product of (i, j) and (j, k) costs ``2 i j k`` operations::

    forward   through the factors  2 M n m + 2 M r (n + m)
              through the sum      2 M n m + 2 n m r
    backward  through the factors  2 M n m + 2 M r (2 m + 2 n), where dA and dX share E = dY B
              through the sum      2 M n m + 2 M r (2 m + n) + 2 n m r

Recomputing H adds ``2 M n r``. So the sum is cheaper in forward for M > n m / (n + m), and in backward for M > m. No
cheapest path forms dY^T X, a gradient of W's size (Cherniuk, Mikhalev, Oseledets, "Run LoRA Run", arXiv 2312.03415,
enumerate all paths). The sum needs memory for a matrix of W's size and, in 16 bits, rounds small adapters away.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# a smaller gain is not worth the memory of the sum
MIN_GAIN = 0.03


class ContractionPath(NamedTuple):
    """Whether the forward and the backward pass materialise ``W + s B A``."""

    forward: bool = False
    backward: bool = False


def forward_flops(rows: int, n: int, m: int, r: int, materialize_sum: bool) -> int:
    """Operations of the forward pass."""
    return 2 * rows * n * m + (2 * n * m * r if materialize_sum else 2 * rows * r * (n + m))


def backward_flops(rows: int, n: int, m: int, r: int, materialize_sum: bool, recompute: bool = True) -> int:
    """Operations of the backward pass: dX, dA, dB, and recomputing H if ``recompute``."""
    through_b, through_a = 2 * rows * r * (2 * m + n), 2 * n * m * r if materialize_sum else 2 * rows * r * n
    return 2 * rows * n * m + through_b + through_a + (2 * rows * n * r if recompute else 0)


def contraction_path(rows: int, n: int, m: int, r: int, dtype: torch.dtype) -> ContractionPath:
    """Choose the sum for each pass in which it saves more than 3 % of the operations, in fp32 and fp64 only.

    Args:
        rows: M.
        n, m, r: width of the input, width of the output, rank.
        dtype: dtype of the products.
    """
    if dtype not in (torch.float32, torch.float64):
        return ContractionPath()
    pairs = (
        [flops(rows, n, m, r, materialize_sum) for materialize_sum in (False, True)]
        for flops in (forward_flops, backward_flops)
    )
    return ContractionPath(*(summed < (1 - MIN_GAIN) * factored for factored, summed in pairs))
