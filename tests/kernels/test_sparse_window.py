"""Sparse windows: which entries are kept, and dots and combinations against the dense rows that they stand for."""

import pytest
import torch
from gradient_windows import sparse_gram_row
from kernel_cases import DTYPES, bits_equal, dtype_name

from leanstep.kernels import (
    linear_combination,
    row_dots,
    scatter,
    sparse_layout,
    sparse_linear_combination,
    sparse_row_dots,
    top_k,
    use_backend,
)

BACKENDS = ["reference", "cpp"]
# whole blocks, a last short one, less than a block, one element, none, and enough blocks for the compiled loops
SIZES = [(64, 16), (1000, 96), (10, 4096), (1, 1), (0, 8), (40 * 64 + 7, 64), (40_000, 32_768)]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sparse_window(m, dtype, density=0.1, sizes=SIZES):
    """(values, indices, layouts, dense float64 rows), one of each per block."""
    layouts = [sparse_layout(n, density, block) for n, block in sizes]
    kept = [
        [top_k(normal(layout.numel, seed=100 * b + i), layout, dtype) for i in range(m)]
        for b, layout in enumerate(layouts)
    ]
    values = [torch.stack([v for v, _ in rows]) for rows in kept]
    indices = [torch.stack([i for _, i in rows]) for rows in kept]
    dense = [
        torch.stack([scatter(v, i, s, dtype=torch.float64) for v, i in rows])
        for rows, s in zip(kept, layouts, strict=True)
    ]
    return values, indices, layouts, dense


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("m", [1, 6])
def test_equals_the_dense_rows(backend, dtype, m, dirty_memory):
    values, indices, layouts, dense = sparse_window(m, dtype)
    vectors = [normal(s.numel, seed=9) for s in layouts]
    coefficients = normal(m, dtype=torch.float64, seed=8)
    g, x = torch.cat(dense, dim=1), torch.cat(vectors).double()
    before = [t.clone() for t in values + indices]
    with use_backend("reference" if dtype == torch.float64 else backend):
        for found, want, size in (
            (sparse_row_dots(values, indices, vectors, layouts), g @ x, g.abs() @ x.abs()),
            (sparse_gram_row(values, indices, m - 1, layouts), g @ g[-1], g.abs() @ g[-1].abs()),
            (
                torch.cat(sparse_linear_combination(values, indices, coefficients, layouts)),
                coefficients @ g,
                coefficients.abs() @ g.abs(),
            ),
        ):
            bound = 1e-14 if found.dtype == torch.float64 else 2**-24  # fp64 sums; combinations are rounded once
            assert ((found - want).abs() <= bound * size).all()
    for tensor, want in zip(values + indices, before, strict=True):
        bits_equal(tensor, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_and_repeats(backend, dirty_memory):
    values, indices, layouts, dense = sparse_window(5, torch.bfloat16)
    groups = [0, 1, 1, 0, 2, 1, 0]
    vectors = [normal(s.numel, seed=9) for s in layouts]
    coefficients = normal(3, 5, dtype=torch.float64)
    with use_backend(backend):
        dots = sparse_row_dots(values, indices, vectors, layouts, groups=groups)
        first, second = (
            sparse_linear_combination(values, indices, coefficients, layouts, groups=groups) for _ in range(2)
        )
    want = torch.zeros(3, 5, dtype=torch.float64)
    for group, rows, vector in zip(groups, dense, vectors, strict=True):
        want[group] += rows @ vector.double()
    torch.testing.assert_close(dots, want, rtol=1e-5, atol=1e-5)
    for group, rows, one, two in zip(groups, dense, first, second, strict=True):
        torch.testing.assert_close(one.double(), coefficients[group] @ rows, rtol=1e-5, atol=1e-6)
        bits_equal(one, two)


def test_the_number_of_threads_changes_nothing():
    values, indices, layouts, _ = sparse_window(5, torch.bfloat16)
    vectors, coefficients, found = [normal(s.numel) for s in layouts], normal(5, dtype=torch.float64), []
    with use_backend("cpp"):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            dots = sparse_row_dots(values, indices, vectors, layouts)
            found.append([dots, *sparse_linear_combination(values, indices, coefficients, layouts)])
    for a, b in zip(*found, strict=True):
        bits_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_density_one_is_the_dense_window_bit_for_bit(dtype, dirty_memory):
    values, indices, layouts, _ = sparse_window(6, dtype, density=1.0)
    assert all(layout.is_dense for layout in layouts)
    for layout, value in zip(layouts, values, strict=True):
        bits_equal(value[0], normal(layout.numel, seed=100 * layouts.index(layout)).to(dtype))
    vectors = [normal(s.numel, seed=9) for s in layouts]
    coefficients = normal(6, dtype=torch.float64)
    bits_equal(sparse_row_dots(values, indices, vectors, layouts), row_dots(values, vectors))
    for found, want in zip(
        sparse_linear_combination(values, indices, coefficients, layouts),
        linear_combination(values, coefficients),
        strict=True,
    ):
        bits_equal(found, want)


def test_the_largest_of_every_block_are_kept_and_the_first_of_equal_ones():
    vector = torch.tensor([1.0, -2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, -5.0, 5.0])
    values, indices = top_k(vector, sparse_layout(10, 0.5, 4), torch.float32)
    assert values.tolist() == [-2.0, 2.0, 0.0, 0.0, -5.0]
    assert indices.tolist() == [1, 2, 0, 1, 0]
    assert values.dtype == torch.float32 and indices.dtype == torch.int16


@pytest.mark.parametrize(("numel", "block"), [(5000, 512), (40_000, 32_768), (7, 3)])
def test_top_k_against_a_stable_sort(numel, block):
    layout = sparse_layout(numel, 0.07, block)
    vector = normal(numel).mul(4).round()  # many equal magnitudes
    values, indices = top_k(vector, layout, torch.float32)
    at = 0
    for start in range(0, numel, block):
        piece = vector[start : start + block]
        count = layout.per_block if len(piece) == block else layout.last
        assert count == -(-len(piece) * 7 // 100)
        order = torch.sort(piece.abs(), descending=True, stable=True).indices[:count].sort().values
        assert indices[at : at + count].tolist() == order.tolist()
        bits_equal(values[at : at + count], piece[order])
        at += count
    assert at == layout.k == values.numel()


def test_error_feedback_loses_nothing():
    layout, error, total = sparse_layout(1000, 0.02, 128), torch.zeros(1000), torch.zeros(1000, dtype=torch.float64)
    stored = torch.zeros(1000, dtype=torch.float64)
    for step in range(50):
        gradient = normal(1000, seed=step)
        total += gradient.double()
        accumulated = error + gradient
        row = scatter(*top_k(accumulated, layout), layout)
        stored += row.double()
        error = accumulated - row
    # every addition above rounds to fp32: 50 of them, of numbers up to 20
    torch.testing.assert_close(stored + error.double(), total, rtol=0, atol=1e-4)
    assert error.abs().max() > 1


def test_fp64_vectors_keep_fp64():
    values, indices = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int16)
    vector = torch.tensor([1 + 2**-30, 0.0], dtype=torch.float64)
    assert sparse_row_dots([values], [indices], [vector], [sparse_layout(2, 0.5, 2)]).item() == 1 + 2**-30


def test_bad_arguments_are_named():
    layout = sparse_layout(10, 0.5, 4)
    values, indices = torch.ones(3, 5), torch.zeros(3, 5, dtype=torch.int16)
    for call, message in [
        (lambda: sparse_layout(10, 0.0), "0 < density <= 1"),
        (lambda: sparse_layout(10, 0.5, 2**15 + 1), "block of 1 to 32768"),
        (lambda: sparse_layout(-1, 0.5), "numel >= 0"),
        (lambda: top_k(torch.ones(9), layout), "layout is of 10 elements, the vector has 9"),
        (lambda: scatter(values[0, :4], indices[0], layout), "expected 5 values"),
        (lambda: sparse_row_dots([], [], [], []), "at least one window"),
        (lambda: sparse_row_dots([values], [indices.int()], [torch.ones(10)], [layout]), "torch.int16"),
        (lambda: sparse_row_dots([values], [indices], [torch.ones(9)], [layout]), r"vectors\[0\] has 9"),
        (lambda: sparse_row_dots([values[:, :4]], [indices], [torch.ones(10)], [layout]), r"shape \(3, 5\)"),
        (lambda: sparse_row_dots([values[:0]], [indices[:0]], [torch.ones(10)], [layout]), "at least one row"),
        (lambda: sparse_linear_combination([values], [indices], torch.ones(2), [layout]), r"shape \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_compiles_whole():
    values, indices, layouts, _ = sparse_window(3, torch.bfloat16, sizes=SIZES[:3])
    vectors, coefficients = [normal(s.numel) for s in layouts], normal(3, dtype=torch.float64)

    def step(values, indices, vectors, coefficients):
        dots = sparse_row_dots(values, indices, vectors, layouts)
        return [dots, *sparse_linear_combination(values, indices, coefficients, layouts)]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, want in zip(
        compiled(values, indices, vectors, coefficients), step(values, indices, vectors, coefficients), strict=True
    ):
        bits_equal(found, want)
