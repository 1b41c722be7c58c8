import pytest
import torch
from kernel_cases import DTYPES, ROUNDINGS, STEPS, bits_equal, dtype_name, matrices, rounding_states

from leanstep.kernels import StepOptions
from leanstep.kernels.reference.steps import scaled_step as reference

triton_step = pytest.importorskip("leanstep.kernels.triton_impl.steps.scaled_step")

STEP, DECAY = 1e-2, 1 - 1e-3
POISONED = 6  # a batch of three matrices


def build(p_dtype, g_dtype, rounding, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    params, mats = (matrices(d, generator, device) for d in (p_dtype, g_dtype))
    states = rounding_states(params, rounding)
    rows = [torch.rand(p.shape[:-1], generator=generator).to(device) + 0.5 for p in params]
    cols = [torch.rand(*p.shape[:-2], p.shape[-1], generator=generator).to(device) + 0.5 for p in params]
    seeds = torch.randint(0, 2**32, (len(params),), generator=generator).to(device)
    offsets = torch.randint(0, 2**34, (len(params),), generator=generator).to(device)
    return params, mats, rows, cols, states, seeds, offsets


def compare(p_dtype, g_dtype, rounding, *, poison=False, device="cpu", **switches):
    params, mats, rows, cols, states, seeds, offsets = build(p_dtype, g_dtype, rounding, device)
    if poison:
        cols[POISONED][1, 4] = float("nan")
    scalars = torch.tensor([STEP, DECAY], device=device)
    options = StepOptions(scalars, rounding, seeds=seeds, offsets=offsets, **switches)
    expected = [[t.clone() for t in part] for part in (params, states)]
    flags = triton_step.scaled_step(params, mats, rows, cols, states, options)
    assert flags.dtype == torch.int32
    assert flags.tolist() == [int(poison and i == POISONED) for i in range(len(params))]
    for i, (p, g) in enumerate(zip(expected[0], mats, strict=True)):
        old = [part[i].clone() for part in expected if part]
        state = expected[1][i] if states else None
        reference.scaled_step(p, g, rows[i], cols[i], state, options=options.of(i))
        if poison and i == POISONED:
            for part, before in zip((part for part in expected if part), old, strict=True):
                part[i][1] = before[1]
    for part, wanted in zip((params, states), expected, strict=True):
        for actual, want in zip(part, wanted, strict=True):
            bits_equal(actual, want)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize(("p_dtype", "g_dtype", "rounding"), STEPS, ids=dtype_name)
def test_every_step_equals_the_reference_and_nan_matrices_are_left_alone(p_dtype, g_dtype, rounding):
    compare(p_dtype, g_dtype, rounding, poison=True)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_decay_of_aligned_entries_equals_the_reference_bit_for_bit(rounding):
    compare(torch.bfloat16, torch.float32, rounding, decay_where_aligned=True)


@pytest.mark.slow
@pytest.mark.interpret
def test_close_to_a_float64_oracle():
    params, mats, rows, cols, states, seeds, offsets = build(torch.float32, torch.float32, "nearest")
    wanted = [
        p.double() * DECAY - STEP * (r.double().unsqueeze(-1) * g.double() * c.double().unsqueeze(-2))
        for p, g, r, c in zip(params, mats, rows, cols, strict=True)
    ]
    options = StepOptions(torch.tensor([STEP, DECAY]), skip_nonfinite=False)
    triton_step.scaled_step(params, mats, rows, cols, states, options)
    for p, want in zip(params, wanted, strict=True):
        # two roundings of values below 5, and the update's own below 0.1
        torch.testing.assert_close(p.double(), want, rtol=0, atol=7e-7)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_scales_pass_when_told_to_and_empty_lists_do_nothing():
    options = StepOptions(torch.tensor([STEP, DECAY]), skip_nonfinite=False)
    param, cols = torch.ones(2, 3), torch.tensor([1.0, float("nan"), 1.0])
    flags = triton_step.scaled_step([param], [torch.ones(2, 3)], [torch.ones(2)], [cols], [], options)
    assert flags.tolist() == [0] and param.isnan().tolist() == [[False, True, False]] * 2
    assert triton_step.scaled_step([], [], [], [], [], options._replace(skip_nonfinite=True)).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("p_dtype", DTYPES, ids=dtype_name)
def test_equals_the_reference_on_the_device(p_dtype, rounding):
    compare(p_dtype, p_dtype, rounding, poison=True, device="cuda")
