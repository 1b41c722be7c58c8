"""SinkGD's rule, function by function in float64, and that the step consists of them."""

import math

import pytest
import torch
from walks import walk

from leanstep.optimizers import SinkGD
from leanstep.optimizers.sinkgd import rule


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal(x: torch.Tensor, num_iters: int, end_with_rows: bool) -> torch.Tensor:
    m, n = x.shape[-2:]
    for half in range(2 * num_iters + end_with_rows):
        dim, size = (-1, n) if half % 2 == 0 else (-2, m)
        x = math.sqrt(size) * x / x.norm(dim=dim, keepdim=True)
    return x


def test_momentum_average_and_look_ahead():
    buffer, gradient = matrix(4, 3), matrix(4, 3, seed=1)
    average = rule.momentum_average(buffer, gradient, 0.9)
    torch.testing.assert_close(average, 0.9 * buffer + 0.1 * gradient, rtol=1e-15, atol=1e-15)
    ahead = rule.momentum_average(average, gradient, 0.9)
    torch.testing.assert_close(ahead, 0.81 * buffer + 0.19 * gradient, rtol=1e-15, atol=1e-15)
    low = rule.momentum_average(buffer.bfloat16(), gradient.bfloat16(), 0.9)
    assert low.dtype == torch.float32


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)])
def test_mask_rows_drops_quiet_rows(shape):
    gradient = matrix(*shape)
    gradient[..., 1, :] *= 1e-3
    norms = rule.row_norms(gradient)
    torch.testing.assert_close(norms, gradient.square().sum(dim=-1).sqrt(), rtol=1e-14, atol=0)
    torch.testing.assert_close(rule.mean_norm(norms, 5), norms.mean(dim=-1, keepdim=True), rtol=1e-14, atol=0)
    masked = rule.mask_rows(gradient, norms, rule.mean_norm(norms, 5), tau=0.1)
    assert not masked[..., 1, :].any()
    kept = [0, 2, 3, 4]
    assert torch.equal(masked[..., kept, :], gradient[..., kept, :])
    norms[..., 0] = math.nan
    assert rule.mask_rows(gradient, norms, rule.mean_norm(norms, 5), tau=0.1)[..., 0, :].any()


@pytest.mark.parametrize("end_with_rows", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)])
def test_normalize_is_the_literal_loop(shape, end_with_rows):
    gradient = matrix(*shape)
    scales = rule.normalize([gradient], 5, end_with_rows=end_with_rows)
    x = rule.scaled(gradient, scales.rows[0], scales.cols[0])
    torch.testing.assert_close(x, literal(gradient, 5, end_with_rows), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(x.square().mean(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-13, atol=0)
    assert torch.equal(x.sign(), gradient.sign())


def test_power_steps_find_the_operator_norm_from_below():
    x = matrix(7, 5)
    vector, norms = rule.first_power_vector(torch.zeros(5, dtype=torch.float64)), []
    for _ in range(200):
        square, vector = rule.power_step(x, vector)
        norms.append(square.sqrt().item())
    exact = torch.linalg.matrix_norm(x, 2).item()
    assert norms == sorted(norms) or max(a - b for a, b in zip(norms, norms[1:], strict=False)) < 1e-14
    assert norms[0] < exact and norms[-1] == pytest.approx(exact, rel=1e-12)
    parts = [rule.power_step(part, vector) for part in x.split([4, 3])]
    square, after = rule.power_step(x, vector)
    torch.testing.assert_close(sum(s for s, _ in parts), square, rtol=1e-14, atol=0)
    torch.testing.assert_close(sum(v for _, v in parts), after, rtol=1e-14, atol=1e-14)


def test_rows_of_any_size_are_kept_beside_their_like():
    for size in (1e-38, 1.0, 1e37):  # squares of the first underflow, of the last overflow
        rows = torch.full((2, 4), size)
        norms = rule.row_norms(rows)
        assert torch.equal(rule.mask_rows(rows, norms, rule.mean_norm(norms, 2), 1e-3), rows)
    for shape in ((3, 0), (0, 3)):
        assert torch.equal(rule.row_norms(torch.ones(shape)), torch.zeros(shape[0]))


def test_targets_and_scalars():
    assert rule.spectral_target("unit", 8, 2) == 1.0 and rule.spectral_target("muon", 8, 2) == 2.0
    like = torch.zeros(1, dtype=torch.float64)
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        assert rule.step_scalars(lr, 0.05, 0.2, like).tolist() == pytest.approx([0.005, 0.999], rel=1e-15)


@pytest.mark.parametrize("algorithm", ["sinkgd", "balanced"])
def test_the_step_is_the_rule(algorithm):
    """Momentum, look-ahead, mask, normalization and update, put together here, give the optimizer's bits in float64."""
    settings = {"lr": 0.1, "scale": 0.5, "weight_decay": 0.1, "momentum": 0.8, "nesterov": True}
    param = matrix(6, 4, seed=9).requires_grad_()
    expected, buffer = param.detach().clone(), torch.zeros(6, 4, dtype=torch.float64)
    optimizer = SinkGD([param], algorithm=algorithm, **settings)
    balanced = algorithm == "balanced"
    for step in range(3):
        param.grad = matrix(6, 4, seed=step)
        param.grad[2] *= 1e-4
        entered = walk(optimizer.step)
        buffer = rule.momentum_average(buffer, param.grad, 0.8)
        x = rule.momentum_average(buffer, param.grad, 0.8)
        if balanced:
            norms = rule.row_norms(x)
            x = rule.mask_rows(x, norms, rule.mean_norm(norms, 6), 1e-3)
            assert not x[2].any()
        scales = rule.normalize([x], 5, end_with_rows=balanced)
        size, decay = rule.step_scalars(0.1, 0.5, 0.1, param)
        expected = expected * decay - size * rule.scaled(x, scales.rows[0], scales.cols[0])
        assert torch.equal(param, expected)
    of_rule = {function for file, function in entered if file == "optimizers/sinkgd/rule.py"}
    masked = {"row_norms", "mean_norm", "mask_rows"} if balanced else set()
    assert of_rule == {"momentum_average", "normalize", "step_scalars"} | masked


def test_the_spectral_step_calls_the_rule():
    param = matrix(6, 4).requires_grad_()
    optimizer = SinkGD([param], algorithm="sinkgd", spectral="muon")
    param.grad = matrix(6, 4, seed=1)
    of_rule = {function for file, function in walk(optimizer.step) if file == "optimizers/sinkgd/rule.py"}
    assert {"normalize", "scaled", "first_power_vector", "power_step", "spectral_target", "step_scalars"} == of_rule
