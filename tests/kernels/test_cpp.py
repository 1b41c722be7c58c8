"""The C++ kernels: the same on any number of threads, in one call or two."""

import subprocess
import sys

import pytest
import torch
from kernel_cases import rounding_states

from leanstep.kernels import (
    StepOptions,
    lion_agreement,
    lion_agreement_int8,
    lion_step,
    lion_step_int8,
    scaled_step,
    sinkhorn,
    sinkhorn_step,
    use_backend,
)
from leanstep.kernels.steps.adamw_step import adamw_step
from leanstep.kernels.steps.common import nonfinite_flags

SCALARS = torch.tensor([0.1, 1.0, 0.9, 0.1, 0.99, 0.01])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_nonfinite_flags(dtype, value):
    tensors = [torch.randn(70000).to(dtype), torch.randn(0).to(dtype), torch.randn(9, 8)[:, ::3].to(dtype)]
    tensors += [torch.full((5,), torch.finfo(dtype).max, dtype=dtype), torch.randn(40, 30).to(dtype).t()]
    with use_backend("cpp"):
        assert nonfinite_flags(tensors).tolist() == [0, 0, 0, 0, 0]
        for i, position in ((0, (69999,)), (2, (8, 2)), (4, (29, 0))):
            spoiled = [t.clone() for t in tensors]
            spoiled[i][position] = value
            assert nonfinite_flags(spoiled).tolist() == [int(j == i) for j in range(5)]


def test_the_number_of_threads_changes_no_bit():
    """Large matrices are cut by rows and small ones taken whole, by any thread."""
    generator = torch.Generator().manual_seed(0)
    mats = [torch.randn(4096, 1200, generator=generator), *(torch.randn(64, 90, generator=generator) for _ in range(5))]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with use_backend("cpp"):
                scales = sinkhorn(mats, 3)
                param, momentum = mats[0].clone(), torch.zeros_like(mats[0])
                lion_step([param], [mats[0]], [momentum], [], StepOptions(SCALARS))
            results.append([scales.flat_rows, scales.flat_cols, param, momentum])
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_a_large_matrix_has_the_scales_of_the_definition():
    """Shared by the threads, with sums over thousands of rows."""
    mat = torch.randn(5000, 1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 1000)
    with use_backend("reference"):
        want = sinkhorn([mat.double()], 5, end_with_rows=True)
    with use_backend("cpp"):
        got = sinkhorn([mat], 5, end_with_rows=True)
    torch.testing.assert_close(got.rows[0].double(), want.rows[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got.cols[0].double(), want.cols[0], rtol=1e-5, atol=0)


_RUNTIMES = """
from pathlib import Path
import leanstep.kernels
from leanstep.kernels.cpp_impl import _build
_build.library("steps/nonfinite_flags", {"TENSOR": "float"})
mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
print(*(path for path in mapped if "libgomp" in path or "libomp" in path), sep="\\n")
"""


def test_torch_and_the_kernels_share_one_openmp_runtime():
    """Two runtimes would be two pools of threads. Alone in a process, because scikit-learn brings one of its own."""
    result = subprocess.run([sys.executable, "-P", "-c", _RUNTIMES], capture_output=True, text=True, check=True)
    assert len(result.stdout.split()) == 1, result.stdout


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "master", "split"])
def test_scales_and_update_in_one_call_have_the_bits_of_two(rounding):
    """Stacks, a matrix that the threads share, one that is not finite, empty ones and strides among them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 90), (3, 8, 20), (2100, 1000), (5, 7), (30, 40)]

    def run(one_call, extra_shapes=()):
        generator.manual_seed(1)
        params = [torch.randn(s, generator=generator).bfloat16() for s in (*shapes, *extra_shapes)]
        mats = [torch.randn(s, generator=generator).bfloat16() for s in (*shapes, *extra_shapes)]
        mats[1][1, 2, 3] = float("nan")
        states = rounding_states(params, rounding)
        options = StepOptions(torch.tensor([0.125, 0.75]), rounding)
        if rounding == "stochastic":
            options = options._replace(seeds=torch.arange(len(params)) + 5, offsets=torch.arange(len(params)) * 100)
        with use_backend("cpp"):
            if one_call:
                flags = sinkhorn_step(params, mats, states, options, num_iters=3, end_with_rows=True)
            else:
                scales = sinkhorn(mats, 3, end_with_rows=True)
                flags = scaled_step(params, mats, scales.rows, scales.cols, states, options)
        return [flags, *params, *states]

    for more in ((), ((0, 5), (5, 0))):  # empty ones take the way of two calls
        for one, two in zip(run(True, more), run(False, more), strict=True):
            assert torch.equal(one, two)
    assert run(True)[0].tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_scales_and_update_in_one_call_are_in_fp32_whatever_the_default_dtype(default):
    mat = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    options, params = StepOptions(torch.tensor([0.125, 0.75])), [mat.clone(), mat.clone()]
    for param, dtype in zip(params, (torch.float32, default), strict=True):
        torch.set_default_dtype(dtype)
        with use_backend("cpp"):
            sinkhorn_step([param], [mat], [], options, num_iters=3)
    assert torch.equal(*params)


@pytest.mark.parametrize("rounding", ["master", "kahan", "split"])
@pytest.mark.parametrize("operation", ["lion_step", "scaled_step"])
def test_written_parameters_are_seen_at_every_bit_pattern(operation, rounding):
    """Every bf16 parameter beside states that just do and just do not round to it, NaN of any payload, and noise."""
    chance = torch.Generator().manual_seed(0)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    upper = patterns << 16
    special = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -(2**31), 0, 1, 0x007FFFFF, 0x7F7FFFFF, 0x7FFF8000])
    if rounding == "master":
        near = [upper + distance for distance in (-0x8001, -0x8000, -0x7FFF, 0, 0x7FFF, 0x8000, 0x8001)]
        noise = torch.randint(-(2**31), 2**31, (3 * 2**16,), generator=chance)
        others = special.repeat(2**14)[: 2 * 2**16]
        states = torch.cat([t.to(torch.int32) for t in (*near, noise, others)]).view(torch.float32)
    elif rounding == "split":
        ends = [torch.full((2**16,), end) for end in (-128, -1, 0, 1, 127)]
        states = torch.cat([*ends, torch.randint(-128, 128, (7 * 2**16,), generator=chance)]).to(torch.int8)
    else:
        values = upper.view(torch.float32).nan_to_num()
        errors = [values * size for size in (0, 2.0**-9, -(2.0**-9), 2.0**-9 * 127 / 128, 2.0**-8, -(2.0**-10), 1)]
        noise = torch.randint(-(2**15), 2**15, (5 * 2**16,), generator=chance).to(torch.int16).view(torch.bfloat16)
        states = torch.cat([*(e.bfloat16() for e in errors), noise])
    params = patterns.to(torch.int16).view(torch.bfloat16).repeat(12).view(12, -1)
    gradient = torch.randn(params.shape, generator=chance).bfloat16()
    results = []
    for backend in ("reference", "cpp"):
        param, state, momentum = params.clone(), states.clone().view_as(params), torch.zeros_like(params)
        with use_backend(backend):
            if operation == "lion_step":
                options = StepOptions(torch.tensor([2.0**-6, 0.999, 0.9, 0.1, 0.99, 0.01]), rounding)
                lion_step([param], [gradient], [momentum], [state], options)
            else:
                rows, cols = torch.ones(param.shape[0]), torch.ones(param.shape[1])
                options = StepOptions(torch.tensor([2.0**-6, 0.999]), rounding)
                scaled_step([param], [gradient], [rows], [cols], [state], options)
        results.append((param, state, momentum))
    for defined, computed in zip(*results, strict=True):
        torch.testing.assert_close(defined, computed, rtol=0, atol=0, equal_nan=True)


def _calls_with_a_smaller_tensor():
    """Steps of two tensors, of which one of the lists has a smaller second one: kernels would write past its end."""
    options, masters = StepOptions(SCALARS), StepOptions(SCALARS, "master")
    numbers = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    steps = [torch.zeros(()), torch.zeros(())]

    def tensors(rows=4):
        return [torch.ones(4, 6), torch.ones(rows, 6)]

    rows, cols = [torch.ones(4), torch.ones(4)], [torch.ones(6), torch.ones(6)]
    yield "lion_step", lambda: lion_step(tensors(), tensors(), tensors(2), [], options)
    yield "lion_step", lambda: lion_step(tensors(), tensors(2), tensors(), [], options)
    yield "lion_step", lambda: lion_step(tensors(), tensors(), tensors(), tensors(2), masters)
    yield "lion_agreement", lambda: lion_agreement(tensors(), tensors(2), options)
    yield "scaled_step", lambda: scaled_step(tensors(), tensors(2), rows, cols, [], options)
    yield "scaled_step", lambda: scaled_step(tensors(), tensors(), rows, cols, tensors(2), masters)
    yield "scaled_step", lambda: scaled_step(tensors(), tensors(), [rows[0], torch.ones(2)], cols, [], options)
    yield "scaled_step", lambda: scaled_step(tensors(), tensors(), rows, [cols[0], torch.ones(5)], [], options)
    yield "sinkhorn_step", lambda: sinkhorn_step(tensors(), tensors(2), [], options, num_iters=1)
    codes, scales = [torch.ones(4, 6, dtype=torch.int8)] * 2, [torch.ones(4, 1), torch.ones(2, 1)]
    yield "lion_step_int8", lambda: lion_step_int8(tensors(), tensors(2), codes, [scales[0]] * 2, [], options)
    yield "lion_step_int8", lambda: lion_step_int8(tensors(), tensors(), codes, scales, [], options)
    yield "lion_agreement_int8", lambda: lion_agreement_int8(tensors(), codes, scales, options)
    yield "adamw_step", lambda: adamw_step(tensors(), tensors(), tensors(2), tensors(), steps, **numbers)


@pytest.mark.parametrize("number", range(13))
def test_kernels_refuse_tensors_of_different_shapes(number):
    op, call_it = list(_calls_with_a_smaller_tensor())[number]
    with pytest.raises(ValueError, match=f"{op}: expected (tensors of one shape at index 1|scales)"):
        call_it()
