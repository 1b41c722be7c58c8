"""Transposable masks: valid both ways, and as good as any can be."""

import pytest
import torch
from scipy.optimize import linprog

from leanstep.sparsity import is_nm, transposable_mask
from leanstep.sparsity.training.transposable import METHODS


def kept(scores, mask):
    return float(torch.where(mask, scores.abs(), 0).sum(dtype=torch.float64))


def best_by_linear_program(tile, n):
    """The largest sum of scores with n entries per row and column; the program's corners are integral."""
    m = len(tile)
    rows, columns = torch.eye(m).repeat_interleave(m, dim=1), torch.eye(m).repeat(1, m)
    result = linprog(-tile.flatten().numpy(), A_eq=torch.cat([rows, columns]).numpy(), b_eq=[n] * (2 * m),
                              bounds=(0, 1))  # fmt: skip
    return -result.fun


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2", "4:8", "1:8", "2:5", "3:16", "0:4", "4:4"])
def test_both_directions_keep_exactly_n(pattern, method):
    n, m = map(int, pattern.split(":"))
    for shape in ((2 * m, 3 * m), (2, m, m)):
        mask = transposable_mask(torch.randn(shape), pattern, method=method)
        assert mask.shape == shape and mask.dtype == torch.bool
        assert bool((mask.unflatten(-1, (-1, m)).sum(dim=-1) == n).all())
        assert bool((mask.mT.unflatten(-1, (-1, m)).sum(dim=-1) == n).all())
        assert is_nm(mask, pattern) and is_nm(mask.mT, pattern)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:8", "2:8", "4:8", "3:5", "2:16", "8:16"])
def test_exact_is_the_optimum_of_the_linear_program(pattern):
    n, m = map(int, pattern.split(":"))
    # of 90 masks of 2:4, a few tiles have few as their best
    scores = torch.randn(200 if pattern == "2:4" else 6, m, m, dtype=torch.float64)
    # many ties, and mostly zeros
    scores[4] = scores[4].round()
    scores[5] = scores[5] * (scores[5] > 1)
    masks = transposable_mask(scores, pattern, method="exact")
    for tile, mask in zip(scores.abs(), masks, strict=True):
        assert kept(tile, mask) == pytest.approx(best_by_linear_program(tile, n), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:16"])
def test_greedy_is_never_below_half_of_the_best(pattern):
    m = int(pattern.split(":")[1])
    for power in (1, 8):
        scores = torch.randn(300, m, m, dtype=torch.float64).abs() ** power
        sums = [
            (scores * transposable_mask(scores, pattern, method=method)).sum(dim=(1, 2))
            for method in ("greedy", "exact")
        ]
        assert bool((sums[0] >= sums[1] / 2).all()) and bool((sums[0] <= sums[1] * (1 + 1e-12)).all())
        assert bool((sums[0] < sums[1]).any())


def test_tiles_do_not_depend_on_each_other():
    scores = torch.randn(8, 12)
    mask = transposable_mask(scores, "2:4")
    for i in range(0, 8, 4):
        for j in range(0, 12, 4):
            tile = slice(i, i + 4), slice(j, j + 4)
            assert torch.equal(mask[tile], transposable_mask(scores[tile], "2:4"))


def test_it_is_deterministic_signs_do_not_matter_and_scores_stay():
    scores = torch.randn(16, 16)
    before = scores.clone()
    mask = transposable_mask(scores, "3:8")
    assert torch.equal(mask, transposable_mask(-scores, "3:8"))
    assert torch.equal(scores, before)
    assert transposable_mask(torch.zeros(8, 8), "2:8", method="greedy").sum() == 16


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((6, 8), {}, r"tiles of 4 x 4 do not fill scores of shape \(6, 8\)"),
        ((8,), {}, "do not fill"),
        ((8, 8), {"method": "optimal"}, "method must be one of auto, exact, greedy"),
    ],
)
def test_bad_arguments_are_named(shape, options, message):
    with pytest.raises(ValueError, match=message):
        transposable_mask(torch.randn(shape), "2:4", **options)
