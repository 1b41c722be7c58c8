"""AdamW's moments, and the momenta of SinkGD and LANTON, in 8 bits: their size, training with them, and conversion."""

import copy

import pytest
import torch
from optimizer_cases import run
from torch import nn

from leanstep.kernels.reference.quantization import dequantize
from leanstep.optimizers import LANTON, Lion, SinkGD

# name -> (class, settings, settings of 8 bits, bytes of state per parameter of a matrix)
METHODS = {
    "lion": (Lion, {"lr": 1e-4}, ("momentum_dtype",), 1.03125),
    "adamw": (SinkGD, {"lr": 1e-3, "algorithm": "adamw"}, ("momentum_dtype",), 2.0625),
    "sinkgd": (SinkGD, {"lr": 2e-2, "algorithm": "sinkgd", "momentum": 0.9}, ("momentum_dtype",), 1.03125),
    "sinkgd post": (
        SinkGD,
        {"lr": 2e-2, "algorithm": "sinkgd", "momentum": 0.9, "momentum_order": "post", "transposed": True},
        ("momentum_dtype",),
        1.03125,
    ),
    "lanton": (LANTON, {"lr": 1e-2, "norm": "rms"}, ("momentum_dtype", "noise_dtype"), 2.0625),
    "lanton sign": (LANTON, {"lr": 1e-3, "norm": "sign"}, ("momentum_dtype", "noise_dtype"), 2.0625),
}
CODES = ("exp_avg", "exp_avg_sq", "momentum_buffer", "previous_grad")


def build(name, int8=True, shape=(64, 256), **more):
    cls, settings, dtypes, _ = METHODS[name]
    param = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dtype = torch.int8 if int8 else None
    return cls([param], **{**settings, **dict.fromkeys(dtypes, dtype), **more}), param


def averages(optimizer, param):
    """The averages of a parameter, decoded."""
    state = optimizer.state[param]
    return {
        key: dequantize(state[key], state[f"{key}_scale"], torch.float32) if f"{key}_scale" in state else state[key]
        for key in CODES
        if key in state
    }


@pytest.mark.parametrize("name", METHODS)
def test_bytes_of_state(name):
    optimizer, param = build(name)
    run(optimizer, [param], range(1))
    # beside numbers per matrix: a step count, and LANTON's estimates
    assert 0 <= optimizer.state_bytes() - METHODS[name][3] * param.numel() <= 4 + 12


@pytest.mark.parametrize("name", METHODS)
def test_training_curves_overlap(name):
    """Fit a matrix from noisy products: the losses of 8 bits and of fp32 differ by less than 3 % all the way."""
    goal = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    rate = {"lanton": 0.5, "sinkgd": 0.4, "sinkgd post": 0.4}.get(name, 2e-2)

    def losses(int8):
        optimizer, param = build(name, int8, lr=rate)
        values = []
        for step in range(60):
            inputs = torch.randn(32, 256, generator=torch.Generator().manual_seed(step))
            loss = (inputs @ (param - goal).T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append((param.detach() - goal).square().mean())
        return torch.stack(values)

    eight, wide = losses(True), losses(False)
    assert not torch.equal(eight, wide) and wide[-1] < 0.7 * wide[0]
    assert ((eight - wide).abs() <= 0.03 * wide).all()


@pytest.mark.parametrize("into_int8", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_changing_the_setting_converts_the_state(name, into_int8):
    """The next step converts, also after loading; a step that skips its gradient shows what it converted."""
    optimizer, param = build(name, not into_int8)
    run(optimizer, [param], range(3))
    before = averages(optimizer, param)
    other, twin = build(name, into_int8)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(torch.equal(other.state[twin][k], v) for k, v in optimizer.state[param].items())
    for setting in METHODS[name][2]:
        other.param_groups[0][setting] = torch.int8 if into_int8 else None
    twin.grad = torch.full_like(twin, float("nan"))
    other.step()
    after = averages(other, twin)
    assert before.keys() == after.keys()
    for key, old in before.items():
        assert (f"{key}_scale" in other.state[twin]) == into_int8
        largest = old.abs().amax() / (63487 if key == "exp_avg_sq" else 247)
        assert ((after[key] - old).abs() <= (old.abs() + largest) / 15 * into_int8).all()
    run(other, [twin], range(3, 5))


@pytest.mark.parametrize("name", METHODS)
def test_codes_without_scales_and_scales_without_the_setting_are_refused(name):
    optimizer, param = build(name)
    run(optimizer, [param], range(2))
    state = copy.deepcopy(optimizer.state_dict())
    key = next(key for key in CODES if key in state["state"][0])
    lost, unmarked, uncounted = (copy.deepcopy(state) for _ in range(3))
    del lost["state"][0][f"{key}_scale"], uncounted["state"][0]["step"]
    for setting in METHODS[name][2]:
        unmarked["param_groups"][0][setting] = None
    before = averages(optimizer, param)
    for damaged, said in (
        (lost, f"has no {key}_scale"),
        (uncounted, "has no step"),
        (unmarked, f"{key}'.*expected float|{key}_scale.*expected one of"),
    ):
        with pytest.raises(ValueError, match=rf"({said}).*nothing was changed"):
            optimizer.load_state_dict(damaged)
    assert all(torch.equal(averages(optimizer, param)[k], v) for k, v in before.items())


@pytest.mark.parametrize(("name", "off"), [("sinkgd", {"momentum": 0.0}), ("lanton", {"noise_adaptive": False})])
def test_codes_that_are_switched_off_are_saved_and_loaded(name, off):
    optimizer, param = build(name)
    run(optimizer, [param], range(2))
    optimizer.param_groups[0].update(off)
    other, twin = build(name)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(torch.equal(other.state[twin][key], value) for key, value in optimizer.state[param].items())


def test_parameters_of_one_dimension_have_averages_of_their_dtype():
    for name in ("adamw", "lanton sign"):
        optimizer, param = build(name, shape=(300,))
        run(optimizer, [param], range(2))
        assert all(v.dtype == torch.float32 for v in averages(optimizer, param).values())
        assert not any(key.endswith("_scale") for key in optimizer.state[param])


@pytest.mark.parametrize("name", ["lion", *(name for name in METHODS if name != "adamw")])
def test_changing_the_setting_between_ordinary_dtypes_converts_the_state(name):
    """The next step converts; without a setting every tensor keeps its dtype."""
    cls, settings, dtypes, _ = METHODS.get(name, (Lion, {"lr": 1e-3}, ("momentum_dtype",), None))
    param = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = cls([param], **settings)
    run(optimizer, [param], range(2))
    before = averages(optimizer, param)
    for setting, expected in ((torch.bfloat16, torch.bfloat16), ("float64", torch.float64), (None, torch.float64)):
        for name_of_setting in dtypes:
            optimizer.param_groups[0][name_of_setting] = setting
        param.grad = torch.full_like(param, float("nan"))  # which the step skips
        optimizer.step()
        after = averages(optimizer, param)
        assert after.keys() == before.keys() and all(value.dtype == expected for value in after.values())
        assert all(torch.equal(after[key].float(), old.bfloat16().float()) for key, old in before.items())
    run(optimizer, [param], range(2, 4))
    assert torch.isfinite(param).all()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("into", ["nearest", "master", "kahan", "split", "stochastic"])
@pytest.mark.parametrize("start", ["nearest", "master", "kahan", "split", "stochastic"])
def test_changing_the_rounding_converts_the_moments_of_adamw(start, into, fused):
    param = torch.nn.Parameter(torch.linspace(-1, 1, 256).bfloat16())
    twin = torch.nn.Parameter(param.detach().float())
    optimizer = SinkGD([param], lr=1e-2, algorithm="adamw", rounding=start, fused=fused)
    control = torch.optim.AdamW([twin], lr=1e-2, weight_decay=0.0)
    for step in range(6):
        if step == 3:
            optimizer.param_groups[0]["rounding"] = into
        param.grad = torch.randn(256, generator=torch.Generator().manual_seed(step)).bfloat16()
        twin.grad = param.grad.float()
        optimizer.step()
        control.step()
    dtype = torch.bfloat16 if into == "nearest" else torch.float32
    state = optimizer.state[param]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
    torch.testing.assert_close(param.float(), twin, rtol=0.02, atol=0.05)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[key].float(), control.state[twin][key], rtol=0.03, atol=5e-3)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16], ids=str)
def test_adamw_follows_a_model_that_changes_its_dtype(start, fused):
    into = torch.bfloat16 if start == torch.float32 else torch.float32
    model = torch.nn.Linear(256, 1, bias=False)
    twin = torch.nn.Parameter(model.weight.detach().clone())
    model.to(start)
    optimizer = SinkGD(model.parameters(), lr=1e-3, algorithm="adamw", fused=fused)
    control = torch.optim.AdamW([twin], lr=1e-3, weight_decay=0.0)
    for step in range(6):
        if step == 3:
            model.to(into)
        twin.grad = torch.randn(1, 256, generator=torch.Generator().manual_seed(step)).bfloat16().float()
        model.weight.grad = twin.grad.to(model.weight.dtype)
        optimizer.step()
        control.step()
    assert optimizer.state[model.weight]["exp_avg"].dtype == into
    torch.testing.assert_close(model.weight.float(), twin, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("algorithm", ["adamw", "sinkgd"])
def test_a_tensor_of_one_element_is_a_learning_rate_whatever_its_shape(shape, algorithm):
    params = [[nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(3, 2))] for _ in range(2)]
    for copies, lr in zip(params, (0.1, torch.full(shape, 0.1)), strict=True):
        optimizer = SinkGD(copies, lr=lr, algorithm=algorithm, momentum=0.9, momentum_dtype="int8")
        for step in range(2):
            for i, param in enumerate(copies):
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
    for expected, param in zip(*params, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)
