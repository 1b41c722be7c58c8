"""Products with matrices of values and bit masks: equal to the dense ones."""

import copy
import sys

import pytest
import torch
from covering import meeting
from emulated import compute_with
from kernel_cases import DTYPES, bits_equal, dtype_name
from torch.utils._python_dispatch import TorchDispatchMode

from leanstep.kernels import backend_table, bitmask_linear, bitmask_pack, bitmask_quantize, bitmask_unpack, use_backend
from leanstep.kernels.cpp_impl._build import why_not_cpp
from leanstep.kernels.cpp_impl.sparse import linear as cpp
from leanstep.kernels.reference.sparse import bitmask as reference
from leanstep.kernels.sparse import linear


def sparse(rows, columns, sparsity=0.6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return torch.where(torch.rand(rows, columns, generator=generator) < sparsity, 0.0, weight).to(dtype)


def check_product(out, x, weight, bias=None, tolerance=1e-6):
    """Rounded once to the dtype, after fp32 sums: measured 3e-7 of the sum of magnitudes."""
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    bound = torch.finfo(x.dtype).eps / 2 * exact.abs() * 1.01 + tolerance * size + torch.finfo(x.dtype).tiny
    assert out.dtype == x.dtype and out.shape == exact.shape
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "tokens"),
    meeting([(70, 200), (33, 31), (5, 1029), (1, 64)], DTYPES, [1, 2, 3, 4, 7, 8, 13, 16, 17, 40]),
    ids=dtype_name,
)
def test_products_against_float64(shape, dtype, tokens, dirty_memory, monkeypatch):
    monkeypatch.setattr(reference, "TILE", 4000)
    weight, x, bias = sparse(*shape, dtype=dtype), torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0])
    weight[0] = 0
    weight[-1] = torch.randn(shape[1])
    bias = bias.to(dtype)
    parts = bitmask_pack(weight)
    before = [t.clone() for t in (x, *parts)]
    check_product(bitmask_linear(x, *parts, shape[1]), x, weight)
    check_product(bitmask_linear(x, *parts, shape[1], bias=bias), x, weight, bias)
    for tensor, want in zip((x, *parts), before, strict=True):
        bits_equal(tensor, want)


@pytest.mark.parametrize("tokens", [1, 3, 5, 16, 30])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_products_of_codes_against_float64(dtype, bits, tokens, dirty_memory, monkeypatch):
    monkeypatch.setattr(reference, "TILE", 4000)
    weight, x, bias = sparse(40, 333), torch.randn(tokens, 333).to(dtype), torch.randn(40).to(dtype)
    values, mask, offsets = bitmask_pack(weight)
    codes, scales = bitmask_quantize(values, offsets, mask, bits=bits)
    rounded = bitmask_unpack(codes, mask, offsets, weight.shape, scales, torch.float64)
    # without AVX-512, tiles for many tokens hold weights that are rounded to the dtype; so do those of 4 bits in bf16
    exact = (
        tokens <= cpp.FEW or why_not_cpp() or (not cpp.runs_on_blas(x) and not (bits == 4 and dtype == torch.bfloat16))
    )
    tolerance = 1e-6 if exact else max(1e-6, torch.finfo(dtype).eps)
    for b in (None, bias):
        check_product(bitmask_linear(x, codes, mask, offsets, 333, b, scales), x, rounded, b, tolerance)


needs_cpp = pytest.mark.skipif(why_not_cpp() is not None, reason=f"needs the C++ kernels: {why_not_cpp()}")


@pytest.mark.slow
@needs_cpp
@pytest.mark.parametrize(
    ("dtype", "bits", "instructions"),
    [
        *meeting(DTYPES, (0, 8, 4), cpp.INSTRUCTIONS[: cpp.BF16]),
        *[(dtype, 0, "NEON") for dtype in DTYPES],
        *[(torch.bfloat16, bits, "NEON") for bits in (8, 4)],
    ],
    ids=dtype_name,
)
def test_products_by_the_instructions_of_other_processors(dtype, bits, instructions, monkeypatch):
    compute_with(instructions, monkeypatch)
    monkeypatch.setattr(reference, "TILE", 4000)
    weight = sparse(43, 100, dtype=dtype)
    values, *layout = bitmask_pack(weight)
    scales = None
    if bits:
        values, scales = bitmask_quantize(values, layout[1], layout[0], bits=bits)
    exact = bitmask_unpack(values, *layout, weight.shape, scales, torch.float64)
    for tokens in (1, 2, 4, 11, 30):
        x = torch.randn(tokens, 100).to(dtype)
        rounded = bits and tokens > cpp.FEW and cpp.runs_on_blas(x)
        tolerance = max(1e-6, torch.finfo(dtype).eps) if rounded else 1e-6
        with use_backend("cpp"):
            check_product(bitmask_linear(x, values, *layout, 100, None, scales), x, exact, None, tolerance)


@pytest.mark.slow
@needs_cpp
@pytest.mark.parametrize("instructions", cpp.INSTRUCTIONS)
def test_damaged_parts_never_read_outside_of_the_values(instructions, monkeypatch):
    """NaN surrounds the values: a product that read one would be NaN."""
    compute_with(instructions, monkeypatch)
    surrounded = torch.full((3000,), float("nan"))
    values = surrounded[1000:1300].fill_(1.0)
    full = torch.full((10, 4), -1, dtype=torch.int32)
    for offsets in (torch.arange(11) * 30, torch.full((11,), 2**62), torch.full((11,), -(2**62)), torch.arange(11) - 5):
        for tokens in (1, 8, 30):
            with use_backend("cpp"):
                assert bitmask_linear(torch.ones(tokens, 128), values, full, offsets, 128).isfinite().all()


@needs_cpp
def test_damaged_codes_of_4_bits_never_read_outside_of_the_values(monkeypatch):
    """Codes of 7 surround codes of 1, so that a product that read one would be larger."""
    surrounded = torch.full((3000,), 0x77, dtype=torch.uint8)
    codes = surrounded[1000:1150].fill_(0x11)
    full = torch.full((10, 4), -1, dtype=torch.int32)
    scales = torch.ones(10, 2, dtype=torch.bfloat16)
    for offsets in (torch.arange(11) * 30, torch.full((11,), 2**62), torch.full((11,), -(2**62)), torch.arange(11) - 5):
        for tokens in (1, 8, 30):
            with use_backend("cpp"):
                assert bitmask_linear(torch.ones(tokens, 128), codes, full, offsets, 128, None, scales).max() <= 128


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("tokens", [25, 63, 130])
def test_chunks_of_tokens_and_tiles_of_the_blas(tokens, dtype, monkeypatch):
    """Rows and columns beyond one tile of the cache; and the path of processors without AVX-512."""
    weight, x, bias = sparse(117, 1100, dtype=dtype), torch.randn(tokens, 1100).to(dtype), torch.randn(117).to(dtype)
    parts = bitmask_pack(weight)
    if not cpp.runs_on_blas(x):
        monkeypatch.setattr(cpp, "MANY", 64)
        check_product(bitmask_linear(x, *parts, 1100, bias), x, weight, bias)
    monkeypatch.setattr(reference, "TILE", 64 * 1100)
    monkeypatch.setattr(cpp, "runs_on_blas", lambda x: True)
    check_product(bitmask_linear(x, *parts, 1100, bias), x, weight, bias)


def test_chunks_cover_the_tokens_and_differ_by_less_than_a_panel():
    for tokens in (25, 1024, 1025, 3000):
        chunks = list(cpp.token_chunks(tokens))
        assert [begin for begin, _ in chunks[1:]] == [end for _, end in chunks[:-1]]
        assert chunks[0][0] == 0 and chunks[-1][1] == tokens
        assert max(end - begin for begin, end in chunks) <= cpp.MANY
    assert [end - begin for begin, end in cpp.token_chunks(1025)] == [544, 481]


@needs_cpp
def test_the_table_of_backends_names_the_instructions():
    reasons = {row[0]: row[3] for row in backend_table() if row[1] == "cpu"}
    assert reasons["bitmask_linear"].endswith(cpp.instructions())
    with use_backend("reference"):
        assert "by" not in {row[0]: row[3] for row in backend_table()}["bitmask_linear"].split()


def test_no_more_than_a_tile_is_expanded(monkeypatch):
    monkeypatch.setattr(reference, "TILE", 64 * 100)
    weight, x = sparse(500, 100), torch.randn(40, 100)
    parts = bitmask_pack(weight)

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            result = function(*arguments, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.size = max(self.size, result.numel())
            return result

    for backend in ("reference", "auto"):
        with use_backend(backend), Largest() as largest:
            bitmask_linear(x, *parts, 100)
        # the result has 20,000 entries, and the matrix 50,000
        assert largest.size <= 20_000


@needs_cpp
def test_a_repeated_product_follows_its_parts_and_calls_little():
    product, x, calls = linear.RepeatedProduct(), torch.randn(3, 70).bfloat16(), []
    parts = [*bitmask_pack(sparse(20, 70, dtype=torch.bfloat16)), 70, torch.randn(20).bfloat16(), None]
    for change in (torch.clone, torch.neg, torch.Tensor.share_memory_):
        parts[0] = change(parts[0])
        for rows in (x, x, x[:1], x[:0], x.T.contiguous().T, x.repeat(9, 1), x.unsqueeze(0)):
            bits_equal(product(rows, *parts), bitmask_linear(rows, *parts))
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    product(x, *parts)
    sys.setprofile(None)
    # bitmask_linear makes 73
    assert calls.count("call") <= 25
    with use_backend("triton"), pytest.raises(RuntimeError, match="was asked for"):
        product(x, *parts)
    assert product(x.clone().requires_grad_(), *parts).requires_grad
    assert copy.deepcopy(product)._prepared is None
    with pytest.raises(ValueError, match="one floating dtype"):
        product(x.double(), *parts)
    with pytest.raises(ValueError, match="no gradient"):
        product(x, parts[0].requires_grad_(), *parts[1:])


def test_products_in_float64_are_the_dense_ones():
    weight, x = sparse(20, 70, dtype=torch.float64), torch.randn(6, 70, dtype=torch.float64)
    torch.testing.assert_close(bitmask_linear(x, *bitmask_pack(weight), 70), x @ weight.T)


def test_leading_dimensions_layouts_and_nothing():
    weight = sparse(37, 50)
    parts = bitmask_pack(weight)
    x = torch.randn(2, 3, 50)
    bits_equal(bitmask_linear(x, *parts, 50).flatten(0, 1), bitmask_linear(x.flatten(0, 1), *parts, 50))
    assert bitmask_linear(x[:0], *parts, 50).shape == (0, 3, 37)
    assert bitmask_linear(x[0, 0], *parts, 50).shape == (37,)
    strided = torch.randn(50, 5).T
    bits_equal(bitmask_linear(strided, *parts, 50), bitmask_linear(strided.contiguous(), *parts, 50))
    zero, bias = bitmask_pack(torch.zeros(3, 50)), torch.randn(3)
    bits_equal(bitmask_linear(x[0], *zero, 50, bias), bias.expand(3, 3))
    assert bitmask_linear(x, *bitmask_pack(weight[:0]), 50).shape == (2, 3, 0)


def test_a_vmapped_batch_becomes_rows_or_a_call_for_each_bias():
    weight = sparse(37, 50)
    parts = bitmask_pack(weight)
    x, biases = torch.randn(2, 3, 50, requires_grad=True), torch.randn(2, 37)
    product = torch.vmap(lambda x: bitmask_linear(x, *parts, 50), in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(product, x @ weight.T)
    product.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(2, 3, 50))
    product = torch.vmap(lambda x, bias: bitmask_linear(x, *parts, 50, bias))(x, biases)
    torch.testing.assert_close(product, x @ weight.T + biases[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("tokens", [1, 30])
def test_gradients_are_those_of_the_dense_product(dtype, tokens, monkeypatch):
    monkeypatch.setattr(reference, "TILE", 1000)
    weight, bias = sparse(40, 70, dtype=dtype), torch.randn(40).to(dtype).requires_grad_()
    x = torch.randn(tokens, 70).to(dtype).requires_grad_()
    parts = bitmask_pack(weight)
    grad = torch.randn(tokens, 40).to(dtype)
    bitmask_linear(x, *parts, 70, bias).backward(grad)
    exact = grad.double() @ weight.double()
    bound = 2 * torch.finfo(dtype).eps * (grad.double().abs() @ weight.double().abs())
    assert ((x.grad.double() - exact).abs() <= bound).all()
    torch.testing.assert_close(bias.grad, grad.sum(0))
    with pytest.raises(ValueError, match="values have no gradient"):
        bitmask_linear(x, parts[0].requires_grad_(), *parts[1:], 70)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("tokens", [2, 40])
def test_autocast_does_not_reach_the_products(tokens, backend, monkeypatch):
    monkeypatch.setattr(cpp, "runs_on_blas", lambda x: True)
    chance = torch.Generator().manual_seed(0)
    parts = bitmask_pack(torch.randn(48, 64, generator=chance).relu())
    x = torch.randn(tokens, 64, generator=chance).requires_grad_()
    results = []
    for enabled in (False, True):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = bitmask_linear(x, *parts, 64)
            results.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles_whole_and_is_a_proper_op():
    parts = bitmask_pack(sparse(20, 70))
    x, bias = torch.randn(3, 70), torch.randn(20)
    compiled = torch.compile(lambda x: bitmask_linear(x, *parts, 70, bias), fullgraph=True, backend="aot_eager")
    bits_equal(compiled(x), bitmask_linear(x, *parts, 70, bias))
    recorded = x.clone().requires_grad_()
    compiled(recorded).sum().backward()
    assert recorded.grad is not None
    arguments = (x.requires_grad_(), *parts, bias, None)
    torch.library.opcheck(torch.ops.leanstep.bitmask_linear.default, arguments)
    with use_backend("reference"):
        torch.testing.assert_close(bitmask_linear(x, *parts, 70, bias), compiled(x))


def test_bad_arguments_are_named():
    values, mask, offsets = bitmask_pack(sparse(20, 70))
    x = torch.randn(3, 70)
    codes, scales = bitmask_quantize(values, offsets)
    for arguments, message in [
        ((x[:, :64], values, mask, offsets, 70), r"expected x \[..., 70\]"),
        ((x[:, :64], values, mask, offsets, 64), "int32 mask"),
        ((x.double(), values, mask, offsets, 70), "one floating dtype"),
        ((x, codes, mask, offsets, 70), "without scales"),
        ((x, codes, mask, offsets, 70, None, scales[1:]), "float32 scales"),
        ((x, values, mask, offsets[1:], 70), "int64 offsets"),
        ((x, values, mask, offsets, 70, torch.ones(19)), r"expected a bias \[20\]"),
        ((x, values, mask, offsets, 70, torch.ones(20).double()), r"expected a bias \[20\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            bitmask_linear(*arguments)


def test_the_sizes_from_which_zeros_save_time(monkeypatch):
    """Matrices of SmolLM2 and of larger models, as measured with AVX-512 and without."""
    small, medium, large, wide, four = (
        (128, 384, 16),
        (576, 1536, 8),
        (4096, 11008, 32),
        (576, 1536, 32),
        (9999, 9999, 4),
    )
    monkeypatch.setattr(linear, "why_not", lambda *_: None)
    for has_avx512, slow in ((True, [[small]]), (False, [[small], [wide] * 9 + [small], [four]])):
        monkeypatch.setattr(cpp, "has_avx512", lambda answer=has_avx512: answer)
        for matrices in (
            [],
            [small],
            [medium],
            [large],
            [medium] * 9 + [small],
            [large, medium],
            [wide] * 9 + [small],
            [four],
        ):
            assert (linear.why_slower(matrices) is not None) == (matrices in slow)
    why = linear.why_slower([wide])
    assert "without AVX-512" in why and "33.6 million entries of 32 bits" in why and "100% of the entries here" in why
    monkeypatch.setattr(linear, "why_not", lambda *_: "no C++ compiler")
    assert (
        linear.why_slower([large]) == "the products run in plain torch (no C++ compiler)"
        and linear.why_slower([]) is None
    )
