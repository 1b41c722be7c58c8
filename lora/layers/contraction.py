"""Which way a layer's products are contracted: through the factors, or through the materialised ``W + s B A``.

With M rows, a weight (m, n) and rank r, where a product of (i, j) and (j, k) costs ``2 i j k`` operations::

    forward   through the factors  2 M n m + 2 M r (n + m)
              through the sum      2 M n m + 2 n m r
    backward  through the factors  2 M n m + 2 M r (2 m + 2 n), where dA and dX share E = dY B
              through the sum      2 M n m + 2 M r (2 m + n) + 2 n m r

and ``2 M n r`` more where H is computed again. So the sum is cheaper in forward for M > n m / (n + m), and in backward
for M > m. A gradient of W's size, dY^T X, is in no cheapest path (Cherniuk, Mikhalev, Oseledets, "Run LoRA Run", arXiv
2312.03415, enumerate all of them). The sum costs a matrix of W's size and, in 16 bits, rounds small adapters away.
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
    """Operations of the backward pass: dX, dA, dB, and H again if ``recompute``."""
    through_b, through_a = 2 * rows * r * (2 * m + n), 2 * n * m * r if materialize_sum else 2 * rows * r * n
    return 2 * rows * n * m + through_b + through_a + (2 * rows * n * r if recompute else 0)


def contraction_path(rows: int, n: int, m: int, r: int, dtype: torch.dtype) -> ContractionPath:
    """The path with fewer operations: the sum where it saves more than 3 % of a pass, in fp32 and fp64 only.

    Args:
        rows: M.
        n, m, r: width of the input, width of the output, rank.
        dtype: of the products.
    """
    if dtype not in (torch.float32, torch.float64):
        return ContractionPath()
    pairs = (
        [flops(rows, n, m, r, materialize_sum) for materialize_sum in (False, True)]
        for flops in (forward_flops, backward_flops)
    )
    return ContractionPath(*(summed < (1 - MIN_GAIN) * factored for factored, summed in pairs))
