import pytest
import torch
from kernel_cases import DTYPES, bits_equal, dtype_name

from leanstep.kernels import scatter, sparse_layout, top_k
from leanstep.kernels.reference.fisher import sparse_window as reference

triton_window = pytest.importorskip("leanstep.kernels.triton_impl.fisher.sparse_window")

# (elements, density, block): one entry, none, less than a block, whole blocks with aligned rows, a last short block,
# and enough entries of a block for every width of the kernel
CASES = [
    (1, 1.0, 4), (0, 0.5, 8), (100, 0.1, 4096), (8 * 64, 0.125, 64), (3 * 128 + 17, 0.2, 128), (2000, 0.1, 1000),
    (5000, 0.4, 4096),
]  # fmt: skip
GROUPS = [0, 2, 1, 0, 1, 2, 0]


def check(m, dtype, groups, device="cpu"):
    """Run both kernels beside the definition and float64; return what they gave."""
    layouts = [sparse_layout(*case) for case in CASES]
    kept = [[top_k(torch.randn(s.numel, device=device), s, dtype) for _ in range(m)] for s in layouts]
    values = [torch.stack([v for v, _ in rows]) for rows in kept]
    indices = [torch.stack([i for _, i in rows]) for rows in kept]
    vectors = [torch.randn(s.numel, device=device) for s in layouts]
    count = max(groups) + 1
    coefficients = torch.randn(count, m, device=device)
    out = [torch.full((s.numel,), float("nan"), device=device) for s in layouts]
    dots = triton_window.row_dots(values, indices, layouts, vectors, groups, count)
    triton_window.linear_combination(values, indices, layouts, coefficients, groups, out)
    sums, magnitudes = torch.zeros(2, count, m, dtype=torch.float64, device=device)
    for layout, rows, v, i, x, group, found in zip(layouts, kept, values, indices, vectors, groups, out, strict=True):
        dense = torch.stack([scatter(*row, layout, dtype=torch.float64) for row in rows])
        sums[group] += dense @ x.double()
        magnitudes[group] += dense.abs() @ x.double().abs()
        # rows are added in the order of the definition, and products are rounded before
        want = torch.empty_like(found, device="cpu")
        reference.linear_combination(v.cpu(), i.cpu(), layout, coefficients[group].cpu(), want)
        bits_equal(found.cpu(), want)
    assert ((dots - sums).abs() <= 1e-14 * magnitudes).all()
    return dots, *out


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize(("dtype", "m"), list(zip(DTYPES, (9, 1, 9), strict=True)), ids=dtype_name)
def test_follows_the_definition(dtype, m):
    check(m, dtype, GROUPS)
    check(m, dtype, [0] * len(CASES))


@pytest.mark.interpret
def test_the_longest_block_that_an_int16_reaches():
    layout = sparse_layout(2**15 + 5, 0.01, 2**15)
    vector = torch.zeros(layout.numel)
    vector[[2**15 - 1, 2**15 + 4]] = torch.tensor([3.0, 5.0])
    values, indices = (t.unsqueeze(0) for t in top_k(vector, layout, torch.float32))
    assert indices.max() == 2**15 - 1
    out = torch.full((layout.numel,), float("nan"))
    triton_window.linear_combination([values], [indices], [layout], torch.ones(1, 1), [0], [out])
    bits_equal(out, vector)
    dots = triton_window.row_dots([values], [indices], [layout], [vector], [0], 1)
    assert dots.tolist() == [[34.0]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_follows_the_definition_on_the_device_and_repeats_exactly(dtype):
    torch.manual_seed(0)
    first = check(64, dtype, GROUPS, "cuda")
    torch.manual_seed(0)
    for a, b in zip(first, check(64, dtype, GROUPS, "cuda"), strict=True):
        bits_equal(a, b)
