"""Curves around a pruned model to second order: exact where the output is linear in each matrix, and without points."""

import pytest
import torch
from pruned_models import make_llama, tokens
from torch import nn

from leanstep.pruning import allocate, find_targets, prune
from leanstep.pruning.allocate.levels import levels_of
from leanstep.pruning.config import PruneConfig
from leanstep.pruning.measure.activation_cache import ActivationCache
from leanstep.pruning.measure.batches import as_batches
from leanstep.pruning.measure.checks import Trial
from leanstep.pruning.measure.curve_file import weights_hash
from leanstep.pruning.measure.measurement import Measurement
from leanstep.pruning.score.calibration import Pruning
from leanstep.pruning.score.targets import WeightSnapshot, make_groups

LEVELS = (0.3, 0.6, 0.8)


def around_uniform(model, data, sparsity, score="wanda"):
    """A trial, its measurement, levels of all matrices, and the uniform allocation."""
    groups = make_groups(find_targets(model), "matrix")
    batches = as_batches(data, model)
    cache = ActivationCache(model, batches)
    measurement = Measurement(model, batches, like=cache)
    trial = Trial(groups, Pruning(cache, score), WeightSnapshot(find_targets(model)))
    levels = levels_of(groups, PruneConfig(levels=LEVELS), sparsity)
    return trial, measurement, levels, allocate([group.layer for group in groups], sparsity, method="uniform")


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_they_are_exact_where_the_output_is_linear_in_a_matrix(score):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 9), nn.Linear(9, 4)).double()
    trial, measurement, levels, around = around_uniform(model, torch.randn(40, 12).double(), 0.5, score)
    before = weights_hash(model)
    measured = trial.relinearised_curves(measurement, levels, around)
    estimated = trial.relinearised_curves(measurement, levels, around, second_order=True)
    assert weights_hash(model) == before
    for name, curve in measured.items():
        assert estimated[name].counts == curve.counts
        assert estimated[name].distortion == pytest.approx(curve.distortion, rel=1e-5, abs=1e-9)
        assert (estimated[name].source, curve.source) == ("fisher", "measured")
        assert max(map(abs, curve.distortion)) > 1e-4


def test_near_the_pruned_model_they_follow_the_measured_ones_of_a_language_model():
    """First-order terms are most of a small change; without them the curves would be those of the dense model."""
    model = make_llama(2)
    trial, measurement, levels, around = around_uniform(model, tokens(8), 0.6)
    measured, estimated = (
        trial.relinearised_curves(measurement, levels, around, second_order=second) for second in (False, True)
    )

    def slopes(curves):  # from a level above the allocation's to one below
        return torch.tensor([curve.distortion[3] - curve.distortion[1] for curve in curves.values()])

    assert torch.corrcoef(torch.stack([slopes(measured), slopes(estimated)]))[0, 1] > 0.9


@pytest.mark.parametrize("curves", ["measured", "fisher"])
def test_a_correction_measures_points_for_measured_curves_alone(curves, monkeypatch):
    points, measure = [], Measurement.measure
    monkeypatch.setattr(Measurement, "measure", lambda self, changes: points.append(1) or measure(self, changes))
    settings = {"sparsity": 0.6, "levels": LEVELS, "curves": curves, "held_out": False}
    plain = prune(make_llama(2), tokens(8), **settings)
    without = len(points)
    points.clear()
    corrected = prune(make_llama(2), tokens(8), correction="relinearise", **settings)
    groups = len(plain.groups)
    more = {"measured": groups * (len(LEVELS) + 1), "fisher": 0}[curves]
    assert len(points) - without in (more, 2 * more)
    assert corrected.sparsity == pytest.approx(0.6, abs=1e-3)
