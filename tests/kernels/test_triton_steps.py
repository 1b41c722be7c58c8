"""Steps by Triton beside their definitions, bit for bit, in Triton's interpreter and on a GPU.

The definitions are compared with formulas in float64 by test_lion_step.py and its neighbours.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import (
    DTYPES,
    ROUNDINGS,
    STEPS,
    bits_equal,
    dtype_name,
    matrices,
    replay_beside_eager,
    rounding_states,
    tensors,
)

from leanstep.kernels import StepOptions
from leanstep.kernels.reference.quantization import quantize
from leanstep.kernels.reference.steps import adamw_int8, average_int8, lion_int8, lion_step, scaled_step

NAMES = ("adamw_int8", "average_int8", "lion_int8", "lion_step", "scaled_step")
triton = SimpleNamespace(**{n: pytest.importorskip(f"leanstep.kernels.triton_impl.steps.{n}") for n in NAMES})
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")

LION = (1e-3, 1 - 1e-3 * 0.1, 0.9, 0.1, 0.99, 0.01)
ADAMW = (1 - 1e-3 * 0.1, 0.9, 0.1, 0.999, 0.001, 1e-8)
CODES = (torch.int8, torch.float8_e4m3fn)
# one and several rows to a tile, short blocks, rows of one tile and more, a stack, a tail of whole blocks
SHAPES = ((1, 1), (0, 5), (3, 0), (7, 3), (5, 130), (70, 256), (2, 8200), (3, 5, 77), (1, 8320), (24, 1))
SWITCHES = (
    {}, {"maximize": True}, {"decay_where_aligned": True}, {"cautious": True}, {"cautious": True, "maximize": True}
)  # fmt: skip


def compare(lists, kernel, definition):
    """Run a kernel on lists of tensors and its definition on the tensors one by one; return the kernel's flags.

    A list may be empty.
    """
    lists = [part for part in lists if part]
    expected = [[t.clone() for t in part] for part in lists]
    flags = kernel(lists)
    for i, tensors_of_one in enumerate(zip(*expected, strict=True)):
        definition(i, *tensors_of_one)
    for part, wanted in zip(lists, expected, strict=True):
        for actual, want in zip(part, wanted, strict=True):
            bits_equal(actual, want)
    return flags


def options_of(scalars, rounding, count, device, offsets=None, *, cautious=False, **switches):
    """Options with a seed, an offset and, if asked for, another cautious scale for each of several tensors."""
    chance = torch.Generator().manual_seed(1)
    seeds = torch.randint(0, 2**32, (count,), generator=chance).to(device)
    offsets = torch.randint(0, 2**34, (count,), generator=chance) if offsets is None else offsets
    scale = torch.linspace(1, 2, count, device=device) if cautious else None
    numbers = torch.tensor(scalars, device=device)
    return StepOptions(numbers, rounding, scale, **switches, seeds=seeds, offsets=offsets.to(device))


# ---- steps with 8-bit states


def coded(p_dtype, g_dtype, device, code, *, second=False):
    """Parameters, gradients of which three are not finite or huge, codes and scales; offsets of whole rows."""
    chance = torch.Generator().manual_seed(0)

    def randn(shape, dtype=torch.float32):
        return torch.randn(shape, generator=chance).to(device=device, dtype=dtype)

    lists = [[randn(shape, p_dtype) for shape in SHAPES], [randn(shape, g_dtype) for shape in SHAPES]]
    lists += [[], [], [], []] if second else [[], []]
    for shape in SHAPES:
        average = randn(shape) * randn(shape).exp()
        for k, (values, dtype) in enumerate(((average, code), (average.square(), torch.uint8))[: 1 + second]):
            for part, tensor in zip(lists[2 + 2 * k :], quantize(values, 5, dtype=dtype), strict=False):
                part.append(tensor)
    params, grads = lists[:2]
    # other layouts, and an odd address
    params[5] = params[5].t().contiguous().t()
    grads[6] = torch.cat([grads[6].flatten()[:1], grads[6].flatten()])[1:].view(SHAPES[6])
    grads[4][1, 129], grads[8][0, 8319], grads[3][0, 0] = float("nan"), float("inf"), 6e4
    rows = torch.randint(0, 2**30, (len(SHAPES),), generator=chance)
    return lists, rows * torch.tensor([torch.Size(s[1:]).numel() for s in SHAPES])


def compare_lion_int8(p_dtype, g_dtype, rounding, device="cpu", code=torch.int8, **switches):
    lists, offsets = coded(p_dtype, g_dtype, device, code)
    states = rounding_states(lists[0], rounding)
    options = options_of(LION, rounding, len(SHAPES), device, offsets, **switches)
    flags = compare(
        [*lists, states],
        lambda lists: triton.lion_int8.lion_step_int8(lists, options),
        lambda i, *one: lion_int8.lion_step_int8(*one, *[None] * (5 - len(one)), options=options.of(i)),
    )
    skipped = [options.skip_nonfinite and i in (4, 8) for i in range(len(SHAPES))]
    assert flags.dtype == torch.int32 and flags.bool().tolist() == skipped


def compare_adamw_int8(p_dtype, g_dtype, rounding, device="cpu", code=torch.int8, **switches):
    lists, offsets = coded(p_dtype, g_dtype, device, code, second=True)
    states = rounding_states(lists[0], rounding)
    options = options_of(ADAMW, rounding, len(SHAPES), device, offsets, **switches)
    corrections = torch.rand(len(SHAPES), 2, generator=torch.Generator().manual_seed(2)).to(device)
    compare(
        [*lists, states],
        lambda lists: triton.adamw_int8.adamw_step_int8(lists, options, corrections),
        lambda i, *one: adamw_int8.adamw_step_int8(*one[:6], corrections[i], *one[6:], options=options.of(i)),
    )


def compare_average_int8(dtype, mode, device="cpu", code=torch.int8, *, beta=0.9, skips=False, maximize=False):
    has_outputs, nesterov, update = mode
    (_, grads, codes, scales), offsets = coded(dtype, dtype, device, code)
    grads[5] = grads[5].t().contiguous().t()
    lists = [grads, codes, scales] + [[torch.full(s, 7.0, device=device) for s in SHAPES]] * has_outputs
    options = options_of((beta, 1 - beta), "nearest", len(SHAPES), device, offsets, maximize=maximize)
    skip = (torch.arange(len(SHAPES), device=device) % 2).to(torch.int32) if skips else None
    named = {"nesterov": nesterov, "update": update}

    def definition(i, g, c, s, output=None):
        flag = None if skip is None else skip[i]
        average_int8.average_step_int8(g, c, s, output, flag, options=options.of(i), **named)

    compare(lists, lambda lists: triton.average_int8.average_step_int8(lists, options, skip, **named), definition)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize(("step", "switch"), list(zip(STEPS, 2 * SWITCHES, strict=True)), ids=str)
def test_lion_int8(step, switch):
    """Switches are bits of an argument, and meet every dtype and rounding in the same line."""
    compare_lion_int8(*step, skip_nonfinite=True, **switch)


@pytest.mark.interpret
@pytest.mark.parametrize("rounding", ["nearest", "master"])
def test_lion_fp8(rounding):
    compare_lion_int8(torch.bfloat16, torch.bfloat16, rounding, code=CODES[1], skip_nonfinite=True, cautious=True)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize(("step", "maximize"), list(zip(STEPS, 5 * (False, True), strict=True)), ids=str)
def test_adamw_int8(step, maximize):
    compare_adamw_int8(*step, maximize=maximize, decay_where_aligned=maximize)


@pytest.mark.interpret
def test_adamw_fp8():
    compare_adamw_int8(torch.bfloat16, torch.bfloat16, "nearest", code=CODES[1])


# (outputs, nesterov, update)
MODES = ((True, False, True), (True, True, True), (False, False, True), (True, False, False), (True, True, False))


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_averages_in_int8(dtype):
    compare_average_int8(dtype, MODES[0], maximize=True)


@pytest.mark.interpret
@pytest.mark.parametrize(("mode", "code"), [*((m, CODES[0]) for m in MODES), *((m, CODES[1]) for m in MODES[:2])])
def test_modes_of_averages(mode, code):
    compare_average_int8(torch.bfloat16, mode, skips=True, code=code)


@pytest.mark.interpret
def test_an_average_of_weight_zero():
    compare_average_int8(torch.float32, MODES[2], beta=0.0)


# ---- steps without


def build_lion(p_dtype, g_dtype, m_dtype, rounding, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    lists = [tensors(dtype, generator, device) for dtype in (p_dtype, g_dtype, m_dtype)]
    return lists, rounding_states(lists[0], rounding)


def compare_lion(p_dtype, g_dtype, m_dtype, rounding, switch, device="cpu", poison=False):
    lists, states = build_lion(p_dtype, g_dtype, m_dtype, rounding, device)
    if poison:
        lists[1][2][1, 1], lists[1][5][-1] = float("nan"), float("inf")
    options = options_of(LION, rounding, len(lists[0]), device, **({"skip_nonfinite": False} | switch))
    flags = compare(
        [*lists, states],
        lambda lists: triton.lion_step.lion_step(lists, options),
        lambda i, *one: lion_step.lion_step(*one, *[None] * (4 - len(one)), options=options.of(i)),
    )
    skipped = [poison and options.skip_nonfinite and i in (2, 5) for i in range(len(lists[0]))]
    assert flags.dtype == torch.int32 and flags.bool().tolist() == skipped


@pytest.mark.interpret
@pytest.mark.parametrize(("g", "p"), list(itertools.product(range(3), repeat=2)), ids=str)
def test_lion_of_every_pair_of_dtypes(p, g):
    """Parameters, gradients and averages are each widened to fp32 when they are loaded: no three of them meet."""
    compare_lion(DTYPES[p], DTYPES[g], DTYPES[(p + g) % 3], "nearest", {"skip_nonfinite": True})


@pytest.mark.interpret
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("p_dtype", DTYPES, ids=dtype_name)
def test_lion_of_every_rounding(p_dtype, rounding):
    compare_lion(p_dtype, p_dtype, torch.float32, rounding, {"skip_nonfinite": True}, poison=True)


@pytest.mark.interpret
@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_lion_of_every_switch(switch):
    compare_lion(torch.bfloat16, torch.bfloat16, torch.bfloat16, "nearest", switch)


@pytest.mark.interpret
def test_nonfinite_gradients_pass_when_told_to():
    compare_lion(torch.float32, torch.float32, torch.float32, "nearest", {}, poison=True)
    compare_lion_int8(torch.float32, torch.float32, "nearest", skip_nonfinite=False)


POISONED = 6  # a batch of three matrices


def compare_scaled(p_dtype, g_dtype, rounding, device="cpu", **switches):
    generator = torch.Generator().manual_seed(0)
    params, mats = (matrices(d, generator, device) for d in (p_dtype, g_dtype))
    rows = [torch.rand(p.shape[:-1], generator=generator).to(device) + 0.5 for p in params]
    cols = [torch.rand(*p.shape[:-2], p.shape[-1], generator=generator).to(device) + 0.5 for p in params]
    cols[POISONED][1, 4] = float("nan")
    states = rounding_states(params, rounding)
    options = options_of((1e-2, 1 - 1e-3), rounding, len(params), device, **switches)

    def definition(i, p, g, r, c, *state):
        before = [t.clone() for t in (p, *state)]
        scaled_step.scaled_step(p, g, r, c, *(state or [None]), options=options.of(i))
        if i == POISONED:  # of a batch the kernel leaves the one matrix alone
            for tensor, old in zip((p, *state), before, strict=True):
                tensor[1] = old[1]

    flags = compare(
        [params, mats, rows, cols, states], lambda lists: triton.scaled_step.scaled_step(lists, options), definition
    )
    assert flags.dtype == torch.int32 and flags.tolist() == [int(i == POISONED) for i in range(len(params))]


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_scaled_steps_leave_matrices_with_nan_alone(step):
    compare_scaled(*step)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_scaled_steps_with_decay_of_aligned_entries(rounding):
    compare_scaled(torch.bfloat16, torch.float32, rounding, decay_where_aligned=True)


@pytest.mark.interpret
def test_nan_scales_pass_when_told_to():
    options = StepOptions(torch.tensor([1e-2, 1 - 1e-3]), skip_nonfinite=False)
    param, cols = torch.ones(2, 3), torch.tensor([1.0, float("nan"), 1.0])
    flags = triton.scaled_step.scaled_step([[param], [torch.ones(2, 3)], [torch.ones(2)], [cols]], options)
    assert flags.tolist() == [0] and param.isnan().tolist() == [[False, True, False]] * 2


# ---- agreement, empty lists


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("code", [None, *CODES], ids=dtype_name)
def test_agreement_counts_exactly(dtype, code):
    if code is None:
        (_, grads, *state), _ = build_lion(dtype, dtype, torch.float32, "nearest")
        kernel, definition = triton.lion_step.lion_agreement, lion_step.lion_agreement
        grads[5][3] = float("inf")
    else:
        (_, grads, *state), _ = coded(dtype, dtype, "cpu", code)
        kernel, definition = triton.lion_int8.lion_agreement_int8, lion_int8.lion_agreement_int8
    for switches in ({"maximize": False, "skip_nonfinite": True}, {"maximize": True, "skip_nonfinite": False}):
        options = StepOptions(torch.tensor(LION), **switches)
        counts = kernel([grads, *state], options)
        wanted = [definition(*one, options).item() for one in zip(grads, *state, strict=True)]
        assert counts.dtype == torch.float32 and counts.tolist() == wanted and max(counts) > 100


@pytest.mark.interpret
def test_empty_lists_and_empty_tensors_launch_nothing():
    options, zeros = StepOptions(torch.tensor(LION)), torch.zeros(0, 3)
    codes, second, scales = (torch.zeros(0, n, dtype=d) for n, d in ((3, torch.int8), (3, torch.uint8), (1, None)))
    for lists, flags in (([[]] * 4, []), ([[zeros], [zeros], [codes], [scales]], [0])):
        assert triton.lion_int8.lion_step_int8(lists, options).tolist() == flags
        assert triton.lion_int8.lion_agreement_int8(lists[1:], options).tolist() == flags
        assert triton.lion_step.lion_step([*lists[:2], lists[0]], options).tolist() == flags
        assert triton.lion_step.lion_agreement(lists[:2], options).tolist() == flags
        triton.average_int8.average_step_int8(lists[1:], options, None, nesterov=False, update=True)
        moments = [*lists, [second] * len(flags), lists[3]]
        triton.adamw_int8.adamw_step_int8(moments, options, torch.zeros(len(flags), 2))
    assert triton.scaled_step.scaled_step([[]] * 4, options).shape == (0,)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("p_dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("code", CODES, ids=dtype_name)
def test_every_8_bit_step_on_the_device(p_dtype, rounding, code):
    compare_lion_int8(p_dtype, p_dtype, rounding, "cuda", code, skip_nonfinite=True)
    compare_adamw_int8(p_dtype, p_dtype, rounding, "cuda", code)


@pytest.mark.gpu
@pytest.mark.parametrize("code", CODES, ids=dtype_name)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_average_on_the_device(dtype, mode, code):
    compare_average_int8(dtype, mode, "cuda", code, skips=True)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("p_dtype", DTYPES, ids=dtype_name)
def test_every_step_on_the_device(p_dtype, rounding):
    for switch in (*SWITCHES, {"skip_nonfinite": True}):
        compare_lion(p_dtype, p_dtype, torch.float32, rounding, switch, device="cuda")
    compare_scaled(p_dtype, p_dtype, rounding, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", [None, "stochastic"])
def test_a_captured_step_replays_as_the_eager_one(rounding):
    """Of 8-bit states with stochastic rounding, and of others."""
    bf16, sets = torch.bfloat16, []
    for _ in range(2):
        if rounding:
            lists, offsets = coded(bf16, bf16, "cuda", torch.int8)
            run, options = triton.lion_int8.lion_step_int8, options_of(LION, rounding, len(SHAPES), "cuda", offsets)
        else:
            lists, _ = build_lion(bf16, bf16, torch.float32, "nearest", "cuda")
            run, options = triton.lion_step.lion_step, options_of(LION, "nearest", len(lists[0]), "cuda")
        sets.append(lists)
    replay_beside_eager(lambda which: run(sets[which], options))
    for captured, eager in zip(*map(itertools.chain.from_iterable, sets), strict=True):
        bits_equal(captured, eager)
