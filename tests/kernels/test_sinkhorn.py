"""sinkhorn: the algebra of the iteration, and the scale-vector form against the literal loop in fp64."""

import math

import pytest
import torch
from kernel_cases import draw

from leanstep.kernels import sinkhorn, use_backend
from leanstep.kernels.matrices.sinkhorn import sinkhorn_of_rows

BACKENDS = ["reference", "cpp"]
SHAPES = [(1, 1), (1, 9), (9, 1), (3, 7), (61, 130), (130, 61), (33, 257)]


def literal(gradient, iterations, *, end_with_rows=False):
    """SR-Sinkhorn as printed (arXiv 2502.06742): rows to norm sqrt(n), then columns to norm sqrt(m)."""
    x = gradient.double().clone()
    m, n = x.shape[-2:]

    def scaled(x, dim, size):
        norms = x.norm(dim=dim, keepdim=True)
        return torch.where(norms == 0, 0.0, math.sqrt(size) * x / norms)

    for _ in range(iterations):
        x = scaled(x, -1, n)
        x = scaled(x, -2, m)
    return scaled(x, -1, n) if end_with_rows else x


def iterate(gradient, iterations, **options):
    """The iterate that the scales stand for, in fp64."""
    scales = sinkhorn([gradient], iterations, **options)
    rows, cols = scales.rows[0].double(), scales.cols[0].double()
    return rows.unsqueeze(-1) * gradient.double() * cols.unsqueeze(-2)


def close(a, b, tolerance):
    error = (a - b).norm() / b.norm().clamp_min(1e-30)
    assert error <= tolerance, float(error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_literal_loop(backend, shape, dirty_memory):
    g = draw(*shape)
    before = g.clone()
    with use_backend(backend):
        for count in (1, 2, 5):
            close(iterate(g, count), literal(g, count), 1e-6)
        close(iterate(g, 2, end_with_rows=True), literal(g, 2, end_with_rows=True), 1e-6)
    assert torch.equal(g, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(backend, dtype):
    g = draw(40, 70, dtype=dtype)
    if backend == "cpp" and dtype != torch.bfloat16:
        backend = "auto"  # which takes the definition
    with use_backend(backend):
        scales = sinkhorn([g], 5)
        close(iterate(g, 5), literal(g, 5), 1e-12 if dtype == torch.float64 else 1e-6)
    assert scales.flat_rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_stacks_and_layouts(backend):
    stack, empty, no_rows = draw(3, 9, 20), torch.empty(0, 5), torch.empty(2, 0, 3)
    mats = [draw(9, 20), stack, empty, draw(20, 9).mT, draw(18, 40)[::2, ::2], torch.empty(5, 0), no_rows]
    with use_backend(backend):
        scales = sinkhorn(mats, 5)
    assert [tuple(r.shape) for r in scales.rows] == [(9,), (3, 9), (0,), (9,), (9,), (5,), (2, 0)]
    assert [tuple(c.shape) for c in scales.cols] == [(20,), (3, 20), (5,), (20,), (20,), (0,), (2, 3)]
    assert scales.flat_rows.numel() == sum(r.numel() for r in scales.rows)
    for mat, rows, cols in zip(mats, scales.rows, scales.cols, strict=True):
        if mat.numel():
            close(rows.double().unsqueeze(-1) * mat * cols.double().unsqueeze(-2), literal(mat, 5), 1e-6)
    assert sinkhorn([], 5).rows == []


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_columns_are_exact_and_the_size_is_fixed(count):
    x = iterate(draw(61, 130), count)
    torch.testing.assert_close(x.square().sum() / x.numel(), torch.ones((), dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(x.norm(dim=0), torch.full((130,), math.sqrt(61), dtype=torch.float64), rtol=1e-6, atol=0)


def test_rows_converge_for_normal_entries_and_slowly_for_heavy_tails():
    rows = iterate(draw(61, 130, dtype=torch.float64), 10).norm(dim=1) / math.sqrt(130)
    assert (rows - 1).abs().max() < 1e-8
    heavy = draw(61, 130) / torch.distributions.Chi2(2.0).sample((61, 130)).div(2).sqrt()
    rows = iterate(heavy, 5).norm(dim=1) / math.sqrt(130)
    assert (rows - 1).abs().max() < 0.3


def test_two_by_two():
    g = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    for count, want in (
        (20, [[0.894427, 1.095445], [1.095445, -0.894427]]),
        (1, [[0.845154, 1.054093], [1.133893, -0.942809]]),
    ):
        torch.testing.assert_close(iterate(g, count), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-6)


def test_closed_forms():
    outer = draw(7, 1) @ draw(1, 9, seed=1)
    torch.testing.assert_close(iterate(outer, 1), torch.sign(outer).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(iterate(torch.full((4, 6), -3.0), 1), -torch.ones(4, 6).double(), rtol=1e-6, atol=0)
    permutation = torch.eye(8)[torch.randperm(8)]
    torch.testing.assert_close(iterate(permutation, 3), permutation.double() * math.sqrt(8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_the_size_does_not_matter(factor):
    g = draw(20, 33)
    close(iterate(g * factor, 5), iterate(g, 5), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.9e19, 1e30, 1e37])
def test_rows_whose_squares_overflow_stand_anywhere(backend, dtype, size):
    """Loops over several rows at a time repeat the last one where the number of rows does not divide."""
    for rows in range(1, 10):
        mats = [draw(rows, 7, dtype=dtype, seed=rows), draw(2, rows, 7, dtype=dtype), draw(rows, 7, dtype=dtype)]
        mats[0] *= size
        mats[1] *= size
        mats[2][-1] *= size
        with use_backend(backend):
            scales = sinkhorn(mats, 3, end_with_rows=True)
        for mat, r, c in zip(mats, scales.rows, scales.cols, strict=True):
            close(r.double().unsqueeze(-1) * mat * c.double().unsqueeze(-2), literal(mat, 3, end_with_rows=True), 1e-6)


def test_equivariance():
    g = draw(20, 33)
    x = iterate(g, 3)
    assert torch.equal(iterate(-g, 3), -x)
    i, j = torch.randperm(20), torch.randperm(33)
    close(iterate(g[i][:, j], 3), x[i][:, j], 1e-6)  # sums in another order
    signs = torch.sign(draw(33))
    assert torch.equal(iterate(g * signs, 3), x * signs)


def test_diagonal_rescaling_matters_less_the_longer_it_runs():
    """... and at one iteration it does: no more iterations run than were asked for."""
    g = draw(20, 33, dtype=torch.float64)
    scaled = torch.exp(draw(20, 1).double()) * g * torch.exp(draw(1, 33, seed=1).double())
    close(iterate(scaled, 50), iterate(g, 50), 1e-8)
    assert (iterate(scaled, 1) - iterate(g, 1)).norm() > 0.05 * math.sqrt(g.numel())


def test_rows_come_first():
    g = draw(20, 33, dtype=torch.float64).exp()
    assert (iterate(g, 1) - iterate(g.T, 1).T).norm() > 1e-3 * math.sqrt(g.numel())
    close(iterate(g, 50), iterate(g.T, 50).T, 1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_stay_zero(backend):
    with use_backend(backend):
        assert not iterate(torch.zeros(4, 6), 5).any()
        g = draw(12, 20)
        g[[2, 5, 7]] = 0
        g[:, 4] = 0
        x = iterate(g, 50)
        assert torch.isfinite(x).all() and not x[[2, 5, 7]].any() and not x[:, 4].any()
        # three of twelve rows are empty: the others share what columns of norm sqrt(12) hold
        alive = [i for i in range(12) if i not in (2, 5, 7)]
        want = torch.full((9,), math.sqrt(19 * 12 / 9), dtype=torch.float64)
        torch.testing.assert_close(x[alive].norm(dim=1), want, rtol=1e-5, atol=0)
        single = torch.zeros(3, 4)
        single[1, 2] = -1e-20
        x = iterate(single, 5)
        assert x.count_nonzero() == 1 and x[1, 2] == pytest.approx(-math.sqrt(3), rel=1e-6)
        triangle = torch.tril(torch.ones(4, 4))
        assert torch.isfinite(iterate(triangle, 20)).all() and (iterate(triangle, 20)[triangle == 0] == 0).all()


def test_tiny_rows_come_to_full_size():
    g = draw(10, 16)
    g[3] *= 1e-12
    norms = iterate(g, 5).norm(dim=1)
    assert norms[3] / norms.mean() > 0.9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_entries_show_in_every_column(backend, value):
    g, stack = draw(6, 9), draw(2, 6, 9)
    g[1, 2] = stack[1, 0, 0] = value
    with use_backend(backend):
        scales = sinkhorn([g, stack, draw(3, 3)], 3)
    assert scales.cols[0].isnan().all() and scales.cols[1][1].isnan().all()
    assert torch.isfinite(scales.cols[1][0]).all() and torch.isfinite(scales.cols[2]).all()


def test_a_list_with_an_fp64_matrix_keeps_its_precision():
    chance = torch.Generator().manual_seed(0)
    narrow, wide = torch.randn(5, 7, generator=chance), torch.randn(6, 4, generator=chance, dtype=torch.float64)
    alone = sinkhorn([wide], 3)
    for place, mats in enumerate(([wide, narrow], [narrow, wide])):
        scales = sinkhorn(mats, 3)
        assert torch.equal(scales.rows[place], alone.rows[0]) and torch.equal(scales.cols[place], alone.cols[0])


def test_balanced_form_ends_with_rows():
    x = iterate(draw(30, 12), 2, end_with_rows=True)
    torch.testing.assert_close(x.square().mean(dim=1), torch.ones(30).double(), rtol=1e-6, atol=0)


def test_without_iterations_rows_have_their_largest_entries():
    g = draw(9, 7)
    whole = sinkhorn([g], 0)
    torch.testing.assert_close(whole.rows[0], 1 / g.abs().amax(dim=1))
    with pytest.raises(StopIteration) as end:
        next(sinkhorn_of_rows([g], 0, rows_total=[9]))
    assert torch.equal(end.value.value.rows[0], whole.rows[0]) and torch.equal(end.value.value.cols[0], whole.cols[0])


def test_sharded_rows_are_the_whole():
    """Column means of the shards, summed once per iteration, give the scales of the whole matrix."""
    g = draw(23, 17)
    whole = sinkhorn([g], 5, end_with_rows=True)
    rules = [sinkhorn_of_rows([part], 5, end_with_rows=True, rows_total=[23]) for part in (g[:9], g[9:9], g[9:])]
    for _ in range(5):
        means = [next(rule)[0] for rule in rules]
        total = sum(means)
        for mean in means:
            mean.copy_(total)
    results = []
    for rule in rules:
        with pytest.raises(StopIteration) as end:
            next(rule)
        results.append(end.value.value)
    torch.testing.assert_close(torch.cat([r.rows[0] for r in results]), whole.rows[0], rtol=1e-5, atol=0)
    for result in results:
        torch.testing.assert_close(result.cols[0], whole.cols[0], rtol=1e-5, atol=0)


def test_opcheck():
    for mats in ([draw(3, 5), draw(2, 4, 3)], [draw(3, 5, dtype=torch.float64)]):
        torch.library.opcheck(torch.ops.leanstep.sinkhorn, (mats, 3, True))
