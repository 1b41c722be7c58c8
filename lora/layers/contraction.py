"""In which order the products of a layer are taken: through the factors, or through ``W + s B A``.

With M rows, weight (m, n) and rank r, one product of (i, j) and (j, k) costs ``2 i j k`` operations::

    forward   through the factors  2 M n m + 2 M r (n + m)
              through the sum      2 M n m + 2 n m r
    backward  through the factors  2 M n m + 2 M r (2 m + 2 n), the second by E = dY B, shared by dA and dX
              through the sum      2 M n m + 2 M r (2 m + n) + 2 n m r

and ``2 M n r`` more where H is computed again. So the sum wins in forward when M > n m / (n + m), in backward when
M > m (Cherniuk, Mikhalev, Oseledets, "Run LoRA Run", arXiv 2312.03415, tries all orders); a gradient of W's size,
dY^T X, is in no cheapest order. The sum costs a matrix of W's size and, in 16 bits, rounds small adapters away.

Operations are not time: ``"time"`` runs both on the machine and takes the faster
(:mod:`leanstep.lora.layers.timed_order`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# below this the sum's memory is not worth the operations it saves
LEAST_GAIN = 0.03
NAMES = ("auto", "factors", "sum", "time")


class Order(NamedTuple):
    """Whether ``W + s B A`` is formed, in the forward and in the backward pass."""

    forward: bool = False
    backward: bool = False


def sum_is_accurate(dtype: torch.dtype) -> bool:
    """Whether ``W + s B A`` keeps a small adapter: in 32 and 64 bits."""
    return dtype in (torch.float32, torch.float64)


def forward_flops(rows: int, n: int, m: int, r: int, through_sum: bool) -> int:
    """Operations of the forward pass."""
    return 2 * rows * n * m + (2 * n * m * r if through_sum else 2 * rows * r * (n + m))


def backward_flops(rows: int, n: int, m: int, r: int, through_sum: bool, recompute: bool = True) -> int:
    """Operations of the backward pass: dX, dA, dB, and H again if ``recompute``."""
    factors = 2 * rows * r * (2 * m + n) + (2 * n * m * r if through_sum else 2 * rows * r * n)
    return 2 * rows * n * m + factors + (2 * rows * n * r if recompute else 0)


def choose_order(rows: int, n: int, m: int, r: int, *, dtype: torch.dtype, plain: bool, asked: str = "auto") -> Order:
    """The order for a layer.

    Args:
        rows: M.
        n, m, r: width of the input, width of the output, rank.
        dtype: of the products. In 16 bits ``auto`` takes the factors.
        plain: neither dropout nor DoRA nor a quantised weight, which exclude the sum.
        asked: ``"auto"``: the cheaper one, where it saves more than 3 % of the pass; ``"factors"``; ``"sum"``;
            ``"time"``: as ``"auto"``, for a layer that cannot be timed.
    """
    if not plain or asked == "factors":
        return Order()
    if asked == "sum":
        return Order(True, True)
    if not sum_is_accurate(dtype):
        return Order()

    def wins(flops, *more: bool) -> bool:
        split = flops(rows, n, m, r, False, *more)
        return flops(rows, n, m, r, True, *more) < (1 - LEAST_GAIN) * split

    return Order(wins(forward_flops), wins(backward_flops))
