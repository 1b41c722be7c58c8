"""Hooks around a step act on the gradients that the step uses; the output head and Conv1D are found in models."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D

from leanstep._torch import StepHooks, is_conv1d, output_head


class Recorder:
    """Halves the gradients before every step, and counts."""

    def __init__(self, model):
        self.parameters, self.before, self.after = list(model.parameters()), 0, 0

    def halve(self, optimizer):
        self.before += 1
        for parameter in self.parameters:
            parameter.grad.mul_(0.5)

    def count(self, optimizer):
        self.after += 1


def setting(lr=0.1):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    inputs = torch.randn(5, 4)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    return model, optimizer, closure


def half_step():
    """Weights after one step with half the gradient."""
    model, optimizer, closure = setting(lr=0.05)
    closure()
    optimizer.step()
    return model.weight.detach()


@pytest.mark.parametrize("form", ["plain", "closure", "keyword", "none"])
def test_gradients_are_changed_once_for_every_form_of_a_step(form):
    model, optimizer, closure = setting()
    recorder = Recorder(model)
    StepHooks(optimizer, recorder.halve, recorder.count, caller="test")
    if form in ("plain", "none"):
        closure()
        result = optimizer.step() if form == "plain" else optimizer.step(None)
    else:
        expected = closure().item()
        result = optimizer.step(closure) if form == "closure" else optimizer.step(closure=closure)
        assert result.item() == expected
    assert (recorder.before, recorder.after) == (1, 1)
    torch.testing.assert_close(model.weight.detach(), half_step(), rtol=0, atol=1e-7)


def test_every_call_of_a_closure_counts():
    model, _, _ = setting()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")
    recorder, calls = Recorder(model), []
    StepHooks(optimizer, recorder.halve, recorder.count, caller="test")

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert recorder.before == len(calls) > 1 and recorder.after == 1


def test_accelerates_wrapper_is_hooked_where_it_steps():
    model, optimizer, closure = setting()
    wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer)
    recorder = Recorder(model)
    hooks = StepHooks(wrapped, recorder.halve, recorder.count, caller="test")
    wrapped.step(closure)
    assert (recorder.before, recorder.after) == (1, 1)
    torch.testing.assert_close(model.weight.detach(), half_step(), rtol=0, atol=1e-7)
    hooks.remove()
    closure()
    wrapped.step()
    assert (recorder.before, recorder.after) == (1, 1)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_is_none(fused):
    model, _, closure = setting()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    recorder = Recorder(model)
    StepHooks(optimizer, recorder.halve, recorder.count, caller="test")
    for loss_factor, steps in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).square().mean() * loss_factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert recorder.after == steps


def test_hooks_are_copied_with_what_they_call():
    model, optimizer, closure = setting()
    recorder = Recorder(model)
    hooks = StepHooks(optimizer, recorder.halve, recorder.count, caller="test")
    copy.deepcopy(hooks).remove()
    closure()
    optimizer.step()
    assert (recorder.before, recorder.after) == (1, 1)


def test_what_cannot_be_hooked_is_refused_by_name():
    model, optimizer, _ = setting()
    with pytest.raises(TypeError, match="test: expected a torch optimizer, got Linear"):
        StepHooks(model, print, print, caller="test")
    parameters = {"new": nn.Parameter(torch.ones(2)), "weight": model.weight}
    with pytest.raises(ValueError, match="test: SGD does not train new; build the optimizer"):
        StepHooks(optimizer, print, print, caller="test", parameters=parameters)
    StepHooks(optimizer, print, print, caller="test", parameters={"new": nn.Parameter(torch.ones(2), False)})


def test_conv1d_and_the_output_head():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=4))
    assert is_conv1d(model.transformer.h[0].mlp.c_fc) and isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)
    assert not is_conv1d(nn.Conv1d(2, 2, 1)) and not is_conv1d(model.lm_head)
    assert output_head(model) is model.lm_head
    assert output_head(GPT2Model(model.config)) is None and output_head(nn.Linear(2, 2)) is None
