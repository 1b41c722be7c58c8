"""Rate-distortion curves: cleaning, what lies between levels, and the levels worth measuring."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from leanstep.pruning import Curve, PruneConfig, find_targets, level_grid, measure_curves, nm_levels, prune
from leanstep.pruning.allocate.levels import levels_of
from leanstep.pruning.measure.activation_cache import ActivationCache
from leanstep.pruning.measure.batches import as_batches
from leanstep.pruning.measure.curves import monotone_cubic
from leanstep.pruning.score.calibration import statistics_for
from leanstep.pruning.score.targets import count_uses, make_groups

LEVELS = (0.5, 0.9)


def curve(kept, distortion, numel=1000, stderr=None, patterns=()):
    return Curve("w", numel, tuple(kept), tuple(distortion), tuple(stderr or [0.0] * len(kept)), "kl", patterns)


@pytest.mark.parametrize("seed", range(20))
def test_a_cleaned_curve_is_the_weighted_isotonic_regression(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    values, errors = rng.random(n), rng.random(n) + 0.1

    def mean(i, j):
        return np.average(values[i : j + 1], weights=1 / errors[i : j + 1] ** 2)

    expected = [max(min(mean(i, j) for j in range(k, n)) for i in range(k + 1)) for k in range(n)]
    kept = range(1000, 1000 - 10 * n - 1, -10)
    clean = curve(kept, [0.0, *values.tolist()], stderr=[0.0, *errors.tolist()]).cleaned()
    np.testing.assert_allclose(clean.distortion, [0.0, *expected], rtol=1e-12)


def test_a_curve_that_is_in_order_is_clean_already():
    noiseless = curve([1000, 800, 500, 100], [0.0, 0.1, 0.1, 0.7])
    assert noiseless.cleaned() == noiseless
    assert curve([1000], [0.0]).cleaned().distortion == (0.0,)


def test_the_cubic_meets_its_points_and_lines_and_never_overshoots():
    x = np.array([0.0, 1.0, 1.5, 4.0, 4.1, 9.0])
    y = np.array([0.0, 0.0, 2.0, 2.1, 7.0, 7.0])
    at = np.linspace(0, 9, 5000)
    found = monotone_cubic(x, y, at)
    np.testing.assert_allclose(monotone_cubic(x, y, x), y, atol=1e-14)
    assert (np.diff(found) >= -1e-12).all() and found.max() <= 7 + 1e-12
    np.testing.assert_allclose(monotone_cubic(x, 3 * x - 1, at), 3 * at - 1, atol=1e-12)
    # the end slopes are the secants, also where scipy's three-point formula gives others
    ends = monotone_cubic(np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 5.0]), np.array([1e-6, 2 - 1e-6]))
    np.testing.assert_allclose(ends, [1e-6, 5 - 4e-6], atol=1e-9)


def test_a_cleaned_curve_is_monotone_and_trusts_small_errors_more():
    noisy = curve([1000, 800, 600, 400], [0.0, 0.3, 0.1, 0.5], stderr=[0.0, 0.1, 0.01, 0.1])
    clean = noisy.cleaned()
    assert clean.distortion[0] == 0.0
    assert clean.distortion[1] == clean.distortion[2] == pytest.approx((0.3 * 100 + 0.1 * 10000) / 10100)
    assert clean.distortion[3] == 0.5
    assert noisy.distortion[1] == 0.3  # raw values stay
    unknown = dataclasses.replace(noisy, stderr=(0.0,) * 4).cleaned()
    assert unknown.distortion[1] == pytest.approx(0.2)
    assert curve([1000, 500], [0.0, -0.2]).cleaned().distortion == (0.0, 0.0)


def test_the_grid_passes_through_the_levels_and_is_fine_where_little_is_left():
    numel = 100_000
    kept = level_grid(numel, 0.9)
    truth = [(1 - k / numel) ** 2 / (k / numel) for k in kept]
    fine = curve(kept, truth, numel).dense_grid()
    assert fine.counts[0] == numel and fine.distortion[0] == 0.0
    assert 200 < len(fine.counts) <= 221
    at = dict(zip(fine.counts, fine.distortion, strict=True))
    assert all(at[k] == d for k, d in zip(kept, truth, strict=True))
    assert (np.diff(fine.counts) < 0).all() and (np.diff(fine.distortion) >= 0).all()
    expected = [(1 - k / numel) ** 2 / (k / numel) for k in fine.counts]
    measured = np.array(fine.counts) <= 0.9 * numel
    np.testing.assert_allclose(np.array(fine.distortion)[measured], np.array(expected)[measured], rtol=0.01)
    # nearer to dense than any level measured, a power of what is removed
    above = np.array(fine.counts) <= 0.99 * numel
    np.testing.assert_allclose(np.array(fine.distortion)[above], np.array(expected)[above], rtol=0.5)
    # a grid even in sparsity has 5 of its points from 90 to 95 %
    assert sum(k <= 0.1 * numel for k in fine.counts) > 10


def test_the_grid_s_levels_are_multiples_of_a_unit_apart():
    levels = level_grid(10_007, 0.5)
    fine = curve(levels, [0.0, *np.linspace(0.1, 2, len(levels) - 1)], 10_007).dense_grid(unit=64)
    assert fine.counts[0] == 10_007 and fine.counts[-1] == levels[-1]
    between = set(fine.counts) - set(levels)
    assert set(levels) < set(fine.counts) and all((k - levels[-1]) % 64 == 0 for k in between) and len(between) > 60
    assert curve([1000, 900], [0.0, 1.0]).dense_grid(101, unit=500).counts == (1000, 900)


def test_the_grid_of_a_curve_with_levels_that_cost_nothing():
    free = curve([1000, 900, 500, 100], [0.0, 0.0, 0.0, 0.4]).dense_grid(50)
    at = dict(zip(free.counts, free.distortion, strict=True))
    assert all(d == 0.0 for k, d in at.items() if k >= 500)
    assert all(0 < d <= 0.4 for k, d in at.items() if k < 500)
    assert set(curve([1000, 500], [0.0, 0.0]).dense_grid(20).distortion) == {0.0}
    assert curve([1000], [0.0]).dense_grid(20).counts == (1000,)


def test_between_levels_a_curve_is_linear():
    line = curve([1000, 500, 100], [0.0, 1.0, 3.0])
    assert line.at(750) == 0.5 and line.at(300) == 2.0 and line.at(1000) == 0.0
    with pytest.raises(ValueError, match="a count of 99 is outside its levels 100 .. 1000"):
        line.at(99)


def test_a_curve_survives_json():
    first = curve([1000, 875, 250], [0.0, 0.1, 1 / 3], stderr=[0.0, 1e-3, 0.1], patterns=("8:8", "7:8", "2:8"))
    saved = json.loads(json.dumps(first.to_dict()))
    assert Curve.from_dict(saved) == first
    # as before the count was renamed
    saved["kept"] = saved.pop("counts")
    assert Curve.from_dict(saved) == first and first.kept == first.counts


@pytest.mark.parametrize(
    ("counts", "distortion", "patterns", "said"),
    [
        ([1000, 1000], [0.0, 0.1], (), "strictly decrease"),
        ([1001, 10], [0.0, 0.1], (), "0 .. 1000"),
        ([1000, 500], [0.01, 0.1], (), "exactly 0; got 0.01"),  # a pass that differs from itself
        ([1000, 500], [0.0, float("nan")], (), "finite"),
        ([1000, 500], [0.0], (), "as many"),
        ([], [], (), "as many"),
        ([1000, 500], [0.0, 1.0], ("8:8", "3:8"), "3:8 keeps 375 of 1000 weights, not 500"),
    ],
)
def test_what_is_no_curve_is_refused(counts, distortion, patterns, said):
    with pytest.raises(ValueError, match=said):
        curve(counts, distortion, patterns=patterns)


def test_the_levels_worth_measuring():
    levels = [1 - k / 10_000 for k in level_grid(10_000, 0.7)]
    assert levels[0] == 0.0
    for wanted in (0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.875):
        assert min(abs(s - wanted) for s in levels) < 1e-4
    assert max(levels) == 0.95  # never all of a matrix
    assert level_grid(8, 0.5) == (8, 7, 6, 5, 4, 3, 2, 1)
    tail = [s for s in (1 - k / 10**6 for k in level_grid(10**6, 0.98, highest=0.999)) if s > 0.9]
    assert len(tail) >= 6
    with pytest.raises(ValueError, match="target 1.0"):
        level_grid(100, 1.0)


@pytest.mark.parametrize("sparsity", [0.9, 0.97, 0.98, 0.995])
def test_no_level_removes_a_matrix_whole(sparsity):
    """However far the model is to be pruned: training brings nothing back through a layer that is gone."""
    groups = make_groups(find_targets(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 9))))
    kept, _ = levels_of(groups, PruneConfig(), sparsity)["0.weight"]
    assert 0 < kept[-1] <= (1 - sparsity) * 10000 + 1


@pytest.mark.parametrize("level", [1.5, -0.1, math.nan])
def test_levels_that_are_no_sparsities_are_refused_before_anything_is_measured(level):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="levels: expected sparsities from 0 to 1, got 0.5, "):
        measure_curves(model, torch.randn(2, 8), score="magnitude", levels=[0.5, level])


def test_the_levels_of_mixed_patterns():
    assert nm_levels(64, 8, 5) == ((64, 56, 48, 40), ("8:8", "7:8", "6:8", "5:8"))
    with pytest.raises(ValueError, match="expected m to divide numel .* got 8, 60 and 2"):
        nm_levels(60, 8)


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.down(torch.tanh(3 * self.up(x)))


class _Tied(nn.Module):
    """Three blocks, run in reverse; two have one matrix, in two modules or as one module."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.lm_head = nn.Embedding(12, 16), nn.Linear(16, 12)
        self.layers = nn.ModuleList(_Block() for _ in range(3))
        if kind == "weight":
            self.layers[2].up.weight = self.layers[0].up.weight
        else:
            self.layers[2].up = self.layers[0].up

    def forward(self, x):
        h = self.embed(x)
        for layer in reversed(self.layers):
            h = layer(h)
        return self.lm_head(h)


@pytest.mark.parametrize("kind", ["weight", "module"])
def test_a_matrix_of_two_blocks_is_measured_from_the_first_on_and_gets_the_inputs_of_both(kind):
    model, data = _Tied(kind), torch.randint(0, 12, (8, 6))
    arguments = {"levels": LEVELS, "score": "magnitude"}
    cached = measure_curves(model, data, **arguments)
    assert cached == measure_curves(model, data, prefix_cache=False, **arguments)
    cache = ActivationCache(model, as_batches(data, model))
    assert len(cache.starts) == 5  # with those of the embedding and the head
    target = find_targets(model)[0]
    rows = statistics_for(cache, [target], ("square_sum",))[target.name].count
    assert target.name == "layers.0.up.weight" and rows == 2 * data.numel()
    [counted] = count_uses(model, [target], as_batches(data, model)[0])
    assert counted.layer.uses == 2 * data.shape[1]


def test_a_matrix_of_modules_of_two_classes_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.GRUCell(8, 8))
    model[2].some = model[0].weight
    with pytest.raises(ValueError, match="0.weight is tied between GRUCell and Linear"):
        find_targets(model)
    assert "1.weight" in [target.name for target in find_targets(model, exclude=["0.weight"])]


class _Overflowing(_Tied):
    """Gives NaN where a matrix has lost more than 60 % of its weights."""

    def forward(self, x):
        zeros = float((self.layers[0].up.weight == 0).float().mean())
        return super().forward(x) * (math.nan if zeros > 0.6 else 1)


@pytest.mark.parametrize("method", ["measured", "anchored"])
def test_a_curve_ends_where_the_outputs_are_not_finite(method, tmp_path):
    model, data, file = _Overflowing("module"), torch.randint(0, 12, (8, 6)), tmp_path / "curves.jsonl"
    arguments = {"levels": (0.3, 0.5, 0.8, 0.9), "score": "magnitude", "sparsity": 0.8, "method": method}
    curves = measure_curves(model, data, resume=file, **arguments)
    ends = {name: 1 - curve.counts[-1] / curve.numel for name, curve in curves.items()}
    assert ends.pop("layers.0.up.weight") == pytest.approx(0.5, abs=0.01)
    assert list(ends.values()) == pytest.approx([0.9] * len(ends), abs=0.01)
    assert measure_curves(model, data, resume=file, **arguments) == curves
    assert "NaN" not in file.read_text()
    result = prune(model, data, sparsity=0.8, score="magnitude", levels=(0.3, 0.5, 0.8, 0.9), curves=method)
    assert result.sparsity == pytest.approx(0.8, abs=1e-3)
    assert any("not finite at the sparsest levels of layers.0.up.weight" in note for note in result.notes)
