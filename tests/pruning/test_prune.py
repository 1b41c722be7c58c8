"""Pruning a model: what it gets is what the allocation says, the cost is measured, and an error changes nothing."""

import copy
import json
import math
from collections import OrderedDict
from dataclasses import fields, replace

import pytest
import torch
from pruned_models import images, make_cnn, make_gpt2, make_llama, make_mixtral, tokens
from torch import nn

from leanstep.pruning import Budget, InfeasibleBudget, PruneConfig, Refinement, find_targets, measure_curves, prune
from leanstep.pruning.allocate.allocation import METHODS as ALLOCATIONS
from leanstep.pruning.folder.report import report_page
from leanstep.pruning.measure.batches import as_batches
from leanstep.pruning.measure.checks import Trial
from leanstep.pruning.measure.curve_file import weights_hash
from leanstep.pruning.measure.curves import SOURCES
from leanstep.pruning.measure.measurement import Measurement
from leanstep.pruning.measure.metrics import METRICS
from leanstep.pruning.measure.products import PRODUCTS
from leanstep.pruning.result import Additivity
from leanstep.pruning.score.base import NEEDS
from leanstep.pruning.score.targets import GRANULARITIES, count_uses
from leanstep.recipes.report.prune_output import summary_of
from leanstep.sparsity import is_nm

LEVELS = (0.3, 0.6, 0.8, 0.9)
SCORES = ("magnitude", "wanda", "sparsegpt", "alps", "mfac")


@pytest.fixture(scope="module")
def curves():
    """Of the two-layer LLaMA, which most tests prune."""
    return measure_curves(make_llama(2), tokens(4), levels=LEVELS)


def zeros(model) -> int:
    return sum(int((target.weight == 0).sum()) for target in find_targets(model))


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_reaches_the_sparsity_it_was_asked_for(allocation, curves):
    model = make_llama(2)
    others = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {"curves": curves} if allocation == "dp" else {}
    result = prune(model, tokens(10), sparsity=0.6, allocation=allocation, **given)
    total = sum(target.layer.numel for target in find_targets(model))
    assert zeros(model) == total - int(0.4 * total)
    assert result.sparsity == pytest.approx(zeros(model) / total)
    for row, target in zip(result.layers(), find_targets(model), strict=True):
        assert row["nonzero"] == result.allocation.counts[target.name] == int(target.weight.count_nonzero())
    pruned = {target.parameter for target in find_targets(model)}
    assert all(torch.equal(t, others[name]) for name, t in model.state_dict().items() if name not in pruned)
    assert result.held_out.ratio == pytest.approx(result.held_out.joint / result.held_out.summed)
    assert result.held_out.joint > 0
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("score", SCORES)
def test_scores_keep_weights_or_make_up_for_them(score):
    model, dense = make_gpt2(), make_gpt2()
    prune(model, tokens(6), sparsity=0.5, allocation="uniform", score=score)
    moved = [
        bool(((new.weight != old.weight) & (new.weight != 0)).any())
        for new, old in zip(find_targets(model), find_targets(dense), strict=True)
    ]
    assert all(moved) if score in ("sparsegpt", "alps", "mfac") else not any(moved)


def test_dynamic_programming_costs_less_than_uniform_on_held_out_data(curves):
    model = make_llama(2)
    result = prune(model, tokens(10), sparsity=0.6, curves=curves)
    by_curves, uniform = result.compared
    assert (by_curves.method, uniform.method) == ("dp", "uniform")
    assert by_curves.joint < uniform.joint
    assert result.allocation.method == "dp" and not result.notes
    again = make_llama(2)
    assert prune(again, tokens(10), sparsity=0.6, curves=curves).to_dict() == result.to_dict()
    assert weights_hash(again) == weights_hash(model)


class _Additive(nn.Module):
    """f(x) = sum over g of A_g W_g x, with ranges of A_g that are orthogonal to each other."""

    def __init__(self, parts: int = 3, size: int = 4):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(parts))
        frame = torch.linalg.qr(torch.randn(parts * size, parts * size))[0]
        frames = [scale * frame[:, n * size : (n + 1) * size] for n, scale in enumerate((1.0, 3.0, 0.3))]
        self.register_buffer("frames", torch.stack(frames))

    def forward(self, x):
        return sum(part(x) @ frame.T for part, frame in zip(self.parts, self.frames, strict=True))


@pytest.mark.parametrize("minutes, sums", [(1e-9, 0), (2 / 60, 1), (30.0, 2)])
def test_matrices_are_pruned_one_by_one_on_held_out_data_within_the_minutes(minutes, sums, monkeypatch):
    monkeypatch.setattr(Measurement, "seconds_of_singles", lambda *_: 1.5)
    model, data = make_llama(), tokens(8)
    curves = measure_curves(model, data[:2], levels=(0.5, 0.7))
    result = prune(model, data, sparsity=0.5, minutes=minutes, curves=curves, levels=(0.5, 0.7))
    assert [math.isnan(one.summed) for one in result.compared] == [sums < 1, sums < 2]
    assert all(one.joint > 0 for one in result.compared)
    note = [note for note in result.notes if "whether distortions add up was not measured" in note]
    assert len(note) == (sums == 0) and all("takes longer than 1e-09 minutes" in one for one in note)
    described = [one["summed"] is None and one["ratio"] is None for one in map(Additivity.to_dict, result.compared)]
    assert described == [sums < 1, sums < 2]
    lines = [line for line in summary_of(result, result.layers(), "out").splitlines() if line.startswith("held out")]
    assert ["single matrices sum to" in line for line in lines] == [sums > 0, sums > 1]


def test_curves_that_no_measurement_scales_are_named():
    model, data = make_llama(), tokens(8)
    result = prune(model, data, sparsity=0.5, curves="anchored", minutes=1e-9, levels=(0.5, 0.7))
    count = len(result.curves)
    assert any(f"{count} of {count} curves are Fisher curves that no measurement scales" in n for n in result.notes)
    result = prune(make_llama(), data, sparsity=0.5, curves="fisher", levels=(0.5, 0.7))
    assert not any("are Fisher curves" in note for note in result.notes)


def test_distortions_of_parts_that_do_not_meet_add_up():
    model = _Additive().double()
    data = torch.randn(64, 4, dtype=torch.float64)
    result = prune(model, data, sparsity=0.5, score="magnitude", metric="mse_logits")
    for one in result.compared:
        assert one.joint == pytest.approx(one.summed, rel=1e-5)
    assert result.held_out.ratio == pytest.approx(1.0, rel=1e-5)
    kept = result.allocation.counts
    assert kept["parts.1.weight"] > kept["parts.0.weight"] > kept["parts.2.weight"]


class _Cancelling(nn.Module):
    """Two layers of which each alone does little when it is pruned, and both together much: f(x) = (a x)(b x)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 4, bias=False) for _ in range(3))
        for layer in (self.a, self.b, self.c):
            nn.init.ones_(layer.weight)
        self.a.weight.data[:, :4] = 0.99
        self.b.weight.data[:, :4] = 0.99

    def forward(self, x):
        # a and b stand in for each other: the output hardly moves until both are gone
        a, b = self.a(x), self.b(x)
        return torch.maximum(a, b) + 1e-3 * (a + b) + 0.1 * self.c(x)


def test_where_distortions_do_not_add_up_it_is_told_and_the_better_allocation_is_taken():
    model = _Cancelling()
    data = torch.rand(40, 8) + 0.5
    result = prune(model, data, sparsity=0.5, score="magnitude", metric="mse_logits")
    by_curves, uniform = result.compared
    assert by_curves.ratio > 5
    better = min(result.compared, key=lambda one: one.joint).method
    assert result.allocation.method == better == "uniform"
    assert result.held_out == uniform
    assert "the latter was applied" in result.notes[0]
    assert [int(layer.weight.count_nonzero()) for layer in (model.a, model.b, model.c)] == [16, 16, 16]


def test_a_sum_that_is_not_near_what_it_stands_for_is_told_where_it_was_taken(curves):
    model = make_llama(2)
    data = tokens(8)
    result = prune(model, data, sparsity=0.6, curves=curves, held_out=data)
    by_curves, uniform = result.compared
    assert by_curves.joint < uniform.joint and 2 / 3 < by_curves.ratio < 1.5
    assert not [note for note in result.notes if "add up" in note]
    for joint, told in ((1.4, False), (1.6, True), (0.7, False), (0.6, True), (math.inf, True)):
        note = Additivity("dp", joint, 0.0, 1.0).note()
        assert bool(note) == told, joint
        assert not told or f"{joint:.2f} times the sum" in note
    # the notes are in the summary of the command and in the report
    assert "may do better" in summary_of(replace(result, notes=[note]), result.layers(), "out")
    assert "may do better" in report_page({**result.to_dict(), "notes": [note]})


def test_corrections_find_what_is_no_worse_on_the_data_they_saw(curves):
    data = tokens(8)
    results = [
        prune(make_llama(2), data, sparsity=0.7, curves=curves, held_out=data, correction=one, levels=LEVELS)
        for one in ("none", "relinearise")
    ]
    assert results[1].compared[0].joint <= results[0].compared[0].joint * (1 + 1e-9)
    assert results[1].sparsity == pytest.approx(0.7, abs=1e-3)


def test_patterns_may_be_fixed_or_chosen_by_each_matrix():
    model = make_llama(2)
    result = prune(model, tokens(6), pattern="2:4")
    assert all(is_nm(target.weight, "2:4") for target in find_targets(model))
    assert result.sparsity == 0.5
    for allocation in ("dp", "erk"):
        model = make_gpt2(n_layer=1)
        result = prune(model, tokens(6), pattern="N:8", sparsity=0.4, allocation=allocation)
        patterns = result.allocation.patterns
        assert all(is_nm(target.weight, patterns[target.name]) for target in find_targets(model))
        assert len(set(patterns.values())) > 1
        assert 0.4 <= result.sparsity < 0.45


def make_overflowing():
    """A model whose second matrix gets inputs beyond fp32 once every row of the first has a single weight left.

    The first two products of a row cancel. All products are multiples of 2^50 and all sums of them at most 2^74, so
    that fp32 is exact in any order, and the outputs are the same on all processors.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 64, bias=False), nn.Linear(64, 4, bias=False))
    weight, inputs = (torch.randint(1, 9, size) * 2.0**25 for size in ((8, 8), (96, 8)))
    weight *= torch.randint(0, 2, (8, 8)) * 2 - 1
    weight[:, 0], weight[:, 1], inputs[:, :2] = 2.0**36, -(2.0**36), 2.0**37
    model[0].weight.data = weight
    return model, inputs


OVERFLOWING = {"metric": "mse_logits", "sparsity": 0.875}


@pytest.mark.parametrize("refine", [None, Refinement(evaluations=4)])
def test_an_allocation_whose_pruned_blocks_overflow_is_never_the_best(refine):
    model, inputs = make_overflowing()
    settings = {**OVERFLOWING, "held_out": inputs[64:]}
    result = prune(model, inputs[:64], levels=(0.5, 0.75, 0.875, 0.95), curves="measured", refine=refine, **settings)
    assert result.sparsity == 0.875 and result.allocation.method != "uniform"
    assert [math.isnan(row.joint) for row in result.compared] == [row.method == "uniform" for row in result.compared]
    model, inputs = make_overflowing()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="1.weight: its inputs on the calibration data, or .* not finite, .*; ask"):
        prune(model, inputs[:64], allocation="uniform", **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("budget", ["params", "flops"])
def test_matrices_without_effect_are_pruned_beyond_uniform_sparsity_where_others_overflow(budget):
    model, inputs = make_overflowing()
    inputs[:, 2:] = 0  # what is left cancels: all outputs are zero
    settings = {**OVERFLOWING, "levels": (0.5, 0.75, 0.875, 0.9, 0.95), "curves": "measured", "held_out": False}
    result = prune(model, inputs, budget=budget, **settings)
    assert result.sparsity == 0.875
    assert result.curves["0.weight"].counts == (64, 32, 16)  # it overflows at the next level
    # 16, 64 and 32 weights are more than 104: one level more suffices
    assert [result.curves[name].counts[-1] for name in ("1.weight", "2.weight")] == [51, 26]
    assert any("were pruned beyond uniform sparsity" in note for note in result.notes)


def test_a_matrix_with_more_zeros_than_the_sparsest_pattern_keeps_them():
    model = make_llama(2)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[:, torch.arange(weight.shape[1]) % 10 > 0] = 0
    zeros = weight == 0
    result = prune(model, tokens(6), pattern="N:8", sparsity=0.6)
    assert result.sparsity >= 0.6 and (weight[zeros] == 0).all()
    assert result.allocation.patterns["model.layers.0.mlp.up_proj.weight"] == "2:8"


def test_a_second_round_keeps_the_zeros_of_the_first():
    model = make_llama(2)
    previous = None
    for sparsity in (0.3, 0.5, 0.7):
        how = {"allocation": "dp", "levels": LEVELS} if sparsity > 0.4 else {"allocation": "erk"}
        prune(model, tokens(6), sparsity=sparsity, **how)
        masks = [target.weight != 0 for target in find_targets(model)]
        if previous is not None:
            assert not any(bool((new & ~old).any()) for new, old in zip(masks, previous, strict=True))
        previous = masks


def test_other_budgets_than_a_number_of_weights():
    model = make_cnn()
    layers = [target.layer for target in find_targets(model)]
    budget = Budget.fraction("bytes", 0.5, layers)
    result = prune(model, images(10), budget=budget, score="magnitude", levels=LEVELS)
    assert result.allocation.cost <= budget.target
    assert result.allocation.budget_kind == "bytes"
    by_curves, uniform = result.compared
    assert by_curves.joint < uniform.joint


@pytest.mark.parametrize("allocation", ["owl", "atp"])
def test_rules_by_depth_take_layers_outside_of_all_blocks(allocation):
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(4))
    model = nn.Sequential(OrderedDict(stem=nn.Linear(8, 16), blocks=nn.Sequential(*blocks), last=nn.Linear(16, 8)))
    targets = find_targets(model, include=["*"])
    assert {target.layer.block for target in targets} == {None, 0, 1, 2, 3}
    result = prune(model, torch.randn(12, 8), sparsity=0.6, allocation=allocation, include=["*"])
    assert result.sparsity == pytest.approx(0.6, abs=1e-3)
    if allocation == "atp":
        rising = [1 - result.allocation.counts[t.name] / t.layer.numel for t in targets]
        assert rising == pytest.approx(sorted(rising), abs=0.01) and rising[0] < rising[-1]


def test_operations_are_counted_where_weights_are_used():
    model = make_cnn()
    targets = count_uses(model, find_targets(model), as_batches(images(2), model)[0])
    uses = {target.name: target.layer.uses for target in targets}
    assert uses["conv1.weight"] == uses["layer1.0.conv2.weight"] == 8 * 8
    assert uses["fc.weight"] == 1
    budget = Budget.fraction("flops", 0.5, [target.layer for target in targets])
    result = prune(model, images(10), budget=budget, score="magnitude", levels=LEVELS)
    spent = sum(2 * uses[row["name"]] * row["nonzero"] for row in result.layers())
    assert spent == result.allocation.cost <= budget.target
    model = make_llama(1)
    (first, *_) = count_uses(model, find_targets(model), as_batches(tokens(2), model)[0])
    assert first.layer.uses == 16


def test_without_data_only_what_needs_none():
    model = make_mixtral()
    result = prune(model, sparsity=0.5, allocation="erk", score="magnitude")
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)
    assert result.held_out is None and "was not measured" in result.notes[0]


def test_held_out_data_alone_measures_what_needs_no_data():
    results = []
    for data in (None, tokens(8)):
        held_out = tokens(4, seed=1)
        results.append(prune(make_llama(1), data, sparsity=0.5, allocation="erk", score="magnitude", held_out=held_out))
    assert results[0].held_out.joint == results[1].held_out.joint > 0 and not results[0].notes


def test_mfac_leaves_a_matrix_of_zeros_as_it_is_and_names_one_without_gradients():
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    settings = {"sparsity": 0.6, "score": "mfac", "allocation": "uniform", "include": ["0.*", "2.*"]}
    model[2].weight.data.zero_()
    model[2].bias.data.fill_(1.0)
    x = torch.randn(20, 8)
    with pytest.raises(ValueError, match=r"^0\.weight: FisherPruner: expected finite gradients of the nonzero weights"):
        prune(model, x, **settings)  # nothing passes the zeros
    model[2].weight.data[0] = 1.0
    prune(model, x, **settings)
    shortcut = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 12)])

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = shortcut

        def forward(self, x):
            hidden = self.layers[0](x)
            return hidden + self.layers[1](hidden)

    shortcut[1].weight.data.zero_()
    assert prune(Residual(), x, sparsity=0.8, score="mfac", allocation="uniform").sparsity == pytest.approx(
        0.8, abs=0.01
    )


@pytest.mark.parametrize("allocation", ["uniform", "dp", "erk"])
@pytest.mark.parametrize("held_out", [None, False])
def test_a_model_with_more_zeros_than_asked_is_refused_before_anything_is_measured(allocation, held_out):
    model, points = make_llama(1), []
    prune(model, sparsity=0.7, allocation="uniform", score="magnitude")
    before = weights_hash(model)
    with pytest.raises(InfeasibleBudget, match=r"already has 0\.7001 zeros, more than the 0\.5 that was asked"):
        prune(
            model,
            tokens(6),
            sparsity=0.5,
            allocation=allocation,
            held_out=held_out,
            progress=lambda *point: points.append(point),
        )
    assert not points and weights_hash(model) == before


BAD = {
    "no target": ({"sparsity": None}, "expected a sparsity, such as 0.6 .*, alone"),
    "all of it": ({"sparsity": 1.0}, "must lie between 0 and 1"),
    "percent": ({"sparsity": 60}, r"must lie between 0 and 1, got 60; did you mean 0\.6\?"),
    "allocation": ({"allocation": "best"}, "allocation must be one of dp, uniform"),
    "score": ({"score": "best"}, "score must be one of magnitude"),
    "pattern": ({"pattern": "2of4"}, "expected 'N:M'"),
    "pattern and sparsity": ({"pattern": "2:4", "sparsity": 0.6}, "has a sparsity of 0.5, got sparsity=0.6"),
    "pattern of no weight": ({"pattern": "0:4", "sparsity": None}, "pattern 0:4 has a sparsity of 1, and must lie"),
    "pattern of all": ({"pattern": "4:4", "sparsity": None}, "pattern 4:4 has a sparsity of 0, and must lie"),
    "no weight left": ({"allocation": "uniform", "sparsity": 0.999999999}, "keeps none of the [0-9,]+ weights"),
    "batch size": ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    "correction of rules": (
        {"allocation": "erk", "correction": "relinearise"},
        "correction=.* is for allocation='dp' o",
    ),
    "levels of rules": ({"allocation": "uniform", "levels": [0.5]}, "levels are for allocation='dp' only, got 'unif"),
    "minutes without data": (
        {"data": None, "score": "magnitude", "allocation": "erk", "minutes": 5},
        "minutes=5 is the time for measurements on data, which is missing",
    ),
    "curves of rules": ({"allocation": "uniform", "curves": {}}, "curves are for allocation='dp' only"),
    "curves of a fixed pattern": (
        {"pattern": "2:4", "sparsity": None, "curves": "fisher"},
        "pattern 2:4 is the same for every matrix, so that curves='fisher' would have no effect; leave curves out",
    ),
    "nothing to measure": ({"data": None}, "needs data"),
    "nothing to hold out": ({"data": tokens(1)}, "at least one is held out"),
    "out of reach": ({"pattern": "N:8", "sparsity": 0.9}, "out of reach"),
    "rule": ({"exclude": ["*.ffn.*"]}, "matches no matrix"),
    "no curve": ({"curves": {}}, "needs a curve of every layer, and .* has none"),
}


def test_settings_are_one_object_or_arguments_which_change_it():
    config = PruneConfig(sparsity=0.5, allocation="erk", score="magnitude")
    by_name = prune(make_llama(1), sparsity=0.6, allocation="erk", score="magnitude")
    assert prune(make_llama(1), None, config, sparsity=0.6).to_dict() == by_name.to_dict()
    with pytest.raises(TypeError, match=r"^prune\(\) got an unexpected keyword argument 'sparsities'"):
        prune(make_llama(1), tokens(1), sparsities=0.5)
    choices = {setting.name: setting.metadata["choices"] for setting in fields(config) if setting.metadata}
    known = {"allocation": ALLOCATIONS, "score": (*NEEDS,), "metric": (*METRICS,), "granularity": GRANULARITIES}
    assert {**choices, **known, "curves": SOURCES, "curve_score": (*NEEDS,), "products": PRODUCTS} == choices


@pytest.mark.parametrize("case", BAD)
def test_settings_that_cannot_be_met_are_refused_and_change_nothing(case):
    changes, message = BAD[case]
    model = make_llama(1).train()
    before = weights_hash(model)
    with pytest.raises(ValueError, match=message):
        prune(model, **{"data": tokens(6), "sparsity": 0.5} | changes)
    assert weights_hash(model) == before
    assert model.training


def test_a_target_out_of_reach_is_told_with_the_range():
    with pytest.raises(InfeasibleBudget, match="sparsities from 0 to 0.75") as refused:
        prune(make_llama(1), tokens(6), sparsity=0.9, pattern="N:8")
    assert refused.value.lowest == refused.value.highest / 4


@pytest.mark.parametrize("held_out", [False, tokens(2, seed=1)], ids=["applied", "measured"])
@pytest.mark.parametrize("stored", [True, False])
def test_an_error_on_the_way_puts_the_weights_back(held_out, stored, monkeypatch):
    model = make_llama(1)
    before = weights_hash(model)
    elsewhere = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply = Trial.apply

    def failing(*args, **options):
        apply(*args, **options)
        raise MemoryError

    monkeypatch.setattr(Trial, "apply", failing)
    more = {"stored": elsewhere.get} if stored else {}
    with pytest.raises(MemoryError):
        prune(model, tokens(6), sparsity=0.5, allocation="uniform", held_out=held_out, **more)
    assert weights_hash(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("correction", ["none", "relinearise"])
def test_what_is_stored_elsewhere_is_read_again_to_the_same_end(correction):
    asked = []
    model, other = make_mixtral(), make_mixtral()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = find_targets(model)[0].parameter
    dense[name][0, 0] += 1  # not what the model has: it is not read, but copied

    def stored(parameter):
        asked.append(parameter)
        return dense.get(parameter)

    settings = {"sparsity": 0.5, "levels": (0.4, 0.6), "correction": correction}
    found = prune(model, tokens(6), stored=stored, **settings)
    expected = prune(other, tokens(6), **settings)
    assert found.to_dict() == expected.to_dict()
    assert weights_hash(model) == weights_hash(other)
    assert asked.count(name) == 1 and set(asked) == {target.parameter for target in find_targets(model)}
    assert len(asked) >= 2 * len(set(asked)) - 1
