"""The Triton kernels of N:M sparsity against their definitions, in the interpreter and on a device."""

import pytest
import torch
from kernel_cases import DTYPES, bits_equal, draw, dtype_name

from leanstep.kernels import nm_apply, nm_compress, nm_decompress, nm_mask, nm_matmul, use_backend

pytest.importorskip("triton")

PATTERNS = [(1, 2), (2, 4), (1, 8), (7, 8), (3, 16), (9, 32), (1, 128), (64, 128), (0, 4), (4, 4), (2, 5), (20, 40)]


def check_masks(n, m, dtype, device="cpu"):
    tied = [draw(6, m * 11), draw(1, 2100 // m * m + m), draw(m * 3, 7), draw(3, m * 2, 3, 3), draw(0, m)]
    tied = [(s.mul(3).round() / 3).to(device, dtype) for s in tied]
    tied[0].view(-1)[1] = float("nan")
    # a view that does not start on a 16-byte boundary, and a tensor of two programs and a rest
    tied.append(torch.cat([draw(1), draw(m * 9)]).to(device, dtype)[1:])
    tied.append(draw(20 if m == 4 else 1, 1000 // m * m).to(device, dtype))
    for dim, members in ((-1, [0, 1, 4, 5, 6]), (0, [2]), (1, [3])):
        scores = [tied[i] for i in members]
        with use_backend("reference"):
            want = nm_mask(scores, n, m, dim=dim)
        out = [torch.ones(s.shape, dtype=torch.bool, device=device) for s in scores]
        with use_backend("triton"):
            nm_mask(scores, n, m, dim=dim, out=out)
        for found, mask in zip(out, want, strict=True):
            assert torch.equal(found, mask)


def check_apply(dtype, shape, device="cpu"):
    weight = draw(*shape, dtype=dtype, device=device)
    weight.view(-1)[0] = -0.0
    (mask,) = nm_mask([weight], 1, 4)
    for value in (0.0, 0.3, 1.0):
        alpha = torch.tensor(value, device=device)
        results = []
        for backend in ("reference", "triton"):
            with use_backend(backend):
                results.append(nm_apply(weight, mask, alpha))
        want, found = results
        bits_equal(found, want)
        assert torch.equal(found.signbit(), want.signbit())


def check_matmul(n, m, dtype, tokens, device="cpu"):
    weight = draw(37, m * 5, dtype=dtype, device=device)
    weight = torch.where(nm_mask([weight], n, m)[0], weight, torch.zeros((), dtype=dtype, device=device))
    values, indices = nm_compress(weight, n, m)
    assert torch.equal(nm_decompress(values, indices, m), weight)
    x = draw(tokens, m * 5, dtype=dtype, device=device, seed=1)
    with use_backend("triton"):
        found = nm_matmul(x, values, indices, m)
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    # one rounding to the dtype after fp32 sums; the dense product in 16 bits may round partial sums as well
    eps = torch.finfo(dtype).eps
    assert ((found.double() - exact).abs() <= eps * size + 1e-6 * size).all()


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("n", "m", "dtype"),
    [(*pattern, dtype) for pattern, dtype in zip(PATTERNS, 4 * DTYPES, strict=True)],
    ids=dtype_name,
)
def test_masks(n, m, dtype):
    check_masks(n, m, dtype)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", [(1, 4), (7, 40), (130, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_masked_weights(dtype, shape):
    check_apply(dtype, shape)


@pytest.mark.interpret
@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (3, 7), (1, 128)])
def test_products(n, m, dtype, tokens):
    check_matmul(n, m, dtype, tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_on_a_device(dtype):
    for n, m in PATTERNS:
        check_masks(n, m, dtype, "cuda")
    check_apply(dtype, (513, 264), "cuda")
    for n, m in ((2, 4), (1, 8), (3, 7)):
        for tokens in (1, 7, 33):
            check_matmul(n, m, dtype, tokens, "cuda")
