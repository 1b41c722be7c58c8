"""Forward and backward rules by numbers worked out by hand, and as the loss functions they are the gradients of."""

import pytest
import torch

from leanstep.sparsity import nm_mask, s_ste_scale, s_ste_weight, sparse_weight
from leanstep.sparsity.functional import soft_threshold, srste_term

WEIGHT, GRADIENT = [1.0, -3.0, 2.0, 0.5], [0.1, 0.2, 0.3, 0.4]


def run(weight, gradient, mask=None, **options):
    """The sparse weight and the gradient that the dense one gets."""
    weight = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    mask = nm_mask(weight, "2:4") if mask is None else mask
    value = sparse_weight(weight, mask, **options)
    value.backward(torch.tensor(gradient, dtype=torch.float64))
    return value.tolist(), weight.grad.tolist()


@pytest.mark.parametrize(
    ("options", "value", "gradient"),
    [
        ({}, [0, -3, 2, 0], GRADIENT),
        ({"alpha": 0.25}, [0.25, -3, 2, 0.125], GRADIENT),
        ({"alpha": 0.25, "grad_flow": "decay"}, [0.25, -3, 2, 0.125], [0.025, 0.2, 0.3, 0.1]),
        ({"grad_flow": "fixed"}, [0, -3, 2, 0], [0, 0.2, 0.3, 0]),
    ],
    ids=str,
)
def test_every_method_by_hand(options, value, gradient):
    assert run(WEIGHT, GRADIENT, **options) == (
        pytest.approx(value, rel=1e-14, abs=0),
        pytest.approx(gradient, rel=1e-12, abs=0),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_alpha_of_one_is_dense_and_of_zero_is_the_straight_through_estimator(dtype):
    weight = torch.randn(6, 16).to(dtype)
    weight[0, :3] = torch.tensor([-0.0, float("inf"), 1e-40])
    mask = nm_mask(weight, "2:8")
    dense = sparse_weight(weight, mask, alpha=1.0, grad_flow="decay")
    assert torch.equal(dense, weight) and torch.equal(dense.signbit(), weight.signbit())
    pruned = sparse_weight(weight, mask, alpha=0.0)[~mask]
    assert not pruned.any() and not pruned.signbit().any()
    everything = torch.ones_like(mask)
    assert torch.equal(sparse_weight(weight, everything, alpha=0.3), weight)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_decay_is_the_derivative_of_the_product(alpha):
    weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    mask = nm_mask(weight, "2:4")
    assert torch.autograd.gradcheck(lambda w: sparse_weight(w, mask, alpha=alpha, grad_flow="decay"), [weight])
    assert torch.autograd.gradgradcheck(lambda w: sparse_weight(w, mask, alpha=alpha, grad_flow="decay"), [weight])
    g = torch.randn(3, 8, dtype=torch.float64)
    (autograd,) = torch.autograd.grad(
        weight * torch.where(mask, 1.0, torch.tensor(alpha, dtype=torch.float64)), weight, g
    )
    (ours,) = torch.autograd.grad(sparse_weight(weight, mask, alpha=alpha, grad_flow="decay"), weight, g)
    torch.testing.assert_close(ours, autograd, rtol=1e-15, atol=0)


def test_sr_ste_is_the_straight_through_estimator_on_a_penalised_loss():
    inputs, targets, factor = torch.randn(20, 8).double(), torch.randn(20, 4).double(), 0.05
    weight = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    mask = nm_mask(weight, "2:4")

    def gradient(penalty):
        value = sparse_weight(weight, mask)
        loss = (inputs @ value.T - targets).square().mean()
        if penalty:
            loss = loss + factor / 2 * weight.masked_fill(mask, 0).square().sum()
        return torch.autograd.grad(loss, weight)[0]

    with_term = gradient(False) + srste_term(weight.detach(), mask, factor)
    torch.testing.assert_close(with_term, gradient(True), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_an_infinite_gradient_of_a_pruned_weight_is_no_nan(alpha):
    weight = torch.randn(3, 8, requires_grad=True)
    mask = nm_mask(weight, "2:4")
    sparse_weight(weight, mask, alpha=alpha, grad_flow="fixed").backward(torch.full((3, 8), torch.inf))
    assert weight.grad[mask].isinf().all() and not weight.grad[~mask].any()


def test_no_gradient_reaches_mask_or_alpha():
    weight = torch.randn(4, 8, requires_grad=True)
    alpha = torch.tensor(0.5, requires_grad=True)
    sparse_weight(weight, nm_mask(weight, "2:4"), alpha=alpha, grad_flow="decay").sum().backward()
    assert alpha.grad is None and weight.grad is not None


def test_bad_settings_are_named():
    weight = torch.randn(4, 8)
    with pytest.raises(ValueError, match="sparse_weight: grad_flow must be one of ste, decay, fixed, got 'up'"):
        sparse_weight(weight, weight > 0, grad_flow="up")


def test_s_ste_by_hand():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 0.0, 0.0, -1.0, 4.0]], requires_grad=True)
    # thresholds 1 and 0: the second smallest of each four
    assert soft_threshold(weight.detach(), "2:4").tolist() == [[0, -2, 1, 0, 0, 0, -1, 4]]
    beta = s_ste_scale(weight, "2:4")
    assert float(beta) == pytest.approx((6 + 2 + 1 + 16) / (4 + 1 + 1 + 16))
    value = s_ste_weight(weight, "2:4", beta=beta)
    expected = torch.tensor([[0, -2, 1, 0, 0, 0, -1, 4]]) * beta
    torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=0)
    gradient = torch.arange(8.0).view(1, 8)
    value.backward(gradient)
    assert torch.equal(weight.grad, gradient)


def test_s_ste_is_continuous_where_a_mask_jumps():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    before, after = weight.clone(), weight.clone()
    before[0, 1], after[0, 1] = 3 - 1e-6, 3 + 1e-6
    assert not torch.equal(nm_mask(before, "2:4"), nm_mask(after, "2:4"))
    assert float((soft_threshold(before, "2:4") - soft_threshold(after, "2:4")).abs().max()) < 3e-6


def test_s_ste_on_other_patterns_axes_and_zeros():
    weight = torch.randn(12, 6)
    for pattern, dim in (("1:3", 1), ("1:4", 0), ("5:6", 1)):
        shrunk = soft_threshold(weight, pattern, dim=dim)
        mask = nm_mask(weight, pattern, axis="in" if dim == 1 else "out")
        assert not shrunk[~mask].any() and bool((shrunk[mask] * weight[mask] > 0).all())
    assert torch.equal(soft_threshold(weight, "3:3"), weight)
    assert float(s_ste_scale(torch.zeros(2, 4), "2:4")) == 1
    scale = s_ste_scale(weight, "1:3")
    losses = [float((weight - f * scale * soft_threshold(weight, "1:3")).norm()) for f in (0.99, 1.0, 1.01)]
    assert losses[1] == min(losses)
    with pytest.raises(ValueError, match="6 entries along dimension -1.*do not fill groups of 4"):
        soft_threshold(weight, "2:4")
