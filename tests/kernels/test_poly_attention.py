"""Polynomial attention in chunks against the definition that forms the whole matrix, its gradient, and its cost."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from leanstep.kernels.poly.attention import (
    _run,
    _run_backward,
    poly_attention,
    poly_attention_backward_flops,
    poly_attention_flops,
)
from leanstep.kernels.reference.poly import attention as definition


def register_flop_formulas():
    """Teach torch's FlopCounterMode the formulas of the op; before such a mode is made."""
    if torch.ops.leanstep.poly_attention in flop_registry:
        return

    @register_flop_formula(torch.ops.leanstep.poly_attention)
    def _(q, k, v, center, key_mask, coefficients, scale, causal, chunk, *args, out_shape=None, **kwargs):
        return poly_attention_flops(q, k, v, len(coefficients) - 1, causal=causal, chunk=chunk)

    @register_flop_formula(torch.ops.leanstep.poly_attention_backward)
    def _(grad, q, k, v, out, total, center, mask, coefficients, scale, causal, chunk, wanted, *args, **kwargs):
        settings = dict(causal=causal, chunk=chunk, wanted=wanted)
        return poly_attention_backward_flops(q, k, v, len(coefficients) - 1, **settings)


def taylor(degree):
    return [1 / math.factorial(t) for t in range(degree + 1)]


def inputs(heads=(4, 2), lengths=(20, 20), dims=(3, 5), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (2, heads[0], lengths[0], dims[0]),
        (2, heads[1], lengths[1], dims[0]),
        (2, heads[1], lengths[1], dims[1]),
    ]
    return [(0.5 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]


def same(found, want, **tolerance):
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("coefficients", [[1.0], [1.0, 1.0, 0.5], [0.9, 1.1, 0.4, 0.2]], ids=len)
def test_chunks_equal_the_dense_definition(causal, masked, chunk, coefficients):
    q, k, v = inputs(lengths=(20, 20 if causal else 13))
    center = torch.randn(2, 3, dtype=torch.float64)
    mask = torch.rand(2, k.shape[2]) > 0.4 if masked else None
    settings = dict(scale=0.7, causal=causal)
    found = poly_attention(q, k, v, coefficients, center=center, key_mask=mask, chunk=chunk, **settings)
    want = definition.poly_attention(q, k, v, center.expand(2, -1, -1), mask, coefficients, **settings)
    same(found, want, rtol=1e-11, atol=1e-12)
    grad = torch.randn_like(found[0])
    options = dict(allow_unused=True, materialize_grads=True)
    slopes = [torch.autograd.grad(out[0], (q, k, v), grad, **options) for out in (found, want)]
    same(*slopes, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradients_pass_gradcheck(causal):
    q, k, v = inputs(heads=(2, 1), lengths=(6, 6), dims=(2, 2))
    mask = torch.tensor([[True] * 6, [False, True, True, False, True, True]])

    def run(q, k, v):
        return poly_attention(q, k, v, taylor(2), scale=0.5, causal=causal, key_mask=mask, chunk=4)[0]

    assert torch.autograd.gradcheck(run, (q, k, v), atol=1e-8)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1)], ids=str)
def test_only_wanted_gradients_are_computed_and_operations_are_those_of_the_formulas(wanted, causal):
    tensors = inputs(lengths=(50, 50), dims=(8, 6), dtype=torch.float32)
    q, k, v = (x.detach() for x in tensors)
    shapes, flags = (q.shape, k.shape, v.shape, 2), [bool(w) for w in wanted]
    settings = (None, None, taylor(2), 0.3, causal, 16)
    with FlopCounterMode(display=False) as forward:
        out, sums = _run.__wrapped__(q, k, v, *settings)
    assert forward.get_total_flops() == poly_attention_flops(*shapes, causal=causal, chunk=16)
    with FlopCounterMode(display=False) as backward:
        found = _run_backward(out, q, k, v, out, sums, *settings, flags)
    want = poly_attention_backward_flops(*shapes, causal=causal, chunk=16, wanted=flags)
    assert backward.get_total_flops() == want
    assert [x.numel() > 0 for x in found] == flags
    # and the counter sees through the op
    register_flop_formulas()
    leaves = [x.requires_grad_(flag) for x, flag in zip((q, k, v), flags, strict=True)]
    with FlopCounterMode(display=False) as whole:
        poly_attention(*leaves, taylor(2), scale=0.3, causal=causal, chunk=16)[0].sum().backward()
    assert whole.get_total_flops() == forward.get_total_flops() + want
    assert [x.grad is not None for x in leaves] == flags


def test_operations_are_linear_in_the_length():
    def cost(length):
        shapes = ((1, 8, length, 64), (1, 2, length, 64), (1, 2, length, 64), 2)
        flops = (poly_attention_flops, poly_attention_backward_flops)
        return [f(*shapes, causal=causal) for f in flops for causal in (False, True)]

    for small, large in zip(cost(1 << 14), cost(1 << 17), strict=True):
        assert large / small == pytest.approx(8, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_narrow_dtypes_are_computed_in_fp32(causal, dtype, dirty_memory):
    q, k, v = inputs(lengths=(40, 40), dims=(8, 8), dtype=dtype)
    out, sums = poly_attention(q, k, v, taylor(2), scale=0.3, causal=causal, chunk=16)
    assert out.dtype == dtype and sums.dtype == torch.float32
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), grad)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = poly_attention(*exact, taylor(2), scale=0.3, causal=causal, chunk=16)[0]
    slopes = torch.autograd.grad(want, exact, grad.double())
    # one rounding of the result, and fp32 sums
    unit = torch.finfo(dtype).eps
    for a, b in zip((out, *found), (want, *slopes), strict=True):
        assert a.dtype == dtype
        assert ((a.double() - b).abs().max() <= 2 * (unit + 2e-6) * b.abs().max()).item()


def test_autocast_does_not_reach_the_sums():
    q, k, v = inputs(dtype=torch.float32)
    settings = dict(coefficients=taylor(2), scale=0.5, causal=True, chunk=8)
    want = poly_attention(q, k, v, **settings)
    slopes = torch.autograd.grad(want[0].sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        found = poly_attention(q, k, v, **settings)
        grads = torch.autograd.grad(found[0].sum(), (q, k, v))
    same(found, want, rtol=0, atol=0)
    same(grads, slopes, rtol=0, atol=0)


def test_where_no_key_counts_the_result_is_zero():
    q, k, v = inputs(heads=(1, 1), lengths=(6, 6))
    mask = torch.tensor([[False, False, True, True, True, True], [False] * 6])
    # what is masked may be anything
    with torch.no_grad():
        v[0, :, :2] = float("nan")
    for chunk in (1, 4):
        out, sums = poly_attention(q, k, v, taylor(2), scale=0.5, causal=True, key_mask=mask, chunk=chunk)
        assert not out[0, 0, :2].any() and not out[1].any() and not sums[1].any()
        assert out.isfinite().all()
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(g.isfinite().all() for g in grads)
        assert not grads[2][0, :, :2].any() and not grads[1][1].any()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_heads_are_split_to_fit_the_scratch_memory(causal, monkeypatch):
    q, k, v = inputs()
    whole = poly_attention(q, k, v, taylor(2), scale=0.5, causal=causal, chunk=8)
    grads = torch.autograd.grad(whole[0].sum(), (q, k, v))
    monkeypatch.setattr("leanstep.kernels.poly.chunks._SCRATCH", {"cpu": 1})
    parts = poly_attention(q, k, v, taylor(2), scale=0.5, causal=causal, chunk=8)
    same(parts, whole)
    same(torch.autograd.grad(parts[0].sum(), (q, k, v)), grads)


def test_it_is_a_proper_op_and_compiles_whole():
    q, k, v = inputs(lengths=(9, 9), dtype=torch.float32)
    arguments = (q, k, v, None, None, taylor(2), 0.5, True, 4)
    torch.library.opcheck(torch.ops.leanstep.poly_attention.default, arguments)
    compiled = torch.compile(
        lambda q, k, v: poly_attention(q, k, v, [1.0, 1.0, 0.5], scale=0.5, causal=True, chunk=4)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    out, want = compiled(q, k, v), poly_attention(q, k, v, taylor(2), scale=0.5, causal=True, chunk=4)[0]
    same([out], [want])
    same(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_backward_op_has_the_strides_that_it_promises(batch, causal):
    """Of inputs [B, L, H, d] in transposed views, as attention layers make them."""
    q, k, v = (torch.randn(batch, 9, 2, 3).transpose(1, 2) for _ in range(3))
    settings = (None, None, taylor(2), 0.5, causal, 4)
    out, sums = torch.ops.leanstep.poly_attention(q, k, v, *settings)
    arguments = (torch.randn_like(out), q, k, v, out, sums, *settings, [True, True, True])
    torch.library.opcheck(torch.ops.leanstep.poly_attention_backward.default, arguments)


def test_bad_arguments_are_named():
    q, k, v = (x.detach() for x in inputs())
    mask = torch.ones(2, 20, dtype=torch.bool)
    for call, message in [
        (lambda: poly_attention(q[0], k, v, [1.0], scale=1), r"q \[B, Hq, L, d\].*got \(4, 20, 3\)"),
        (lambda: poly_attention(q[:, :3], k, v, [1.0], scale=1), "multiple of key heads"),
        (lambda: poly_attention(q.float(), k, v, [1.0], scale=1), "one floating dtype"),
        (lambda: poly_attention(q[:, :, :5], k, v, [1.0], scale=1, causal=True), "as many keys as queries"),
        (lambda: poly_attention(q, k, v, [], scale=1), "expected coefficients"),
        (lambda: poly_attention(q, k, v, [1.0], scale=1, chunk=0), "chunk >= 1"),
        (lambda: poly_attention(q, k, v, [1.0], scale=1, center=torch.zeros(3)), r"center \[H, d\]"),
        (lambda: poly_attention(q, k, v, [1.0], scale=1, key_mask=mask.float()), "bool key_mask"),
        (lambda: poly_attention(q, k, v, [1.0], scale=1, key_mask=mask[:, 1:]), r"\(2, 19\)"),
        (lambda: poly_attention(q, k, v, [1.0] * 400, scale=1), "take a lower degree"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
