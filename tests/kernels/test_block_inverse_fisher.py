"""The inverse of a Fisher matrix whose gradients stay: every query against the dense inverse of the blocks."""

import pytest
import torch
from dense_fisher import newest_preconditioned, slow_rows
from static_recursion import dense_fisher, static_recursion

from leanstep.kernels import BlockInverseFisher
from leanstep.kernels.fisher import block_inverse_fisher

# (m, d, block): dual, primal, a last block that is primal while the others are dual, whole, single columns
CASES = [(5, 40, 16), (20, 40, 16), (10, 44, 16), (7, 36, None), (50, 36, None), (3, 8, 1)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocked(rows, damping, block):
    """F with the elements between blocks put to zero, dense."""
    owners = torch.arange(rows.shape[1]) // (block or rows.shape[1])
    return dense_fisher(rows, damping) * (owners.unsqueeze(1) == owners)


@pytest.mark.parametrize("tile", [1 << 22, 50], ids=["whole", "in tiles"])
@pytest.mark.parametrize(("m", "d", "block"), CASES)
def test_equals_the_dense_inverse(m, d, block, tile, monkeypatch):
    monkeypatch.setattr(block_inverse_fisher, "_TILE", tile)
    rows, damping = normal(m, d), 1e-2
    fisher = blocked(rows, damping, block)
    inverse = torch.linalg.inv(fisher)
    found = BlockInverseFisher(rows, damping=damping, block_size=block)
    bound = {"rtol": 0, "atol": 1e-10}  # entries of up to 1 / damping = 100: measured 1e-11
    torch.testing.assert_close(found.diagonal(), inverse.diagonal(), **bound)
    x = normal(d, 3, seed=1)
    torch.testing.assert_close(found.solve(x), inverse @ x, **bound)
    torch.testing.assert_close(found.solve(x[:, 0]), inverse @ x[:, 0], **bound)
    size = 1 if block == 1 else 4
    want = torch.stack([inverse[i : i + size, i : i + size] for i in range(0, d, size)])
    torch.testing.assert_close(found.sub_blocks(size), want, **bound)


def test_is_what_the_static_recursion_computes():
    rows, damping = normal(6, 30), 1e-3
    recursion, found = static_recursion(rows, damping), BlockInverseFisher(rows, damping=damping)
    torch.testing.assert_close(found.diagonal(), recursion.diagonal(), rtol=1e-9, atol=1e-9)
    x = normal(30, seed=1)
    torch.testing.assert_close(found.solve(x), recursion.solve(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "block", "scale"), [(64, 512, 1.0), (128, 128, 1.0), (256, 128, 0.1)])
def test_heavy_tails_and_a_small_damping_keep_the_diagonal_exact(dtype, m, block, scale):
    damping = 1e-7
    heavy = normal(m, 512) / torch.distributions.Chi2(2.0).sample((m, 512)).div(2).sqrt()
    rows = (heavy * scale).to(dtype)
    found = BlockInverseFisher(rows, damping=damping, block_size=block).diagonal()
    want = torch.linalg.inv(blocked(rows.double(), damping, block)).diagonal()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
    # the recursion in fp32, for contrast, loses the small entries of the blocks that the gradients span
    if m >= block and dtype == torch.float32:
        first = static_recursion(rows[:, :block], damping).diagonal().double()
        assert ((first - want[:block]).abs() / want[:block]).max() > 1e-2


@pytest.mark.parametrize("m", [16, 120], ids=["dual", "primal"])
@pytest.mark.parametrize("change", [1e-2, 1e-4, 1e-6])
def test_gradients_that_change_slowly(change, m):
    rows, damping = slow_rows(m, 100, change), 1e-7
    found = BlockInverseFisher(rows, damping=damping)
    exact = newest_preconditioned(rows, damping, m)
    assert (found.solve(rows[-1]) - exact).norm() < 1e-6 * exact.norm()
    _, sizes, right = torch.linalg.svd(rows.double(), full_matrices=False)
    inside = right.square().T @ (1 / (damping + sizes.square() / m) - 1 / damping)
    torch.testing.assert_close(found.diagonal(), 1 / damping + inside, rtol=1e-6, atol=0)


def test_a_diagonal_that_rounding_has_taken_over_is_never_clamped():
    rows = normal(4, 6)
    repeated = rows[:1].expand(4, -1) * 1e9
    with pytest.raises(ValueError, match="not positive definite.*Raise the damping"):
        BlockInverseFisher(repeated, damping=1e-9)
    spoiled = BlockInverseFisher(rows, damping=1e-2)
    spoiled._runs[0].factor.mul_(0.5)  # W twice as large: 1 - W^2 turns negative
    with pytest.raises(ValueError, match=r"diagonal entries of the inverse are not in.*Raise the damping"):
        spoiled.diagonal()
    with pytest.raises(ValueError, match="not in"):
        spoiled.sub_blocks(2)


def test_columns_without_gradients_keep_the_damping():
    rows = normal(5, 12)
    rows[:, 3] = 0
    diagonal = BlockInverseFisher(rows, damping=1e-3, block_size=4).diagonal()
    torch.testing.assert_close(diagonal[3], torch.tensor(1e3, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (diagonal[:3] < 1e3).all()
    nothing = BlockInverseFisher(torch.zeros(2, 6), damping=0.5, block_size=4).diagonal()
    torch.testing.assert_close(nothing, torch.full((6,), 2.0, dtype=torch.float64), rtol=1e-12, atol=0)


def test_rows_are_kept_as_they_are():
    whole = normal(6, 40).to(torch.bfloat16)
    rows, before = whole[:, 4:28:2], whole.clone()
    found = BlockInverseFisher(rows, damping=1e-2, block_size=5)
    assert found.rows.data_ptr() == rows.data_ptr()
    found.diagonal(), found.solve(torch.ones(12))
    assert torch.equal(whole, before)
    want = torch.linalg.inv(blocked(rows.double(), 1e-2, 5))
    torch.testing.assert_close(found.solve(torch.ones(12)), want.sum(dim=1), rtol=1e-9, atol=1e-9)


def test_bad_arguments_are_named():
    rows = torch.ones(3, 8)
    good = BlockInverseFisher(rows, damping=1.0, block_size=4)
    infinite = rows.clone()
    infinite[1, 5] = float("inf")
    for call, message in [
        (lambda: BlockInverseFisher(rows, damping=0.0), "damping = 0.0"),
        (lambda: BlockInverseFisher(rows, damping=1.0, block_size=9), "block_size = 9"),
        (lambda: BlockInverseFisher(rows[0], damping=1.0), r"rows \[m, d\]"),
        (lambda: BlockInverseFisher(rows.int(), damping=1.0), "floating dtype"),
        (lambda: BlockInverseFisher(infinite, damping=1.0, block_size=4), "columns 4 to 7 are not finite"),
        (lambda: good.sub_blocks(3), "size 3 does not divide blocks"),
        (lambda: good.solve(torch.ones(7)), r"expected x \[8\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
