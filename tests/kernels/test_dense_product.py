"""Dense products: one result from either of torch's libraries, and the rule that picks one."""

import warnings

import pytest
import torch
from kernel_cases import draw
from torch.utils.flop_counter import FlopCounterMode

from leanstep.kernels import product
from leanstep.kernels.matrices import dense_product

has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SHAPES = [(8, 1, 1), (9, 24, 20), (64, 512, 16), (300, 7, 130), (2, 30, 40)]


@pytest.fixture(params=["onednn", "torch"])
def library(request, monkeypatch):
    if request.param == "onednn" and not has_onednn:
        pytest.skip("this torch has no oneDNN with linear layers")
    reason = None if request.param == "onednn" else "asked for"
    monkeypatch.setattr(dense_product, "why_not_onednn", lambda: reason)
    return request.param


def layouts(matrix):
    """The same numbers, row by row, column by column, and as a part of a larger matrix."""
    wide = torch.zeros(matrix.shape[0] + 3, matrix.shape[1] + 5)
    wide[2:-1, 3:-2] = matrix
    return matrix, matrix.t().contiguous().t(), wide[2:-1, 3:-2]


@pytest.mark.parametrize("rows, n, m", SHAPES)
def test_products_and_sums_of_every_layout(library, rows, n, m):
    x, w, row, plus = draw(rows, n), draw(n, m, seed=1), draw(m, seed=2), draw(rows, m, seed=3)
    exact = x.double() @ w.double()
    size = x.double().abs() @ w.double().abs() + row.double().abs() + plus.double().abs()
    for x_i in layouts(x):
        for w_i in layouts(w):
            for added in (None, row, plus):
                found = product(x_i, w_i, None if added is None else added.clone())
                wanted = exact if added is None else exact + added.double()
                assert found.dtype == torch.float32 and found.shape == (rows, m) and found.is_contiguous()
                # one rounding of half a unit for every term, were all of one sign
                assert float(((found.double() - wanted).abs() / size).max()) < (n + 1) * 2**-24
    assert torch.equal(x, layouts(draw(rows, n))[0]) and torch.equal(w, draw(n, m, seed=1))


@pytest.mark.parametrize("bias", [draw(40)[::2], draw(1).expand(20)], ids=["every second", "one number"])
def test_a_bias_of_any_stride(library, bias):
    x, w = draw(9, 24), draw(24, 20, seed=1)
    torch.testing.assert_close(product(x, w, bias), x @ w + bias)


def test_operations_are_counted(library):
    x, w = draw(40, 24), draw(24, 20)
    with FlopCounterMode(display=False) as counter:
        product(x, w)
        product(x, w, draw(20))
    assert counter.get_total_flops() == 2 * 2 * 40 * 24 * 20


@pytest.mark.parametrize("shape", [(0, 4, 3), (9, 0, 3), (9, 4, 0)])
def test_empty_matrices(library, shape):
    rows, n, m = shape
    assert torch.equal(product(torch.ones(rows, n), torch.ones(n, m)), torch.full((rows, m), float(n)))


def test_only_fp32_matrices_of_the_cpu_go_to_onednn(library):
    fits = library == "onednn"
    assert dense_product.runs_on_onednn(torch.ones(2, 2)) is fits
    for other in (torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.bfloat16)):
        assert not dense_product.runs_on_onednn(other)
        assert torch.equal(product(other, other), other @ other)
    assert not dense_product.runs_on_onednn(torch.ones(2, 2, device="meta"))


def test_without_oneDNN_as_torch_is_told_products_are_torchs(library):
    x, w = draw(64, 512), draw(512, 40)
    with warnings.catch_warnings():
        # of torch, about other devices
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False):
            assert not dense_product.runs_on_onednn(torch.ones(2, 2))
            assert torch.equal(product(x, w), torch.mm(x, w))


@pytest.mark.parametrize(
    "vendor, capability, mkl, wanted",
    [
        ("AuthenticAMD", "AVX512", True, None),
        ("AuthenticAMD", "AVX2", True, "no AVX-512"),
        ("GenuineIntel", "AVX512", True, "MKL is made for this processor"),
        ("", "AVX512", True, "MKL is made for this processor"),
        ("AuthenticAMD", "AVX512", False, "torch.mm does not call MKL here"),
    ],
)
@pytest.mark.skipif(not has_onednn, reason="this torch has no oneDNN with linear layers")
def test_the_rule(monkeypatch, vendor, capability, mkl, wanted):
    monkeypatch.setattr(dense_product, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert dense_product.why_not_onednn.__wrapped__() == wanted


def test_a_product_with_a_nan_has_it(library):
    x = draw(16, 32)
    x[3, 5] = float("nan")
    found = product(x, draw(32, 8))
    assert found[3].isnan().all() and not found[[0, 1, 2, 4]].isnan().any()
