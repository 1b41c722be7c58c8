"""adamw_step_int8: its codes of squares, its error beside AdamW in fp64, and the backends that a CPU has."""

import math

import pytest
import torch
from kernel_cases import bits_equal, normal, rounding_states

from leanstep.kernels import StepOptions, use_backend
from leanstep.kernels.reference.quantization import BLOCK, dequantize, quantize
from leanstep.kernels.reference.rounding import hash_number
from leanstep.kernels.reference.steps.adamw_int8 import adamw_step_int8 as definition
from leanstep.kernels.steps import adamw_int8 as module
from leanstep.kernels.steps.adamw_int8 import adamw_step_int8

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
SCALARS = torch.tensor((0.999, BETA1, 1 - BETA1, BETA2, 1 - BETA2, EPS))
SHAPES = [(1, 1), (0, 3), (3, 0), (5, 128), (7, 129), (65, 77), (3, 4, 50), (130, 256), (1, 40000)]
ROUNDINGS = ["nearest", "stochastic", "kahan", "master", "split"]


# ---- the codes of squares


def test_squares_are_unbiased_and_never_become_zero():
    """The mean of 4000 roundings is the value, down to the smallest code; below it, the smallest code."""
    values = torch.logspace(-9, 0, BLOCK, dtype=torch.float64)
    codes, scales = quantize(values.expand(4000, BLOCK), 3, dtype=torch.uint8)
    assert codes.dtype == torch.uint8 and codes.min() == 1
    decoded = dequantize(codes, scales, torch.float64)
    smallest = 1 / 63487 / 16
    deviation = decoded.std(dim=0) / 4000**0.5
    spacing = (values + 1 / 63487) / 16
    above = values > smallest
    assert ((decoded.mean(dim=0) - values).abs() <= 5 * deviation + 2**-15 * spacing)[above].all()
    torch.testing.assert_close(decoded[:, ~above], torch.full_like(decoded[:, ~above], smallest), rtol=1e-6, atol=0)
    assert ((decoded - values).abs() <= 1.0001 * spacing)[:, above].all()
    assert not quantize(torch.zeros(1, BLOCK), 0, dtype=torch.uint8)[0].any()


def run_adamw(gradients, size=1e-3):
    """Steps of the definition in fp64 arithmetic with codes, and of AdamW in fp64. Returns (m, v, p) of both."""
    shape = gradients[0].shape
    (codes, scales), (square_codes, square_scales) = (
        quantize(torch.zeros(shape), 0, dtype=dtype) for dtype in (torch.int8, torch.uint8)
    )
    param, wide, m, v = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))
    scalars = torch.tensor((1.0, BETA1, 1 - BETA1, BETA2, 1 - BETA2, EPS), dtype=torch.float64)
    for step, gradient in enumerate(gradients, 1):
        corrections = torch.tensor((size / (1 - BETA1**step), 1 / math.sqrt(1 - BETA2**step)), dtype=torch.float64)
        options = StepOptions(scalars, seeds=torch.tensor(hash_number(step, 7)))
        definition(param, gradient, codes, scales, square_codes, square_scales, corrections, options=options)
        m, v = BETA1 * m + (1 - BETA1) * gradient, BETA2 * v + (1 - BETA2) * gradient.square()
        wide -= corrections[0] * m / (v.sqrt() * corrections[1] + EPS)
    decoded = [dequantize(*pair, torch.float64) for pair in ((codes, scales), (square_codes, square_scales))]
    return (*decoded, param), (m, v, wide)


def test_the_error_of_moments_and_updates_beside_fp64():
    """1200 noisy gradients, with sizes that differ a hundredfold within a block and drift.

    Rounding to nearest would stop the average of weight 0.999 at a fraction of its value: it moves by less than half
    the distance between codes.
    """
    sizes = normal((8, BLOCK), seed=1).double().exp().clamp(0.1, 10)
    gradients = [(normal((8, BLOCK), seed=10 + i).double() + 0.1) * sizes * (1 + i / 600) for i in range(1200)]
    (m, v, p), (exact_m, exact_v, exact_p) = run_adamw(gradients)
    ratio = v.sqrt() / exact_v.sqrt()
    assert 0.99 < ratio.mean() < 1.01 and 0.02 < (ratio - 1).square().mean().sqrt() < 0.1
    assert (m - exact_m).square().mean().sqrt() < 0.05 * exact_m.square().mean().sqrt()
    assert (p - exact_p).square().mean().sqrt() < 0.06 * exact_p.square().mean().sqrt()


def test_steps_of_small_entries_stay_small():
    """Entries a hundred-thousandth of their block's largest: no step is larger than AdamW's longest, lr * 3.2."""
    sizes = torch.logspace(-5, 0, BLOCK, dtype=torch.float64).expand(4, BLOCK)
    gradients = [normal((4, BLOCK), seed=i).double() * sizes for i in range(60)]
    before = torch.zeros(4, BLOCK, dtype=torch.float64)
    for count in range(40, 60):
        (_, _, now), _ = run_adamw(gradients[:count])
        assert count == 40 or (now - before).abs().max() < 3.2e-3
        before = now


# ---- the step


def problem(p_dtype, g_dtype, rounding="nearest"):
    """Lists for one call: every shape, with moments of several magnitudes in each row."""
    params = [normal(s, p_dtype, i) for i, s in enumerate(SHAPES)]
    grads = [normal(s, g_dtype, 50 + i) for i, s in enumerate(SHAPES)]
    moments = [[], [], [], []]
    for i, shape in enumerate(SHAPES):
        average = normal(shape, seed=100 + i) * normal(shape, seed=150 + i).exp()
        both = *quantize(average, i), *quantize(average.square(), i, dtype=torch.uint8)
        for tensors, tensor in zip(moments, both, strict=True):
            tensors.append(tensor)
    return params, grads, *moments, rounding_states(params, rounding)


def options(rounding="nearest", **more):
    seeds = torch.arange(len(SHAPES)) * 977 + 2**31
    offsets = torch.tensor([torch.Size(s[1:]).numel() for s in SHAPES]) * torch.arange(len(SHAPES)) * (2**31 + 7)
    return StepOptions(SCALARS, rounding, seeds=seeds, offsets=offsets, **more)


CORRECTIONS = torch.stack([torch.linspace(1e-3, 2e-3, len(SHAPES)), torch.linspace(1, 30, len(SHAPES))], 1)


def step(lists, numbers, corrections=CORRECTIONS):
    *tensors, states = lists
    adamw_step_int8(*tensors, corrections, states, numbers)


@pytest.mark.parametrize(
    ("dtype", "g_dtype", "rounding", "isa"),
    [
        *((torch.bfloat16, torch.bfloat16, rounding, {}) for rounding in ROUNDINGS),
        (torch.float32, torch.float32, "nearest", {}),
        (torch.bfloat16, torch.float32, "split", {}),
        *((dtype, dtype, "nearest", {"ISA": 2}) for dtype in (torch.float32, torch.bfloat16)),  # less than it has
    ],
    ids=str,
)
def test_backends_agree_bit_for_bit(dtype, g_dtype, rounding, isa, dirty_memory, monkeypatch):
    """Also with infinite, NaN and huge gradients, and after the first step, whose codes are new."""
    macros = module.fp8_macro
    monkeypatch.setattr(module, "fp8_macro", lambda codes: macros(codes) | isa)
    results = []
    for backend in ("reference", "cpp"):
        lists = problem(dtype, g_dtype, rounding)
        lists[1][4][2, 128], lists[1][3][1, 7], lists[1][7][129, 200] = math.nan, math.inf, 1e30
        lists[1][7][5, 3], lists[1][7][64, 100] = math.nan, math.inf  # in pieces of whole registers
        with use_backend(backend):
            for maximize in (False, True):
                step(lists, options(rounding, maximize=maximize, decay_where_aligned=maximize))
        results.append([t for part in lists for t in part])
    for reference, cpp in zip(*results, strict=True):
        bits_equal(cpp, reference)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_huge_gradient_spoils_no_block(backend):
    """Its square is infinite in fp32. AdamW does not move the entry; the others move on."""
    lists = [ts[3:4] for ts in problem(torch.float32, torch.float32)]
    lists[1][0][1, 7] = 1e30
    before = lists[0][0].clone()
    with use_backend(backend):
        step(lists, StepOptions(SCALARS, seeds=torch.tensor([3])), CORRECTIONS[:1])
    assert all(torch.isfinite(t).all() for part in (lists[0], lists[3], lists[5]) for t in part)
    assert (lists[0][0] != before).float().mean() > 0.99
