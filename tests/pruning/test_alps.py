"""ALPS against its formulas in float64, exact least squares, and the objectives of the other scores."""

import pytest
import torch

from leanstep.pruning import LayerStatistics, layer_pruner
from leanstep.sparsity import is_nm, nm_mask


def problem(rows=10, columns=24, seed=0, dtype=torch.float64):
    """A weight and the statistics of strongly correlated inputs of unlike scales."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(90, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = (x * torch.rand(columns, generator=generator).add(0.1)).to(dtype)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return weight, LayerStatistics(square_sum=x.double().square().sum(0), gram=x.T @ x)


def damped(gram):
    gram = gram.double()
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def error(weight, dense, gram):
    """tr((W - W') G (W - W')^T), which is the squared error of the outputs for G = X^T X."""
    change = (weight - dense).double()
    return float((change @ gram * change).sum())


def largest(scores, keep):
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort()[scores.numel() - keep :]] = True
    return mask.view_as(scores)


def two_of_four(scores):
    ranks = scores.unflatten(1, (-1, 4)).argsort(dim=-1).argsort(dim=-1)
    return (ranks >= 2).flatten(1)


def support_by_admm(weight, gram, project):
    """The published iterations in plain float64: a new inverse at every step, B, D and V by name."""
    h = damped(gram)
    scales = h.diagonal().sqrt()
    a, dense = h / torch.outer(scales, scales), weight.double() * scales
    rho, d, v = 0.1, dense * project(dense.abs()), torch.zeros_like(dense)
    before = d != 0
    for iteration in range(1, 301):
        b = (dense @ a - v + rho * d) @ torch.linalg.inv(a + rho * torch.eye(len(a), dtype=torch.float64))
        d = (b + v / rho) * project((b + v / rho).abs())
        v = v + rho * (b - d)
        if iteration % 3 == 0:
            changed = int(((d != 0) != before).sum())
            if changed == 0:
                return d != 0, iteration
            fraction = changed / int((d != 0).sum())
            rho *= 1.3 if fraction >= 0.1 else 1.2 if fraction >= 0.005 else 1.1
            before = d != 0
    return d != 0, iteration


@pytest.mark.parametrize("level", [60, 120, 180, "2:4"])
def test_the_support_is_that_of_the_plain_iterations(level):
    weight, statistics = problem()
    project = two_of_four if isinstance(level, str) else lambda scores: largest(scores, level)
    expected, iterations = support_by_admm(weight, statistics.gram, project)
    assert iterations > 6  # the support moved away from that of the dense weights
    pruned = layer_pruner(weight, "alps", statistics).prune(level)
    assert torch.equal(pruned.mask, expected)


@pytest.mark.parametrize("level", [50, 120, "2:4", "1:8"])
@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_the_weights_are_the_least_squares_of_their_support(level, scope):
    weight, statistics = problem()
    pruned = layer_pruner(weight, "alps", statistics, scope=scope).prune(level)
    h = damped(statistics.gram)
    for row, mask, dense in zip(pruned.weight, pruned.mask, weight, strict=True):
        support = mask.nonzero().squeeze(1)
        exact = torch.linalg.solve(h[support][:, support], h[support] @ dense)
        torch.testing.assert_close(row[support], exact, rtol=1e-7, atol=1e-8)
        assert not row[~mask].any()


def test_fp32_weights_are_as_near_as_fp32_allows():
    weight, statistics = problem(40, 64, dtype=torch.float32)
    pruned = layer_pruner(weight, "alps", statistics).prune(800)
    h = damped(statistics.gram)
    exact = torch.zeros_like(weight, dtype=torch.float64)
    for row, mask, dense in zip(exact, pruned.mask, weight.double(), strict=True):
        support = mask.nonzero().squeeze(1)
        row[support] = torch.linalg.solve(h[support][:, support], h[support] @ dense)
    assert error(pruned.weight, weight, h) <= error(exact, weight, h) * (1 + 1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("level", [24, 60, 96, 150, "2:4", "1:8"])
def test_no_other_score_errs_less_on_its_inputs(seed, level):
    """With the damping, which ALPS checks itself; and here without it as well."""
    weight, statistics = problem(seed=seed)
    weights = {
        score: layer_pruner(weight, score, statistics).prune(level).weight
        for score in ("magnitude", "wanda", "sparsegpt", "alps")
    }
    for gram in (damped(statistics.gram), statistics.gram.double()):
        errors = {score: error(pruned, weight, gram) for score, pruned in weights.items()}
        assert min(errors, key=errors.get) == "alps"
    assert errors["alps"] < 0.9 * errors["sparsegpt"]


@pytest.mark.parametrize("level", [60, "1:4"])
def test_a_bad_support_of_admm_is_replaced(monkeypatch, level):
    """Step 3 of the rule: whatever ADMM finds, the objective is below those of SparseGPT and of the masked weights."""
    from leanstep.pruning.score import alps

    weight, statistics = problem()
    first = torch.arange(weight.numel()).view_as(weight) < 60
    monkeypatch.setattr(alps, "admm_support", lambda *_: first)
    pruned = layer_pruner(weight, "alps", statistics).prune(level)
    sparsegpt = layer_pruner(weight, "sparsegpt", statistics).prune(level)
    h = damped(statistics.gram)
    scores = weight.abs() * h.diagonal().sqrt()
    masked = weight * (nm_mask(scores, level) if isinstance(level, str) else largest(scores, level))
    assert not torch.equal(pruned.mask, first)
    assert error(pruned.weight, weight, h) < min(error(sparsegpt.weight, weight, h), error(masked, weight, h))


@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_the_scope_decides_where_weights_compare(scope):
    weight, statistics = problem()
    weight[:5] *= 10
    mask = layer_pruner(weight, "alps", statistics, scope=scope).prune(120).mask
    counts = mask.sum(dim=1)
    assert int(counts.sum()) == 120
    assert (counts == 12).all() if scope == "row" else counts[:5].min() > counts[5:].max()


def test_inputs_that_are_always_zero_are_pruned_first_and_zeros_before_them():
    weight, statistics = problem()
    for index in (3, 8):
        statistics.gram[index] = 0
        statistics.gram[:, index] = 0
    weight[2, 5] = weight[4, :8] = 0
    for level in (200, 120, 30):
        pruned = layer_pruner(weight, "alps", statistics).prune(level)
        assert not pruned.mask[:, [3, 8]].any() and int(pruned.mask.sum()) == level
        assert not pruned.mask[weight == 0].any()
    pruned = layer_pruner(weight, "alps", statistics).prune("2:4")
    assert is_nm(pruned.weight, "2:4") and not pruned.weight[weight == 0].any()
    # more weights than are not zero: nothing is pruned, and nothing moves
    assert torch.equal(layer_pruner(weight, "alps", statistics).prune(235).weight, weight)


def test_uncorrelated_inputs_have_nothing_to_compensate():
    """A diagonal gram matrix: the best support is that of the largest w_ij^2 H_jj, and the weights stay."""
    weight, _ = problem()
    scales = torch.linspace(0.2, 3.0, 24, dtype=torch.float64)
    pruner = layer_pruner(weight, "alps", LayerStatistics(gram=scales.diag()))
    pruned = pruner.prune(100)
    assert torch.equal(pruned.mask, largest(weight.square() * damped(scales.diag()).diagonal(), 100))
    torch.testing.assert_close(pruned.weight, weight * pruned.mask, rtol=1e-9, atol=1e-12)


def test_another_scope_and_a_gram_matrix_that_is_not_finite_are_refused():
    weight, statistics = problem()
    with pytest.raises(ValueError, match="scope 'column' is not supported for score 'alps'"):
        layer_pruner(weight, "alps", statistics, scope="column")
    with pytest.raises(ValueError, match="not finite"):
        layer_pruner(weight, "alps", LayerStatistics(gram=statistics.gram * float("nan")))
