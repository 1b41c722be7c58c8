"""Masked weights and their gradients: closed forms, and every backend equal to the definition bit for bit."""

import pytest
import torch
from kernel_cases import bits_equal, dtype_name

from leanstep.kernels import nm_apply, nm_apply_backward, nm_mask, use_backend

WIDE = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FLOWS = ["ste", "decay", "fixed"]


def case(w_dtype, g_dtype, shape=(37, 40), seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, grad = torch.randn(shape, generator=generator).to(w_dtype), torch.randn(shape, generator=generator)
    weight.view(-1)[:3] = torch.tensor([-0.0, float("inf"), -1.0])
    (mask,) = nm_mask([weight], 1, 4)
    return weight, mask, grad.to(g_dtype)


def same_signs(found, want):
    bits_equal(found, want)
    assert torch.equal(found.signbit(), want.signbit())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", WIDE, ids=dtype_name)
def test_the_definition(dtype, alpha):
    weight, mask, _ = case(dtype, dtype)
    with use_backend("reference"):
        out = nm_apply(weight, mask, torch.tensor(alpha))
    assert out.dtype == dtype
    same_signs(out[mask], weight[mask])
    if alpha == 0:
        same_signs(out[~mask], torch.zeros_like(out[~mask]))
    if alpha == 1:
        same_signs(out, weight)
    factor = torch.tensor(alpha).double()  # the fp32 number that alpha is
    exact = torch.where(mask, weight.double(), weight.double() * factor)
    finite = exact.isfinite()
    bound = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-15
    assert ((out.double() - exact).abs()[finite] <= bound * exact.abs()[finite]).all()


@pytest.mark.parametrize("g_dtype", WIDE[:2], ids=dtype_name)
@pytest.mark.parametrize("w_dtype", WIDE[:2], ids=dtype_name)
def test_fast_ones_equal_the_definition(w_dtype, g_dtype, dirty_memory):
    weight, mask, grad = case(w_dtype, g_dtype, (301, 64))
    before = [t.clone() for t in (weight, mask, grad)]
    layouts = [(weight, mask, grad), (weight.t(), mask.t(), grad.t()), (weight[:, ::2], mask[:, ::2], grad[:, ::2])]
    layouts += [(weight, mask, grad.t().contiguous().t()), (weight[:0], mask[:0], grad[:0])]
    for w, k, g in layouts:
        for value in (0.0, 0.3, 1.0):
            alpha = torch.tensor(value)
            with use_backend("reference"):
                want = nm_apply(w, k, alpha)
            same_signs(nm_apply(w, k, alpha), want)
            for flow in FLOWS:
                for srste in (0.0, 2e-4):
                    options = {"grad_flow": flow, "srste_lambda": srste}
                    with use_backend("reference"):
                        want = nm_apply_backward(g, w, k, alpha, **options)
                    found = nm_apply_backward(g, w, k, alpha, **options)
                    same_signs(found, want)
                    assert found.dtype == w_dtype and found.shape == w.shape
    for tensor, want in zip((weight, mask, grad), before, strict=True):
        bits_equal(tensor, want)


@pytest.mark.parametrize("flow", FLOWS)
def test_gradients_by_their_formula(flow):
    weight, mask, grad = case(torch.float64, torch.float64)
    weight[0, 1] = 1.0
    pruned = {"ste": grad, "decay": 0.3 * grad, "fixed": torch.zeros_like(grad)}[flow] + 2e-4 * weight
    found = nm_apply_backward(
        grad, weight, mask, torch.tensor(0.3, dtype=torch.float64), grad_flow=flow, srste_lambda=2e-4
    )
    torch.testing.assert_close(found, torch.where(mask, grad, pruned), rtol=1e-14, atol=0)


def test_straight_through_costs_nothing():
    weight, mask, grad = case(torch.float32, torch.float32)
    assert nm_apply_backward(grad, weight, mask, torch.tensor(0.0)) is grad


def test_bad_arguments_are_named():
    weight, mask, grad = case(torch.float32, torch.float32)
    alpha = torch.tensor(0.5)
    for call, message in [
        (lambda: nm_apply(weight, mask.float(), alpha), "torch.bool"),
        (lambda: nm_apply(weight, mask[:1], alpha), r"shape \(37, 40\)"),
        (lambda: nm_apply(weight, mask, torch.ones(1)), "0-d"),
        (lambda: nm_apply(mask, mask, alpha), "floating"),
        (lambda: nm_apply_backward(grad[:1], weight, mask, alpha), r"got \(1, 40\)"),
        (lambda: nm_apply_backward(grad, weight, mask, alpha, grad_flow="x"), "grad_flow"),
        (lambda: nm_apply_backward(grad, weight, mask, alpha, srste_lambda=-1.0), "srste_lambda"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
