"""The Triton kernels of polynomial features against their definitions, in the interpreter and on a device."""

import pytest
import torch

from leanstep.kernels import poly_features, poly_features_backward, use_backend
from leanstep.kernels.poly.attention import poly_attention

pytest.importorskip("triton")

SHAPES = [(1, 3), (3, 2), (4, 1), (5, 4), (17, 2), (3, 0)]


def check(dim, degree, columns, device="cpu", count=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, dim, columns, generator=generator).to(device)
    exact = poly_features(x.double(), degree)
    grad = torch.randn(exact.shape, generator=generator).to(device)
    before = x.clone(), grad.clone()
    with use_backend("triton"):
        found, slope = poly_features(x, degree), poly_features_backward(grad, x, degree)
    # a product of at most 4 factors and a root, each rounded; sums of at most 200 of them
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-12)
    want = poly_features_backward(grad.double(), x.double(), degree)
    torch.testing.assert_close(slope.double(), want, rtol=0, atol=2e-5 * float(want.abs().max()) + 1e-12)
    assert torch.equal(x, before[0]) and torch.equal(grad, before[1])


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize(
    ("dim", "degree", "columns"), [*((*shape, 70) for shape in SHAPES), (3, 2, 1), (4, 1, 64)], ids=str
)
def test_features_and_their_gradient(dim, degree, columns):
    check(dim, degree, columns)


@pytest.mark.interpret
def test_more_matrices_than_one_grid_takes(monkeypatch):
    from leanstep.kernels.triton_impl.poly import features

    monkeypatch.setattr(features, "MOST_PROGRAMS", 2)
    check(3, 2, 5, count=5)


@pytest.mark.interpret
def test_attention_over_them():
    tensors = [torch.randn(1, 2, 40, 5, generator=torch.Generator().manual_seed(i)).mul_(0.5) for i in range(3)]
    results = []
    for backend in ("reference", "triton"):
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        with use_backend(backend):
            out, _ = poly_attention(q, k, v, [1.0, 1.0, 0.5], scale=0.4, causal=True, chunk=16)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_on_a_device():
    for dim, degree in [*SHAPES, (64, 2), (16, 4)]:
        for columns in (1, 127, 512):
            check(dim, degree, columns, "cuda")
