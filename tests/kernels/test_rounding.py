"""The ways an fp32 value meets bf16: their arithmetic, and the random bits of one of them."""

import math

import pytest
import torch

from leanstep.kernels import StepOptions, lion_step, scaled_step, use_backend
from leanstep.kernels.reference.rounding import (
    element_index,
    hash32,
    hash_number,
    narrow,
    round_stochastic,
    split,
    widen,
)


def unsigned(index, seed):
    return hash32(index, seed).long() & 0xFFFFFFFF


def test_hash_of_numbers_is_that_of_tensors():
    numbers = [0, 1, 5, 2**31, 2**32 - 1, 2**32 + 3]
    for seed in (0, 77, 2**32 - 1):
        assert unsigned(torch.tensor(numbers), seed).tolist() == [hash_number(number, seed) for number in numbers]


def test_hash_is_uniform_and_mixes():
    index = torch.arange(1 << 16)
    bits = unsigned(index, 7)
    assert bits.unique().numel() == index.numel()  # every step of it can be undone
    # 256 bins of 256 expected: chi-square with 255 degrees of freedom, in either half
    for part in (bits & 0xFF, (bits >> 8) & 0xFF, bits >> 24):
        counts = torch.bincount(part.long(), minlength=256).double()
        chi = ((counts - 256).square() / 256).sum()
        assert abs(chi - 255) < 5 * math.sqrt(2 * 255)
    # one bit of the index or of the seed changes half of the bits
    for other in (unsigned(index ^ 1, 7), unsigned(index, 6), unsigned(index ^ (1 << 20), 7)):
        changed = (bits ^ other).long()
        ones = sum(((changed >> b) & 1).double().mean() for b in range(32))
        assert abs(ones - 16) < 0.5
    # neighbours are not correlated
    x = bits.double() / 2**32 - 0.5
    assert abs((x[1:] * x[:-1]).mean() * 12) < 5 / math.sqrt(x.numel())
    assert torch.equal(unsigned(index[:5], torch.tensor(7)), bits[:5])
    assert torch.equal(unsigned(index[:5] + 2**32, 7), bits[:5])


@pytest.mark.parametrize("value", [1.001, -1.001, 3.3e-5, 1e30, -7.77e-30, 0.0, 1.0])
def test_stochastic_rounding_is_unbiased(value):
    count = 1 << 15
    exact = torch.full((count,), value)
    rounded = round_stochastic(exact, hash32(torch.arange(count), 5)).double()
    low, high = rounded.min(), rounded.max()
    true = float(exact[0])
    if low == high:
        assert low == true  # bf16 holds it
        return
    assert low < true < high and rounded.unique().numel() == 2
    up = (true - low) / (high - low)
    deviation = (high - low) * math.sqrt(up * (1 - up) / count)
    assert abs(rounded.mean() - true) < 3 * deviation + (high - low) * 2**-16


def test_stochastic_rounding_passes_specials():
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    rounded = round_stochastic(values, torch.full((5,), 0xFFFF, dtype=hash32(torch.arange(1), 0).dtype))
    torch.testing.assert_close(rounded.float(), values, rtol=0, atol=0, equal_nan=True)


def test_index_counts_rows_and_starts_at_the_offset():
    assert element_index(torch.empty(2, 3), 10).tolist() == [[10, 11, 12], [13, 14, 15]]


def test_a_shard_is_rounded_as_in_the_whole():
    value, param = torch.randn(6, 5), torch.empty(6, 5, dtype=torch.bfloat16)
    whole, _ = narrow(value, param, "stochastic", 9, 0)
    part, _ = narrow(value[2:4], param[2:4], "stochastic", 9, 10)
    assert torch.equal(part, whole[2:4])


def test_kahan_carries_what_rounding_dropped():
    value = torch.randn(1000) * torch.logspace(-3, 3, 1000)
    param = torch.empty(1000, dtype=torch.bfloat16)
    rounded, dropped = narrow(value, param, "kahan")
    assert dropped.dtype == torch.bfloat16 and torch.equal(rounded, value.bfloat16())
    back = widen(rounded, dropped, "kahan")
    assert ((back - value).abs() <= value.abs() * 2**-16).all()


def test_master_is_the_weight():
    value, extra = torch.randn(5), torch.randn(5)
    assert torch.equal(widen(extra.half(), extra, "master"), extra)
    new_param, new_extra = narrow(value, torch.empty(5, dtype=torch.float16), "master")
    assert new_param is value and new_extra is value


def test_a_split_weight_is_exact_to_16_bits():
    """In fp64, for normal numbers of every exponent, halves between two of 24 bits and between two of bf16 included."""
    chance = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (1 << 18,), generator=chance)
    halves = (patterns & -0x10000) + torch.tensor([0x80, 0x7F80, 0x7FFF, 0x8000, 0x8080, 0xFF80, 0xFFFF])[:, None]
    values = torch.cat([patterns, halves.flatten()]).to(torch.int32).view(torch.float32)
    values = values[torch.isfinite(values) & (values.abs() >= 2.0**-126) & (values.abs() < 3.38e38)]
    param, difference = split(values)
    stored = param.bfloat16()
    assert torch.equal(stored.float(), param) and difference.dtype == torch.int8
    weights = widen(stored, difference, "split")
    errors = (weights.double() - values.double()).abs() / values.double().abs()
    assert 0.99 * 2**-16 < errors.max() <= 2**-16
    # the parameter is a nearest bf16 number of the weight
    assert ((param.double() - weights.double()).abs() <= (values.bfloat16().double() - weights.double()).abs()).all()


def test_every_split_pair_is_a_weight_beside_its_parameter():
    """A parameter that was written beside any difference: halfway to its neighbour at most, and zero stays zero."""
    params = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[:, None]
    differences = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8)
    weights = widen(params.expand(-1, 256), differences.expand(2**16, -1), "split")
    ordinary = (torch.isfinite(params) & (params != 0)).squeeze(1)
    others = params[~ordinary].float().expand(-1, 256)
    torch.testing.assert_close(weights[~ordinary], others, rtol=0, atol=0, equal_nan=True)
    again, same_differences = split(weights[ordinary])
    assert torch.equal(again, params[ordinary].float().expand(-1, 256))
    assert torch.equal(same_differences, differences.expand_as(again))


def test_split_passes_specials():
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, -(2.0**-133), 2.0**-134, 3.4e38, 2.0**-126 * 1.7]
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7F800001]).to(torch.int32)  # NaN of every kind
    value = torch.cat([torch.tensor(values), patterns.view(torch.float32)])
    param, difference = split(value)
    weights = widen(param.bfloat16(), difference, "split")
    assert (weights - value).abs()[[5, 6, 7]].max() <= 2.0**-134 and not weights[5].any() and weights[8] == math.inf
    assert abs(weights[9] / value[9] - 1) <= 2**-16
    torch.testing.assert_close(weights[[0, 1, 2, 3, 4]], value[[0, 1, 2, 3, 4]], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(weights.signbit()[:2], value.signbit()[:2]) and weights[10:].isnan().all()


# ---- parameters written between two steps


def stepped_state(dtype, rounding):
    """A parameter and its rounding state after a step; remainders of all sizes, at powers of two and zero too."""
    chance = torch.Generator().manual_seed(0)
    value = torch.randn(4096, generator=chance) * torch.logspace(-3, 3, 4096)
    value[:64] = 2.0 ** torch.arange(-6, 2).repeat(8) * (1 + torch.linspace(-0.002, 0.002, 64))
    value[64:72] = 0.0
    param = value.to(dtype)
    _, state = narrow(value, param, rounding)
    return value, param, state.to({"kahan": dtype, "master": torch.float32, "split": torch.int8}[rounding])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["kahan", "master"])
def test_the_state_of_a_step_is_kept_and_of_a_written_entry_dropped(dtype, rounding):
    value, param, state = stepped_state(dtype, rounding)
    kept = widen(param, state, rounding)
    assert torch.equal(kept, state if rounding == "master" else param.float() + state.float())
    assert (kept - value).abs().max() <= (param.float() - value).abs().max()
    written = param.clone()
    written[::2] = 0.0
    mixed = widen(written, state, rounding)
    assert torch.equal(mixed[1::2], kept[1::2])
    dropped = mixed[::2] != 0.0
    # such a master is the rounded value of zero already
    assert not dropped.any() or (rounding == "master" and (mixed[::2][dropped].to(dtype) == 0).all())


@pytest.mark.parametrize("rounding", ["kahan", "master", "split"])
@pytest.mark.parametrize("backend", ["cpp", pytest.param("triton", marks=pytest.mark.interpret)])
def test_all_backends_drop_the_state_of_the_same_entries(rounding, backend):
    def stepped(backend):
        _, param, state = stepped_state(torch.bfloat16, rounding)
        param[::3] = torch.linspace(-2, 2, len(param[::3])).bfloat16()
        other, other_state = param.clone().view(64, 64), state.clone().view(64, 64)
        grad = torch.randn(4096, generator=torch.Generator().manual_seed(1)).bfloat16()
        momentum = torch.zeros_like(param)
        with use_backend(backend):
            lion = StepOptions(torch.tensor([0.01, 0.99, 0.9, 0.1, 0.99, 0.01]), rounding)
            lion_step([param], [grad], [momentum], [state], lion)
            scaled = StepOptions(torch.tensor([0.01, 0.99]), rounding)
            scaled_step([other], [grad.view(64, 64)], [torch.ones(64)], [torch.ones(64)], [other_state], scaled)
        return param, state, other, other_state

    for got, want in zip(stepped(backend), stepped("reference"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["kahan", "master", "split"])
def test_generated_code_rounds_as_the_definition(rounding):
    """Inductor leaves out conversions to low precision that are followed by conversions back."""

    def step(param, state):
        return narrow(widen(param, state, rounding) * 1.001, param, rounding)

    _, param, state = stepped_state(torch.bfloat16, rounding)
    generated = torch.compile(step, backend="inductor", fullgraph=True)(param, state)
    for got, want in zip(generated, step(param, state), strict=True):
        assert torch.equal(got, want)
    torch._dynamo.reset()
