"""cautious_decay of SinkGD and LANTON: p = p - u - lr * weight_decay * [u p >= 0] p, with u the step without decay."""

import copy

import pytest
import torch

from leanstep.optimizers import LANTON, Lion, SinkGD

DECAY = 0.3


def sinkgd_groups(params):
    algorithms = ["sinkgd", "sinkgd", "balanced", "adamw"]
    return [{"params": [p], "algorithm": a, "scale": 0.5} for p, a in zip(params, algorithms, strict=True)]


def lanton_groups(params):
    norms = ["rms", "rms", "sign", "vector"]
    return [{"params": [p], "norm": n} for p, n in zip(params, norms, strict=True)]


def set_gradients(params, step):
    chance = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=chance, dtype=torch.float64).to(param.dtype)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("cls", "groups", "options"),
    [
        (SinkGD, sinkgd_groups, {}),
        (SinkGD, sinkgd_groups, {"momentum": 0.9, "spectral": "unit"}),
        (LANTON, lanton_groups, {"alpha": "auto", "nesterov": True}),
    ],
    ids=["SinkGD", "SinkGD, scaled", "LANTON"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_follows_the_formula(cls, groups, options, maximize, dtype):
    chance = torch.Generator().manual_seed(0)
    shapes = [(9, 6), (2, 5, 7), (11, 4), (13,)]
    params = [torch.randn(s, generator=chance, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    optimizer = cls(groups(params), lr=0.1, weight_decay=DECAY, cautious_decay=True, maximize=maximize, **options)
    for step in range(3):
        set_gradients(params, step)
        plain = copy.deepcopy(optimizer)
        for group in plain.param_groups:
            group["weight_decay"] = 0.0
        without = [group["params"][0] for group in plain.param_groups]
        set_gradients(without, step)
        plain.step()
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for param, old, new, group in zip(params, before, without, optimizer.param_groups, strict=True):
            rate = group["lr"] * (group["scale"] if group.get("algorithm") in ("sinkgd", "balanced") else 1.0)
            update = old - new.detach()
            aligned = update * old >= 0
            assert 0 < aligned.double().mean() < 1
            want = new.detach() - torch.where(aligned, rate * DECAY * old, 0.0)
            torch.testing.assert_close(param.detach(), want, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize(
    "build",
    [
        lambda p, **settings: Lion([p], **settings),
        lambda p, **settings: SinkGD([p], algorithm="sinkgd", **settings),
        lambda p, **settings: SinkGD([p], algorithm="adamw", **settings),
        lambda p, **settings: LANTON([p], norm="sign", **settings),
    ],
    ids=["Lion", "SinkGD", "AdamW", "LANTON"],
)
def test_entries_with_a_zero_update_decay(build):
    """The paper's mask is update * parameter >= 0."""
    param = torch.nn.Parameter(torch.tensor([[2.0, -2.0], [4.0, -4.0]]))
    optimizer = build(param, lr=0.1, weight_decay=DECAY, cautious_decay=True)
    param.grad = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    rate = 0.1 * optimizer.defaults.get("scale", 1.0) if optimizer.defaults.get("algorithm") == "sinkgd" else 0.1
    optimizer.step()
    torch.testing.assert_close(param[0].detach(), torch.tensor([2.0, -2.0]) * (1 - rate * DECAY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_update_against_a_small_parameter_does_not_decay_it(dtype):
    """The product of the momentum and the parameter is below the smallest number of fp16."""
    params = [torch.full((4,), 1e-3, dtype=dtype, requires_grad=True) for _ in range(2)]
    for param, decay in zip(params, (0.0, 100.0), strict=True):
        param.grad = torch.full((4,), -1e-4, dtype=dtype)
        SinkGD([param], lr=1e-3, weight_decay=decay, algorithm="adamw", cautious_decay=True, eps=1e-4).step()
    assert torch.equal(*params)
