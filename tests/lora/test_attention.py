"""Low-rank attention: what it computes, its gradient, the bounds of its errors, and the paper's own gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minimax import minimax_coefficients
from paper_chain import chain_gradients, dense_gradients, factor_gradients, paper_chain_attention
from torch.nn.functional import scaled_dot_product_attention

from leanstep.kernels.poly.features import poly_features
from leanstep.lora.attention.attention import (
    LowRankAttentionError,
    key_means,
    low_rank_attention,
    needed_degree,
    relative_error,
    slope_error,
    taylor_coefficients,
)
from leanstep.lora.attention.error_bounds import error_bounds, largest_logit

# bound of the logits: least degree of Taylor's sum, and of the best polynomial, for relative errors 0.1, 0.01, 0.001
DEGREES = {
    0.5: ((2, 3, 4), (1, 2, 3)),
    1: ((3, 5, 6), (2, 3, 4)),
    2: ((7, 8, 10), (3, 5, 6)),
    3: ((10, 12, 13), (4, 6, 8)),
    4: ((14, 15, 17), (6, 7, 9)),
    6: ((21, 22, 24), (8, 10, 12)),
    8: ((28, 30, 31), (10, 12, 14)),
    10: ((35, 37, 38), (12, 15, 17)),
}


def tensors(batch=2, heads=(2, 2), length=12, dim=4, wide=3, size=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads[0], length, dim), (batch, heads[1], length, dim), (batch, heads[1], length, wide)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    top = largest_logit(q, k, dim**-0.5).max()
    q, k = q * (size / top).sqrt(), k * (size / top).sqrt()
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def exact(q, k, v, causal=False):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal)


# --- the function --------------------------------------------------------------------------------------------------


def test_a_high_degree_is_exact_attention():
    for causal in (False, True):
        q, k, v = tensors(heads=(4, 2), size=1.0)
        found = low_rank_attention(q, k, v, degree=12, causal=causal)
        want = exact(q, k, v, causal)
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
        grad = torch.randn_like(found)
        grads = [torch.autograd.grad(out, (q, k, v), grad) for out in (found, want)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("degree", [2, 3])
def test_the_gradient_is_that_of_the_surrogate(degree, causal):
    q, k, v = tensors(batch=1, heads=(2, 1), length=5, dim=2, wide=2)
    center = torch.full((1, 2), 0.1, dtype=torch.float64)

    def run(q, k, v):
        return low_rank_attention(q, k, v, degree=degree, causal=causal, center=center)

    assert torch.autograd.gradcheck(run, (q, k, v), atol=1e-8)


def test_centring_changes_no_softmax_and_takes_the_mean_of_the_keys_that_count():
    q, k, v = tensors()
    torch.testing.assert_close(exact(q, k - key_means(k)[..., None, :], v), exact(q, k, v), rtol=0, atol=1e-15)
    mask = torch.rand(2, 12) > 0.5
    means = key_means(k, mask)
    for b in range(2):
        torch.testing.assert_close(means[b], k[b][:, mask[b]].mean(dim=1).detach())
    # far from the origin, centring is what makes the approximation one
    far = k + 20
    error = (low_rank_attention(q, far, v, degree=4) - exact(q, k, v)).abs().max()
    assert error < 1e-3 < 100 * (low_rank_attention(q, far, v, degree=4, center=False) - exact(q, k, v)).abs().max()


def test_causal_outputs_do_not_depend_on_keys_to_come():
    # more than one chunk
    q, k, v = (x.detach() for x in tensors(length=150))
    before = low_rank_attention(q, k, v, causal=True)
    changed = [torch.cat([x[:, :, :140], 5 * torch.randn_like(x[:, :, 140:])], dim=2) for x in (k, v)]
    after = low_rank_attention(q, *changed, causal=True)
    assert torch.equal(before[:, :, :140], after[:, :, :140])
    assert not torch.equal(before[:, :, 140:], after[:, :, 140:])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_padding_changes_nothing(causal):
    q, k, v = (x.detach() for x in tensors(length=9))
    mask = torch.zeros(2, 14, dtype=torch.bool)
    mask[:, :9] = True
    padded = [torch.cat([x, torch.full_like(x[:, :, :5], 7.0)], dim=2).requires_grad_() for x in (q, k, v)]
    found = low_rank_attention(*padded, key_mask=mask, causal=causal)
    plain = [x.requires_grad_() for x in (q, k, v)]
    want = low_rank_attention(*plain, causal=causal)
    torch.testing.assert_close(found[:, :, :9], want)
    grads = torch.autograd.grad(found[:, :, :9].square().sum(), padded)
    for a, b in zip(grads, torch.autograd.grad(want.square().sum(), plain), strict=True):
        torch.testing.assert_close(a[:, :, :9], b)
        assert not a[:, :, 9:].any()


def test_normalisers_of_even_degree_are_positive_whatever_the_logits():
    generator = torch.Generator().manual_seed(0)
    for degree in (2, 4):
        for size in (1.0, 10.0, 50.0):
            q = torch.randn(1, 1, 40, 3, dtype=torch.float64, generator=generator)
            q = size * q / q.norm(dim=-1, keepdim=True)
            # opposite to the queries, and the places where the sum is least: p_2 at -1, p_4 at about -1.6
            least = -1.0 if degree == 2 else -1.5961
            for k in (-q, q.flip(2), least * q / size**2):
                out = low_rank_attention(q, k, k, degree=degree, scale=1.0, center=False)
                assert out.isfinite().all()


def test_a_normaliser_that_is_not_positive_is_an_error_that_says_what_to_do():
    q = torch.ones(1, 1, 3, 1)
    with pytest.raises(LowRankAttentionError, match=r"9 of 9|3 of 3.*-.*degree 1.*exact attention"):
        low_rank_attention(q, -5 * q, q, degree=1, scale=1.0, center=False)
    unlooked = low_rank_attention(q, -5 * q, q, degree=1, scale=1.0, center=False, check=False)
    assert unlooked.shape == q.shape
    with pytest.raises(LowRankAttentionError, match="not positive and finite"):
        low_rank_attention(q * float("nan"), q, q)
    with pytest.raises(LowRankAttentionError, match="finite"):
        low_rank_attention(q * 1e30, q * 1e30, q, center=False)


def test_adapters_on_q_and_v_leave_keys_alone():
    q, k, v = tensors()
    k = k.detach()
    low_rank_attention(q, k, v, causal=True).sum().backward()
    assert q.grad is not None and v.grad is not None and k.grad is None


def test_bad_arguments_are_named():
    q, k, v = (x.detach() for x in tensors())
    for settings_, message in [
        (dict(degree=0), "degree >= 1, got 0"),
        (dict(degree=2.5), "degree >= 1, got 2.5"),
        (dict(degree=400), "take a lower degree"),
        (dict(key_mask=torch.ones(2, 3, dtype=torch.bool)), "bool key_mask"),
        (dict(center=torch.zeros(4)), "expected center"),
        (dict(scale=float("nan")), "finite scale, or None"),
        (dict(scale="a"), "finite scale, or None"),
        (dict(center="mean"), "center True, False, None or a tensor, got 'mean'"),
    ]:
        with pytest.raises(ValueError, match=message):
            low_rank_attention(q, k, v, **settings_)
    with pytest.raises(ValueError, match=r"q \[B, Hq, L, d\]"):
        low_rank_attention(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="as many keys as queries"):
        low_rank_attention(q[:, :, :3], k, v, causal=True)


# --- polynomials ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", DEGREES)
def test_least_degrees(bound):
    polynomials = taylor_coefficients, lambda degree: minimax_coefficients(float(bound), degree)
    for polynomial, want in zip(polynomials, DEGREES[bound], strict=True):
        errors = [relative_error(polynomial(degree), bound) for degree in range(max(want) + 1)]
        assert tuple(next(g for g, e in enumerate(errors) if e <= t) for t in (0.1, 0.01, 0.001)) == want


@given(st.floats(0.01, 12), st.integers(0, 12))
@settings(max_examples=25, deadline=None)
def test_relative_errors_are_attained_and_never_passed(bound, degree):
    x = torch.linspace(-bound, bound, 4001, dtype=torch.float64)
    kinds = [taylor_coefficients(degree), minimax_coefficients(bound, degree)]
    for coefficients in kinds:
        p = sum(c * x**t for t, c in enumerate(coefficients))
        slope = sum(t * c * x ** (t - 1) for t, c in enumerate(coefficients) if t)
        for values, found in ((p, relative_error(coefficients, bound)), (slope, slope_error(coefficients, bound))):
            sampled = float((values * torch.exp(-x) - 1).abs().max()) if torch.is_tensor(values) else 1.0
            assert sampled <= found * (1 + 1e-6) + 1e-12
            assert found <= sampled * 1.001 + 1e-9
    assert relative_error(kinds[1], bound) <= relative_error(kinds[0], bound) * (1 + 1e-6) + 1e-12


def test_degrees_grow_with_the_bound_and_end_at_the_most():
    found = [needed_degree(s, 0.01) for s in (0.0, 0.1, 0.5, 1.0, 3.0, 100.0)]
    assert found[-1] is None and found[0] == 2
    assert all(a <= b and b % 2 == 0 for a, b in zip(found[:-2], found[1:-1], strict=True))
    assert relative_error([1.0], 1000.0) == math.inf
    for call in (
        lambda: needed_degree(1.0, 0.0),
        lambda: taylor_coefficients(-1),
        lambda: relative_error([1.0], float("nan")),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


# --- bounds --------------------------------------------------------------------------------------------------------

CASES = st.tuples(
    st.integers(1, 24),
    st.sampled_from([1, 2, 5, 8]),
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    st.sampled_from([2, 4]),
    st.floats(0.05, 1.2),
    st.sampled_from(["full", "causal", "padded"]),
    st.integers(0, 2**31),
)


@pytest.mark.slow
@given(CASES)
@settings(max_examples=500, deadline=None)
def test_errors_stay_within_their_bounds(case):
    length, dim, heads, degree, size, kind, seed = case
    q, k, v = tensors(1, heads, length, dim, 3, size, seed)
    causal, mask = kind == "causal", None
    if kind == "padded":
        mask = torch.rand(1, length, generator=torch.Generator().manual_seed(seed)) > 0.3
        mask[:, 0] = True
    shared = dict(causal=causal, key_mask=mask, degree=degree)
    found = low_rank_attention(q, k, v, **shared)
    group = heads[0] // heads[1]
    attention_mask = None if mask is None else mask[:, None, None, :]
    wide = [x.repeat_interleave(group, dim=1) for x in (k, v)]
    want = scaled_dot_product_attention(q, *wide, attn_mask=attention_mask, is_causal=causal)
    grad = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    errors = [found - want]
    grads = [torch.autograd.grad(out, (q, k, v), grad) for out in (found, want)]
    errors += [a - b for a, b in zip(*grads, strict=True)]
    bounds = error_bounds(q, k, v, grad, **shared)
    for error, bound in zip(errors, bounds[:4], strict=True):
        assert (error.detach().abs().amax(dim=(2, 3)) <= bound * (1 + 1e-9) + 1e-13).all()


def test_bounds_of_a_negative_scale_are_those_of_the_positive_one():
    q, k, v = tensors(size=0.4)
    grad = torch.ones_like(v)
    for found, wanted in zip(
        error_bounds(q, k, v, grad, scale=-0.3), error_bounds(-q, k, v, grad, scale=0.3), strict=True
    ):
        torch.testing.assert_close(found, wanted)
        assert (found > 0).all()


def test_bounds_say_nothing_where_nothing_holds():
    q, k, v = tensors(size=8.0)
    bounds = error_bounds(q, k, v, torch.ones_like(v))
    assert bounds.out.isinf().all() and bounds.query.isinf().all()
    assert error_bounds(q, k, v).key.isinf().all()
    small = error_bounds(*tensors(size=0.3))
    assert small.out.isfinite().all() and small.logit.max() <= 0.6 and small.query.isinf().all()


def test_no_logit_is_larger_than_the_largest():
    q, k, _ = (x.detach() for x in tensors(heads=(4, 2)))
    s = 0.5 * q @ k.repeat_interleave(2, dim=1).mT
    assert (largest_logit(q, k, 0.5) >= s.abs().amax(dim=(2, 3))).all()


# --- the paper's gradient ------------------------------------------------------------------------------------------


def projections(seed=0, length=7, width=6, dim=4, rank=2):
    """X, frozen weights and factors of Q, K and V, and a target of the paper's squared loss."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return 0.6 * torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weights = normal(length, width), [normal(width, dim) for _ in range(3)]
    factors = [(normal(rank, dim).requires_grad_(), normal(width, rank).requires_grad_()) for _ in range(3)]
    return x, weights, factors, normal(length, dim)


def test_the_formulas_equal_autograd_for_adapters_on_q_k_and_v():
    x, weights, factors, target = projections()
    q, k, v = (x @ (w + b @ a) for w, (a, b) in zip(weights, factors, strict=True))
    f = torch.softmax(0.5 * q @ k.T, dim=-1)
    c = f @ v - target
    loss = 0.5 * c.square().sum()
    want = torch.autograd.grad(loss, [t for pair in factors for t in pair])
    grads = dense_gradients(*(t.detach() for t in (f, q, k, v, c)), 0.5)
    found = [t for grad, (a, b) in zip(grads, factors, strict=True) for t in factor_gradients(x, grad, a, b)]
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-11, atol=1e-12)


def test_scaling_columns_instead_of_rows_is_wrong():
    x, weights, factors, target = projections()
    q, k, v = (x @ (w + b @ a) for w, (a, b) in zip(weights, factors, strict=True))
    f = torch.softmax(q @ k.T, dim=-1)
    c = f @ v - target
    (want,) = torch.autograd.grad(0.5 * c.square().sum(), q)
    f, k, v, c = (t.detach() for t in (f, k, v, c))
    dp = c @ v.T
    r = (f * dp).sum(dim=1)
    rows, columns = ((f * dp - scaled) @ k for scaled in (r[:, None] * f, f * r[None, :]))
    assert (rows - want).abs().max() < 1e-12
    assert (columns - want).abs().max() > 0.1 * want.abs().max()


@pytest.mark.parametrize("shape", [(9, 9), (9, 6)], ids=str)
def test_the_chain_is_exact_for_weights_of_low_rank(shape):
    generator = torch.Generator().manual_seed(0)
    length, keys = shape
    u, v1, q, k, v, c = (
        torch.rand(rows, width, generator=generator, dtype=torch.float64)
        for rows, width in ((length, 5), (keys, 5), (length, 4), (keys, 4), (keys, 3), (length, 3))
    )
    u = u / (u @ v1.sum(dim=0))[:, None]
    for one, other in zip(
        chain_gradients(u, v1, q, k, v, c, 0.7), dense_gradients(u @ v1.T, q, k, v, c, 0.7), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_chain_as_the_gradient_of_attention():
    q, k, v = tensors(heads=(4, 2), size=0.6)
    centred = (k - key_means(k)[..., None, :]).repeat_interleave(2, dim=1)
    found, _ = paper_chain_attention(q, centred, v.repeat_interleave(2, dim=1), 0.5, 2)
    torch.testing.assert_close(found, low_rank_attention(q, k, v, degree=2))
    grad = torch.randn_like(found)
    grads = torch.autograd.grad(found, (q, k, v), grad)
    # softmax's Jacobian at the approximate weights, formed
    y = (k - key_means(k)[..., None, :]).detach().repeat_interleave(2, dim=1)
    s = 0.5 * q.detach() @ y.mT
    weights = 1 + s + s**2 / 2
    f = weights / weights.sum(dim=-1, keepdim=True)
    want = dense_gradients(f, q.detach(), y, v.detach().repeat_interleave(2, dim=1), grad, 0.5)
    torch.testing.assert_close(grads[0], want.query)
    for found_one, wanted in zip(grads[1:], want[1:], strict=True):
        torch.testing.assert_close(found_one, wanted.unflatten(1, (2, 2)).sum(dim=2))
    # and close to the surrogate's own gradient and to the exact one, which are different things
    own = torch.autograd.grad(low_rank_attention(q, k, v, degree=2), q, grad)[0]
    true = torch.autograd.grad(exact(q, k, v), q, grad)[0]
    assert 0 < (own - grads[0]).abs().max() < 0.3 * true.abs().max()
    assert (true - grads[0]).abs().max() < 0.1 * true.abs().max()


def test_features_of_the_chain_are_the_kernels():
    x, y = torch.randn(1, 4, 3, dtype=torch.float64), torch.randn(1, 4, 3, dtype=torch.float64)
    s = x[0].T @ y[0]
    torch.testing.assert_close(poly_features(x, 2)[0].T @ poly_features(y, 2)[0], 1 + s + s**2 / 2)
