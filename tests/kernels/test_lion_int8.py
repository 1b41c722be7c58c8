"""lion_step_int8 and lion_agreement_int8: the codes, their rounding, and the backends that a CPU has."""

import pytest
import torch
from kernel_cases import bits_equal, normal, rounding_states

from leanstep.kernels import StepOptions, lion_agreement, lion_agreement_int8, lion_step, lion_step_int8, use_backend
from leanstep.kernels.reference import quantization
from leanstep.kernels.reference.quantization import BLOCK, dequantize, quantize, scale_shape
from leanstep.kernels.steps import lion_int8
from leanstep.kernels.steps.average_int8 import average_step_int8

SCALARS = torch.tensor((0.01, 0.999, 0.9, 0.1, 0.99, 0.01))
SHAPES = [(1, 1), (0, 3), (3, 0), (5, 128), (7, 129), (65, 77), (3, 4, 50), (130, 256), (2, 5, 3, 3), (1, 40000)]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
ROUNDINGS = ["nearest", "stochastic", "kahan", "master", "split"]


def problem(p_dtype, g_dtype, rounding="nearest"):
    """Lists for one call: every shape, with momenta of several magnitudes in each row."""
    params = [normal(s, p_dtype, i) for i, s in enumerate(SHAPES)]
    grads = [normal(s, g_dtype, 50 + i) for i, s in enumerate(SHAPES)]
    codes, scales = [], []
    for i, shape in enumerate(SHAPES):
        c, s = quantize(normal(shape, seed=100 + i) * normal(shape, seed=150 + i).exp(), i)
        codes.append(c)
        scales.append(s)
    return params, grads, codes, scales, rounding_states(params, rounding)


def options(rounding="nearest", **more):
    seeds = torch.arange(len(SHAPES)) * 977 + 2**31
    offsets = torch.tensor([torch.Size(s[1:]).numel() for s in SHAPES]) * torch.arange(len(SHAPES)) * (2**31 + 7)
    return StepOptions(SCALARS, rounding, seeds=seeds, offsets=offsets, **more)


def poison(grads):
    """Non-finite entries in two tensors, and a block of nothing else in a third. Returns the tensors' flags."""
    grads[4][2, 128] = float("nan")
    grads[7][129, 200] = float("-inf")
    grads[3][1] = float("inf")
    return [int(i in (3, 4, 7)) for i in range(len(grads))]


# ---- the codes


def largest_of_blocks(scales, shape):
    """The largest magnitude of every entry's block, fp64."""
    columns = torch.Size(shape[1:]).numel()
    return scales.double().repeat_interleave(BLOCK, 1)[:, :columns].reshape(shape) * 247


def widest_step(values, largest):
    """The distance between the codes around a value: at most a sixteenth of z = 1 + 247 |value| / largest."""
    return (values.abs() + largest / 247) / 16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_within_one_step_of_the_code(shape):
    """In fp64, for values of several magnitudes."""
    values = normal(shape).double() * normal(shape, seed=1).double().exp()
    codes, scales = quantize(values, 5)
    assert codes.dtype == torch.int8 and codes.shape == shape and tuple(scales.shape) == scale_shape(values.shape)
    error = (dequantize(codes, scales, torch.float64) - values).abs()
    # scale and z are rounded to fp32
    assert (error <= 1.0001 * widest_step(values, largest_of_blocks(scales, shape))).all()
    assert not codes[values == 0].any() and ((codes == 0) | (codes.sign() == values.sign())).all()


def test_rounding_is_unbiased():
    """The mean of 4000 roundings is the value, within 5 of its standard deviations."""
    values = torch.logspace(-6, 0, BLOCK, dtype=torch.float64).mul(torch.tensor([1.0, -1.0]).repeat(BLOCK // 2))
    codes, scales = quantize(values.expand(4000, BLOCK), 3)
    decoded = dequantize(codes, scales, torch.float64)
    deviation = decoded.std(dim=0) / 4000**0.5
    # a probability is a multiple of 2**-16
    assert ((decoded.mean(dim=0) - values).abs() <= 5 * deviation + 2**-16 * widest_step(values, 1.0)).all()
    assert (decoded.std(dim=0) > 0).sum() > 120


def momenta_of(gradients, seeds):
    """The momentum of weight 0.99 in codes, and in fp64."""
    codes, scales = quantize(torch.zeros_like(gradients[0]), 0)
    exact = torch.zeros_like(gradients[0])
    for gradient, seed in zip(gradients, seeds, strict=True):
        codes, scales = quantize(0.99 * dequantize(codes, scales, torch.float64) + 0.01 * gradient, seed)
        exact = 0.99 * exact + 0.01 * gradient
    return dequantize(codes, scales, torch.float64), exact


def test_slow_changes_arrive(monkeypatch):
    """Half of a block's gradients change sign for good, with constant sizes: no noise helps the momentum over.

    With rounding to nearest, four of five of these signs never arrive.
    """
    sizes = normal((40, 128)).double()
    flipped = sizes * normal((40, 128), seed=1).sign()
    gradients = [sizes] * 400 + [flipped] * 1000
    momentum, _ = momenta_of(gradients, range(1400))
    change = flipped != sizes
    assert (momentum.sign() != flipped.sign())[change].double().mean() < 0.002
    monkeypatch.setattr(quantization, "random_bits", lambda pairs, *_, **__: torch.full_like(pairs, 2**31 + 2**15))
    momentum, _ = momenta_of(gradients, range(1400))
    assert 0.7 < (momentum.sign() != flipped.sign())[change].double().mean() < 0.95


def test_signs_of_updates_in_noise():
    """The sign of 0.9 m + 0.1 g, for gradients of many sizes: 2 % differ from those of an exact momentum."""
    sizes = normal((20, 128), seed=1).double().exp()
    gradients = [normal((20, 128), seed=10 + step).double() * sizes for step in range(301)]
    momentum, exact = momenta_of(gradients[:-1], range(300))
    differs = (0.9 * momentum + 0.1 * gradients[-1]).sign() != (0.9 * exact + 0.1 * gradients[-1]).sign()
    assert 0.001 < differs.double().mean() < 0.04


def test_zeros_and_tiny_and_infinite_blocks():
    values = torch.zeros(5, 256)
    values[1, 3], values[1, 200] = 1e-40, -1.0
    values[2] = 2.0**-110
    values[3, 7], values[3, 130] = float("nan"), 2.0
    values[4, 100], values[4, 130] = float("inf"), 3e38
    codes, scales = quantize(values, 1)
    decoded = dequantize(codes, scales, torch.float32)
    assert not decoded[0].any() and not decoded[2].any() and not decoded[1, :128].any() and not scales[2].any()
    assert decoded[3, :128].isnan().all() and decoded[4, :128].isnan().all()
    torch.testing.assert_close(decoded[[1, 3, 4], [200, 130, 130]], torch.tensor([-1.0, 2.0, 3e38]), rtol=1e-6, atol=0)


# ---- the step


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_step_is_lion_on_the_decoded_momentum(backend, dtypes, dirty_memory):
    """Parameters bit for bit; the momentum within one step of its code."""
    params, grads, codes, scales, _ = problem(*dtypes)
    momenta = [dequantize(c, s, torch.float32) for c, s in zip(codes, scales, strict=True)]
    want, before = [p.clone() for p in params], [g.clone() for g in grads]
    with use_backend(backend):
        lion_step(want, grads, momenta, [], options())
        flags = lion_step_int8(params, grads, codes, scales, [], options())
    assert flags.dtype == torch.int32 and not flags.any()
    for i, (p, w, g, b) in enumerate(zip(params, want, grads, before, strict=True)):
        assert torch.equal(p, w) and torch.equal(g, b)
        if p.numel():
            decoded = dequantize(codes[i], scales[i], torch.float32)
            bound = widest_step(momenta[i].double(), largest_of_blocks(scales[i], p.shape))
            assert ((decoded - momenta[i]).abs() <= 1.0001 * bound).all()


SWITCHES = {
    "maximize": {"maximize": True},
    "pass": {"skip_nonfinite": False},
    "cautious": {"cautious_scale": torch.linspace(1, 2, len(SHAPES)), "decay_where_aligned": True},
}
# roundings whose steps, all in bf16, run in registers; each needs every switch. The other roundings and dtypes share a
# loop, where a weight is moved first and stored then: pairs suffice.
IN_REGISTERS = ["nearest", "stochastic", "split"]
LOOPED = [rounding for rounding in ROUNDINGS if rounding not in IN_REGISTERS]
AGREEING = [
    *(("nearest", DTYPES[0], switch) for switch in SWITCHES),
    *((rounding, DTYPES[1], switch) for rounding in IN_REGISTERS for switch in SWITCHES),
    *((rounding, DTYPES[2], switch) for rounding, switch in zip(IN_REGISTERS, SWITCHES, strict=True)),
    *((rounding, DTYPES[1 + (i + k) % 2], s) for i, rounding in enumerate(LOOPED) for k, s in enumerate(SWITCHES)),
]


@pytest.mark.parametrize(("rounding", "dtypes", "switch"), AGREEING, ids=str)
def test_backends_agree_bit_for_bit(rounding, dtypes, switch):
    switches, results = SWITCHES[switch], []
    for backend in ("reference", "cpp"):
        params, grads, codes, scales, states = problem(*dtypes, rounding)
        flags = poison(grads)
        with use_backend(backend):
            raised = [lion_step_int8(params, grads, codes, scales, states, options(rounding, **switches))]
            raised.append(lion_step_int8(params, grads, codes, scales, states, options(rounding, **switches)))
        for flag in raised:
            assert flag.tolist() == (flags if switches.get("skip_nonfinite", True) else [0] * len(flags))
        results.append([*params, *codes, *scales, *states])
    for reference, cpp in zip(*results, strict=True):
        bits_equal(cpp, reference)


@pytest.mark.parametrize(
    ("dtypes", "rounding"), [(DTYPES[0], "nearest"), *((DTYPES[1], rounding) for rounding in IN_REGISTERS)], ids=str
)
def test_processors_without_byte_permutations_give_the_same_bits(dtypes, rounding, monkeypatch):
    macros, results = lion_int8.macros, []
    for isa in ({}, {"ISA": 2}):  # those of this processor, and less
        monkeypatch.setattr(lion_int8, "macros", lambda *args, isa=isa, **types: macros(*args, **types) | isa)
        params, grads, codes, scales, states = problem(*dtypes, rounding)
        poison(grads)
        with use_backend("cpp"):
            for _ in range(2):
                lion_step_int8(params, grads, codes, scales, states, options(rounding))
        results.append([*params, *codes, *scales, *states])
    for this, other in zip(*results, strict=True):
        bits_equal(this, other)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_every_code_stands_for_its_value(backend):
    """All codes, with a scale that is no power of two; a step that leaves the momentum leaves them."""
    codes = [torch.arange(-127, 128, dtype=torch.int8).view(1, 255)]
    scales = [torch.full((1, 2), 0.3)]
    zeros, seeds = [torch.zeros(1, 255)], torch.tensor([3])
    outputs = [torch.zeros(1, 255)]
    still = StepOptions(torch.tensor((0.0, 1.0, 0.9, 0.1, 1.0, 0.0)), seeds=seeds)
    with use_backend(backend):
        average_step_int8(
            zeros, codes, scales, outputs, StepOptions(torch.tensor((1.0, 0.0)), seeds=seeds), update=False
        )
        lion_step_int8([torch.zeros(1, 255)], zeros, codes, scales, [], still)
    code = torch.arange(-127, 128).double()
    z = torch.exp2(code.abs() // 16) * (1 + code.abs() % 16 / 16)
    torch.testing.assert_close(outputs[0][0].double(), code.sign() * (z - 1) * 0.3, rtol=1e-6, atol=0)
    # the scale may have changed in its last bit
    assert (codes[0][0].double() - code).abs().max() <= 1


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_entries_with_a_non_finite_gradient(backend):
    params, grads, codes, scales, _ = problem(torch.float32, torch.float32)
    flags = poison(grads)
    old = [p.clone() for p in params]
    with use_backend(backend):
        assert lion_step_int8(params, grads, codes, scales, [], options()).tolist() == flags
    for p, g, o, s in zip(params, grads, old, scales, strict=True):
        assert torch.equal(p == o, ~torch.isfinite(g)) and torch.isfinite(s).all()
    _, _, codes, scales, _ = problem(torch.float32, torch.float32)
    with use_backend(backend):
        lion_step_int8(params, grads, codes, scales, [], options(skip_nonfinite=False))
    assert torch.equal(scales[3].isnan().flatten(), torch.arange(5) == 1) and scales[4].isnan().sum() == 1


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("switches", [{}, {"maximize": True}, {"skip_nonfinite": False}], ids=str)
def test_agreement(backend, switches):
    _, grads, codes, scales, _ = problem(torch.bfloat16, torch.bfloat16)
    poison(grads)
    momenta = [dequantize(c, s, torch.float32) for c, s in zip(codes, scales, strict=True)]
    with use_backend(backend):
        counts = lion_agreement_int8(grads, codes, scales, StepOptions(SCALARS, **switches))
        assert torch.equal(counts, lion_agreement(grads, momenta, StepOptions(SCALARS, **switches)))
    assert counts.dtype == torch.float32 and counts.max() > 1000


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_counts_are_fp32_whatever_the_default_dtype(backend, default):
    grads = [torch.ones(3, 21859)]  # 65577 entries; fp16 would give infinity, bf16 65536
    codes, scales = ([t] for t in quantize(grads[0], 0))
    torch.set_default_dtype(default)
    with use_backend(backend):
        counts = lion_agreement_int8(grads, codes, scales, StepOptions(SCALARS))
    assert counts.dtype == torch.float32 and counts.tolist() == [65577]
    assert lion_agreement_int8([], [], [], StepOptions(SCALARS)).dtype == torch.float32
