"""M-FAC's rule, function by function, in float64."""

import pytest
import torch
from dense_fisher import DenseFisher, relative

from leanstep.optimizers.mfac import rule


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_denominator():
    assert rule.denominator("window", 8, 3) == 8
    assert rule.denominator("count", 8, 3) == 3


def test_the_shrinkage_is_a_share_of_the_mean_eigenvalue():
    rows = [normal(5, 12), 3.0 * normal(5, 7, seed=1)]
    gram = torch.stack([block @ block.T for block in rows])
    damping = rule.shrinkage_at(gram, 0.5, torch.tensor([12.0, 7.0], dtype=torch.float64))
    expected = torch.stack([0.5 * torch.linalg.eigvalsh(block.T @ block / 5).mean() / 5 for block in rows])
    torch.testing.assert_close(damping, expected, rtol=1e-13, atol=0)


def test_gram_rows_make_the_gram_matrix():
    rows = normal(5, 12)
    gram = torch.full((1, 5, 5), float("nan"), dtype=torch.float64)
    for n in range(1, 6):
        row = rule.gram_row([rows[:n, :7], rows[:n, 7:]], [rows[n - 1, :7], rows[n - 1, 7:]])
        rule.write_gram_row(gram, row.unsqueeze(0), n - 1)
    torch.testing.assert_close(gram[0], rows @ rows.T, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("damping", [1.0, 1e-3, 1e-6])
def test_the_direction_is_the_dense_inverse_times_the_newest_gradient(damping):
    rows, newest = normal(5, 12), 2
    coefficients, _ = rule.coefficients(rows @ rows.T, damping, 5, newest)
    (update,) = rule.direction([rows], coefficients)
    dense = DenseFisher(5, damping, shrinkage=0.0)
    for row in rows:
        dense.insert(row)
    expected = dense.solve(rows[newest])
    assert relative(update, expected) < 1e-14 * 100 / damping
    decrease, norm = rule.decrease_and_norm(rows @ rows.T, coefficients, newest)
    torch.testing.assert_close(decrease, rows[newest] @ update, rtol=1e-9, atol=0)
    torch.testing.assert_close(norm, update.norm(), rtol=1e-9, atol=0)


def test_the_average():
    buffer, update = normal(4), normal(4, seed=1)
    torch.testing.assert_close(rule.average(buffer, update, 0.8), 0.8 * buffer + 0.2 * update, rtol=1e-14, atol=1e-14)
