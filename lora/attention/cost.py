"""Operations of exact and low-rank attention, forward and backward, and their measured time per operation."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import scaled_dot_product_attention

from leanstep.kernels.poly.attention import poly_attention, poly_attention_backward_flops, poly_attention_flops
from leanstep.lora.attention.attention import taylor_coefficients


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention layer. A head of q and k has ``dim`` entries per token, a head of v ``wide``."""

    heads: int
    key_heads: int
    length: int
    dim: int
    wide: int
    causal: bool = True
    batch: int = 1


def exact_flops(shape: AttentionShape, backward: bool = True) -> int:
    """Count the matrix-product operations of exact attention that recomputes its weights, such as FlashAttention.

    A head takes ``2 L^2 (d + e)`` forward and ``2 L^2 (3 d + 2 e)`` backward (S, dP, dQ, dK and dV). Causal attention
    takes half.
    """
    pairs = shape.length * (shape.length + 1) // 2 if shape.causal else shape.length**2
    width = shape.dim + shape.wide + backward * (3 * shape.dim + 2 * shape.wide)
    return 2 * shape.batch * shape.heads * pairs * width


def low_rank_flops(shape: AttentionShape, degree: int = 2, backward: bool = True) -> int:
    """Count the matrix-product operations of :func:`leanstep.lora.low_rank_attention`."""
    sizes = (
        (shape.batch, shape.heads, shape.length, shape.dim),
        (shape.batch, shape.key_heads, shape.length, shape.dim),
        (shape.batch, shape.key_heads, shape.length, shape.wide),
    )
    flops = poly_attention_flops(*sizes, degree, causal=shape.causal)
    return flops + backward * poly_attention_backward_flops(*sizes, degree, causal=shape.causal)


def cost_ratio(shape: AttentionShape, degree: int = 2, speed: float = 1.0, backward: bool = True) -> float:
    """Predict the time of low-rank attention relative to exact attention: the ratio of operations times ``speed``.

    ``speed`` is the ratio of seconds per operation from :func:`measure_speed`; 1 compares operations.
    """
    return speed * low_rank_flops(shape, degree, backward) / exact_flops(shape, backward)


def break_even(shape: AttentionShape, degree: int = 2, speed: float = 1.0, backward: bool = True) -> int:
    """Predict the sequence length from which low-rank attention is cheaper, to within a thousandth."""

    def cheaper(length: int) -> bool:
        return cost_ratio(replace(shape, length=length), degree, speed, backward) < 1

    high = 2
    while not cheaper(high):
        high *= 2
    low = high // 2
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if cheaper(middle) else (middle, high)
    return high


@functools.lru_cache(maxsize=64)
def measure_speed(
    dim: int, wide: int, degree: int, device: torch.device, dtype: torch.dtype, length: int = 1024
) -> float:
    """Measure the seconds per operation of low-rank attention relative to exact attention, forward and backward.

    Takes the medians of 5 alternating runs on one causal head of ``length`` tokens, once per process and shape. This
    takes about a second on a CPU at head size 64 and degree 2.
    """
    shape = AttentionShape(1, 1, length, dim, wide)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, 1, length, width, device=device, generator=generator).mul_(0.1).to(dtype).requires_grad_()
        for width in (dim, dim, wide)
    )
    coefficients = taylor_coefficients(degree)

    def low_rank() -> torch.Tensor:
        return poly_attention(q, k, v, coefficients, scale=dim**-0.5, causal=True)[0]

    def exact() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    times: dict[Callable[[], torch.Tensor], list[float]] = {low_rank: [], exact: []}
    with torch.enable_grad():
        for _ in range(6):
            for run, seconds in times.items():
                seconds.append(_seconds(run, (q, k, v)))
    low_rank_time, exact_time = (statistics.median(seconds[1:]) for seconds in times.values())
    return (low_rank_time / low_rank_flops(shape, degree)) / (exact_time / exact_flops(shape))


def _seconds(run: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> float:
    # reading a number waits for the device
    inputs[0].detach().sum().item()
    begin = time.perf_counter()
    gradients = torch.autograd.grad(run().sum(), inputs)
    gradients[0].sum().item()
    return time.perf_counter() - begin
