"""Lion with an 8-bit momentum: its state, and states that are saved and loaded in other dtypes."""

import copy

import pytest
import torch
from optimizer_cases import run

from leanstep.kernels.reference.quantization import dequantize
from leanstep.optimizers import LANTON, Lion, SinkGD

SHAPES = ((64, 256), (5, 130), (7,), ())


def build(momentum_dtype=torch.int8, dtype=torch.bfloat16, shapes=SHAPES, **settings):
    chance = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=chance).to(dtype).requires_grad_() for s in shapes]
    return Lion(params, lr=1e-3, momentum_dtype=momentum_dtype, **settings), params


def decoded(optimizer, param):
    state = optimizer.state[param]
    return dequantize(state["exp_avg"], state["exp_avg_scale"], torch.float32)


def test_vectors_and_scalars_have_the_dtype_of_the_parameter():
    optimizer, params = build()
    run(optimizer, params, range(1))
    dtypes = [optimizer.state[p]["exp_avg"].dtype for p in params]
    assert dtypes == [torch.int8, torch.int8, torch.bfloat16, torch.bfloat16]
    assert optimizer.state[params[1]]["exp_avg_scale"].shape == (5, 2)
    assert optimizer.state[params[2]].keys() == {"exp_avg"}


def test_the_momentum_follows_one_of_fp32():
    """300 steps on the same gradients: unbiased, so the codes' mean error is far below their distance."""
    (eight, params), (wide, wide_params) = build(dtype=torch.float32), build(None, dtype=torch.float32)
    for optimizer, of in ((eight, params), (wide, wide_params)):
        run(optimizer, of, range(300))
    exact = wide.state[wide_params[0]]["exp_avg"]
    error = decoded(eight, params[0]) - exact
    # the distance between codes is up to a sixteenth, and about 100 roundings are in a momentum of weight 0.99
    assert 0.02 < error.std() / exact.std() < 0.3
    assert error.mean().abs() < 4 * error.std() / error.numel() ** 0.5


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, None, torch.int8], ids=str)
@pytest.mark.parametrize("into", [torch.float32, torch.int8], ids=str)
def test_a_loaded_momentum_keeps_its_dtype_until_the_setting_changes(saved, into):
    source, params = build(saved)
    run(source, params, range(3))
    target, others = build(into)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for p, q in zip(params, others, strict=True):
        assert source.state[p].keys() == target.state[q].keys()
        assert all(torch.equal(source.state[p][key], target.state[q][key]) for key in source.state[p])
    before = [decoded(source, p) if saved == torch.int8 else source.state[p]["exp_avg"].float() for p in params[:2]]
    target.param_groups[0]["momentum_dtype"] = into
    for q in others:
        q.grad = torch.full_like(q, float("nan"))  # a step that leaves the momentum as it is
    target.step()
    for old, q in zip(before, others, strict=False):
        is_coded = into == torch.int8
        assert (target.state[q]["exp_avg"].dtype == torch.int8) == is_coded
        assert ("exp_avg_scale" in target.state[q]) == is_coded
        new = decoded(target, q) if is_coded else target.state[q]["exp_avg"].float()
        # two roundings to neighbouring codes, a sixteenth apart, and their scale
        assert ((new - old).abs() <= (old.abs() + old.abs().max() / 247) / 7 * is_coded).all()
    run(target, others, range(3, 5))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, "float8_e4m3fnuz"])
@pytest.mark.parametrize("cls", [Lion, SinkGD, LANTON])
def test_other_dtypes_of_8_bit_floating_point_are_refused_by_name(cls, dtype):
    with pytest.raises(TypeError, match=rf"{cls.__name__}: momentum_dtype .*float8_e.m.*take torch.int8 or"):
        cls([torch.nn.Parameter(torch.ones(2, 2))], momentum_dtype=dtype)


def test_other_integers_are_refused():
    with pytest.raises(TypeError, match=r"momentum_dtype must be a floating torch.dtype, torch.int8, 'fp8' or None"):
        build(torch.int16)


@pytest.mark.parametrize("name", ["fp8", torch.float8_e4m3fn], ids=str)
def test_a_momentum_in_fp8_becomes_one_in_int8_and_back(name):
    """As close as two roundings allow: 1 / 8 and 1 / 16 of a value at most, and the scales of both."""
    optimizer, params = build(name)
    run(optimizer, params, range(3))
    codes, scales = (optimizer.state[params[0]][key] for key in ("exp_avg", "exp_avg_scale"))
    assert codes.dtype == torch.float8_e4m3fn and not codes.isnan().any()
    old = decoded(optimizer, params[0])
    largest = scales.max().item() * 448
    for setting, share in (("int8", 1 / 16), ("fp8", 1 / 8)):
        optimizer.param_groups[0]["momentum_dtype"] = setting
        optimizer._init_group()  # as torch.compile does: the state of a step, without the step
        new = decoded(optimizer, params[0])
        assert ((new - old).abs() <= share * (old.abs() + largest / 247)).all() and not torch.equal(new, old)
        old = new


@pytest.mark.parametrize(("dtype", "code"), [("fp8", 0x7F), ("fp8", 0xFF), ("int8", 0x80)])
@pytest.mark.parametrize("cls", [Lion, SinkGD])
def test_a_byte_that_is_no_code_is_refused(cls, dtype, code):
    """NaN and -128, which no step writes: kernels do not agree on the value of the latter."""
    param = torch.nn.Parameter(torch.ones(5, 200))
    settings = {"algorithm": "adamw"} if cls is SinkGD else {}
    optimizer = cls([{"params": [param], **settings}], momentum_dtype=dtype)
    param.grad = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    before = param.detach().clone(), optimizer.state[param]["exp_avg"].clone()
    damaged = copy.deepcopy(optimizer.state_dict())
    damaged["state"][0]["exp_avg"].view(torch.uint8)[2, 3] = code
    got = "finite numbers, got infinity or NaN" if dtype == "fp8" else r"numbers in \[-127, 127\], got -128"
    with pytest.raises(ValueError, match=f"'exp_avg' .*expected {got}; nothing was changed"):
        optimizer.load_state_dict(damaged)
    assert torch.equal(param, before[0]) and torch.equal(optimizer.state[param]["exp_avg"], before[1])
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["state"][0]["exp_avg"] = torch.zeros(5, 200, dtype=torch.uint8)
    with pytest.raises(ValueError, match="'exp_avg' .*expected (float8_e4m3fn|int8), got uint8"):
        optimizer.load_state_dict(wrong)


@pytest.mark.parametrize(("before", "after"), [((64,), (8, 8)), ((8, 8), (64,))])
def test_a_vector_that_became_a_matrix_is_refused_by_name(before, after):
    param = torch.nn.Parameter(torch.ones(before))
    optimizer = Lion([param], lr=1e-3, momentum_dtype=torch.int8)
    for shape in (before, after):
        param.data = torch.ones(shape)
        param.grad = torch.ones(shape)
        if shape == after:
            with pytest.raises(ValueError, match="'exp_avg' of parameter 0 .* was resized"):
                optimizer.step()
        else:
            optimizer.step()
    assert torch.equal(param, torch.ones(after))
