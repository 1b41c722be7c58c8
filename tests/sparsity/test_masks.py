"""Masks of weights: axes, short groups, ties, and what tells a mask from none."""

from itertools import combinations

import pytest
import torch

from leanstep.sparsity import NM, is_nm, nm_mask
from leanstep.sparsity.training import masks
from leanstep.sparsity.training.masks import axis_dim, group_counts, violations


def test_by_hand_and_ties():
    weight = torch.tensor([1.0, -3.0, 2.0, 0.5, 0.1, 0.2, -0.3, 0.4])
    assert nm_mask(weight, "2:4").tolist() == [False, True, True, False, False, False, True, True]
    assert nm_mask(torch.ones(4), "2:4").tolist() == [False, False, True, True]
    assert nm_mask(torch.zeros(8), "1:8").tolist() == [False] * 7 + [True]
    for factor in (-1.0, 1e-3, 1e3):
        assert torch.equal(nm_mask(factor * weight, "2:4"), nm_mask(weight, "2:4"))


@pytest.mark.parametrize(
    ("m", "dtype"),
    [(m, torch.float32) for m in (2, 3, 8, 16, 96, 128)] + [(8, d) for d in (torch.bfloat16, torch.half, torch.double)],
)
def test_every_group_keeps_exactly_n_along_every_axis(m, dtype):
    for n in {0, 1, m // 2, m - 1, m}:
        for shape, axis in (((5, 2 * m), "in"), ((2 * m, 5), "out"), ((3, m, 2, 2), "conv"), ((2, 3, m), "in")):
            mask = nm_mask(torch.randn(shape).to(dtype), NM(n, m), axis=axis)
            assert mask.shape == shape and bool((group_counts(mask, m, axis_dim(mask.shape, axis)) == n).all())


def test_nothing_else_keeps_more():
    weight = torch.randn(50, 8, dtype=torch.float64)
    for n in range(1, 8):
        kept = (weight.abs() * nm_mask(weight, NM(n, 8))).sum(dim=1)
        best = torch.stack([weight[:, list(p)].abs().sum(dim=1) for p in combinations(range(8), n)]).amax(dim=0)
        torch.testing.assert_close(kept, best, rtol=1e-13, atol=0)


def test_axes_are_the_same_groups_seen_otherwise():
    weight = torch.randn(8, 12)
    assert torch.equal(nm_mask(weight, "1:4", axis="out"), nm_mask(weight.T, "1:4").T)
    assert torch.equal(nm_mask(weight.expand(3, 8, 12), "1:4", axis="out")[1], nm_mask(weight, "1:4", axis="out"))
    kernel = torch.randn(6, 8, 3, 3)
    flat = nm_mask(kernel.permute(0, 2, 3, 1).contiguous(), "2:4").permute(0, 3, 1, 2)
    assert torch.equal(nm_mask(kernel, "2:4", axis="conv"), flat)
    with pytest.raises(ValueError, match="axis must be one of"):
        nm_mask(weight, "2:4", axis="row")
    with pytest.raises(ValueError, match="at least 3 dimensions"):
        nm_mask(weight, "2:4", axis="conv")


def test_groups_never_straddle_rows():
    weight = torch.tensor([[9.0, 8, 7, 6, 5, 4], [1, 2, 3, 4, 6, 5]])
    with pytest.raises(
        ValueError, match=r"has 6 entries along dimension 1, which groups of 4 \(2:4\) do not fill.*pad='zero'"
    ):
        nm_mask(weight, "2:4")
    padded = nm_mask(weight, "1:4", pad="zero")
    assert padded.int().tolist() == [[1, 0, 0, 0, 1, 0], [0, 0, 0, 1, 1, 0]]
    # what fills the last group up is pruned first
    assert nm_mask(weight, "3:4", pad="zero")[:, 4:].all()
    with pytest.raises(ValueError, match=r"has 6 entries along dimension 1, fewer than a group of 1:8 holds"):
        nm_mask(weight, "1:8", pad="zero")
    with pytest.raises(ValueError, match="pad must be"):
        nm_mask(weight, "1:2", pad="skip")


def test_nan_is_the_largest_score():
    weight = torch.ones(2, 8)
    weight[1, 2] = float("nan")
    assert bool(nm_mask(weight, "1:8")[1, 2])


def test_coarse_masks_hold_the_fine_ones():
    weight = torch.randn(16, 128)
    fine, target = nm_mask(weight, "1:8"), NM(1, 8)
    for factor in (2, 4, 8, 16):
        assert is_nm(fine, target.scaled(factor))
        coarse = nm_mask(weight, target.scaled(factor))
        assert int(coarse.sum()) == int(fine.sum()) and not is_nm(coarse, target)


def test_violations_are_counted_per_group():
    weight = torch.tensor([[1.0, 1, 1, 0, 0, 0, -0.0, 5], [0, 0, 0, 0, 1, float("nan"), 2, 0]])
    assert group_counts(weight, 4, 1).tolist() == [[3, 1], [0, 3]]
    assert violations(weight, NM(2, 4), -1) == 2 and violations(weight, NM(3, 4), -1) == 0
    assert is_nm(weight, "2:3") is False and violations(weight[:, :7], NM(1, 4), -1) == 2
    assert is_nm(weight, "1:2", axis="out") and not is_nm(weight, "0:2", axis="out")


@pytest.mark.parametrize("shape", [(6, 12), (5, 128), (3, 360), (120, 7), (4, 60, 24), (2, 256), (1, 1)])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_obeyed_patterns_are_the_largest_counts_of_all_group_lengths(shape, density):
    generator = torch.Generator().manual_seed(0)
    weight = torch.where(torch.rand(shape, generator=generator) < density, torch.randn(shape, generator=generator), 0.0)
    for dim, size in enumerate(shape):
        lengths = [m for m in range(2, min(size, 128) + 1) if size % m == 0]
        largest = {m: int((weight.movedim(dim, -1).unflatten(-1, (-1, m)) != 0).sum(-1).max()) for m in lengths}
        want = [NM(n, m) for m, n in largest.items() if n < m]
        assert list(masks._obeyed_patterns(weight, dim, min(size, 128))) == want
