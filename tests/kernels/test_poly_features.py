"""Polynomial features: products that are Taylor sums, their number, and the gradient behind them."""

import math

import pytest
import torch
from kernel_cases import bits_equal, dtype_name

from leanstep.kernels import BackendError, use_backend
from leanstep.kernels.poly.features import poly_features, poly_features_backward
from leanstep.kernels.poly.tables import poly_tables

SHAPES = [(1, 3), (2, 6), (3, 0), (4, 1), (5, 4), (16, 3), (64, 2)]


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("dim", "degree"), SHAPES)
def test_products_of_features_are_taylor_sums(dim, degree):
    x, y = normal(2, dim, 9) / dim**0.5, normal(2, dim, 9, seed=1) / dim**0.5
    found = (poly_features(x, degree) * poly_features(y, degree)).sum(dim=1)
    s = (x * y).sum(dim=1)
    want = sum(s**t / math.factorial(t) for t in range(degree + 1))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dim", "degree"), SHAPES)
def test_features_are_all_monomials_in_order_of_degree(dim, degree):
    assert poly_features(normal(1, dim, 1), degree).shape[1] == math.comb(dim + degree, degree)
    tables = poly_tables(dim, degree, torch.device("cpu"))
    assert tables.degrees.tolist() == sorted(tables.degrees.tolist())
    # the logarithm of a monomial of powers of distinct primes names it
    primes = torch.tensor([p for p in range(2, 400) if all(p % i for i in range(2, p))][:dim], dtype=torch.float64)
    names = torch.log(poly_features(primes[None, :, None], degree)[0, :, 0] * _roots(tables))
    assert len(set(names.mul(1e6).round().tolist())) == names.numel()


def _roots(tables):
    """Root of the multi-index factorial of every feature, by which the features are divided."""
    exponents = torch.zeros(len(tables.parent), int(tables.last.max()) + 1)
    for i in range(1, len(tables.parent)):
        exponents[i] = exponents[tables.parent[i]]
        exponents[i, tables.last[i]] += 1
    return torch.exp(torch.lgamma(exponents.double() + 1).sum(dim=1) / 2)


@pytest.mark.parametrize(("dim", "degree"), SHAPES)
def test_the_gradient_is_that_of_the_features(dim, degree):
    x = normal(2, dim, 5).requires_grad_()
    with use_backend("reference"):
        features = poly_features(x, degree) + 0 * x.sum()
    grad = torch.randn_like(features)
    want = torch.autograd.grad(features, x, grad, allow_unused=True, materialize_grads=True)[0]
    torch.testing.assert_close(poly_features_backward(grad, x.detach(), degree), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 7, 64, 130])
@pytest.mark.parametrize(("dim", "degree"), SHAPES)
def test_the_loop_equals_the_definition(dim, degree, columns, dirty_memory):
    x = normal(3, dim, columns, dtype=torch.float32)
    with use_backend("reference"):
        want = poly_features(x, degree)
        grad = torch.randn_like(want)
        slope = poly_features_backward(grad, x, degree)
    before = x.clone(), grad.clone()
    bits_equal(poly_features(x, degree), want)
    exact = poly_features_backward(grad.double(), x.double(), degree)
    found = poly_features_backward(grad, x, degree)
    # sums of a few thousand products at most; measured: no worse than the definition's own error
    bound = 4 * (slope.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert float((found.double() - exact).abs().max()) <= float(bound)
    bits_equal(x, before[0])
    bits_equal(grad, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_narrow_dtypes_are_rounded_once(dtype):
    x = normal(2, 5, 9, dtype=dtype)
    bits_equal(poly_features(x, 2), poly_features(x.float(), 2).to(dtype))
    grad = normal(2, 21, 9, dtype=dtype)
    bits_equal(poly_features_backward(grad, x, 2), poly_features_backward(grad.float(), x.float(), 2).to(dtype))


def test_nothing_and_strides():
    assert poly_features(torch.zeros(0, 3, 5), 2).shape == (0, 10, 5)
    assert poly_features(torch.zeros(2, 3, 0), 2).shape == (2, 10, 0)
    x = normal(2, 6, 5, dtype=torch.float32)
    bits_equal(poly_features(x.mT, 2), poly_features(x.mT.contiguous(), 2))


def test_bad_arguments_are_named():
    x = torch.zeros(1, 64, 4)
    for call, message in [
        (lambda: poly_features(x[0], 2), r"\[n, d, c\], got \(64, 4\)"),
        (lambda: poly_features(x.long(), 2), "int64"),
        (lambda: poly_features(x, -1), "degree >= 0, got -1"),
        (lambda: poly_features(x, 2.0), "whole degree"),
        (lambda: poly_features(x, 5), r"has 11,238,513 features.*lower degree"),
        (lambda: poly_features_backward(x, x, 2), r"gradient \(1, 2145, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with use_backend("cpp"), pytest.raises(BackendError, match="fp32 and bf16, not float64"):
        poly_features(x.double(), 2)
