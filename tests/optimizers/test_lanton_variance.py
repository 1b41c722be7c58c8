"""variance="rows" against NorMuon's algorithm in float64, and what follows from it."""

import math

import pytest
import torch

from leanstep.optimizers import LANTON

EXACT = {"ns_coefficients": "classic_quintic", "noise_adaptive": False, "norm": "rms"}


def polar(matrix):
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def normuon(param, gradients, lr, weight_decay):
    """Algorithm 1 of arXiv 2510.05491, with the authors' Nesterov momentum."""
    momentum, variance = torch.zeros_like(param), torch.zeros(param.shape[0], 1, dtype=param.dtype)
    m, n = param.shape
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        o = polar(0.95 * momentum + 0.05 * gradient)
        variance = 0.95 * variance + 0.05 * o.square().mean(dim=1, keepdim=True)
        o = o / (variance.sqrt() + 1e-8)
        param = param * (1 - lr * weight_decay) - lr * 0.2 * math.sqrt(m * n) / o.norm() * o
    return param


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train(param, gradients, **options):
    param = param.clone().requires_grad_()
    optimizer = LANTON([param], variance="rows", **{**EXACT, **options})
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach(), optimizer.state[param]


@pytest.mark.parametrize("shape", [(9, 6), (5, 12), (8, 8)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_follows_normuon(shape, transposed):
    """Rows of gradients of very different sizes, over several steps."""
    param = normal(*shape)
    sizes = torch.logspace(-2, 1, shape[0], dtype=torch.float64).unsqueeze(1)
    gradients = [normal(*shape, seed=step + 1) * sizes for step in range(5)]
    expected = normuon(param, gradients, 0.1, 0.2)
    options = {"lr": 0.1, "weight_decay": 0.2, "scaling": "muon", "nesterov": True}
    if transposed:
        result, state = train(param.mT, [g.mT for g in gradients], transposed=True, **options)
        result = result.mT
    else:
        result, state = train(param, gradients, **options)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)
    assert state["row_mean_sq"].shape == (shape[0],) and state["row_mean_sq"].dtype == torch.float64


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_is_its_matrices(transposed):
    stack, gradients = normal(3, 5, 7), [normal(3, 5, 7, seed=step) for step in (1, 2, 3)]
    together, state = train(stack, gradients, lr=0.1, transposed=transposed)
    for k in range(3):
        alone, one = train(stack[k], [g[k] for g in gradients], lr=0.1, transposed=transposed)
        torch.testing.assert_close(together[k], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(state["row_mean_sq"][k], one["row_mean_sq"], rtol=0, atol=1e-12)


def test_blocks_are_matrices_of_their_own():
    matrix, gradients = normal(8, 7), [normal(8, 7, seed=step) for step in (1, 2, 3)]
    together, state = train(matrix, gradients, lr=0.1, blocks=(5, 3))
    for rows in (slice(0, 5), slice(5, 8)):
        alone, one = train(matrix[rows], [g[rows] for g in gradients], lr=0.1)
        torch.testing.assert_close(together[rows], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(state["row_mean_sq"][rows], one["row_mean_sq"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 9), (9, 4), (5, 2, 3, 3)], ids=str)
def test_the_size_of_the_step_does_not_change(shape):
    """The Frobenius norm is that of the base optimizer's step, with inexact polar factors as well."""
    gradients = [normal(*shape, seed=step) * torch.arange(1.0, shape[0] + 1).view(-1, *[1] * (len(shape) - 1)) ** 2
                 for step in range(4)]  # fmt: skip
    inexact = {"lr": 1.0, "betas": (0.0, 0.9), "ns_coefficients": "jordan"}
    before, _ = train(torch.zeros(shape, dtype=torch.float64), gradients[:3], **inexact)
    after, _ = train(torch.zeros(shape, dtype=torch.float64), gradients, **inexact)
    base = torch.zeros(shape, dtype=torch.float64).requires_grad_()
    base.grad = gradients[3]
    LANTON([base], **{**EXACT, **inexact}).step()
    step = after - before
    assert step.norm().item() == pytest.approx(base.norm().item(), rel=1e-9)
    assert (step + base.detach()).norm() > 0.01 * step.norm() or (step - base.detach()).norm() > 0.01 * step.norm()


def test_rows_without_gradient_stand_still_and_a_bad_gradient_changes_nothing():
    gradient = normal(4, 6)
    gradient[1] = 0.0
    param, state = train(normal(4, 6, seed=1), [gradient], lr=0.1)
    assert torch.equal(param[1], normal(4, 6, seed=1)[1]) and torch.isfinite(param).all()
    bad = gradient.clone()
    bad[2, 3] = math.nan
    same, after = train(normal(4, 6, seed=1), [gradient, bad], lr=0.1)
    assert torch.equal(param, same) and torch.equal(state["row_mean_sq"], after["row_mean_sq"])
    still, zero = train(normal(4, 6, seed=1), [torch.zeros(4, 6, dtype=torch.float64)], lr=0.1)
    assert torch.equal(still, normal(4, 6, seed=1)) and not zero["row_mean_sq"].any()


def test_it_is_switched_on_and_off_by_the_group():
    params = [torch.nn.Parameter(normal(4, 6)), torch.nn.Parameter(normal(6, 4)), torch.nn.Parameter(normal(5))]
    groups = [{"params": params[:1], "norm": "rms", "variance": "rows"}, {"params": params[1:2], "norm": "rms"}]
    optimizer = LANTON([*groups, {"params": params[2:], "norm": "vector", "variance": "rows"}], lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert ["row_mean_sq" in optimizer.state[p] for p in params] == [True, False, False]
    optimizer.param_groups[0]["variance"] = None
    saved = optimizer.state_dict()
    fresh = LANTON([*groups, {"params": params[2:], "norm": "vector"}], lr=0.1)
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.state[params[0]]["row_mean_sq"], optimizer.state[params[0]]["row_mean_sq"])
    with pytest.raises(ValueError, match="variance"):
        LANTON(params[:1], norm="rms", variance="columns")
