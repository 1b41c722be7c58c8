import pytest
import torch
from kernel_cases import DTYPES, ROUNDINGS, STEPS, bits_equal, dtype_name, replay_beside_eager, rounding_states

from leanstep.kernels import StepOptions
from leanstep.kernels.reference.quantization import quantize
from leanstep.kernels.reference.steps import lion_int8 as reference

triton_lion = pytest.importorskip("leanstep.kernels.triton_impl.steps.lion_int8")

SCALARS = (1e-3, 1 - 1e-3 * 0.1, 0.9, 0.1, 0.99, 0.01)
SWITCHES = (
    {}, {"maximize": True}, {"decay_where_aligned": True}, {"cautious": True}, {"cautious": True, "maximize": True}
)  # fmt: skip
# one and several rows to a tile, short blocks, rows of one tile and more, a stack, a tail of whole blocks
SHAPES = ((1, 1), (0, 5), (3, 0), (7, 3), (5, 130), (70, 256), (2, 8200), (3, 5, 77), (1, 8320), (24, 1))


def build(p_dtype, g_dtype, rounding, device="cpu", seed=0, code=torch.int8):
    chance = torch.Generator().manual_seed(seed)

    def randn(shape, dtype):
        return torch.randn(shape, generator=chance).to(device=device, dtype=dtype)

    params = [randn(shape, p_dtype) for shape in SHAPES]
    grads = [randn(shape, g_dtype) for shape in SHAPES]
    # other layouts, and an odd address
    params[5] = params[5].t().contiguous().t()
    grads[6] = torch.cat([grads[6].flatten()[:1], grads[6].flatten()])[1:].view(SHAPES[6])
    momenta = [randn(shape, torch.float32) * randn(shape, torch.float32).exp() for shape in SHAPES]
    coded = [quantize(momentum, 5, dtype=code) for momentum in momenta]
    codes, scales = ([pair[k] for pair in coded] for k in range(2))
    states = rounding_states(params, rounding)
    seeds = torch.randint(0, 2**32, (len(SHAPES),), generator=chance).to(device)
    rows = torch.randint(0, 2**30, (len(SHAPES),), generator=chance)
    offsets = (rows * torch.tensor([torch.Size(s[1:]).numel() for s in SHAPES])).to(device)
    return params, grads, codes, scales, states, seeds, offsets


def compare(p_dtype, g_dtype, rounding, switch, device="cpu", poison=False, code=torch.int8):
    params, grads, codes, scales, states, seeds, offsets = build(p_dtype, g_dtype, rounding, device, code=code)
    if poison:
        grads[4][1, 129] = float("nan")
        grads[8][0, 8319] = float("inf")
    switches = {"skip_nonfinite": False} | switch
    cautious = torch.linspace(1, 2, len(params), device=device) if switches.pop("cautious", False) else None
    before = [g.clone() for g in grads]
    changed = [params, codes, scales, states]
    expected = [[t.clone() for t in part] for part in changed]
    numbers = torch.tensor(SCALARS, device=device)
    options = StepOptions(numbers, rounding, cautious, **switches, seeds=seeds, offsets=offsets)
    flags = triton_lion.lion_step_int8(params, grads, codes, scales, states, options)
    for i in range(len(params)):
        p, c, s, state = (part[i] if part else None for part in expected)
        reference.lion_step_int8(p, grads[i], c, s, state, options=options.of(i))
    for part, wanted in zip(changed, expected, strict=True):
        for actual, want in zip(part, wanted, strict=True):
            bits_equal(actual, want)
    for g, want in zip(grads, before, strict=True):
        bits_equal(g, want)
    skipped = [poison and options.skip_nonfinite and i in (4, 8) for i in range(len(params))]
    assert flags.dtype == torch.int32 and flags.bool().tolist() == skipped


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize(("step", "switch"), list(zip(STEPS, 2 * SWITCHES, strict=True)), ids=str)
def test_every_step_equals_the_reference_bit_for_bit(step, switch):
    """Switches are bits of an argument, and meet every dtype and rounding in the same line."""
    compare(*step, {"skip_nonfinite": True} | switch, poison=True)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nonfinite_gradients_pass_when_told_to():
    compare(torch.float32, torch.float32, "nearest", {}, poison=True)


@pytest.mark.interpret
@pytest.mark.parametrize("rounding", ["nearest", "master"])
def test_fp8_equals_the_reference_bit_for_bit(rounding):
    switch = {"skip_nonfinite": True, "cautious": True}
    compare(torch.bfloat16, torch.bfloat16, rounding, switch, poison=True, code=torch.float8_e4m3fn)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn], ids=dtype_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_agreement_counts_exactly(dtype, code):
    _, grads, codes, scales, *_ = build(dtype, dtype, "nearest", code=code)
    grads[5][3, 7] = float("inf")
    for switches in ({"maximize": False, "skip_nonfinite": True}, {"maximize": True, "skip_nonfinite": False}):
        options = StepOptions(torch.tensor(SCALARS), **switches)
        counts = triton_lion.lion_agreement_int8(grads, codes, scales, options)
        rows = zip(grads, codes, scales, strict=True)
        assert counts.tolist() == [reference.lion_agreement_int8(*row, options).item() for row in rows]
        assert counts.dtype == torch.float32
    assert max(counts) > 1000


@pytest.mark.interpret
def test_an_empty_list_and_empty_tensors_launch_nothing():
    options = StepOptions(torch.tensor(SCALARS))
    assert triton_lion.lion_step_int8([], [], [], [], [], options).shape == (0,)
    lists = [torch.zeros(0, 3)], [torch.zeros(0, 3)], [torch.zeros(0, 3, dtype=torch.int8)], [torch.zeros(0, 1)]
    assert triton_lion.lion_step_int8(*lists, [], options).tolist() == [0]
    assert triton_lion.lion_agreement_int8(*lists[1:], options).tolist() == [0]


@pytest.mark.gpu
@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn], ids=dtype_name)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("p_dtype", DTYPES, ids=dtype_name)
def test_on_a_gpu_every_rounding_equals_the_reference_bit_for_bit(p_dtype, rounding, code):
    compare(p_dtype, p_dtype, rounding, {"skip_nonfinite": True}, "cuda", poison=True, code=code)


@pytest.mark.gpu
def test_on_a_gpu_a_step_is_captured():
    sets = [build(torch.bfloat16, torch.bfloat16, "stochastic", "cuda") for _ in range(2)]
    numbers = torch.tensor(SCALARS, device="cuda")

    def step(which):
        *lists, seeds, offsets = sets[which]
        options = StepOptions(numbers, "stochastic", seeds=seeds, offsets=offsets)
        triton_lion.lion_step_int8(*lists, options)

    replay_beside_eager(step)
    for part in (0, 2, 3):
        for captured, eager in zip(sets[0][part], sets[1][part], strict=True):
            bits_equal(captured, eager)
