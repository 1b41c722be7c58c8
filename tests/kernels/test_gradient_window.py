"""Windows of gradients: rows as they are stored, dots and combinations against a float64 oracle, on every CPU path."""

import pytest
import torch
from gradient_windows import gram_row
from kernel_cases import DTYPES, bits_equal, dtype_name

from leanstep.kernels import BackendError, linear_combination, row_dots, use_backend

BACKENDS = ["reference", "cpp"]
# from one element to more than the compiled loops need, and their last columns
SHAPES = [(1,), (), (7, 3), (0,), (1000,), (64, 256), (17 * 1024 + 5,)]
GROUPS = [0, 2, 1, 0, 1, 2, 0]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def window(m, dtype, shapes=SHAPES):
    return [normal(m, *shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def joined(blocks):
    """Blocks [m, *shape] as one [m, d], in float64."""
    return torch.cat([b.double().reshape(b.shape[0], -1) for b in blocks], dim=1)


def close(found, expected, sizes):
    """The error of sums beside the sums of magnitudes: fp64's of dots, measured 4e-16; one rounding of the others."""
    bound = 1e-14 if found.dtype == torch.float64 else 2**-24
    assert ((found.double() - expected).abs() <= bound * sizes).all(), float(((found - expected).abs() / sizes).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("m", [1, 5, 33])
def test_equals_a_float64_oracle(backend, dtype, m, dirty_memory):
    blocks, vectors = window(m, dtype), window(1, torch.float32)
    coefficients = normal(m, dtype=torch.float64, seed=50)
    before = [b.clone() for b in blocks]
    g, x = joined(blocks), joined(vectors)[0]
    with use_backend("reference" if dtype == torch.float64 else backend):
        for found, left, right in ((row_dots(blocks, vectors), g, x), (gram_row(blocks, m - 1), g, g[-1])):
            # summed in pairs: on one thread, a product of the BLAS has an error of 2e-14
            close(found, (left * right).sum(1), left.abs() @ right.abs())
        found = linear_combination(blocks, coefficients)
    assert [f.shape for f in found] == [b.shape[1:] for b in blocks]
    close(torch.cat([f.reshape(-1) for f in found]), coefficients @ g, coefficients.abs() @ g.abs())
    for block, want in zip(blocks, before, strict=True):
        bits_equal(block, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_are_windows_of_their_own(backend, dirty_memory):
    blocks, vectors = window(33, torch.bfloat16), window(1, torch.bfloat16)
    coefficients = normal(3, 33, dtype=torch.float64)
    with use_backend(backend):
        dots = row_dots(blocks, vectors, groups=GROUPS)
        gram = gram_row(blocks, 4, groups=GROUPS)
        found = linear_combination(blocks, coefficients, groups=GROUPS)
        for group in range(3):
            members = [b for b, owner in enumerate(GROUPS) if owner == group]
            own = [blocks[b] for b in members]
            want = row_dots(own, [vectors[b] for b in members])
            torch.testing.assert_close(dots[group], want, rtol=1e-12, atol=0)
            torch.testing.assert_close(gram[group], gram_row(own, 4), rtol=1e-12, atol=0)
            for b, tensor in zip(members, linear_combination(own, coefficients[group]), strict=True):
                bits_equal(found[b], tensor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_live_rows_columns_of_another_window_and_other_layouts(backend, dtype):
    whole = normal(40, 40_000, dtype=dtype)
    live = whole[:35]
    columns = whole[:, 3:30_003]
    transposed = normal(300, 35, dtype=dtype, seed=1).t()
    for block in (live, columns, transposed, live[:, ::2]):
        x, c = normal(block.shape[1], seed=2), normal(block.shape[0], dtype=torch.float64, seed=3)
        g = block.double()
        out = torch.full((block.shape[1],), float("nan"))
        with use_backend(backend):
            close(row_dots([block], [x]), g @ x.double(), g.abs() @ x.double().abs())
            (found,) = linear_combination([block], c, out=[out])
        assert found is out
        close(out, c @ g, c.abs() @ g.abs())


def test_fp32_dots_keep_fp32_whatever_the_matmul_precision(monkeypatch):
    block, x = normal(20, 30_000), normal(30_000, seed=1)
    want = row_dots([block], [x])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        bits_equal(row_dots([block], [x]), want)
    finally:
        torch.set_float32_matmul_precision(before)


def test_fp64_vectors_keep_fp64():
    window, vector = torch.ones(1, 2), torch.tensor([1 + 2**-30, -1.0], dtype=torch.float64)
    assert row_dots([window], [vector]).item() == 2**-30
    assert row_dots([window, window], [vector.float(), vector]).item() == 2**-30
    assert row_dots([window], [torch.tensor([1e39, -1e39], dtype=torch.float64)]).item() == 0
    for backend in ("cpp", "triton"):
        with use_backend(backend), pytest.raises(BackendError, match=f"row_dots: backend '{backend}'.*float64"):
            row_dots([window], [vector])


def test_bad_arguments_are_named():
    block, x = torch.ones(3, 4), torch.ones(4)
    for call, message in [
        (lambda: row_dots([], []), "at least one window"),
        (lambda: row_dots([torch.ones(0, 4)], [x]), "at least one row"),
        (lambda: row_dots([block], [torch.ones(5)]), r"vectors\[0\] has shape \(5,\)"),
        (lambda: row_dots([block], []), "0 for 1"),
        (lambda: row_dots([block, torch.ones(2, 4)], [x, x]), r"windows\[1\] has 2"),
        (lambda: row_dots([block, block.double()], [x, x]), "one dtype"),
        (lambda: row_dots([block], [x], groups=[-1]), "number >= 0"),
        (lambda: linear_combination([block], torch.ones(4)), r"coefficients of shape \(3,\), got \(4,\)"),
        (lambda: linear_combination([block], torch.ones(3), out=[torch.ones(4).double()]), "float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_compiles_whole():
    blocks = [normal(3, 5), normal(3, 2, 2, seed=1)]

    def step(blocks, coefficients):
        row = gram_row(blocks, 1) + row_dots(blocks, [b[0] for b in blocks])
        return row, linear_combination(blocks, coefficients)

    coefficients = normal(3, dtype=torch.float64)
    for found, want in zip(
        torch.compile(step, fullgraph=True, backend="aot_eager")(blocks, coefficients),
        step(blocks, coefficients),
        strict=True,
    ):
        torch.testing.assert_close(found, want)
    # sample inputs through every check that torch has for an operator
    torch.library.opcheck(torch.ops.leanstep.row_dots, (blocks, [b[0].clone() for b in blocks], None))
    torch.library.opcheck(torch.ops.leanstep.row_dots, (blocks, [b[1].clone() for b in blocks], [0, 1]))
    out = [torch.empty(5), torch.empty(2, 2)]
    torch.library.opcheck(torch.ops.leanstep.linear_combination, (blocks, coefficients, None, out))


def test_the_number_of_threads_changes_nothing():
    blocks, vectors = window(19, torch.bfloat16), window(1, torch.float32)
    coefficients, found = normal(19, dtype=torch.float64), []
    with use_backend("cpp"):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append([row_dots(blocks, vectors), *linear_combination(blocks, coefficients)])
    for a, b in zip(*found, strict=True):
        bits_equal(a, b)
