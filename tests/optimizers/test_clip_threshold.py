"""SinkGD's clip_threshold: AdamW's update U of a tensor, divided by max(1, RMS(U) / clip_threshold)."""

import copy

import pytest
import torch

from leanstep.optimizers import SinkGD
from leanstep.optimizers.sinkgd import clipping

SHAPES = [(9, 130), (3, 4, 5), (13,), ()]
BETAS, EPS, LR, DECAY, THRESHOLD = (0.9, 0.99), 1e-8, 0.05, 0.3, 0.7


def parameters(dtype):
    chance = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=chance, dtype=torch.float64).to(dtype).requires_grad_() for s in SHAPES]


def set_gradients(params, step):
    """Gradients that first stay, then turn, so that some updates are above the threshold and others below."""
    chance = torch.Generator().manual_seed(7)
    for i, param in enumerate(params):
        sign = -1.0 if step == 2 and i % 2 else 1.0
        noise = torch.randn(param.shape, generator=chance, dtype=torch.float64)
        param.grad = (sign * (noise + 0.1 * step) * 10.0**step).to(param.dtype)


def oracle(weights, moments, gradients, step, cautious=False):
    """The step in fp64, in place; the factors."""
    factors = []
    for weight, (average, square), gradient in zip(weights, moments, gradients, strict=True):
        average.mul_(BETAS[0]).add_((1 - BETAS[0]) * gradient)
        square.mul_(BETAS[1]).add_((1 - BETAS[1]) * gradient**2)
        update = (average / (1 - BETAS[0] ** step)) / ((square / (1 - BETAS[1] ** step)).sqrt() + EPS)
        factors.append(1 / max(1.0, update.square().mean().sqrt().item() / THRESHOLD))
        decay = torch.where(update * weight >= 0, DECAY, 0.0) if cautious else DECAY
        weight.sub_(LR * decay * weight + LR * factors[-1] * update)
    return factors


@pytest.mark.parametrize(
    ("dtype", "options", "tolerance"),
    [
        (torch.float64, {}, 1e-13),
        (torch.float64, {"fused": False}, 1e-13),
        (torch.float64, {"cautious_decay": True}, 1e-13),
        (torch.float32, {}, 1e-6),
        (torch.float32, {"lr": torch.tensor(LR)}, 1e-6),
        # half the distance of bf16 numbers below 4
        (torch.bfloat16, {"rounding": "master"}, 2**-7),
    ],
    ids=str,
)
def test_follows_the_formula(dtype, options, tolerance, monkeypatch):
    monkeypatch.setitem(clipping._PIECE, "cpu", 260)  # two rows of the first matrix
    params = parameters(dtype)
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "clip_threshold": THRESHOLD}
    optimizer = SinkGD(params, algorithm="adamw", **{**settings, **options})
    weights = [p.detach().double() for p in params]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    is_clipped = set()
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
        gradients = [p.grad.double() for p in params]
        factors = oracle(weights, moments, gradients, step + 1, "cautious_decay" in options)
        is_clipped |= {factor < 1 for factor in factors}
        for param, weight in zip(params, weights, strict=True):
            torch.testing.assert_close(param.detach().double(), weight, rtol=0, atol=tolerance)
    assert is_clipped == {True, False}


def test_8_bit_moments_are_clipped_by_their_own_update():
    """Without decay and clipping the step is -LR * U, whose root mean square decides."""
    params = [torch.zeros(9, 130, requires_grad=True), torch.zeros(4, 300, requires_grad=True)]
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "algorithm": "adamw", "momentum_dtype": torch.int8}
    optimizer = SinkGD(params, **settings, clip_threshold=THRESHOLD)
    for step in range(3):
        set_gradients(params, step)
        plain = copy.deepcopy(optimizer)
        plain.param_groups[0]["clip_threshold"] = None
        others = plain.param_groups[0]["params"]
        set_gradients(others, step)
        before = [p.detach().clone() for p in params]
        plain.step()
        optimizer.step()
        for param, other, old in zip(params, others, before, strict=True):
            update = (old - other.detach()) / LR
            want = old - LR * update / max(1.0, update.square().mean().sqrt().item() / THRESHOLD)
            torch.testing.assert_close(param.detach(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_updates_below_the_threshold_have_the_bits_of_adamw(dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    first = SinkGD(ours, lr=LR, algorithm="adamw", clip_threshold=100.0)
    second = SinkGD(theirs, lr=LR, algorithm="adamw")
    for step in range(3):
        for params, optimizer in ((ours, first), (theirs, second)):
            set_gradients(params, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_nan_gradient_is_skipped_or_passed_as_without_clipping():
    for nonfinite in ("skip", "pass"):
        results = []
        for threshold in (None, 0.5):
            params = [torch.ones(4, 6, requires_grad=True)]
            optimizer = SinkGD(params, algorithm="adamw", nonfinite=nonfinite, clip_threshold=threshold)
            params[0].grad = torch.ones(4, 6)
            params[0].grad[1, 2] = torch.nan
            optimizer.step()
            results.append(params[0].detach())
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
        assert results[0].isnan().sum() == (nonfinite == "pass")


@pytest.mark.parametrize("value", [-1.0, 0.0, "1", float("nan")])
def test_a_threshold_that_is_no_limit_is_refused(value):
    with pytest.raises((TypeError, ValueError), match="clip_threshold"):
        SinkGD(parameters(torch.float32), algorithm="adamw", clip_threshold=value)
