import pytest
import torch
from kernel_cases import DTYPES, bits_equal, dtype_name, matrices, replay_beside_eager

from leanstep.kernels import StepOptions, sinkhorn_step

triton_sinkhorn = pytest.importorskip("leanstep.kernels.triton_impl.matrices.sinkhorn")


def sizes(mats):
    rows = [m.shape[:-1].numel() for m in mats]
    cols = [m.shape[:-2].numel() * m.shape[-1] for m in mats]
    return rows, cols


def oracle(mats, rows, cols, rows_total, first):
    """One iteration in float64: (r, column means), flat."""
    row_sizes, col_sizes = sizes(mats)
    found_rows, found_means = [], []
    for g, r, c, m_total in zip(mats, rows.split(row_sizes), cols.split(col_sizes), rows_total, strict=True):
        g = g.double() if g.dim() == 3 else g.double().unsqueeze(0)
        b, m, n = g.shape
        r, c = r.double().view(b, m, 1), c.double().view(b, 1, n)
        if first:
            largest = g.abs().amax(2, keepdim=True) if n else torch.zeros(b, m, 1, dtype=torch.float64, device=g.device)
            r, c = torch.where(largest == 0, 0, 1 / largest), torch.ones_like(c)
        q = (g * r * c).square().sum(2, keepdim=True) / max(n, 1)
        r = torch.where(q == 0, 0, r / q.sqrt())
        found_rows.append(r.flatten())
        found_means.append(((g * r).square().sum(1) / m_total).flatten())
    return torch.cat(found_rows), torch.cat(found_means)


def run(mats, iterations=2, device="cpu"):
    """Iterate from dirty buffers, each pass beside the oracle from the same scales."""
    row_sizes, col_sizes = sizes(mats)
    rows = torch.full((sum(row_sizes),), float("nan"), device=device)
    cols = torch.full((sum(col_sizes),), float("nan"), device=device)
    totals = [2 * max(m.shape[-2], 1) for m in mats]  # as if these were halves of row-sharded matrices
    for iteration in range(iterations):
        want_rows, want_means = oracle(mats, rows, cols, totals, iteration == 0)
        means = triton_sinkhorn.sinkhorn_pass(mats, rows, cols, totals, iteration == 0)
        # sums of up to 8200 squares in fp32, in 16 to 512 partial sums: measured below 4e-7
        torch.testing.assert_close(rows.double(), want_rows, rtol=2e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(means.double(), want_means, rtol=2e-6, atol=0, equal_nan=True)
        cols = torch.where(means == 0, 0, means.rsqrt())
    return rows, cols


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_passes_follow_a_float64_oracle(dtype):
    mats = matrices(dtype, torch.Generator().manual_seed(0), wide=True)
    mats[4][3] = 0
    mats[4][:, 5] = 0
    before = [m.clone() for m in mats]
    run(mats)
    for mat, want in zip(mats, before, strict=True):
        bits_equal(mat, want)


@pytest.mark.slow
@pytest.mark.interpret
def test_many_row_blocks_and_an_all_zero_matrix():
    generator = torch.Generator().manual_seed(1)
    run([torch.randn(64 * 17 + 3, 5, generator=generator), torch.zeros(70, 9)])


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("size", [1e-30, 1e30, 3e-42])
def test_the_size_of_a_gradient_does_not_matter(size):
    mat = torch.randn(8, 24, generator=torch.Generator().manual_seed(2)) * size
    mat[3] *= 1e3
    rows = torch.empty(8)
    means = triton_sinkhorn.sinkhorn_pass([mat], rows, torch.empty(24), [8], True)
    assert means.isfinite().all() and rows.isfinite().all()
    if size > 1e-38:
        # every row has mean square 1, so the columns' means have mean 1
        torch.testing.assert_close(means.mean(), torch.tensor(1.0), rtol=1e-5, atol=0)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(70, 24), (5, 8200)])
@pytest.mark.parametrize("first", [True, False])
def test_a_nonfinite_entry_makes_its_row_and_all_column_means_nan(value, shape, first):
    m, n = shape
    mats = [torch.randn(2, m, n), torch.randn(3, 8)]
    mats[0][1, 2, 3] = value
    rows, cols = torch.ones(2 * m + 3), torch.ones(2 * n + 8)
    means = triton_sinkhorn.sinkhorn_pass(mats, rows, cols, [m, 3], first)
    assert torch.isnan(rows).nonzero().flatten().tolist() == [m + 2]
    assert torch.isnan(means[n : 2 * n]).all()
    assert means[:n].isfinite().all() and means[2 * n :].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_passes_follow_the_oracle_on_the_device_and_repeat_exactly(dtype):
    mats = matrices(dtype, torch.Generator().manual_seed(0), "cuda", wide=True)
    first, second = (run(mats, device="cuda") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        bits_equal(a, b)


@pytest.mark.gpu
def test_a_captured_step_replays_as_the_eager_one():
    """Scales and update of a list of matrices: all launches of a step, none of which waits for the host."""
    options = StepOptions(torch.tensor([1e-2, 0.999], device="cuda"))
    sets = [
        ([m.clone() for m in matrices(torch.bfloat16, torch.Generator().manual_seed(0), "cuda", wide=True)],
         matrices(torch.bfloat16, torch.Generator().manual_seed(1), "cuda", wide=True))
        for _ in range(2)
    ]  # fmt: skip

    def step(which):
        params, mats = sets[which]
        sinkhorn_step(params, mats, [], options, num_iters=3)

    replay_beside_eager(step)
    for captured, eager in zip(sets[0][0], sets[1][0], strict=True):
        bits_equal(captured, eager)
