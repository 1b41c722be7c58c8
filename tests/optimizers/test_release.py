"""Stepping inside the backward pass: the same update, and no gradient left behind."""

import copy

import pytest
import torch
from torch import nn

from leanstep.optimizers import Lion, SinkGD, param_groups, release_gradients


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 8))


CASES = {
    "lion": lambda model: Lion(param_groups(model), lr=1e-3, weight_decay=0.1),
    "lion cautious": lambda model: Lion(model.parameters(), lr=1e-3, cautious=True),
    "lion stochastic": lambda model: Lion(model.to(torch.bfloat16).parameters(), lr=1e-3, rounding="stochastic"),
    "sinkgd": lambda model: SinkGD(param_groups(model), lr=1e-2),
    "sinkgd momentum": lambda model: SinkGD(param_groups(model), lr=1e-2, momentum=0.9),
    "sinkgd stochastic": lambda model: SinkGD(param_groups(model.to(torch.bfloat16)), lr=1e-2, rounding="stochastic"),
}


@pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())
def test_equals_the_whole_step_bit_for_bit(build):
    plain, released = model_of(), model_of()
    first, second = build(plain), build(released)
    handle = release_gradients(released, second)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (first, second)]
    for step in range(3):
        inputs = torch.randn(4, 24, dtype=next(plain.parameters()).dtype)
        for model, optimizer, scheduler in zip((plain, released), (first, second), schedulers, strict=True):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            if model is released:
                assert all(p.grad is None for p in model.parameters()), step
            optimizer.step()
            scheduler.step()
    for a, b in zip(plain.parameters(), released.parameters(), strict=True):
        assert torch.equal(a, b)
    handle.remove()
    before = copy.deepcopy(released.state_dict())
    released(inputs).square().mean().backward()
    assert all(p.grad is not None for p in released.parameters())
    assert all(torch.equal(v, before[k]) for k, v in released.state_dict().items())


@pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())
def test_a_state_loaded_after_the_release_is_the_one_that_steps(build):
    """Loading replaces the optimizer's groups: rate, seed and count of the loaded ones apply from then on."""
    source = model_of()
    saved = build(source)
    for group in saved.param_groups:
        group["lr"] *= 0.5
    dtype = next(source.parameters()).dtype
    source(torch.randn(4, 24, dtype=dtype)).square().mean().backward()
    saved.step()
    plain, released = model_of(), model_of()
    first, second = build(plain), build(released)
    for model in (plain, released):
        model.load_state_dict(source.state_dict())
    handle = release_gradients(released, second)
    for optimizer in (first, second):
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (first, second)]
    for scale in (1.0, 1.0, float("nan")):
        inputs = torch.randn(4, 24, dtype=dtype)
        for model, optimizer, scheduler in zip((plain, released), (first, second), schedulers, strict=True):
            optimizer.zero_grad()
            (model(inputs).square().mean() * scale).backward()
            optimizer.step()
            scheduler.step()
    for a, b in zip(plain.parameters(), released.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.nonfinite_count() == second.nonfinite_count() == 6
    handle.remove()


def test_gradients_never_exist_together():
    """At every hook at most the one parameter whose gradient is complete still has it."""
    model = model_of()
    optimizer = SinkGD(param_groups(model), lr=1e-2)
    alive = []
    with release_gradients(model, optimizer):
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
            )
        model(torch.randn(4, 24)).square().mean().backward()
    assert len(alive) == 6 and max(alive) <= 1


def test_accumulation_is_refused():
    model = model_of()
    optimizer = Lion(model.parameters())
    release_gradients(model, optimizer)
    model(torch.randn(4, 24)).square().mean().backward()
    with pytest.raises(RuntimeError, match="cannot be accumulated"):
        model(torch.randn(4, 24)).square().mean().backward()
    optimizer.step()
    model(torch.randn(4, 24)).square().mean().backward()


def test_what_cannot_be_released_is_refused():
    model = model_of()
    with pytest.raises(TypeError, match="AdamW cannot step parameters one by one; expected one of"):
        release_gradients(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="nonfinite='raise' must see all gradients first"):
        release_gradients(model, Lion(model.parameters(), nonfinite="raise"))
    with pytest.raises(ValueError, match="parameters that the model does not"):
        release_gradients(model[0], Lion(model.parameters()))


def test_a_nonfinite_gradient_is_skipped_and_counted():
    model = model_of()
    optimizer = SinkGD(param_groups(model), lr=1e-2)
    release_gradients(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    (model(torch.randn(4, 24)).sum() * float("nan")).backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert optimizer.nonfinite_count() == 6
