"""Masks and updates of the scores, against torch, row by row, and brute force."""

import gc
import itertools
import weakref

import pytest
import torch
from torch.nn.utils import prune as torch_prune

from leanstep.pruning import LayerStatistics, as_matrix, layer_pruner
from leanstep.pruning.score.base import NEEDS, smallest
from leanstep.sparsity import is_nm

SCORES = ("magnitude", "wanda", "sparsegpt", "alps", "mfac")


def statistics_of(x, gradients=None):
    found = LayerStatistics(
        square_sum=torch.zeros(x.shape[-1], dtype=torch.float64), gram=torch.zeros(x.shape[-1], x.shape[-1])
    )
    found.add(x)
    found.gradients = gradients
    return found


@pytest.fixture
def matrix():
    """A weight [12, 32], and statistics of correlated inputs and of 20 gradients."""
    x = torch.randn(200, 32) @ torch.randn(32, 32) * torch.rand(32)
    return torch.randn(12, 32), statistics_of(x, torch.randn(20, 12 * 32))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("keep", [0, 1, 97, 192, 383, 384])
def test_exactly_the_asked_number_of_weights_is_kept(matrix, score, keep):
    weight, statistics = matrix
    before = weight.clone()
    pruned = layer_pruner(weight, score, statistics).prune(keep)
    assert int(pruned.mask.sum()) == int(pruned.weight.count_nonzero()) == keep
    assert torch.equal(pruned.weight != 0, pruned.mask)
    assert torch.equal(weight, before)
    assert not torch.signbit(pruned.weight[~pruned.mask]).any()
    if keep == weight.numel():
        assert torch.equal(pruned.weight, weight)


@pytest.mark.parametrize("score", SCORES)
def test_levels_asked_of_one_pruner_are_those_of_new_ones_in_any_order(matrix, score):
    weight, statistics = matrix
    pruner = layer_pruner(weight, score, statistics)
    found = {keep: pruner.prune(keep) for keep in (300, 50, "2:4", 200)}
    for keep in (200, 300, "2:4", 50):
        again = layer_pruner(weight, score, statistics).prune(keep)
        assert torch.equal(again.weight, found[keep].weight) and torch.equal(again.mask, found[keep].mask)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pattern", ["2:4", "3:8", "8:8", "1:16", "0:4"])
def test_patterns_hold(matrix, score, pattern):
    weight, statistics = matrix
    pruned = layer_pruner(weight, score, statistics).prune(pattern)
    n, m = map(int, pattern.split(":"))
    assert is_nm(pruned.weight, pattern) and is_nm(pruned.mask.float(), pattern)
    assert int(pruned.mask.sum()) == weight.numel() * n // m
    if n == m:
        assert torch.equal(pruned.weight, weight)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weight_is_kept(matrix, score, dtype):
    weight, statistics = matrix
    pruned = layer_pruner(weight.to(dtype), score, statistics).prune(100)
    assert pruned.weight.dtype == dtype and int(pruned.weight.count_nonzero()) == 100


@pytest.mark.parametrize("score", SCORES)
def test_what_is_zero_stays_zero_at_sparser_levels(matrix, score):
    """Iterative pruning never brings a weight back, also where the others are moved."""
    weight, statistics = matrix
    first = layer_pruner(weight, score, statistics).prune(250)
    second = layer_pruner(first.weight, score, statistics).prune(130)
    assert int(second.mask.sum()) == 130
    assert not (second.mask & ~first.mask).any()
    assert not second.weight[~first.mask].any()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("zeros", ["rows", "columns"])
@pytest.mark.parametrize("keep", [37, 150, 192, 250])
def test_a_matrix_with_zeros_in_one_place_keeps_the_asked_number_of_nonzeros(matrix, score, zeros, keep):
    """Half the rows are zero, or half of the columns: the others keep what these cannot."""
    weight, statistics = matrix
    weight = weight.clone()
    weight[slice(6) if zeros == "rows" else (slice(None), slice(16))] = 0
    pruned = layer_pruner(weight, score, statistics, **({"block_size": 8} if score == "sparsegpt" else {})).prune(keep)
    assert int(pruned.mask.sum()) == keep
    assert int(pruned.weight.count_nonzero()) == min(keep, 192)


def test_rows_with_few_nonzeros_leave_their_share_to_the_others():
    weight = torch.ones(3, 4)
    weight[0, 1:] = 0
    scores = torch.tensor([[1.0, 1, 1, 1], [1, 2, 3, 4], [5, 6, 7, 8]])
    mask = layer_pruner(weight, lambda w, s: scores, scope="row").prune(6).mask
    # one of the first row, two of both others, and the third of the row where it is larger
    assert mask.int().tolist() == [[1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]]


@pytest.mark.parametrize("amount", [0.0, 0.13, 0.5, 0.77, 1.0])
def test_magnitude_is_that_of_torch(amount):
    layer = torch.nn.Linear(23, 17)
    keep = layer.weight.numel() - round(amount * layer.weight.numel())
    mask = layer_pruner(layer.weight, "magnitude").prune(keep).mask
    torch_prune.l1_unstructured(layer, "weight", amount=amount)
    assert torch.equal(mask, layer.weight_mask.bool())


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_wanda_prunes_as_many_in_each_row_by_weight_times_input_norm(sparsity):
    x, weight = torch.randn(64, 20) * torch.rand(20).mul(10), torch.randn(9, 20)
    each = int(20 * sparsity)
    pruned = layer_pruner(weight, "wanda", statistics_of(x)).prune(9 * (20 - each))
    for i in range(9):
        metric = torch.tensor([abs(float(weight[i, j])) * float(x[:, j].double().norm()) for j in range(20)])
        gone = metric.argsort()[:each]
        expected = weight[i].clone()
        expected[gone] = 0
        assert torch.equal(pruned.weight[i], expected)
        assert int((pruned.weight[i] == 0).sum()) == each


def test_rows_share_a_count_that_they_do_not_divide():
    scores = torch.tensor([[1.0, 2.0, 30.0], [10.0, 20.0, 3.0], [5.0, 6.0, 7.0]])
    mask = layer_pruner(torch.ones(3, 3), lambda w, s: scores, scope="row").prune(4)
    # five to prune: one per row, and two rows more: where the second lowest is lowest
    assert mask.mask.tolist() == [[False, False, True], [True, True, False], [False, False, True]]
    assert int(mask.mask.sum()) == 4


def test_statistics_add_up_over_batches_of_any_shape():
    x = torch.randn(6, 5, 8)
    whole, parts = (LayerStatistics.empty(NEEDS[s], 8) for s in ("sparsegpt", "wanda"))
    whole.add(x)
    for piece in x.split(2):
        parts.add(piece.to(torch.float64))
    rows = x.reshape(-1, 8).double()
    assert whole.count == parts.count == 30
    torch.testing.assert_close(whole.gram.double(), rows.T @ rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.square_sum, rows.square().sum(0), rtol=1e-6, atol=0)
    assert whole.square_sum is None and parts.gram is None and parts.gradients is None


def sparsegpt_by_elimination(weight, gram, masks):
    """Row by row in float64: prune from left to right, and after each weight solve for those right of it again."""
    h = gram.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    out = weight.double().clone()
    for i in range(len(weight)):
        inverse = torch.linalg.inv(h)
        for j in range(len(h)):
            if not masks[i, j]:
                out[i] -= out[i, j] / inverse[j, j] * inverse[:, j]
                out[i, j] = 0
            # column j is done, pruned or kept: it moves no more
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])  # the last without NumPy
@pytest.mark.parametrize("count", [0, 1, 100, 199, 200])
def test_the_smallest_are_those_of_a_stable_sort(dtype, count):
    scores = torch.randint(-1, 12, (10, 20), generator=torch.Generator().manual_seed(count)).to(dtype)  # many are equal
    expected = torch.zeros(200, dtype=torch.bool)
    expected[scores.flatten().argsort(stable=True)[:count]] = True
    assert torch.equal(smallest(scores, count).flatten(), expected)
    assert torch.equal(smallest(scores.t(), count), smallest(scores.t().contiguous(), count))


@pytest.mark.parametrize("block_size", [4, 12, 100])
def test_sparsegpt_moves_the_rest_as_elimination_does(block_size):
    x = torch.randn(50, 12).double() @ torch.randn(12, 12).double()
    weight = torch.randn(5, 12).double()
    statistics = LayerStatistics(gram=x.T @ x)
    for keep in (17, 30, "2:4"):
        pruned = layer_pruner(weight, "sparsegpt", statistics, block_size=block_size).prune(keep)
        expected = sparsegpt_by_elimination(weight, statistics.gram, pruned.mask)
        torch.testing.assert_close(pruned.weight, expected, rtol=1e-9, atol=1e-9)


def test_sparsegpt_chooses_the_mask_of_a_block_when_its_turn_comes():
    """The published algorithm in plain loops: U from the inverse, thresholds per block, errors to the right."""
    x = torch.randn(80, 16).double() @ torch.randn(16, 16).double()
    weight, gram = torch.randn(6, 16).double(), x.T @ x
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, mask = weight.clone(), torch.ones(6, 16, dtype=torch.bool)
    for j in range(16):
        if j % 4 == 0:
            metric = w[:, j : j + 4].square() / u.diagonal()[j : j + 4].square()
            gone = metric.flatten().argsort()[:15]  # 60 of 96 in 4 blocks
            mask[:, j : j + 4] = torch.ones(24, dtype=torch.bool).index_fill(0, gone, False).view(6, 4)
        error = torch.where(mask[:, j], 0.0, w[:, j] / u[j, j])
        for k in range(j, 16):
            w[:, k] -= error * u[j, k]
    pruned = layer_pruner(weight, "sparsegpt", LayerStatistics(gram=gram), block_size=4).prune(36)
    assert torch.equal(pruned.mask, mask)
    torch.testing.assert_close(pruned.weight, w * mask, rtol=1e-9, atol=1e-9)


def test_sparsegpt_errs_less_on_its_inputs_than_masks_alone(matrix):
    weight, statistics = matrix
    gram = statistics.gram.double()

    def error(pruned):
        change = (pruned.weight - weight).double()
        return float((change @ gram * change).sum())

    pruners = {score: layer_pruner(weight, score, statistics) for score in ("magnitude", "wanda", "sparsegpt")}
    for keep in (300, 192, 100, "2:4"):
        errors = {score: error(pruner.prune(keep)) for score, pruner in pruners.items()}
        assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_sparsegpt_prunes_inputs_that_are_always_zero_first():
    x = torch.randn(50, 8)
    x[:, 3] = 0
    pruned = layer_pruner(torch.randn(4, 8), "sparsegpt", statistics_of(x)).prune(28)
    assert not pruned.mask[:, 3].any() and pruned.mask.sum() == 28


@pytest.mark.parametrize("keep", [256, 512, 700])
def test_sparsegpt_prunes_whole_blocks_of_such_inputs_first_and_zeros_before_them(keep):
    x = torch.randn(200, 64)
    x[:, :32] = 0
    weight = torch.randn(16, 64)
    weight[:, :8] = 0
    pruned = layer_pruner(weight, "sparsegpt", statistics_of(x), block_size=16).prune(keep)
    assert int(pruned.mask.sum()) == keep
    assert int(pruned.mask[:, 32:].sum()) == min(keep, 512)  # 16 x 32 weights matter
    assert not pruned.mask[:, :8].any()


@pytest.mark.parametrize("score", ["sparsegpt", "alps"])
@pytest.mark.parametrize("scale", [2.0**-14, 2.0**14])
def test_the_scale_of_the_inputs_does_not_matter_where_some_are_always_zero(score, scale):
    x = torch.randn(50, 16) @ torch.randn(16, 16)
    x[:, [1, 5]] = 0
    weight = torch.randn(6, 16)
    here, there = (layer_pruner(weight, score, statistics_of(inputs)).prune(48) for inputs in (x, scale * x))
    assert torch.equal(here.mask, there.mask)
    torch.testing.assert_close(here.weight, there.weight, rtol=1e-4, atol=1e-5)


def fisher_of(gradients, damping, block):
    """F, dense in float64, damping relative to its mean diagonal."""
    g = gradients.double()
    f = g.T @ g / len(g)
    blocks = torch.arange(len(f)) // block
    return f * (blocks[:, None] == blocks) + damping * g.square().mean() * torch.eye(len(f), dtype=torch.float64)


@pytest.mark.parametrize("m", [3, 40])  # fewer gradients than weights of a block, and more
@pytest.mark.parametrize("block", [6, 8, 24])
def test_mfac_s_exact_update_is_the_least_increase_of_the_loss(m, block):
    weight, gradients = torch.randn(3, 8).double(), torch.randn(m, 24).double()
    statistics = LayerStatistics(gradients=gradients)
    f = fisher_of(gradients, 0.1, block)
    inverse = torch.linalg.inv(f)
    w = weight.flatten()
    for keep in (1, 11, 20):
        losses = {}
        for update in ("exact", "independent", "none"):
            pruner = layer_pruner(weight, "mfac", statistics, update=update, block_size=block)
            torch.testing.assert_close(pruner.scores.flatten(), w**2 / (2 * inverse.diagonal()), rtol=1e-8, atol=0)
            pruned = pruner.prune(keep)
            gone = (~pruned.mask.flatten()).nonzero().squeeze(1)
            assert gone.tolist() == sorted((w**2 / inverse.diagonal()).argsort()[: 24 - keep].tolist())
            change = pruned.weight.flatten() - w
            losses[update] = float(change @ f @ change / 2)
            if update == "exact":
                sub = inverse[gone][:, gone]
                expected = -inverse[:, gone] @ torch.linalg.solve(sub, w[gone])
                torch.testing.assert_close(change, expected, rtol=1e-7, atol=1e-9)
                least = float(w[gone] @ torch.linalg.solve(sub, w[gone]) / 2)
                assert losses["exact"] == pytest.approx(least, rel=1e-8)
            elif update == "independent":
                expected = inverse[:, gone] @ (-w[gone] / inverse.diagonal()[gone])
                expected[gone] = -w[gone]
                torch.testing.assert_close(change, expected, rtol=1e-7, atol=1e-9)
        assert losses["exact"] <= losses["none"] + 1e-12 and losses["exact"] <= losses["independent"] + 1e-12


def test_mfac_prunes_one_weight_at_the_cost_its_score_says():
    weight, gradients = torch.randn(2, 6).double(), torch.randn(5, 12).double()
    f = fisher_of(gradients, 0.1, 12)
    for update in ("exact", "independent"):
        pruner = layer_pruner(weight, "mfac", LayerStatistics(gradients=gradients), update=update)
        pruned = pruner.prune(11)
        change = (pruned.weight - weight).flatten()
        assert float(change @ f @ change / 2) == pytest.approx(float(pruner.scores.min()), rel=1e-9)


def test_mfac_s_pattern_is_the_best_set_of_each_group():
    weight, gradients = torch.randn(3, 8).double(), torch.randn(4, 24).double()
    inverse = torch.linalg.inv(fisher_of(gradients, 0.1, 24))
    pruned = layer_pruner(weight, "mfac", LayerStatistics(gradients=gradients), block_size=24).prune("2:4")
    w, mask = weight.flatten(), pruned.mask.flatten()
    for start in range(0, 24, 4):
        costs = {}
        for gone in itertools.combinations(range(start, start + 4), 2):
            sub = inverse[list(gone)][:, list(gone)]
            costs[gone] = float(w[list(gone)] @ torch.linalg.solve(sub, w[list(gone)]))
        assert min(costs, key=costs.get) == tuple((~mask[start : start + 4]).nonzero().squeeze(1).add(start).tolist())


def test_mfac_leaves_weights_that_are_zero_out_of_the_fisher_matrix():
    """As if they were not among the parameters: the published code removes them from its vectors."""
    weight, gradients = torch.randn(2, 8).double(), torch.randn(5, 16).double()
    weight[0, 2] = weight[1, 5] = 0
    alive = weight.flatten() != 0
    pruner = layer_pruner(weight, "mfac", LayerStatistics(gradients=gradients), block_size=16)
    damping = 0.1 * float((gradients * alive).square().mean())
    rows = gradients[:, alive]
    inverse = torch.linalg.inv(rows.T @ rows / len(rows) + damping * torch.eye(14, dtype=torch.float64))
    expected = weight.flatten()[alive] ** 2 / (2 * inverse.diagonal())
    torch.testing.assert_close(pruner.scores.flatten()[alive], expected, rtol=1e-9, atol=0)
    pruned = pruner.prune(9)
    gone = (~pruned.mask.flatten()[alive]).nonzero().squeeze(1)
    w = weight.flatten()[alive]
    change = -inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], w[gone])
    torch.testing.assert_close(pruned.weight.flatten()[alive], w + change, rtol=1e-8, atol=1e-10)


def test_mfac_prunes_a_matrix_of_zeros_by_nothing():
    statistics = LayerStatistics(gradients=torch.randn(5, 32))
    pruner = layer_pruner(torch.zeros(4, 8), "mfac", statistics)
    assert not pruner.scores.any()
    for keep in (0, 7, 32):
        assert int(pruner.prune(keep).mask.sum()) == keep and not pruner.prune(keep).weight.any()
    assert not pruner.prune("2:4").weight.any()


def test_scores_do_not_depend_on_the_scale_of_the_loss(matrix):
    weight, statistics = matrix
    scaled = LayerStatistics(gradients=statistics.gradients * 1e-4, gram=statistics.gram * 1e6)
    for score in ("mfac", "sparsegpt", "alps"):
        first, second = (layer_pruner(weight, score, s).prune(150) for s in (statistics, scaled))
        assert torch.equal(first.mask, second.mask)
        torch.testing.assert_close(first.weight, second.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_a_transposed_layout_is_pruned_as_the_linear_layer_it_computes(matrix, score):
    weight, statistics = matrix
    stored = weight.T.contiguous()  # Conv1D: [in, out]
    keep = 130
    pruned = layer_pruner(as_matrix(stored, "in_out"), score, statistics).prune(keep)
    assert torch.equal(pruned.weight, layer_pruner(weight, score, statistics).prune(keep).weight)
    as_matrix(stored, "in_out").copy_(pruned.weight)
    assert torch.equal(stored, pruned.weight.T)


@pytest.mark.parametrize("score", SCORES)
def test_experts_are_matrices_of_their_own(score):
    """A three-dimensional parameter [experts, in, out]: each expert is pruned through a view of it."""
    experts = torch.randn(3, 8, 6)
    statistics = [statistics_of(torch.randn(40, 8), torch.randn(5, 48)) for _ in range(3)]
    expected = [layer_pruner(e.T.clone(), score, s).prune(20).weight for e, s in zip(experts, statistics, strict=True)]
    for expert, one in zip(experts, statistics, strict=True):
        view = as_matrix(expert, "in_out")
        view.copy_(layer_pruner(view, score, one).prune(20).weight)
    assert torch.equal(experts, torch.stack(expected).mT)


@pytest.mark.parametrize("score", SCORES)
def test_groups_of_a_convolution_lie_along_its_in_channels(score):
    conv = torch.nn.Conv2d(8, 5, 3)
    rows = as_matrix(conv.weight.detach(), "conv")
    assert rows.shape == (5, 72) and rows.data_ptr() == conv.weight.data_ptr()
    statistics = statistics_of(torch.randn(90, 72), torch.randn(6, 5 * 72))
    pruner = layer_pruner(rows, score, statistics, spacing=9, block_size=72)
    pruned = pruner.prune("2:4")
    assert is_nm(pruned.weight.view(5, 8, 3, 3), "2:4", axis="conv")
    assert int(pruned.mask.sum()) == 180
    assert int(pruner.prune(100).mask.sum()) == 100
    assert pruner.scores.shape == (5, 72)
    if score == "wanda":
        metric = rows.abs() * statistics.square_sum.sqrt()
        torch.testing.assert_close(pruner.scores, metric.float())
    with pytest.raises(ValueError, match="24 do not fill the 8 in-channels"):
        pruner.prune("2:24")


def test_a_function_is_a_score():
    weight = torch.randn(4, 6)
    pruned = layer_pruner(weight, lambda w, s: torch.rand(w.shape).clamp(0.5) * 0 + torch.arange(6.0)).prune(8)
    assert pruned.mask.tolist() == [[False] * 4 + [True] * 2] * 4


def test_ties_are_pruned_from_the_front():
    assert layer_pruner(torch.ones(2, 3)).prune(4).mask.tolist() == [[False, False, True], [True, True, True]]


def test_what_cannot_be_pruned_is_refused_with_the_reason(matrix):
    weight, statistics = matrix
    bad = [
        (
            lambda: layer_pruner(weight, "wandas", statistics),
            "score must be one of magnitude, wanda, sparsegpt, alps, mfac",
        ),
        (lambda: layer_pruner(weight, "wanda"), "needs statistics with square_sum"),
        (lambda: layer_pruner(weight[:, :8], "sparsegpt", statistics), r"gram of shape \(32, 32\) does not fit"),
        (lambda: layer_pruner(weight[:2], "mfac", statistics), "gradients of shape"),
        (lambda: layer_pruner(weight, "mfac", statistics, update="some"), "update must be"),
        (lambda: layer_pruner(weight, "sparsegpt", statistics, scope="row"), "scope 'row'"),
        (lambda: layer_pruner(weight, spacing=5), "spacing that divides in"),
        (lambda: layer_pruner(weight).prune(385), "cannot keep 385 of 384"),
        (lambda: layer_pruner(weight).prune("2:5"), "groups of 5 do not fill the 32 inputs"),
        (lambda: layer_pruner(weight, "mfac", statistics, block_size=6).prune("2:4"), "split groups of 4"),
        (lambda: layer_pruner(weight * float("nan")).prune(3), "finite scores"),
        (lambda: layer_pruner(weight, "sparsegpt", LayerStatistics(gram=weight.T @ weight * float("inf"))), "finite"),
        (lambda: layer_pruner(weight, "mfac", LayerStatistics(gradients=torch.zeros(2, 384))), "not all 0"),
        (lambda: layer_pruner(weight, "sparsegpt", statistics, damping=0.0), "damping > 0"),
    ]
    for call, said in bad:
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(TypeError, match="number of weights to keep"):
        layer_pruner(weight).prune(0.5)


@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_a_pruner_is_freed_with_its_last_reference(scope):
    pruner = layer_pruner(torch.randn(6, 8), "magnitude", scope=scope)
    pruner.prune(20)
    freed = weakref.ref(pruner)
    gc.disable()
    try:
        del pruner
        assert freed() is None
    finally:
        gc.enable()
