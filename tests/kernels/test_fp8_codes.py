"""Momenta in float8_e4m3fn codes: the codes, their rounding, and the steps of the backends that a CPU has."""

import math

import pytest
import torch
from kernel_cases import bits_equal, normal, rounding_states

from leanstep.kernels import StepOptions, lion_agreement_int8, lion_step_int8, use_backend
from leanstep.kernels.reference.quantization import BLOCK, FP8, decode, dequantize, encode, quantize
from leanstep.kernels.steps import average_int8, lion_int8
from leanstep.kernels.steps.adamw_int8 import adamw_step_int8
from leanstep.kernels.steps.average_int8 import average_step_int8

SHAPES = [(1, 1), (0, 3), (3, 0), (5, 128), (7, 129), (65, 77), (3, 4, 50), (130, 256), (1, 40000)]
ROUNDINGS = ["nearest", "stochastic", "kahan", "master", "split"]
SEEDS = torch.arange(len(SHAPES)) * 977 + 2**31
NUMBERS = torch.cat([torch.arange(127), torch.arange(128, 255)]).to(torch.uint8).view(FP8)  # all but NaN


def problem(dtype, rounding="nearest"):
    """Lists for one call of Lion: momenta of several magnitudes in each row, and odd gradients."""
    params = [normal(s, dtype, i) for i, s in enumerate(SHAPES)]
    grads = [normal(s, dtype, 50 + i) for i, s in enumerate(SHAPES)]
    grads[4][2, 128], grads[3][1, 7], grads[7][129, 200] = math.nan, math.inf, 1e30
    momenta = [normal(s, seed=100 + i) * normal(s, seed=150 + i).exp() for i, s in enumerate(SHAPES)]
    pairs = [quantize(m, i, dtype=FP8) for i, m in enumerate(momenta)]
    return params, grads, [c for c, _ in pairs], [s for _, s in pairs], rounding_states(params, rounding)


# ---- the codes


@pytest.mark.parametrize("random", [0, 1, 2**15, 2**16 - 1])
def test_numbers_of_the_format_have_their_own_codes(random):
    """Whatever the random bits: their dropped bits are zeros, and the largest does not become NaN."""
    values, one = NUMBERS.double(), torch.ones(())
    codes = encode(values, one, torch.full((len(NUMBERS),), random), FP8)
    assert torch.equal(codes.view(torch.uint8), NUMBERS.view(torch.uint8))
    assert torch.equal(decode(NUMBERS, one, torch.float64), values)
    between = (values + 1e-3 * values.sign()).clamp(-448, 448)
    assert not encode(between, one, torch.full((len(NUMBERS),), random), FP8).isnan().any()


def test_rounding_is_unbiased_between_neighbours():
    """The mean of 4000 roundings is the value, among subnormal numbers too; each is one of two neighbours.

    Values close to a number of the format may never be rounded to the other one.
    """
    values = torch.logspace(-7, 0, BLOCK, dtype=torch.float64) * normal((BLOCK,)).sign()
    codes, scales = quantize(values.expand(4000, BLOCK), 3, dtype=FP8)
    assert codes.dtype == FP8 and scales[0, 0] == torch.tensor(1.0) * (1 / 448)
    decoded = dequantize(codes, scales, torch.float64)
    units = values.abs() * 448
    spacing = torch.exp2(units.log2().floor().clamp(min=-6) - 3) / 448
    deviation = decoded.std(dim=0) / 4000**0.5
    assert ((decoded - values).abs() <= 1.0001 * spacing).all()
    assert ((decoded.mean(dim=0) - values).abs() <= 5 * deviation + spacing / 1000).all()


def test_error_beside_int8_codes():
    """The errors of normal values, relative to the values: fp8 has one bit of mantissa less."""
    values = normal((400, BLOCK)).double()
    errors = []
    for dtype in (torch.int8, FP8):
        decoded = dequantize(*quantize(values, 5, dtype=dtype), torch.float64)
        errors.append(((decoded - values).square().sum() / values.square().sum()).sqrt().item())
    assert 0.0175 < errors[0] < 0.0185 and 0.0355 < errors[1] < 0.037


def test_zeros_and_tiny_and_infinite_blocks():
    values = torch.zeros(5, 256)
    values[1, 3], values[1, 200] = 1e-40, -1.0
    values[2] = 2.0**-110
    values[3, 7], values[3, 130] = math.nan, 2.0
    values[4, 100], values[4, 130] = math.inf, 3e38
    codes, scales = quantize(values, 1, dtype=FP8)
    decoded = dequantize(codes, scales, torch.float32)
    assert not codes.isnan().any()
    assert not decoded[0].any() and not decoded[2].any() and not decoded[1, :128].any() and not scales[2].any()
    assert decoded[3, :128].isnan().all() and decoded[4, :128].isnan().all()
    torch.testing.assert_close(decoded[[1, 3, 4], [200, 130, 130]], torch.tensor([-1.0, 2.0, 3e38]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_every_code_stands_for_its_value(backend):
    codes, scales, outputs = [NUMBERS.view(1, -1).clone()], [torch.full((1, 2), 0.3)], [torch.zeros(1, len(NUMBERS))]
    numbers = StepOptions(torch.tensor((1.0, 0.0)), seeds=SEEDS[:1])
    with use_backend(backend):
        average_step_int8([torch.zeros(1, len(NUMBERS))], codes, scales, outputs, numbers, update=False)
    torch.testing.assert_close(outputs[0][0], NUMBERS.float() * 0.3, rtol=0, atol=0)


def test_slow_changes_arrive():
    """Half of the gradients change sign for good, with constant sizes: all of these signs arrive in the momentum."""
    sizes = normal((40, BLOCK)).double()
    flipped = sizes * normal((40, BLOCK), seed=1).sign()
    codes, scales = quantize(torch.zeros(40, BLOCK), 0, dtype=FP8)
    for step in range(1400):
        momentum = 0.99 * dequantize(codes, scales, torch.float64) + 0.01 * (sizes if step < 400 else flipped)
        codes, scales = quantize(momentum, step, dtype=FP8)
    differs = dequantize(codes, scales, torch.float64).sign() != flipped.sign()
    assert differs[flipped != sizes].double().mean() < 0.005


# ---- the steps


@pytest.mark.parametrize(
    ("dtype", "rounding", "isa"),
    [
        (torch.float32, "nearest", {}),
        *((torch.bfloat16, rounding, {}) for rounding in ROUNDINGS),
        *((dtype, "nearest", {"ISA": 2}) for dtype in (torch.float32, torch.bfloat16)),  # less than this processor has
    ],
    ids=str,
)
def test_lion_of_both_backends_agrees_bit_for_bit(dtype, rounding, isa, monkeypatch):
    macros = lion_int8.macros
    monkeypatch.setattr(lion_int8, "macros", lambda *args, **types: macros(*args, **types) | isa)
    results = []
    for backend in ("reference", "cpp"):
        params, grads, codes, scales, states = problem(dtype, rounding)
        options = StepOptions(torch.tensor((0.01, 0.999, 0.9, 0.1, 0.99, 0.01)), rounding, seeds=SEEDS)
        with use_backend(backend):
            counts = lion_agreement_int8(grads, codes, scales, options)
            for _ in range(2):
                flags = lion_step_int8(params, grads, codes, scales, states, options)
        results.append([*params, *codes, *scales, *states, flags, counts])
    assert flags.tolist() == [int(i in (3, 4)) for i in range(len(SHAPES))] and counts.max() > 1000
    for reference, cpp in zip(*results, strict=True):
        bits_equal(cpp, reference)


@pytest.mark.parametrize(("nesterov", "update"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("isa", [{}, {"ISA": 2}], ids=str)
def test_averages_of_both_backends_agree_bit_for_bit(isa, nesterov, update, monkeypatch, dirty_memory):
    macros = average_int8.fp8_macro
    monkeypatch.setattr(average_int8, "fp8_macro", lambda codes: macros(codes) | isa)
    results = []
    for backend in ("reference", "cpp"):
        _, grads, codes, scales, _ = problem(torch.bfloat16)
        outputs = [torch.empty(s) for s in SHAPES]
        options = StepOptions(torch.tensor((0.9, 0.1)), seeds=SEEDS)
        with use_backend(backend):
            average_step_int8(grads, codes, scales, outputs, options, nesterov=nesterov, update=update)
        results.append([*codes, *scales, *outputs])
    for reference, cpp in zip(*results, strict=True):
        bits_equal(cpp, reference)


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "nearest"), *((torch.bfloat16, rounding) for rounding in ROUNDINGS)],
    ids=str,
)
def test_adamw_of_both_backends_agrees_bit_for_bit(dtype, rounding):
    """The average of squares stays in codes without sign."""
    corrections = torch.stack([torch.linspace(1e-3, 2e-3, len(SHAPES)), torch.linspace(1, 30, len(SHAPES))], 1)
    results = []
    for backend in ("reference", "cpp"):
        params, grads, codes, scales, states = problem(dtype, rounding)
        squares = [quantize(normal(s, seed=200 + i).square(), i, dtype=torch.uint8) for i, s in enumerate(SHAPES)]
        square_codes, square_scales = [c for c, _ in squares], [s for _, s in squares]
        options = StepOptions(torch.tensor((0.999, 0.9, 0.1, 0.999, 0.001, 1e-8)), rounding, seeds=SEEDS)
        lists = (params, grads, codes, scales, square_codes, square_scales)
        with use_backend(backend):
            for _ in range(2):
                adamw_step_int8(*lists, corrections, states, options)
        results.append([t for part in (*lists, states) for t in part])
    for reference, cpp in zip(*results, strict=True):
        bits_equal(cpp, reference)


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "split"])
def test_pieces_of_every_kind_follow_each_other_as_in_the_definition(rounding, dtype):
    """Pieces of 512 entries: small and large gradients, not finite ones, and blocks with no scale."""
    kinds = {"small": 1e-3, "large": 1e3, "none": 0.0, "tiny": -1e-38, "small again": 1e-2, "short": 0.1}
    sizes = [512] * 5 + [300]
    factors = torch.cat([torch.full((size,), k) for size, k in zip(sizes, kinds.values(), strict=True)])
    grad = (normal((2, 2860), seed=1).abs() * factors).bfloat16()
    grad[0, 3 * 512 - 5], grad[1, 700], grad[1, 1400] = torch.inf, -torch.inf, torch.nan
    scalars, results = torch.tensor((0.01, 0.999, 0.9, 0.1, 0.99, 0.01)), []
    for backend in ("reference", "cpp"):
        params = [normal((2, 2860)).bfloat16()]
        codes, scales = (list(ts) for ts in zip(quantize(torch.zeros(2, 2860), 1, dtype=dtype), strict=True))
        states = rounding_states(params, rounding)
        with use_backend(backend):
            for seed in range(3):
                options = StepOptions(scalars, rounding, seeds=torch.tensor([seed]))
                lion_step_int8(params, [grad], codes, scales, states, options)
        results.append([*params, *codes, *scales, *states])
    for reference, cpp in zip(*results, strict=True):
        bits_equal(cpp, reference)
    assert 0 < (results[0][2] == 0).double().mean() < 1  # some blocks have no scale
