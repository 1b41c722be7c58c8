"""average_step_int8: its error beside an average in fp64, and the backends that a CPU has."""

import math

import pytest
import torch
from kernel_cases import bits_equal, normal

from leanstep.kernels import StepOptions, use_backend
from leanstep.kernels.reference.quantization import BLOCK, dequantize, quantize
from leanstep.kernels.reference.rounding import hash_number
from leanstep.kernels.steps.average_int8 import average_step_int8

BETA = 0.9
SCALARS = torch.tensor((BETA, 1 - BETA))
# unaligned ends: short blocks, rows that end inside a block, odd sizes, empty tensors, a stack
SHAPES = [(1, 1), (0, 3), (3, 0), (5, 128), (7, 129), (65, 77), (3, 4, 50), (130, 256), (1, 40000)]
# (nesterov, update)
MODES = [(False, True), (True, True), (False, False), (True, False)]
BACKENDS = ["reference", "cpp"]


def problem(dtype=torch.float32, shapes=SHAPES):
    """Gradients, codes, scales and outputs, with averages of several magnitudes in each row."""
    lists = [[normal(s, dtype, 50 + i) for i, s in enumerate(shapes)], [], [], [torch.empty(s) for s in shapes]]
    for i, shape in enumerate(shapes):
        average = normal(shape, seed=100 + i) * normal(shape, seed=150 + i).exp()
        for tensors, tensor in zip(lists[1:3], quantize(average, i), strict=True):
            tensors.append(tensor)
    return lists


def options(count, scalars=SCALARS, **more):
    return StepOptions(scalars, seeds=torch.arange(count) * 977 + 2**31, **more)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_formula_in_fp64(dtype, backend):
    """Outputs to the rounding of fp32; codes to the distance of two neighbours, a sixteenth of |m| + scale."""
    for nesterov, update in MODES:
        grads, codes, scales, outputs = problem(dtype)
        old = [dequantize(*pair, torch.float64) for pair in zip(codes, scales, strict=True)]
        before = [[t.clone() for t in ts] for ts in (grads, codes, scales)]
        with use_backend(backend):
            average_step_int8(grads, codes, scales, outputs, options(len(SHAPES)), nesterov=nesterov, update=update)
        for i, (m, g) in enumerate(zip(old, (-0.0 + g.double() for g in grads), strict=True)):
            new = BETA * m + (1 - BETA) * g if update else m
            wanted = BETA * new + (1 - BETA) * g if nesterov else new
            bound = 4e-7 * (m.abs() + g.abs())
            assert ((outputs[i] - wanted).abs() <= bound).all(), (i, nesterov, update)
            if update:
                decoded = dequantize(codes[i], scales[i], torch.float64)
                spacing = (
                    new.abs() + scales[i].double().repeat_interleave(BLOCK, 1)[:, : g[:1].numel()].view_as(g)
                ) / 16
                assert ((decoded - new).abs() <= 1.0001 * spacing + bound).all(), i
        assert all(map(torch.equal, grads, before[0]))
        if not update:
            assert all(map(torch.equal, [*codes, *scales], before[1] + before[2]))


def test_the_average_follows_fp64_over_many_steps():
    """600 noisy gradients whose sizes differ a hundredfold within a block; nearest would lose slow changes."""
    sizes = normal((8, BLOCK), seed=1).double().exp().clamp(0.1, 10)
    codes, scales = quantize(torch.zeros(8, BLOCK), 0)
    exact, weight = torch.zeros(8, BLOCK, dtype=torch.float64), 0.99
    for step in range(600):
        grad = (normal((8, BLOCK), seed=10 + step) + 0.1) * sizes.float()
        numbers = StepOptions(torch.tensor((weight, 1 - weight)), seeds=torch.tensor([hash_number(step, 7)]))
        average_step_int8([grad], [codes], [scales], [], numbers)
        exact = weight * exact + (1 - weight) * grad.double()
    error = dequantize(codes, scales, torch.float64) - exact
    assert error.square().mean().sqrt() < 0.12 * exact.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("nesterov", "update"), MODES)
def test_backends_agree_bit_for_bit(dtype, nesterov, update, dirty_memory):
    """Also with infinite and NaN gradients, with skipped tensors, and with rows of a larger tensor."""
    offsets = torch.tensor([torch.Size(s[1:]).numel() for s in SHAPES]) * torch.arange(len(SHAPES)) * (2**31 + 7)
    skip = (torch.arange(len(SHAPES)) % 3 == 0).to(torch.int32)
    results = []
    for backend in BACKENDS:
        lists = problem(dtype)
        lists[0][4][2, 128], lists[0][3][1, 7], lists[0][7][129, 200] = math.nan, math.inf, 1e30
        with use_backend(backend):
            for maximize, flags in ((False, None), (True, skip)):
                numbers = options(len(SHAPES), offsets=offsets, maximize=maximize)
                average_step_int8(*lists, numbers, skip=flags, nesterov=nesterov, update=update)
        results.append([t for part in lists for t in part])
    for reference, cpp in zip(*results, strict=True):
        bits_equal(cpp, reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_tensor_keeps_its_average(backend):
    grads, codes, scales, outputs = problem(shapes=[(5, 130)] * 2)
    grads[0][1, 1] = math.nan
    before = [[t.clone() for t in ts] for ts in (codes, scales)]
    skip = torch.tensor([1, 0], dtype=torch.int32)
    with use_backend(backend):
        average_step_int8(grads, codes, scales, outputs, options(2), skip=skip, nesterov=True)
    assert torch.equal(codes[0], before[0][0]) and torch.equal(scales[0], before[1][0])
    assert torch.equal(outputs[0], dequantize(codes[0], scales[0], torch.float32))
    assert not torch.equal(codes[1], before[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_of_zero_forgets_a_block_of_nan(backend):
    grads, codes, scales, _ = problem(shapes=[(5, 130)])
    scales[0][2] = math.nan
    with use_backend(backend):
        average_step_int8(grads, codes, scales, [], options(1, torch.tensor((0.0, 1.0))))
    assert all(map(torch.equal, (codes[0], scales[0]), quantize(grads[0], 2**31)))


def test_fp64_averages_in_fp64():
    grad, output = normal((3, 130), torch.float64), torch.empty(3, 130, dtype=torch.float64)
    codes, scales = quantize(normal((3, 130), seed=1), 0)
    old = dequantize(codes, scales, torch.float64)
    average_step_int8([grad], [codes], [scales], [output], options(1, SCALARS.double()))
    torch.testing.assert_close(output, SCALARS[0].double() * old + SCALARS[1].double() * grad, rtol=1e-15, atol=1e-17)
