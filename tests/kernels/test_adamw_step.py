"""AdamW on the CPU: the C++ kernel gives the bits of torch's, whatever the size, the layout and the settings."""

import pytest
import torch

from leanstep import use_backend
from leanstep.kernels.steps import adamw_step as module
from leanstep.kernels.steps.adamw_step import adamw_step

SIZES = [*range(1, 66, 3), 1000, 4097, 65537, 131072]
SETTINGS = [
    {"betas": (0.9, 0.999), "weight_decay": 0.1, "maximize": False},
    {"betas": (0.4, 0.95), "weight_decay": 0.0, "maximize": True},
    {"betas": (0.0, 0.5), "weight_decay": 0.1, "maximize": False},
    {"betas": (0.95, 0.0), "weight_decay": 0.01, "maximize": False},
]


def steps_of_torch(params, grads, **settings):
    params = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True, **settings)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [(p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]) for p in params]


def assert_equal_to_torch(params, grads, **settings):
    want = steps_of_torch(params, grads, **settings)
    got = [(p.clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    steps = [torch.zeros(()) for _ in params]
    for step in grads:
        columns = [list(column) for column in zip(*got, strict=True)]
        adamw_step(columns[0], step, *columns[1:], steps, lr=1e-3, eps=1e-8, **settings)
    assert [float(s) for s in steps] == [len(grads)] * len(params)
    for mine, theirs in zip(got, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), tuple(mine[0].shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", SETTINGS)
def test_bits_are_those_of_torch(settings, dtype):
    if dtype == torch.bfloat16:
        # else torch's kernel is compared with itself: where it has no fused multiply-add
        assert module._same_bits() or torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    chance = torch.Generator().manual_seed(0)
    params = [(torch.randn(n, generator=chance) * 0.02).to(dtype) for n in SIZES]
    grads = [
        [(torch.randn(n, generator=chance) * torch.randn(n, generator=chance).exp() * 1e-3).to(dtype) for n in SIZES]
        for _ in range(4)
    ]
    assert_equal_to_torch(params, grads, **settings)


@pytest.mark.parametrize("order", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_lists_of_both_dtypes(order):
    chance = torch.Generator().manual_seed(0)
    params = [torch.randn(130, generator=chance).to(dtype) for dtype in (*order, *order)]
    grads = [[torch.randn(130, generator=chance).to(p.dtype) for p in params] for _ in range(3)]
    assert_equal_to_torch(params, grads, **SETTINGS[0])


def test_layouts():
    """Any one dense layout of a row: transposed matrices, channels last."""
    chance = torch.Generator().manual_seed(0)
    params = [
        torch.randn(40, 65, generator=chance).bfloat16().t(),
        torch.randn(4, 3, 5, 7, generator=chance).bfloat16(),
    ]
    params[1] = params[1].to(memory_format=torch.channels_last)
    grads = [[torch.randn(p.shape, generator=chance).bfloat16() for p in params] for _ in range(3)]
    grads = [[torch.empty_like(p).copy_(g) for p, g in zip(params, step, strict=True)] for step in grads]
    assert_equal_to_torch(params, grads, **SETTINGS[0])


def test_steps_and_rates_of_their_own():
    """Tensors that have taken different numbers of steps, and a rate held by a tensor."""
    chance = torch.Generator().manual_seed(0)
    params = [torch.randn(96, generator=chance).bfloat16() for _ in range(2)]
    grads = [torch.randn(96, generator=chance).bfloat16() for _ in range(2)]
    results = []
    for backend in ("cpp", "reference"):
        rows = [[p.clone() for p in params], grads, *([torch.full_like(p, 1e-3) for p in params] for _ in range(2))]
        steps = [torch.tensor(3.0), torch.tensor(40.0)]
        with use_backend(backend):
            adamw_step(*rows, steps, lr=torch.tensor(2e-3), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
        assert [float(s) for s in steps] == [4.0, 41.0]
        results.append(torch.stack([*rows[0], *rows[2], *rows[3]]))
    assert torch.equal(*results)


def test_another_build_of_torch_keeps_its_own_kernel(monkeypatch):
    """Where the bits differ, torch's kernel runs."""
    monkeypatch.setattr(module, "_same_bits", lambda: False)
    monkeypatch.setattr(module, "_cpp", None)
    adamw_step(*([torch.ones(64).bfloat16()] for _ in range(4)), [torch.zeros(())], lr=1e-3, betas=(0.9, 0.999),
               eps=1e-8, weight_decay=0.0)  # fmt: skip


def test_nothing_to_do():
    adamw_step([], [], [], [], [], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


@pytest.mark.parametrize("odd", range(4))
def test_tensors_of_another_dtype_are_refused_and_nothing_is_written(odd):
    columns = [[torch.ones(128, dtype=torch.bfloat16)] for _ in range(4)]
    columns[odd] = [torch.ones(128)]
    steps = [torch.zeros(())]
    with pytest.raises(ValueError, match="adamw_step: expected tensors of one dtype at index 0.*float32.*convert"):
        adamw_step(*columns, steps, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    assert steps[0] == 0 and all((tensor == 1).all() for (tensor,) in columns)
