import pytest
import torch
from kernel_cases import DTYPES, ROUNDINGS, STEPS, bits_equal, dtype_name, rounding_states

from leanstep.kernels import StepOptions
from leanstep.kernels.reference.quantization import quantize
from leanstep.kernels.reference.steps import adamw_int8 as reference

triton_adamw = pytest.importorskip("leanstep.kernels.triton_impl.steps.adamw_int8")

SCALARS = (1 - 1e-3 * 0.1, 0.9, 0.1, 0.999, 0.001, 1e-8)
# one and several rows to a tile, short blocks, rows of one tile and more, a stack, a tail of whole blocks
SHAPES = ((1, 1), (0, 5), (3, 0), (7, 3), (5, 130), (70, 256), (2, 8200), (3, 5, 77), (1, 8320), (24, 1))


def build(p_dtype, g_dtype, rounding, device="cpu", code=torch.int8):
    chance = torch.Generator().manual_seed(0)

    def randn(shape, dtype=torch.float32):
        return torch.randn(shape, generator=chance).to(device=device, dtype=dtype)

    params = [randn(shape, p_dtype) for shape in SHAPES]
    grads = [randn(shape, g_dtype) for shape in SHAPES]
    # other layouts, and an odd address
    params[5] = params[5].t().contiguous().t()
    grads[6] = torch.cat([grads[6].flatten()[:1], grads[6].flatten()])[1:].view(SHAPES[6])
    lists = [params, grads, [], [], [], []]
    for shape in SHAPES:
        average = randn(shape) * randn(shape).exp()
        for k, (values, dtype) in enumerate(((average, code), (average.square(), torch.uint8))):
            codes, scales = quantize(values, 5, dtype=dtype)
            lists[2 + 2 * k].append(codes)
            lists[3 + 2 * k].append(scales)
    states = rounding_states(params, rounding)
    lists += [states] if states else []
    seeds = torch.randint(0, 2**32, (len(SHAPES),), generator=chance).to(device)
    rows = torch.randint(0, 2**30, (len(SHAPES),), generator=chance)
    offsets = (rows * torch.tensor([torch.Size(s[1:]).numel() for s in SHAPES])).to(device)
    corrections = torch.rand(len(SHAPES), 2, generator=chance).to(device)
    return lists, corrections, seeds, offsets


def compare(p_dtype, g_dtype, rounding, device="cpu", maximize=False, code=torch.int8):
    lists, corrections, seeds, offsets = build(p_dtype, g_dtype, rounding, device, code)
    lists[1][4][1, 129], lists[1][8][0, 8319], lists[1][3][0, 0] = float("nan"), float("inf"), 6e4
    expected = [[t.clone() for t in part] for part in lists]
    numbers = torch.tensor(SCALARS, device=device)
    switches = {"maximize": maximize, "decay_where_aligned": maximize}
    options = StepOptions(numbers, rounding, **switches, seeds=seeds, offsets=offsets)
    triton_adamw.adamw_step_int8(lists, corrections, options)
    for i, (p, g, m, m_scale, v, v_scale, *state) in enumerate(zip(*expected, strict=True)):
        reference.adamw_step_int8(p, g, m, m_scale, v, v_scale, corrections[i], *state, options=options.of(i))
    for part, wanted in zip(lists, expected, strict=True):
        for actual, want in zip(part, wanted, strict=True):
            bits_equal(actual, want)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize(("step", "maximize"), list(zip(STEPS, 5 * (False, True), strict=True)), ids=str)
def test_every_step_equals_the_reference_bit_for_bit(step, maximize):
    compare(*step, maximize=maximize)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_fp8_equals_the_reference_bit_for_bit():
    compare(torch.bfloat16, torch.bfloat16, "nearest", code=torch.float8_e4m3fn)


@pytest.mark.interpret
def test_an_empty_list_and_empty_tensors_launch_nothing():
    options = StepOptions(torch.tensor(SCALARS))
    triton_adamw.adamw_step_int8([[]] * 6, torch.zeros(0, 2), options)
    codes = [torch.zeros(0, 3, dtype=dtype) for dtype in (torch.int8, torch.uint8)]
    lists = [
        [t] for t in (torch.zeros(0, 3), torch.zeros(0, 3), codes[0], torch.zeros(0, 1), codes[1], torch.zeros(0, 1))
    ]
    triton_adamw.adamw_step_int8(lists, torch.zeros(1, 2), options)


@pytest.mark.gpu
@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn], ids=dtype_name)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("p_dtype", DTYPES, ids=dtype_name)
def test_on_a_gpu_every_rounding_equals_the_reference_bit_for_bit(p_dtype, rounding, code):
    compare(p_dtype, p_dtype, rounding, "cuda", code=code)
