"""Weights of more bits than their parameters: split weights, conversions, and full_precision_state_dict."""

import copy

import pytest
import torch
from optimizer_cases import run

from leanstep.optimizers import LANTON, Lion, SinkGD, param_groups
from leanstep.optimizers.common.rounding import STATE_KEY

# largest relative distance between a weight and what a rounding keeps of it
PRECISION = {"nearest": 2.0**-8, "kahan": 2.0**-17, "split": 2.0**-16, "master": 0.0}


class Tied(torch.nn.Module):
    """An embedding tied to the head, a buffer, and a frozen parameter."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        chance = torch.Generator().manual_seed(0)
        self.embed = torch.nn.Embedding(20, 16)
        self.head = torch.nn.Linear(16, 20, bias=False)
        self.norm = torch.nn.LayerNorm(16)
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("count", torch.tensor(7))
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=chance))
        self.head.weight = self.embed.weight
        self.to(dtype)


def stepped(rounding, steps=20, dtype=torch.bfloat16, **settings):
    model = Tied(dtype)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = Lion(named, lr=1e-3, rounding=rounding, momentum_dtype=torch.float32, **settings)
    run(optimizer, [p for _, p in named], range(steps))
    return model, optimizer


def weights_of(optimizer):
    return torch.cat([w.flatten() for w in optimizer.full_precision_state_dict().values()]).double()


@pytest.mark.parametrize("rounding", PRECISION)
def test_a_model_in_fp32_loads_the_weights(rounding):
    """Tied weights, buffers and frozen parameters as in the model's own state dict."""
    model, optimizer = stepped(rounding)
    weights = optimizer.full_precision_state_dict(model)
    stored = model.state_dict()
    assert list(weights) == list(stored)
    Tied(torch.float32).load_state_dict(weights)
    assert torch.equal(weights["embed.weight"], weights["head.weight"]) and weights["count"] == 7
    for name, weight in weights.items():
        if weight.is_floating_point():
            assert weight.dtype == torch.float32
            if rounding == "split":
                assert ((weight - stored[name]).abs() <= stored[name].abs().float() * 2**-8).all()
            else:
                assert torch.equal(weight.bfloat16(), stored[name])
    named = optimizer.full_precision_state_dict()
    assert named.keys() == {"embed.weight", "norm.weight", "norm.bias"}
    assert all(torch.equal(weights[name], weight) for name, weight in named.items())
    # copies: the next step does not change them
    before = copy.deepcopy(weights)
    run(optimizer, [p for p in model.parameters() if p.requires_grad], range(20, 21))
    assert all(torch.equal(before[name], weight) for name, weight in weights.items())


def test_the_extra_state_of_a_module_is_left_as_it_is():
    class WithExtraState(torch.nn.Linear):
        def get_extra_state(self):
            return {"count": 7}

        def set_extra_state(self, state):
            self.count = state["count"]

    model = WithExtraState(3, 3, dtype=torch.bfloat16)
    weights = Lion(model.named_parameters()).full_precision_state_dict(model)
    assert weights["weight"].dtype == torch.float32 and weights["_extra_state"] == {"count": 7}
    wide = WithExtraState(3, 3)
    wide.load_state_dict(weights)
    assert wide.count == 7


@pytest.mark.parametrize("rounding", [r for r in PRECISION if r != "nearest"])
def test_a_step_follows_fp64_to_the_precision_of_the_rounding(rounding):
    """From the same weights, one step: the error is that of one rounding, beside those of fp32 arithmetic."""
    model, optimizer = stepped(rounding)
    before = weights_of(optimizer)
    params = [p for p in model.parameters() if p.requires_grad]
    exp_avgs = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in params]).double()
    run(optimizer, params, range(20, 21))
    grads = torch.cat([p.grad.flatten() for p in params]).double()
    exact = before - torch.tensor(1e-3).double() * torch.sign(0.9 * exp_avgs + 0.1 * grads)
    error = (weights_of(optimizer) - exact).abs() / exact.abs()
    assert error.max() <= PRECISION[rounding] + 2.0**-23
    if rounding != "master":
        assert error.max() > PRECISION[rounding] / 4


@pytest.mark.parametrize("cls", [Lion, SinkGD, LANTON])
def test_many_steps_follow_fp32(cls):
    """30 steps with the same gradients: each adds a rounding of 2**-16, and those to nearest are coarser."""

    groups = {Lion: {}, SinkGD: {"algorithm": "sinkgd"}, LANTON: {"norm": "sign"}}
    settings = {
        Lion: {"momentum_dtype": torch.float32},
        SinkGD: {"lr": 2e-2},
        LANTON: {"momentum_dtype": torch.float32},
    }

    def trained(dtype, rounding):
        weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
        param = weight.to(dtype).requires_grad_()
        options = {"lr": 1e-3, "rounding": rounding, **settings[cls]}
        optimizer = cls([{"params": [("weight", param)], **groups[cls]}], **options)
        for step in range(30):
            chance = torch.Generator().manual_seed(step)
            param.grad = torch.randn(param.shape, generator=chance).bfloat16().to(dtype)
            optimizer.step()
        return optimizer.full_precision_state_dict()["weight"]

    wide = trained(torch.float32, "nearest")
    split, nearest = (trained(torch.bfloat16, rounding) for rounding in ("split", "nearest"))
    size = wide.abs().amax()
    assert (split - wide).abs().max() <= 30 * 2.0**-16 * size < (nearest - wide).abs().max()


def test_lion_with_split_weights_and_an_int8_momentum_takes_4_bytes():
    model = torch.nn.Sequential(torch.nn.Linear(512, 1024, bias=False), torch.nn.Linear(1024, 384)).bfloat16()
    optimizer = Lion(model.parameters(), lr=1e-3, rounding="split", momentum_dtype=torch.int8)
    params = list(model.parameters())
    run(optimizer, params, range(1))
    bytes_per_parameter = 2 + optimizer.state_bytes() / sum(p.numel() for p in params)
    assert 4.03 < bytes_per_parameter < 4.04


@pytest.mark.parametrize("into", STATE_KEY)
@pytest.mark.parametrize("saved", STATE_KEY)
def test_changing_the_setting_converts_the_weights(saved, into):
    """The next step converts, also after loading; a step of size 0 shows the weights as they were converted."""
    _, source = stepped(saved)
    before = weights_of(source)
    model, target = stepped(into, 1)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for param, other in zip(params, source.param_groups[0]["params"], strict=True):
            param.copy_(other)
    assert torch.equal(weights_of(target), before)
    target.param_groups[0].update(rounding=into, lr=0.0)
    run(target, params, range(20, 21))
    assert all(STATE_KEY.values() & target.state[p].keys() == {STATE_KEY[into]} for p in params)
    error = (weights_of(target) - before).abs() / before.abs()
    assert error.max() <= PRECISION[into]


def test_a_written_weight_is_not_undone():
    """Zeros stay zeros, and other weights move by less than half the distance to the next bf16 number."""
    model, optimizer = stepped("split", 5)
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for param in params:
            param.mul_(0.75)
            param.flatten()[::2] = 0.0
    written = torch.cat([p.flatten() for p in params]).double()
    weights = weights_of(optimizer)
    assert not weights[written == 0].any()
    error = (weights - written).abs() / written.abs().clamp_min(1e-30)
    assert 2.0**-10 < error.max() <= 2.0**-8


def test_weights_without_names_are_refused():
    param = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"Lion: expected named parameters.*full_precision_state_dict\(model\)"):
        Lion([param]).full_precision_state_dict()
    model = torch.nn.Linear(3, 2)
    assert Lion(param_groups(model)).full_precision_state_dict().keys() == {"weight", "bias"}


@pytest.mark.parametrize("cls", [Lion, SinkGD, LANTON])
def test_split_takes_bf16(cls):
    for dtype in (torch.float32, torch.float16):
        param = torch.ones(4, 3, dtype=dtype, requires_grad=True)
        group = {Lion: {}, SinkGD: {"algorithm": "adamw"}, LANTON: {"norm": "sign"}}[cls]
        optimizer = cls([{"params": [param], **group}], rounding="split")
        param.grad = torch.ones_like(param)
        if dtype == torch.float16:
            with pytest.raises(ValueError, match=r"rounding='split' supports bfloat16 parameters, but parameter 0 of"):
                optimizer.step()
        else:
            optimizer.step()
            assert "split_difference" not in optimizer.state[param]
