import itertools

import pytest
import torch
from kernel_cases import DTYPES, ROUNDINGS, bits_equal, dtype_name, replay_beside_eager, rounding_states, tensors

from leanstep.kernels import StepOptions
from leanstep.kernels.reference.steps import lion_step as reference

triton_lion = pytest.importorskip("leanstep.kernels.triton_impl.steps.lion_step")

LR, DECAY, BETA1, BETA2 = 1e-3, 1 - 1e-3 * 0.1, 0.9, 0.99
SWITCHES = ({}, {"maximize": True}, {"decay_where_aligned": True}, {"skip_nonfinite": True}, {"cautious": True})


def scalars(device="cpu"):
    return torch.tensor([LR, DECAY, BETA1, 1 - BETA1, BETA2, 1 - BETA2], dtype=torch.float32, device=device)


def build(p_dtype, g_dtype, m_dtype, rounding, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    params, grads, exp_avgs = (tensors(d, generator, device) for d in (p_dtype, g_dtype, m_dtype))
    states = rounding_states(params, rounding)
    seeds = torch.randint(0, 2**32, (len(params),), generator=generator).to(device)
    offsets = torch.randint(0, 2**34, (len(params),), generator=generator).to(device)
    return params, grads, exp_avgs, states, seeds, offsets


def compare(p_dtype, g_dtype, m_dtype, rounding, switch, device="cpu", poison=False):
    params, grads, exp_avgs, states, seeds, offsets = build(p_dtype, g_dtype, m_dtype, rounding, device)
    if poison:
        grads[2][1, 1] = float("nan")
        grads[5][-1] = float("inf")
    switches = {"skip_nonfinite": False} | switch
    scale = torch.linspace(1, 2, len(params), device=device) if switches.pop("cautious", False) else None
    before = [g.clone() for g in grads]
    expected = [[t.clone() for t in part] for part in (params, exp_avgs, states)]
    options = StepOptions(scalars(device), rounding, scale, **switches, seeds=seeds, offsets=offsets)
    flags = triton_lion.lion_step(params, grads, exp_avgs, states, options)
    for i in range(len(params)):
        state = expected[2][i] if states else None
        reference.lion_step(expected[0][i], grads[i], expected[1][i], state, options=options.of(i))
    for part, wanted in zip((params, exp_avgs, states), expected, strict=True):
        for actual, want in zip(part, wanted, strict=True):
            bits_equal(actual, want)
    for g, want in zip(grads, before, strict=True):
        bits_equal(g, want)
    skipped = [i in (2, 5) for i in range(len(params))] if poison and options.skip_nonfinite else [False] * len(params)
    assert flags.dtype == torch.int32 and flags.bool().tolist() == skipped


@pytest.mark.interpret
@pytest.mark.parametrize(("g", "p"), list(itertools.product(range(3), repeat=2)), ids=str)
def test_every_pair_of_dtypes_equals_the_reference_bit_for_bit(p, g):
    """Parameters, gradients and averages are each widened to fp32 when they are loaded: no three of them meet."""
    compare(DTYPES[p], DTYPES[g], DTYPES[(p + g) % 3], "nearest", {"skip_nonfinite": True})


@pytest.mark.interpret
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("p_dtype", DTYPES, ids=dtype_name)
def test_every_rounding_equals_the_reference_bit_for_bit(p_dtype, rounding):
    compare(p_dtype, p_dtype, torch.float32, rounding, {"skip_nonfinite": True}, poison=True)


@pytest.mark.interpret
@pytest.mark.parametrize("switch", SWITCHES, ids=lambda s: next(iter(s), "plain"))
def test_every_switch_equals_the_reference_bit_for_bit(switch):
    compare(torch.bfloat16, torch.bfloat16, torch.bfloat16, "nearest", switch)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nonfinite_gradients_pass_when_told_to():
    compare(torch.float32, torch.float32, torch.float32, "nearest", {}, poison=True)


@pytest.mark.interpret
def test_close_to_a_float64_oracle():
    params, grads, exp_avgs, states, seeds, offsets = build(*[torch.float32] * 3, "nearest")
    oracle = []
    for p, g, m in zip(params, grads, exp_avgs, strict=True):
        p, g, m = p.double(), g.double(), m.double()
        oracle.append((p * DECAY - LR * torch.sign(BETA1 * m + (1 - BETA1) * g), BETA2 * m + (1 - BETA2) * g))
    triton_lion.lion_step(params, grads, exp_avgs, states, StepOptions(scalars(), seeds=seeds, offsets=offsets))
    for p, m, (want_p, want_m) in zip(params, exp_avgs, oracle, strict=True):
        # three roundings of values below 5: 3 * 2**-24 * 5
        torch.testing.assert_close(p.double(), want_p, rtol=0, atol=9e-7)
        torch.testing.assert_close(m.double(), want_m, rtol=0, atol=9e-7)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_agreement_counts_exactly(dtype):
    _, grads, exp_avgs, *_ = build(dtype, dtype, torch.float32, "nearest")
    grads[5][3] = float("inf")
    for options in ({"maximize": False, "skip_nonfinite": True}, {"maximize": True, "skip_nonfinite": False}):
        counts = triton_lion.lion_agreement(grads, exp_avgs, StepOptions(scalars(), **options))
        wanted = [
            reference.lion_agreement(g, m, StepOptions(scalars(), **options))
            for g, m in zip(grads, exp_avgs, strict=True)
        ]
        assert counts.dtype == torch.float32 and counts.tolist() == [int(w) for w in wanted]
    assert max(counts) > 100


@pytest.mark.interpret
def test_an_empty_list_and_empty_tensors_launch_nothing():
    options = StepOptions(scalars())
    assert triton_lion.lion_step([], [], [], [], options).shape == (0,)
    empty = [torch.zeros(0)]
    assert triton_lion.lion_step(empty, empty, empty, [], options).tolist() == [0]
    assert triton_lion.lion_agreement([], [], options).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("p_dtype", DTYPES, ids=dtype_name)
def test_equals_the_reference_on_the_device(p_dtype, rounding):
    for switch in SWITCHES:
        compare(p_dtype, p_dtype, torch.float32, rounding, switch, device="cuda")


@pytest.mark.gpu
def test_a_captured_step_replays_as_the_eager_one():
    sets = [build(torch.bfloat16, torch.bfloat16, torch.float32, "nearest", "cuda") for _ in range(2)]
    rates = scalars("cuda")

    def step(which):
        *lists, seeds, offsets = sets[which]
        triton_lion.lion_step(*lists, StepOptions(rates, seeds=seeds, offsets=offsets))

    replay_beside_eager(step)
    for part in range(3):
        for captured, eager in zip(sets[0][part], sets[1][part], strict=True):
            bits_equal(captured, eager)
