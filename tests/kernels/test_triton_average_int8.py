import pytest
import torch
from kernel_cases import DTYPES, bits_equal, dtype_name

from leanstep.kernels import StepOptions
from leanstep.kernels.reference.quantization import quantize
from leanstep.kernels.reference.steps import average_int8 as reference

triton_average = pytest.importorskip("leanstep.kernels.triton_impl.steps.average_int8")

# one and several rows to a tile, short blocks, rows of one tile and more, a stack, a tail of whole blocks
SHAPES = ((1, 1), (0, 5), (3, 0), (7, 3), (5, 130), (70, 256), (2, 8200), (3, 5, 77), (1, 8320), (24, 1))
# (outputs, nesterov, update)
MODES = ((True, False, True), (True, True, True), (False, False, True), (True, False, False), (True, True, False))


def build(dtype, device, code):
    chance = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=chance).to(device=device, dtype=dtype) for shape in SHAPES]
    # another layout, and an odd address
    grads[5] = grads[5].t().contiguous().t()
    grads[6] = torch.cat([grads[6].flatten()[:1], grads[6].flatten()])[1:].view(SHAPES[6])
    grads[4][1, 129], grads[8][0, 8319], grads[3][0, 0] = float("nan"), float("inf"), 6e4
    averages = [torch.randn(s, generator=chance) * torch.randn(s, generator=chance).exp() for s in SHAPES]
    pairs = [quantize(average, 5, dtype=code) for average in averages]
    codes, scales = ([t.to(device) for t in ts] for ts in zip(*pairs, strict=True))
    rows = torch.randint(0, 2**30, (len(SHAPES),), generator=chance)
    offsets = (rows * torch.tensor([torch.Size(s[1:]).numel() for s in SHAPES])).to(device)
    seeds = torch.randint(0, 2**32, (len(SHAPES),), generator=chance).to(device)
    outputs = [torch.full(s, 7.0, device=device) for s in SHAPES]
    return [grads, codes, scales, outputs], seeds, offsets


def compare(dtype, mode, device="cpu", *, beta=0.9, skips=False, maximize=False, code=torch.int8):
    has_outputs, nesterov, update = mode
    lists, seeds, offsets = build(dtype, device, code)
    lists = lists if has_outputs else lists[:3]
    expected = [[t.clone() for t in part] for part in lists]
    numbers = torch.tensor((beta, 1 - beta), device=device)
    options = StepOptions(numbers, maximize=maximize, seeds=seeds, offsets=offsets)
    skip = (torch.arange(len(SHAPES), device=device) % 2).to(torch.int32) if skips else None
    triton_average.average_step_int8(lists, skip, options, nesterov=nesterov, update=update)
    for i, (g, c, s, *output) in enumerate(zip(*expected, strict=True)):
        flag = None if skip is None else skip[i]
        one = {"options": options.of(i), "nesterov": nesterov, "update": update}
        reference.average_step_int8(g, c, s, output[0] if output else None, flag, **one)
    for part, wanted in zip(lists, expected, strict=True):
        for actual, want in zip(part, wanted, strict=True):
            bits_equal(actual, want)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_dtype_equals_the_reference_bit_for_bit(dtype):
    compare(dtype, MODES[0], maximize=True)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_mode_equals_the_reference_bit_for_bit(mode):
    compare(torch.bfloat16, mode, skips=True)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("mode", MODES[:2], ids=str)
def test_fp8_equals_the_reference_bit_for_bit(mode):
    compare(torch.bfloat16, mode, skips=True, code=torch.float8_e4m3fn)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_a_weight_of_zero_equals_the_reference_bit_for_bit():
    compare(torch.float32, MODES[2], beta=0.0)


@pytest.mark.interpret
def test_an_empty_list_and_empty_tensors_launch_nothing():
    options = StepOptions(torch.tensor((0.9, 0.1)))
    triton_average.average_step_int8([[]] * 4, None, options, nesterov=False, update=True)
    lists = [[torch.zeros(0, 3)], [torch.zeros(0, 3, dtype=torch.int8)], [torch.zeros(0, 1)]]
    triton_average.average_step_int8(lists, None, options, nesterov=False, update=True)


@pytest.mark.gpu
@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn], ids=dtype_name)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_on_a_gpu_every_mode_equals_the_reference_bit_for_bit(dtype, mode, code):
    compare(dtype, mode, "cuda", skips=True, code=code)
