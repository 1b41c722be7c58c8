"""Lion against its formula, its properties, and bf16 done right."""

import math

import pytest
import torch
from optimizer_cases import fill_grads, run

from leanstep.kernels import use_backend
from leanstep.optimizers import Lion
from leanstep.optimizers.lion import cautious_scale, lion_scalars


def parameters(*shapes, dtype=torch.float32):
    chance = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=chance).to(dtype).requires_grad_() for s in shapes]


def test_by_hand():
    """Three scalars, three steps: no move while nothing was ever seen, and the sign flips a step late."""
    param = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    optimizer = Lion([param], lr=0.5, betas=(0.5, 0.75), weight_decay=0.5)
    # decay 0.75 a step; c = 0.5 m + 0.5 g; m = 0.75 m + 0.25 g
    table = [
        # gradient, c, parameter after, momentum after
        ([4.0, -4.0, 0.0], [0.75 - 0.5, -1.5 + 0.5, 2.25], [1.0, -1.0, 0.0]),
        ([-0.5, 4.0, 0.0], [0.1875 - 0.5, -0.75 - 0.5, 1.6875], [0.625, 0.25, 0.0]),
        ([-4.0, -0.125, 8.0], [-0.234375 + 0.5, -0.9375 - 0.5, 1.265625 - 0.5], [-0.53125, 0.15625, 2.0]),
    ]
    for gradient, expected, momentum in table:
        param.grad = torch.tensor(gradient)
        optimizer.step()
        assert param.tolist() == expected
        assert optimizer.state[param]["exp_avg"].tolist() == momentum


@pytest.mark.parametrize("shape", [(66, 128), (4500,), (3, 5)])
@pytest.mark.parametrize("foreach", [None, False])
def test_equals_the_published_formula_bit_for_bit(shape, foreach):
    """Algorithm 2 of arXiv 2302.06675 in fp32: decay first, then the sign of c, then the momentum."""
    (param,) = parameters(shape)
    lr, beta1, beta2, decay = 1e-2, 0.9, 0.99, 0.1
    expected, m = param.detach().clone(), torch.zeros(shape)
    optimizer = Lion([param], lr=lr, betas=(beta1, beta2), weight_decay=decay, foreach=foreach)
    for step in range(5):
        fill_grads([param], step)
        optimizer.step()
        c = m * beta1 + param.grad * (1 - beta1)
        expected = expected * (1 - lr * decay) - torch.sign(c) * lr
        m = m * beta2 + param.grad * (1 - beta2)
        assert torch.equal(param, expected)
        assert torch.equal(optimizer.state[param]["exp_avg"], m)


def test_every_entry_moves_by_the_rate():
    (param,) = parameters((40, 128))
    with torch.no_grad():
        param.zero_()
    optimizer = Lion([param], lr=0.125)
    fill_grads([param], 0)
    param.grad[0] = 0
    optimizer.step()
    assert torch.equal(param, -0.125 * torch.sign(param.grad))
    assert not param[0].any()


def test_the_weights_stay_in_the_box():
    """|w| <= 1 / weight_decay is invariant, since w' is a convex combination of w and -sign / weight_decay."""
    param = (torch.rand(40, 128) * 4 - 2).requires_grad_()
    optimizer = Lion([param], lr=0.1, weight_decay=0.5)
    for _ in range(100):
        param.grad = torch.full_like(param, -1.0)
        optimizer.step()
        assert param.abs().max() <= 2.0
    assert param.min() > 1.9


def test_decay_comes_before_the_move():
    param = torch.ones(4, requires_grad=True)
    optimizer = Lion([param], lr=0.5, weight_decay=1.0)
    param.grad = torch.ones(4)
    optimizer.step()
    assert param.tolist() == [0.0] * 4  # (1 - 0.5) - 0.5; the other order gives (1 - 0.5) / 2 = 0.25


def test_equal_betas_are_signum_and_zero_betas_sign_descent():
    (param,) = parameters((40, 128))
    twin, m = param.detach().clone(), torch.zeros(40, 128)
    optimizer = Lion([param], lr=1e-2, betas=(0.9, 0.9))
    for step in range(4):
        run(optimizer, [param], range(step, step + 1))
        m = m * 0.9 + param.grad * (1 - 0.9)
        twin = twin - torch.sign(m) * 1e-2
        assert torch.equal(param, twin)
    (param,) = parameters((40, 128))
    twin = param.detach().clone()
    optimizer = Lion([param], lr=1e-2, betas=(0.0, 0.0))
    run(optimizer, [param], range(1))
    assert torch.equal(param, twin - torch.sign(param.grad) * 1e-2)


@pytest.mark.parametrize("shape", [(40, 128), (9,)])
def test_cautious(shape):
    param = torch.zeros(shape, requires_grad=True)
    optimizer = Lion([param], lr=0.01, betas=(0.9, 0.99), cautious=True)
    fill_grads([param], 0)
    optimizer.step()  # no momentum yet: all agree, and the step is Lion's
    assert torch.equal(param, -0.01 * torch.sign(param.grad))
    momentum = optimizer.state[param]["exp_avg"].clone()
    before = param.detach().clone()
    fill_grads([param], 1)
    param.grad.mul_(0.05)
    c = 0.9 * momentum + (1 - 0.9) * param.grad
    agrees = c * param.grad > 0
    assert 0 < agrees.sum() < agrees.numel()
    optimizer.step()
    moved = param.detach() - before
    assert not moved[~agrees].any()
    torch.testing.assert_close(moved.abs().mean(), torch.tensor(0.01), rtol=1e-4, atol=0)
    assert torch.equal(torch.sign(moved[agrees]), -torch.sign(param.grad[agrees]))


def test_the_factor_of_cautious_updates_is_exact_in_float64():
    param = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    param.grad = torch.tensor([1.0] * 3 + [0.0] * 4, dtype=torch.float64)
    Lion([param], lr=1.0, cautious=True).step()
    torch.testing.assert_close(param[0].item(), -7 / 3, rtol=1e-15, atol=0)


def test_cautious_when_nothing_agrees():
    param = torch.ones(3, 128, requires_grad=True)
    optimizer = Lion([param], lr=0.01, cautious=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = param.detach().clone()
    param.grad = torch.full_like(param, -1e-4)  # the momentum's direction wins, against the gradient
    optimizer.step()
    assert torch.equal(param, before)


def test_cautious_decay_spares_entries_that_move_away_from_zero():
    param = torch.tensor([2.0, -2.0, 2.0, -2.0], requires_grad=True)
    optimizer = Lion([param], lr=0.5, weight_decay=0.5, cautious_decay=True)
    param.grad = torch.tensor([1.0, -1.0, -1.0, 1.0])
    optimizer.step()
    assert param.tolist() == [1.5 - 0.5, -1.5 + 0.5, 2.5, -2.5]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "master", "split"])
def test_small_updates_of_bf16_weights(rounding):
    """200 steps of 1e-4 from 1.0: nearest stays where it was (bf16 steps there are 2**-8), the others arrive."""
    param = torch.ones(64, 128, dtype=torch.bfloat16, requires_grad=True)
    optimizer = Lion([("weight", param)], lr=1e-4, rounding=rounding)
    param.grad = torch.ones_like(param)
    for _ in range(200):
        optimizer.step()
    value = optimizer.full_precision_state_dict()["weight"]
    if rounding == "master":
        assert torch.equal(optimizer.state[param]["master_param"], value) and torch.equal(param, value.bfloat16())
    if rounding == "nearest":
        assert torch.equal(param, torch.ones_like(param))
    elif rounding == "stochastic":
        # every weight is 1 - 2**-8 * (number of times it went down): mean 0.98, a deviation of at most 2**-8 a sample
        deviation = 2**-8 * math.sqrt(200 * 0.25) / math.sqrt(value.numel())
        assert abs(value.mean().item() - 0.98) < 3 * deviation
        assert value.unique().numel() > 3
    else:
        # split: a step of 6.6 distances between weights of 24 bits is rounded to 7, every time
        torch.testing.assert_close(
            value, torch.full_like(value, 0.98), rtol=0, atol=1.5e-3 if rounding == "split" else 2e-4
        )


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_stochastic_rounding_is_a_function_of_the_seed_and_the_step(backend):
    def train(seed, steps, resume_at=None):
        params = parameters((40, 128), (40, 128), dtype=torch.bfloat16)
        with torch.no_grad():
            params[1].copy_(params[0])
        optimizer = Lion(params, lr=1e-4, rounding="stochastic", seed=seed)
        for step in range(steps):
            if step == resume_at:
                state = optimizer.state_dict()
                params = [p.detach().clone().requires_grad_() for p in params]
                optimizer = Lion(params, lr=1.0, rounding="stochastic", seed=99)
                optimizer.load_state_dict(state)
            fill_grads(params, step)
            params[1].grad.copy_(params[0].grad)
            optimizer.step()
        return params

    with use_backend(backend):
        first, again, other = train(1, 4), train(1, 4, resume_at=2), train(2, 4)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])  # equal tensors at different places are rounded independently


def test_momentum_dtype_is_kept():
    (param,) = parameters((6, 5), dtype=torch.bfloat16)
    optimizer = Lion([param], momentum_dtype=torch.float32)
    run(optimizer, [param], range(2))
    saved = optimizer.state_dict()
    fresh = Lion(parameters((6, 5), dtype=torch.bfloat16), momentum_dtype=torch.float32)
    fresh.load_state_dict(saved)
    (state,) = fresh.state.values()
    assert state["exp_avg"].dtype == torch.float32
    assert torch.equal(state["exp_avg"], optimizer.state[param]["exp_avg"])
    assert optimizer.state_bytes() == 6 * 5 * 4


def test_pass_uses_the_gradient_as_it_is():
    (param,) = parameters((3, 5))
    optimizer = Lion([param], nonfinite="pass")
    param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].isnan().all()
    assert optimizer.nonfinite_count() == 0


def test_the_numbers_of_the_rule():
    like = torch.zeros(1, dtype=torch.float64)
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        numbers = lion_scalars(lr, (0.9, 0.99), 0.5, like)
        assert numbers.dtype == torch.float64
        assert numbers.tolist() == pytest.approx([0.1, 0.95, 0.9, 0.1, 0.99, 0.01], rel=1e-14)
    scales = cautious_scale(torch.tensor([3.0, 0.0, 0.0]), [4, 5, 0], like)
    assert scales.tolist() == pytest.approx([4 / 3, 1e5, 1e5], rel=1e-6)


def test_the_step_is_the_formula_in_float64():
    """The docstring's three lines, bit for bit."""
    param = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    expected, m = param.detach().clone(), torch.zeros(5, 3, dtype=torch.float64)
    optimizer = Lion([param], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(4):
        g = param.grad = torch.randn(5, 3, dtype=torch.float64)
        optimizer.step()
        c = 0.9 * m + (1.0 - 0.9) * g
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * c.sign()
        m = 0.99 * m + (1.0 - 0.99) * g
        assert torch.equal(param, expected) and torch.equal(optimizer.state[param]["exp_avg"], m)
