import pytest
import torch
from kernel_cases import bits_equal, dtype_name

from leanstep.kernels import newton_schulz, nuclear_norm, use_backend

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton_newton_schulz = pytest.importorskip("leanstep.kernels.triton_impl.matrices.newton_schulz")
tile_of = triton_newton_schulz._tile_of

DTYPES = [torch.bfloat16, torch.float16]
# one tile, several tiles, tiles cut short; sizes that allow wide accesses and sizes that do not
SHAPES = [(2, 8, 16), (1, 136, 72), (3, 5, 9), (1, 67, 33), (2, 1, 4), (1, 1, 1)]


def normal(*shape, dtype=torch.bfloat16, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def symmetric(batch, m, dtype, seed, device="cpu"):
    x = normal(batch, m, m, dtype=dtype, seed=seed, device=device).float()
    return ((x + x.mT) / 2).to(dtype)


def is_rounded(found, exact):
    """The exact result rounded once, up to the order of an fp32 sum: half a unit in the last place, and a little."""
    error = (found.double() - exact).abs()
    unit = torch.finfo(found.dtype).eps
    assert bool((error <= 0.52 * unit * exact.abs() + 1e-4).all()), float((error / exact.abs().clamp_min(1e-3)).max())


def check_gram(shape, dtype, tall, device="cpu"):
    batch, m, k = shape
    x = normal(batch, k, m, dtype=dtype, device=device).mT if tall else normal(batch, m, k, dtype=dtype, device=device)
    before = x.clone()
    out = torch.full((batch, m, m), float("nan"), dtype=dtype, device=device)
    triton_newton_schulz.gram(x, out)
    is_rounded(out, x.double() @ x.double().mT)
    bits_equal(out, out.mT.contiguous())
    bits_equal(x, before)


def check_add(m, dtype, device="cpu"):
    # powers of one matrix commute: the product of two of them is symmetric
    left = symmetric(2, m, dtype, 1, device)
    right, base = left.clone(), symmetric(2, m, dtype, 2, device)
    out = torch.full_like(left, float("nan"))
    triton_newton_schulz.add_product(base, left, right, -4.75, 2.0, out)
    is_rounded(out, -4.75 * base.double() + 2.0 * left.double() @ right.double())
    bits_equal(out, out.mT.contiguous())
    one = torch.full_like(left[0], float("nan"))
    triton_newton_schulz.add_product(base[0], left[0], right[0], -4.75, 2.0, one)
    bits_equal(one, out[0])


@pytest.mark.interpret
@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_matrices_are_exact_and_symmetric(shape, tall):
    check_gram(shape, torch.bfloat16, tall)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("m", [1, 8, 67, 136])
def test_products_of_symmetric_matrices(m, dtype):
    check_add(m, dtype)


@pytest.mark.interpret
def test_products_of_different_factors_are_mirrored():
    left, right = symmetric(1, 20, torch.bfloat16, 1), symmetric(1, 20, torch.bfloat16, 2)  # which do not commute
    out = torch.empty_like(left)
    triton_newton_schulz.add_product(left, left, right, 0.5, 1.0, out)
    exact = 0.5 * left.double() + left.double() @ right.double()
    is_rounded(out.tril(), exact.tril())
    bits_equal(out, out.mT.contiguous())


@triton.jit
def tiles_of(index_ptr, row_ptr, column_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    row, column = tile_of(tl.load(index_ptr + offs))
    tl.store(row_ptr + offs, row)
    tl.store(column_ptr + offs, column)


@pytest.mark.interpret
def test_tiles_of_a_large_triangle_are_found():
    """First and last tile of rows, some of which a rounded square root puts into the neighbouring row."""
    rows = torch.tensor([0, 1, 2, 3, 4, 100, 361, 1447, 1448, 2895, 2896, 4000, 4095, 5000, 5792, 5793])
    first = rows * (rows + 1) // 2
    index = torch.cat([first, first + rows]).to(torch.int32)
    row, column = torch.empty_like(index), torch.empty_like(index)
    tiles_of[(1,)](index, row, column, BLOCK=32)
    assert row.tolist() == [*rows.tolist(), *rows.tolist()]
    assert column.tolist() == [*[0] * 16, *rows.tolist()]


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("shape", [(24, 72), (72, 24), (2, 13, 13)], ids=str)
def test_the_op_on_this_backend(shape):
    mat = normal(*shape, dtype=torch.float32)
    with use_backend("triton"):
        (found,) = newton_schulz([mat], dtype=torch.bfloat16)
        for factor in (2.0**-100, 2.0**-30, 2.0**100):
            assert (newton_schulz([mat * factor], dtype=torch.bfloat16)[0] - found).norm() < 0.01 * found.norm()
        norm = nuclear_norm([mat], dtype=torch.bfloat16)
    (exact,) = newton_schulz([mat.double()])
    # bf16: torch's own products give 0.02 on such matrices
    assert (found.double() - exact).norm() / exact.norm() < 0.04
    torch.testing.assert_close(norm, nuclear_norm([mat.double()]).float(), rtol=0.03, atol=0)


def test_other_strides_are_refused():
    with pytest.raises(ValueError, match="stride of 1"):
        triton_newton_schulz.gram(torch.zeros(1, 4, 6, dtype=torch.bfloat16)[:, ::2, ::2], torch.zeros(1, 2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_products_on_the_device(dtype):
    for tall in (False, True):
        for shape in [*SHAPES, (2, 512, 1376), (1, 300, 5461)]:
            check_gram(shape, dtype, tall, "cuda")
    for m in (1, 8, 67, 512):
        check_add(m, dtype, "cuda")


@pytest.mark.gpu
def test_the_op_on_the_device():
    mats = [normal(512, 1376, dtype=torch.float32, device="cuda"), normal(3, 70, 33, device="cuda")]
    with use_backend("reference"):
        expected, norms = newton_schulz(mats), nuclear_norm(mats)
    for found, want in zip(newton_schulz(mats), expected, strict=True):
        assert (found.float() - want.float()).norm() / want.float().norm() < 0.05
    torch.testing.assert_close(nuclear_norm(mats), norms, rtol=0.03, atol=0)
