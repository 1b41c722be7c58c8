"""N:M masks: the definition against brute force, and the fast ones against the definition, exactly."""

from itertools import combinations

import pytest
import torch
from kernel_cases import DTYPES, bits_equal, dtype_name

from leanstep.kernels import nm_mask, use_backend
from leanstep.kernels.cpp_impl import _build

# selections of every kind: few taken, few dropped, many of both, all, none; groups within a vector and longer than one
PATTERNS = [(1, 2), (2, 4), (1, 8), (7, 8), (1, 16), (9, 16), (16, 32), (1, 32), (20, 64), (40, 100), (64, 128), (0, 4)]
PATTERNS += [(4, 4), (1, 1), (2, 5), (5, 12), (120, 128)]


def shapes(m):
    """(shape, dim): groups that are contiguous, along the rows, along in-channels, and next to none."""
    return [((6, m * 11), 1), ((m * 3, 70), 0), ((3, m * 2, 3, 3), 1), ((m * 70,), -1), ((0, m), 1), ((1, m), 1)]


def scores_of(shape, dtype, seed=0):
    """Scores with many ties, zeros of both signs, the infinite and NaN."""
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(3).round().div(3).to(dtype)
    flat = scores.view(-1)
    for place, value in ((3, float("nan")), (7, float("inf")), (8, -0.0), (9, 1e-40)):
        flat[place : place + 1] = value
    return scores


def kept_by_sorting(scores, n, m):
    """The rule in words, one group after the other: larger magnitude first, then higher index; NaN above all."""
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for row, kept in zip(scores.view(-1, m).tolist(), keep.view(-1, m), strict=True):
        order = sorted(range(m), key=lambda j: (row[j] != row[j], abs(row[j]) if row[j] == row[j] else 0.0, j))
        kept[order[m - n :]] = True
    return keep


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_the_definition_is_the_rule(n, m):
    scores = scores_of((5, 6 * m), torch.float32)
    with use_backend("reference"):
        (mask,) = nm_mask([scores], n, m)
    assert torch.equal(mask, kept_by_sorting(scores, n, m))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (1, 8), (3, 8), (2, 6), (5, 7)])
def test_no_other_choice_keeps_more(n, m):
    scores = torch.randn(40, m, dtype=torch.float64)
    (mask,) = nm_mask([scores], n, m)
    kept = (scores.abs() * mask).sum(dim=1)
    sums = torch.stack([scores[:, list(places)].abs().sum(dim=1) for places in combinations(range(m), n)])
    torch.testing.assert_close(kept, sums.max(dim=0).values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_fast_masks_equal_the_definition(n, m, dtype, dirty_memory):
    for shape, dim in shapes(m):
        scores = scores_of(shape, dtype)
        before = scores.clone()
        with use_backend("reference"):
            (want,) = nm_mask([scores], n, m, dim=dim)
        (found,) = nm_mask([scores], n, m, dim=dim)
        assert torch.equal(found, want)
        assert int(found.sum()) == scores.numel() * n // m
        bits_equal(scores, before)


def test_lists_views_and_given_memory(dirty_memory):
    base = torch.randn(40, 64)
    lists = [base, base.t(), base[::2, 8:40], base.to(torch.bfloat16), base[:0]]
    out = [torch.ones(s.shape, dtype=torch.bool) for s in lists]
    out[0] = torch.ones(64, 40, dtype=torch.bool).t()
    found = nm_mask(lists, 2, 8, out=out)
    for score, mask, given in zip(lists, found, out, strict=True):
        assert mask is given
        with use_backend("reference"):
            assert torch.equal(mask, nm_mask([score], 2, 8)[0])
    assert nm_mask([], 2, 4) == []


def test_signs_and_scale_do_not_matter():
    scores = torch.randn(8, 64)
    (mask,) = nm_mask([scores], 3, 16)
    for changed in (-scores, scores * 0.25, scores * torch.randn_like(scores).sign()):
        assert torch.equal(nm_mask([changed], 3, 16)[0], mask)


def test_groups_longer_than_the_kernels_take():
    scores = torch.randn(3, 1024)
    (mask,) = nm_mask([scores], 8, 1024)
    assert torch.equal(mask, kept_by_sorting(scores, 8, 1024))
    (mask,) = nm_mask([scores.to(torch.bfloat16)], 100, 512)
    assert torch.equal(mask, kept_by_sorting(scores.to(torch.bfloat16), 100, 512))


def test_bad_arguments_are_named():
    scores = torch.ones(4, 6)
    for call, error, message in [
        (lambda: nm_mask([scores], 3, 2), ValueError, "0 <= n <= m"),
        (lambda: nm_mask([scores], -1, 2), ValueError, "0 <= n <= m"),
        (
            lambda: nm_mask([scores], 2, 4),
            ValueError,
            r"\(4, 6\) has 6 entries along dimension -1.*4 do not.*2 are left",
        ),
        (lambda: nm_mask([scores], 1, 2, dim=2), ValueError, "no dimension 2"),
        (lambda: nm_mask([scores.int()], 1, 2), TypeError, "torch.int32"),
        (lambda: nm_mask([scores], 1, 2, out=[]), ValueError, "got 0 for 1"),
        (lambda: nm_mask([scores], 1, 2, out=[scores]), ValueError, "torch.bool"),
        (
            lambda: nm_mask([scores, scores / 0 - 5], 1, 2, check=True),
            ValueError,
            r"24 of the 24 entries of scores\[1\]",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
    nm_mask([scores / 0], 1, 2)


@pytest.mark.slow
@pytest.mark.skipif(_build.why_not_cpp() is not None or not _build.cpp_compiler(), reason="there is no compiler")
def test_compiles_without_a_function_that_older_versions_of_gcc_lack():
    if "clang" in _build._version(_build.cpp_compiler()):
        pytest.skip("clang++ has this function in every version")
    _build.library("nm/mask", {"WORD": "uint16_t", "__builtin_shufflevector": "missing"})


def test_compiles_whole_and_is_a_proper_op():
    scores = [torch.randn(8, 16), torch.randn(4, 32)]
    compiled = torch.compile(lambda s: nm_mask(s, 2, 8), fullgraph=True, backend="aot_eager")
    for found, want in zip(compiled(scores), nm_mask(scores, 2, 8), strict=True):
        assert torch.equal(found, want)
    out = [torch.zeros(s.shape, dtype=torch.bool) for s in scores]
    torch.library.opcheck(torch.ops.leanstep.nm_mask.default, (scores, 2, 8, -1, out))
