import pytest
import torch
from kernel_cases import DTYPES, bits_equal, dtype_name

triton_window = pytest.importorskip("leanstep.kernels.triton_impl.fisher.gradient_window")

# columns: one, none, less than a tile, a tile, whole chunks and more, and a number that is not a multiple of 8
SIZES = [1, 0, 24, 512, 8192, 8192 + 520, 9001]
GROUPS = [0, 2, 1, 0, 1, 2, 0]


def window(m, dtype, device="cpu"):
    """Windows [m, n] of every size, one of them some columns of another, one transposed."""
    generator = torch.Generator().manual_seed(m)
    blocks = [torch.randn(m, n, generator=generator).to(device, dtype) for n in SIZES]
    blocks[3] = torch.randn(m, 600, generator=generator).to(device, dtype)[:, 8:520]
    blocks[6] = torch.randn(SIZES[6], m, generator=generator).to(device, dtype).t()
    return blocks


def check(m, dtype, vector_dtype, groups, device="cpu"):
    """Run both kernels beside float64; return what they gave."""
    blocks = window(m, dtype, device)
    vectors = [torch.randn(n, device=device).to(vector_dtype) for n in SIZES]
    count = max(groups) + 1
    coefficients = torch.randn(count, m, device=device)
    before = [b.clone() for b in blocks]
    out = [torch.full((n,), float("nan"), device=device) for n in SIZES]
    dots = triton_window.row_dots(blocks, vectors, groups, count)
    gram = triton_window.row_dots(blocks, [b[m - 1] for b in blocks], groups, count)
    triton_window.linear_combination(blocks, coefficients, groups, out)
    want = torch.zeros(2, 2, count, m, dtype=torch.float64, device=device)
    for block, vector, group in zip(blocks, vectors, groups, strict=True):
        for k, x in enumerate((vector.double(), block[m - 1].double())):
            want[k, 0, group] += block.double() @ x
            want[k, 1, group] += block.double().abs() @ x.abs()
    # fp64 sums, beside the sums of magnitudes: measured 1.4e-14, most of it the oracle's
    for found, (sums, magnitudes) in zip((dots, gram), want, strict=True):
        assert found.dtype == torch.float64
        assert ((found - sums).abs() <= 1e-13 * magnitudes).all()
    for block, result, group, kept in zip(blocks, out, groups, before, strict=True):
        c = coefficients[group].double()
        assert ((result - c @ block.double()).abs() <= 2**-24 * (c.abs() @ block.double().abs())).all()
        bits_equal(block, kept)
    return dots, gram, *out


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize(("m", "dtype"), [(1, torch.float32), *zip((8, 19, 19), DTYPES, strict=True)], ids=dtype_name)
def test_follows_a_float64_oracle(dtype, m):
    check(m, dtype, torch.float32, GROUPS)
    check(m, dtype, dtype, [0] * len(SIZES))


@pytest.mark.interpret
def test_vectors_of_another_dtype_and_a_group_of_no_elements():
    check(3, torch.bfloat16, torch.float16, [1, 0, 1, 1, 1, 1, 1])


@pytest.mark.interpret
def test_the_public_functions_reach_the_kernels():
    from leanstep.kernels import linear_combination, row_dots, use_backend

    blocks = [torch.randn(5, 3, 8).half(), torch.randn(5, 7).half()]
    vectors = [torch.randn(3, 8), torch.randn(7)]
    coefficients = torch.randn(5, dtype=torch.float64)
    for function, arguments in ((row_dots, (blocks, vectors)), (linear_combination, (blocks, coefficients))):
        found = {}
        for backend in ("reference", "triton"):
            with use_backend(backend):
                found[backend] = function(*arguments)
        torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("m", [1, 19, 256])
def test_follows_the_oracle_on_the_device_and_repeats_exactly(dtype, m):
    torch.manual_seed(0)
    first = check(m, dtype, torch.float32, GROUPS, "cuda")
    torch.manual_seed(0)
    for a, b in zip(first, check(m, dtype, torch.float32, GROUPS, "cuda"), strict=True):
        bits_equal(a, b)


@pytest.mark.gpu
def test_the_solution_on_the_device_is_that_of_the_cpu():
    from gradient_windows import gram_row

    from leanstep.kernels import linear_combination, window_coefficients

    rows = torch.randn(40, 10_000) + torch.randn(10_000)
    found = []
    for device in ("cpu", "cuda"):
        window = [rows.to(device)]
        gram = torch.stack([gram_row(window, i) for i in range(40)])
        coefficients, _ = window_coefficients(gram, 1e-6, 40, 39)
        found.append(linear_combination(window, coefficients)[0].cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4 * float(found[0].abs().max()))
