"""Masked weights: closed forms, and every backend equal to the definition bit for bit."""

import pytest
import torch
from kernel_cases import bits_equal, dtype_name

from leanstep.kernels import nm_apply, nm_mask, use_backend

WIDE = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def case(dtype, shape=(37, 40), seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight.view(-1)[:3] = torch.tensor([-0.0, float("inf"), -1.0])
    (mask,) = nm_mask([weight], 1, 4)
    return weight, mask


def same_signs(found, want):
    bits_equal(found, want)
    assert torch.equal(found.signbit(), want.signbit())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", WIDE, ids=dtype_name)
def test_the_definition(dtype, alpha):
    weight, mask = case(dtype)
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


@pytest.mark.parametrize("dtype", WIDE[:2], ids=dtype_name)
def test_fast_ones_equal_the_definition(dtype, dirty_memory):
    weight, mask = case(dtype, (301, 64))
    before = [t.clone() for t in (weight, mask)]
    for w, k in ((weight, mask), (weight.t(), mask.t()), (weight[:, ::2], mask[:, ::2]), (weight[:0], mask[:0])):
        for value in (0.0, 0.3, 1.0):
            alpha = torch.tensor(value)
            with use_backend("reference"):
                want = nm_apply(w, k, alpha)
            found = nm_apply(w, k, alpha)
            same_signs(found, want)
            assert found.dtype == dtype and found.shape == w.shape
    for tensor, want in zip((weight, mask), before, strict=True):
        bits_equal(tensor, want)


def test_a_weight_with_a_gradient_has_the_derivative():
    weight, mask = case(torch.float64)
    weight.requires_grad_()
    alpha = torch.tensor(0.3, dtype=torch.float64)
    nm_apply(weight, mask, alpha).sum().backward()
    torch.testing.assert_close(weight.grad, torch.where(mask, torch.ones_like(alpha), alpha), rtol=1e-14, atol=0)


def test_bad_arguments_are_named():
    weight, mask = case(torch.float32)
    alpha = torch.tensor(0.5)
    for call, message in [
        (lambda: nm_apply(weight, mask.float(), alpha), "torch.bool"),
        (lambda: nm_apply(weight, mask[:1], alpha), r"shape \(37, 40\)"),
        (lambda: nm_apply(weight, mask, torch.ones(1)), "0-d"),
        (lambda: nm_apply(mask, mask, alpha), "floating"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
