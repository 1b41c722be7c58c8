"""Compressed N:M matrices: exact round trips, and products equal to the dense ones."""

import itertools

import pytest
import torch
from covering import meeting
from kernel_cases import DTYPES, bits_equal, dtype_name

from leanstep.kernels import nm_compress, nm_decompress, nm_mask, nm_matmul, use_backend
from leanstep.kernels.cpp_impl._build import call as call_cpp
from leanstep.kernels.cpp_impl._build import library, why_not_cpp
from leanstep.kernels.nm import matmul

PATTERNS = [(2, 4), (4, 8), (1, 8), (3, 7), (1, 32), (1, 128), (100, 256), (4, 4), (0, 4), (1, 1)]


def sparse(n, m, dtype, rows=37, groups=5, seed=0):
    weight = torch.randn(rows, groups * m, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return torch.where(nm_mask([weight], n, m)[0], weight, torch.zeros((), dtype=dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_round_trips_are_exact(n, m, dtype):
    weight = sparse(n, m, dtype)
    if n:
        # fewer nonzeros than there is room for, subnormal numbers, and a zero with a sign
        weight[3] = 0
        weight[4, :m] = 0
        weight[4, m - 1] = -0.0
        weight[5] = weight[5] * torch.finfo(dtype).tiny * 0.01
    values, indices = nm_compress(weight, n, m)
    assert values.shape == indices.shape == (37, 5, n)
    assert values.dtype == dtype and indices.dtype == torch.uint8
    assert n < 2 or bool((indices.int().diff(dim=-1) > 0).all())
    found = nm_decompress(values, indices, m)
    bits_equal(found, weight)
    assert torch.equal(found.signbit(), weight.signbit())


def test_the_compressed_form_of_a_group_is_determined():
    weight = torch.tensor([[0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, -0.0, 2.0]])
    values, indices = nm_compress(weight, 2, 4)
    assert values.tolist() == [[[0.0, 5.0], [0.0, 0.0], [1.0, 2.0]]]
    assert indices.tolist() == [[[0, 2], [0, 1], [1, 3]]]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_products_in_float64_are_the_dense_ones(n, m):
    weight, x = sparse(n, m, torch.float64), torch.randn(6, 5 * m, dtype=torch.float64)
    bits_equal(nm_matmul(x, *nm_compress(weight, n, m), m), x @ weight.T)


@pytest.mark.slow
@pytest.mark.skipif(why_not_cpp() is not None, reason="needs the C++ kernels")
@pytest.mark.parametrize("isa", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_few_tokens_select_their_entries_in_registers(dtype, isa, monkeypatch):
    """Rows that end inside a vector, M that is no power of two, and tiles of 1, 2 and 4 tokens."""
    if isa > library("sparse/instructions", {}).instructions():
        pytest.skip("this processor has no such instructions")
    monkeypatch.setattr(
        matmul, "call", lambda name, function, macros, *rest: call_cpp(name, function, {**macros, "ISA": isa}, *rest)
    )
    for (n, m), groups, tokens in itertools.product(
        [(2, 4), (3, 7), (4, 8), (1, 32), (1, 1)], [16, 45], [1, 2, 3, 7, 12]
    ):
        weight, x = sparse(n, m, dtype, rows=9, groups=groups), torch.randn(tokens, groups * m).to(dtype)
        product = nm_matmul(x, *nm_compress(weight, n, m), m)
        exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        bound = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-6 * size
        assert ((product.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_pairs_in_any_order_are_multiplied_as_the_formula_says(dtype, tokens):
    """Expanding a pair of 2:4 takes its entries in the order of the columns; every seventh row has them in another."""
    weight, x = sparse(2, 4, dtype, rows=30, groups=37), torch.randn(tokens, 148).to(dtype)
    values, indices = nm_compress(weight, 2, 4)
    values[::7], indices[::7] = values[::7].flip(-1), indices[::7].flip(-1)
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    bound = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-6 * size
    assert ((nm_matmul(x, values, indices, 4).double() - exact).abs() <= bound).all()


def test_a_default_device_does_not_move_the_mask():
    """More rows than are expanded in registers need a mask; it lies where the matrix lies."""
    weight, x = sparse(2, 4, torch.float32, rows=9, groups=16), torch.randn(12, 64)
    compressed = nm_compress(weight, 2, 4)
    with torch.device("meta"):
        product = nm_matmul(x, *compressed, 4)
    torch.testing.assert_close(product, x @ weight.T)


@pytest.mark.parametrize(("pattern", "dtype", "tokens"), meeting(PATTERNS, DTYPES, [1, 3, 16, 40, 70]), ids=dtype_name)
def test_products_against_float64(pattern, dtype, tokens, dirty_memory):
    n, m = pattern
    weight, x = sparse(n, m, dtype, rows=70), torch.randn(tokens, 5 * m).to(dtype)
    values, indices = nm_compress(weight, n, m)
    before = [t.clone() for t in (x, values, indices)]
    found = nm_matmul(x, values, indices, m)
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    # rounded once to the dtype, after fp32 sums of up to 512 products: measured 3e-7 of the sum of magnitudes
    bound = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-6 * size
    assert ((found.double() - exact).abs() <= bound).all()
    assert found.dtype == dtype
    for tensor, want in zip((x, values, indices), before, strict=True):
        bits_equal(tensor, want)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("tokens", [2, 40])
def test_autocast_does_not_reach_the_products(tokens, backend, monkeypatch):
    monkeypatch.setattr(matmul.cpp, "runs_on_blas", lambda x: True)
    values, indices = nm_compress(sparse(2, 4, torch.float32), 2, 4)
    x = torch.randn(tokens, 20, generator=torch.Generator().manual_seed(0))
    with use_backend(backend):
        want = nm_matmul(x, values, indices, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(nm_matmul(x, values, indices, 4), want)


def test_leading_dimensions_and_nothing():
    values, indices = nm_compress(sparse(2, 4, torch.float32), 2, 4)
    x = torch.randn(2, 3, 20)
    bits_equal(nm_matmul(x, values, indices, 4).flatten(0, 1), nm_matmul(x.flatten(0, 1), values, indices, 4))
    assert nm_matmul(x[:0], values, indices, 4).shape == (0, 3, 37)
    assert nm_matmul(x[0, 0], values, indices, 4).shape == (37,)
    assert torch.equal(nm_matmul(x[0], values[..., :0], indices[..., :0], 4), torch.zeros(3, 37))


def test_a_vmapped_batch_becomes_rows_or_a_call_for_each_matrix():
    weights = [sparse(2, 4, torch.float32, seed=seed) for seed in (0, 1)]
    (values, indices), second = (nm_compress(weight, 2, 4) for weight in weights)
    x = torch.randn(2, 3, 20)
    expected = x @ weights[0].T
    torch.testing.assert_close(torch.vmap(lambda x: nm_matmul(x, values, indices, 4))(x), expected)
    torch.testing.assert_close(
        torch.vmap(lambda x: nm_matmul(x, values, indices, 4), in_dims=1, out_dims=1)(x), expected
    )
    torch.testing.assert_close(torch.vmap(torch.vmap(lambda x: nm_matmul(x, values, indices, 4)))(x), expected)
    stacked = (torch.stack(parts) for parts in zip((values, indices), second, strict=True))
    products = torch.vmap(lambda v, i: nm_matmul(x[0], v, i, 4))(*stacked)
    torch.testing.assert_close(products, torch.stack([x[0] @ weight.T for weight in weights]))


def test_bad_arguments_are_named():
    weight = sparse(2, 4, torch.float32)
    values, indices = nm_compress(weight, 2, 4)
    x = torch.randn(3, 20)
    wrong = indices.clone()
    wrong[2, 1, 0] = 200
    for call, message in [
        (lambda: nm_compress(weight, 1, 4), r"is not 1:4: 185 groups.*the first is \(0, 0\), with 2"),
        (lambda: nm_compress(weight, 2, 8), "groups of 8 do not fill"),
        (lambda: nm_compress(weight, 2, 300), "m <= 256"),
        (lambda: nm_decompress(values, wrong, 4), "not ascending numbers below 4"),
        (lambda: nm_decompress(values, indices.flip(-1), 4), "not ascending"),
        (lambda: nm_decompress(values, indices.int(), 4), "uint8"),
        (lambda: nm_matmul(x[:, :16], values, indices, 4), r"\(3, 16\)"),
        (lambda: nm_matmul(x.double(), values, indices, 4), "one floating dtype"),
        (lambda: nm_matmul(x.requires_grad_(), values, indices, 4), "no gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_compiles_whole_and_is_a_proper_op():
    values, indices = nm_compress(sparse(2, 4, torch.float32), 2, 4)
    x = torch.randn(3, 20)
    compiled = torch.compile(lambda x: nm_matmul(x, values, indices, 4), fullgraph=True, backend="aot_eager")
    bits_equal(compiled(x), nm_matmul(x, values, indices, 4))
    torch.library.opcheck(torch.ops.leanstep.nm_matmul.default, (x, values, indices, 4))
    with use_backend("reference"):
        torch.testing.assert_close(nm_matmul(x, values, indices, 4), compiled(x))
