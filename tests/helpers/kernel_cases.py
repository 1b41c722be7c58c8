"""Tensors that kernels tend to get wrong: odd, empty, unaligned and non-contiguous ones."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "stochastic", "kahan", "master", "split")
# What the kernels of steps have code for (dtypes of parameters and gradients, rounding). fp32 is rounded to nearest,
# and fp16 is neither rounded stochastically nor split; test_triton_steps.py has what is asked for and not done.
# Gradients have the parameter's dtype or fp32, and others are converted.
STEPS = (
    (torch.float32, torch.float32, "nearest"), (torch.float32, torch.bfloat16, "nearest"),
    (torch.bfloat16, torch.bfloat16, "nearest"), (torch.bfloat16, torch.float32, "stochastic"),
    (torch.bfloat16, torch.bfloat16, "kahan"), (torch.bfloat16, torch.float32, "master"),
    (torch.bfloat16, torch.float16, "split"), (torch.float16, torch.float32, "nearest"),
    (torch.float16, torch.float16, "kahan"), (torch.float16, torch.bfloat16, "master"),
)  # fmt: skip


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else str(dtype)


def tensors(dtype, generator, device="cpu"):
    """Tensors of every awkward layout: one element, empty, transposed, at an odd address, more than one tile."""

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    return [
        randn(1),
        randn(()),
        randn(7, 3),
        randn(0),
        randn(4, 0, 2),
        randn(2048 * 4 + 5),
        randn(50, 70).t(),
        randn(33, 8)[:, ::3],
        randn(2053)[3:],
    ]


def matrices(dtype, generator, device="cpu", wide=False):
    """Matrices [m, n] and batches [B, m, n] of every awkward layout; `wide` adds rows that fit in no register tile."""

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    return [
        randn(1, 1),
        randn(1, 7),
        randn(9, 1),
        randn(3, 7),
        randn(70, 70),
        randn(34, 136),
        randn(3, 33, 24),
        randn(0, 5),
        randn(5, 0),
        randn(0, 3, 5),
        randn(20, 5, 6),
        randn(3, 280),
        randn(40, 30).t(),
        randn(20, 513)[:, 1:],
        randn(4, 16, 300)[1:3, ::3, ::2],
        *([randn(3, 1400), randn(2, 8200), randn(3, 8195)] if wide else []),
    ]


def rounding_states(params, rounding, seed=3):
    """Rounding states as a step leaves them; some of "kahan" and "master" no longer round to their parameter."""
    chance = torch.Generator().manual_seed(seed)
    # parameters of fp32 need no state
    noise = [torch.randn(p.shape, generator=chance).to(p.device) * (p.dtype != torch.float32) for p in params]
    if rounding == "kahan":
        return [(n / 512).to(p.dtype) for n, p in zip(noise, params, strict=True)]
    if rounding == "master":
        return [p.float() * (1 + n / 512) for n, p in zip(noise, params, strict=True)]
    return [(n * 64).clamp(-128, 127).to(torch.int8) for n in noise] if rounding == "split" else []


def normal(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw(*shape, dtype=torch.float32, seed=0, device="cpu"):
    return normal(shape, dtype, seed).to(device)


def bits_equal(actual, expected):
    """Assert equality of every element, with NaN equal to NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def replay_beside_eager(step):
    """Run ``step(0)`` from a CUDA graph, three times in all, and ``step(1)`` as often without one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(0)
    torch.cuda.current_stream().wait_stream(stream)
    step(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(0)
    for _ in range(2):
        graph.replay()
        step(1)
