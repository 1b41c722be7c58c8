"""The Triton kernels of bitmask matrices against the dense product, in the interpreter and on a device."""

import pytest
import torch
from kernel_cases import DTYPES, dtype_name

from leanstep.kernels import bitmask_linear, bitmask_pack, bitmask_quantize, bitmask_unpack, use_backend
from leanstep.kernels.reference.sparse import bitmask as reference

pytest.importorskip("triton")


def check(dtype, tokens, bits=0, device="cpu", shape=(13, 600)):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    weight = torch.where(torch.rand(shape, generator=generator) < 0.6, 0.0, weight).to(device, dtype)
    weight[0], weight[1, :64] = 0, 1
    x, bias = torch.randn(tokens, shape[1]).to(device, dtype), torch.randn(shape[0]).to(device, dtype)
    values, mask, offsets = bitmask_pack(weight)
    scales = None
    if bits:
        values, scales = bitmask_quantize(values, offsets, mask, bits=bits)
    exact_weight = bitmask_unpack(values, mask, offsets, shape, scales, torch.float64)
    for b in (None, bias):
        with use_backend("triton"):
            out = bitmask_linear(x, values, mask, offsets, shape[1], b, scales)
        exact, size = x.double() @ exact_weight.T, x.double().abs() @ exact_weight.abs().T
        if b is not None:
            exact, size = exact + b.double(), size + b.double().abs()
        # one rounding to the dtype after fp32 sums; the dense product in 16 bits may round partial sums as well
        assert ((out.double() - exact).abs() <= (torch.finfo(dtype).eps + 1e-6) * size).all()


@pytest.mark.interpret
@pytest.mark.parametrize("bits", [0, 8, 4], ids=["values", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 6, 18])
def test_products(tokens, bits, monkeypatch):
    """Either dtype with every number of tokens and of bits."""
    monkeypatch.setattr(reference, "TILE", 2000)
    check((torch.float32, torch.bfloat16)[(tokens // 6 + bits // 4) % 2], tokens, bits)


@pytest.mark.interpret
def test_gradients():
    weight = torch.randn(9, 70) * (torch.rand(9, 70) < 0.4)
    x = torch.randn(5, 70, requires_grad=True)
    with use_backend("triton"):
        bitmask_linear(x, *bitmask_pack(weight), 70).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 70))


@pytest.mark.interpret
def test_damaged_parts_never_read_outside_of_the_values():
    """NaN surrounds the values: a product that read one would be NaN."""
    values = torch.full((3000,), float("nan"))[1000:1300].fill_(1.0)
    full = torch.full((10, 4), -1, dtype=torch.int32)
    for offsets in (torch.arange(11) * 30, torch.full((11,), 2**62), torch.arange(11) - 5):
        for tokens in (1, 18):
            with use_backend("triton"):
                assert bitmask_linear(torch.ones(tokens, 128), values, full, offsets, 128).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_on_a_device(dtype):
    for tokens in (1, 2, 7, 16, 40):
        for bits in (0, 8, 4):
            check(dtype, tokens, bits, "cuda", (513, 1100))
