"""Refinement of a pruned model: what it judges is the model's joint distortion, and its result is within the budget."""

import json
import math
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from pruned_models import images, make_cnn, make_llama, make_mixtral, save_model, tokens
from texts import sentences

from leanstep.cli import main
from leanstep.pruning import Refinement, allocate, find_targets, measure_curves, prune
from leanstep.pruning.allocate import descent as search
from leanstep.pruning.allocate import refine as refining
from leanstep.pruning.folder.report import report_page
from leanstep.pruning.measure.activation_cache import ActivationCache, BlockCache
from leanstep.pruning.measure.batches import as_batches, evaluating
from leanstep.pruning.measure.blocks import BlockMover
from leanstep.pruning.measure.checks import Trial
from leanstep.pruning.measure.curve_file import weights_hash
from leanstep.pruning.measure.joint import JointJudge
from leanstep.pruning.measure.measurement import Measurement
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.measure.products import products_in
from leanstep.pruning.score.calibration import Pruning
from leanstep.pruning.score.targets import WeightSnapshot, make_groups

LEVELS = (0.3, 0.6, 0.8, 0.9)
REFINE = Refinement(evaluations=12)


@pytest.fixture(scope="module")
def curves():
    return measure_curves(make_llama(2), tokens(4), levels=LEVELS)


def judge_of(model, sparsity=0.6, score="wanda"):
    """A judge of a uniformly pruned model; the measurement, its trial and the allocation."""
    groups = make_groups(find_targets(model), "matrix")
    cache = ActivationCache(model, as_batches(tokens(6), model))
    measurement = Measurement(model, as_batches(tokens(8, seed=1), model, batch_size=1), like=cache)
    trial = Trial(groups, Pruning(cache, score), WeightSnapshot(find_targets(model)))
    start = allocate([group.layer for group in groups], sparsity, method="uniform")
    pruners = {}
    trial.apply(start, pruners)
    return JointJudge(groups, measurement, pruners, start.counts, {}), measurement, trial, start


def exchanged(counts, up, down, weights):
    return {**counts, up: counts[up] + weights, down: counts[down] - weights}


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_the_judge_measures_what_a_whole_pass_measures(score):
    model = make_llama(3)
    with evaluating(model):
        judge, measurement, trial, start = judge_of(model, score=score)
        assert judge.distortion == measurement.joint()
        names = list(start.counts)
        for up, down in ((names[-1], names[-2]), (names[8], names[15]), (names[0], names[20])):
            before, weights = measurement.joint(), weights_hash(model)
            counts = exchanged(judge.counts, up, down, 30)
            rejected = judge.judge(counts, {}, math.inf)
            assert rejected is not None and weights_hash(model) == weights and judge.counts != counts
            judge.go_to(counts, {})
            assert judge.distortion == measurement.joint()
            change = judge.distortion.mean - before.mean
            judge.go_to(exchanged(judge.counts, down, up, 30), {})
            assert weights_hash(model) == weights and judge.distortion == before
            # of a change that the judge followed to its end
            accepted = judge.judge(counts, {}, 0.0)
            assert (judge.counts == counts) == (accepted.mean < 0 and measurement.joint() == judge.distortion != before)
            if judge.counts == counts:
                assert accepted.mean == pytest.approx(change, rel=1e-9)


def test_a_judge_that_moved_without_measuring_compares_with_its_new_levels():
    model = make_llama(3)
    with evaluating(model):
        judge, measurement, _, start = judge_of(model)
        names = list(start.counts)
        moved = exchanged(start.counts, names[4], names[15], 30)
        other = exchanged(moved, names[9], names[20], 30)
        from_start, passes = judge.at(other), judge.passes
        judge.go_to(moved, {}, measured=False)
        assert judge.passes == passes and judge.counts == moved
        assert judge.at(moved) == measurement.joint().mean and judge.at(other) == from_start
        assert {group.name for group in judge._differing(other, {})} == {names[9], names[20]}


def test_a_change_that_does_harm_is_rejected_on_a_quarter_of_the_data():
    model = make_llama(2)
    with evaluating(model):
        judge, _, _, start = judge_of(model)
        passes, names = judge.passes, list(start.counts)
        harm = {**start.counts, **{name: 0 for name in names[:4]}}
        assert judge.judge(harm, {}, 1.0).mean > 0
        first = judge._cache.start_of(judge._differing(harm, {}))
        assert judge.passes - passes == pytest.approx(0.25 * (1 - first / len(judge._cache.stages)))
        assert judge.judge(dict(judge.counts), {}, 1.0) is None


def test_an_accepted_change_is_better_by_more_than_its_noise():
    model = make_llama(2)
    with evaluating(model):
        judge, measurement, _, start = judge_of(model)
        reference = [m[0] for m in judge._current]
        counts = {**start.counts, **{name: count + 40 for name, count in start.counts.items()}}
        before = measurement.joint().mean
        change = judge.judge(counts, {}, 1.0)
        assert judge.counts == counts and change.mean < -change.stderr
        differences = torch.cat([new[0] - old for new, old in zip(judge._current, reference, strict=True)])
        tokens_each = torch.cat([new[1] for new in judge._current])
        assert change.mean == pytest.approx(float(differences.sum() / tokens_each.sum()))
        error = (
            (differences - change.mean * tokens_each).std(correction=1) * len(differences) ** 0.5 / tokens_each.sum()
        )
        assert change.stderr == pytest.approx(float(error))
        assert measurement.joint().mean == pytest.approx(before + change.mean)
        again, _, _, start = judge_of(make_llama(2))
        assert again.judge(counts, {}, 1e6) is not None and again.counts == start.counts


def test_slopes_are_derivatives_of_the_joint_distortion():
    model = make_llama(2).double()
    with evaluating(model):
        judge, measurement, trial, start = judge_of(model)
        names = list(start.counts)
        levels = {name: (int(0.7 * start.counts[name]), "") for name in names}
        slopes = judge.slopes(levels)
        for group in trial.groups:
            [target] = group.targets
            here = target.weight.clone()
            [(_, there)] = judge._pruned([group], dict(start.counts, **{group.name: levels[group.name][0]}), {})
            sides = []
            for sign in (1, -1):  # a step that the metric resolves, which is in fp32
                target.weight.copy_(here + sign * 0.02 * (there - here))
                sides.append(measurement.joint().mean)
            target.weight.copy_(here)
            assert slopes[group.name] == pytest.approx((sides[0] - sides[1]) / 0.04, rel=1e-2, abs=2e-6)
        assert not any(p.grad is not None for p in model.parameters())


def test_slopes_of_fp16_do_not_underflow():
    """Divided by all tokens before the backward pass, gradients are below 6e-8, fp16's smallest number."""
    slopes = {}
    for dtype in (torch.float32, torch.float16):
        model = make_llama(2)
        with torch.no_grad():
            model.lm_head.weight.mul_(1e-2)
        with evaluating(model.to(dtype)):
            judge, _, _, start = judge_of(model)
            slopes[dtype] = judge.slopes({name: (int(0.7 * count), "") for name, count in start.counts.items()})
    expected = torch.tensor(list(slopes[torch.float32].values()))
    cosine = torch.nn.functional.cosine_similarity(expected, torch.tensor(list(slopes[torch.float16].values())), dim=0)
    assert cosine > 0.999


@pytest.mark.parametrize("kind", ["llama", "mixtral", "bf16 products", "moved", "writes"])
def test_gradients_compute_blocks_again_and_store_less(kind):
    largest, alive, most = [], [], []

    def pack(tensor):
        saved = _Saved(tensor)
        alive.append(tensor.nbytes)
        weakref.finalize(saved, alive.remove, tensor.nbytes)
        most.append(sum(alive))
        return saved

    gradients = []
    for stored in (False, True):
        model = {"mixtral": make_mixtral, "writes": _writing}.get(kind, lambda: make_llama(4))()
        moved = BlockMover(model, "cpu") if kind == "moved" else nullcontext()
        with moved, products_in(model, "bf16" if kind == "bf16 products" else "stored"), evaluating(model):
            judge, _, trial, _ = judge_of(model)
            judge._recomputes = not stored
            most.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
                gradients.append(judge.gradients())
        largest.append(max(most))
        assert judge._recomputes == (not stored and kind != "writes")
    assert gradients[0].keys() == {target.name for group in trial.groups for target in group.targets}
    for name, gradient in gradients[0].items():
        assert gradient.dtype == torch.float32 and gradient.any()
        assert torch.equal(gradient, gradients[1][name])
    if kind != "writes":
        assert largest[0] < 0.5 * largest[1]


class _Saved:
    def __init__(self, tensor):
        self.tensor = tensor


class _WritingBlock(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden, **kwargs):
        return self.block(torch.nn.functional.silu(hidden * 1.0 if hidden.is_leaf else hidden, inplace=True), **kwargs)


def _writing():
    model = make_llama(2)
    model.model.layers = torch.nn.ModuleList(_WritingBlock(block) for block in model.model.layers)
    return model


def test_inputs_of_blocks_are_cached_within_a_limit_and_forgotten_after_a_change():
    model = make_llama(3)
    with evaluating(model):
        batches = as_batches(tokens(4), model, batch_size=2)
        like = ActivationCache(model, batches)
        cache, none = BlockCache(like, batches, 1e9), BlockCache(like, batches, 0)
        expected = [batch.run(model).logits for batch in batches]
        for start in (like.starts[-1], like.starts[1], 0, like.starts[2]):
            for index, logits in enumerate(expected):
                assert torch.equal(cache.run_from(start, index).logits, logits)
                assert torch.equal(none.run_from(start, index).logits, logits)
        assert not none._inputs and len(cache._inputs) == 6 and cache._size == 6 * 2 * 16 * 16 * 4
        model.model.layers[1].mlp.up_proj.weight.mul_(0)
        start = [name for name, _ in cache.stages].index("model.layers.1")
        cache.forget(start)
        assert {key[0] for key in cache._inputs} == {at for at in like.starts[1:3] if at <= start}
        for index, batch in enumerate(batches):
            assert torch.equal(cache.run_from(like.starts[-1], index).logits, batch.run(model).logits)


def test_prune_refines_within_the_budget_and_compares_all_three(curves, tmp_path):
    model = make_llama(2)
    refine = replace(REFINE, evaluations=40, state=tmp_path / "state.json", data=tokens(24, seed=3))
    result = prune(model, tokens(10), sparsity=0.6, curves=curves, refine=refine)
    total = sum(target.layer.numel for target in find_targets(model))
    zeros = sum(int((target.weight == 0).sum()) for target in find_targets(model))
    assert zeros == total - int(0.4 * total) == total - sum(result.allocation.counts.values())
    assert [one.method for one in result.compared] == ["refined", "dp", "uniform"]
    assert result.held_out.joint == min(one.joint for one in result.compared)
    assert result.held_out.method == result.allocation.method
    content = result.to_dict()
    points = content["refinement"]["points"]
    assert content["refinement"]["evaluations"] == 40 and content["refinement"]["accepted"] == len(points) - 2 > 0
    assert all(later[2] < point[2] for point, later in zip(points, points[1:-1], strict=False))
    page = report_page(json.loads(json.dumps(content, allow_nan=False)))
    assert f"{len(points) - 2} of 40 exchanges" in page and "Joint distortion of the search" in page
    again = make_llama(2)
    same = prune(again, tokens(10), sparsity=0.6, curves=curves, refine=replace(refine, state=None))
    assert weights_hash(again) == weights_hash(model) and same.allocation == result.allocation


@pytest.mark.parametrize("settings", [{}, {"score": "sparsegpt", "curve_score": "wanda"}])
def test_the_search_reports_the_distortion_of_the_model_that_is_returned(curves, settings):
    judging = tokens(16, seed=3)
    costs = {}
    for name, refine in (("start", None), ("refined", replace(REFINE, evaluations=40, data=judging))):
        model = make_llama(2)
        with evaluating(model):
            measurement = Measurement(model, as_batches(judging, model, batch_size=2))
        result = prune(model, tokens(8), sparsity=0.6, curves=curves, refine=refine, held_out=False, **settings)
        costs[name] = measurement.joint().mean
    search = result.to_dict()["refinement"]
    assert search["accepted"] > 0 and costs["refined"] < costs["start"]
    assert search["points"][-1][2] == pytest.approx(costs["refined"], rel=1e-6)
    assert search["start"] == pytest.approx(costs["start"], rel=1e-6)


def test_the_start_stays_where_the_refined_model_is_not_better(curves, monkeypatch):
    def worse(judge, space, settings, file, progress, processes):
        """What seems better on the inputs of the start need not be better on its own."""
        counts, (*_, name) = dict(judge.counts), sorted(judge.counts, key=lambda name: judge.counts[name])
        counts = space.exchange(counts, [name], [other for other in counts if other != name], 0.3)
        points = [(0, 0.0, *judge.distortion), (1, 0.0, 0.5 * judge.distortion.mean, 0.1)]
        return search.Descent(counts, 1, points=points, ended="evaluations")

    monkeypatch.setattr(refining, "descend", worse)
    model, plain = make_llama(2), make_llama(2)
    refine = replace(REFINE, data=tokens(4))
    result = prune(model, tokens(8), sparsity=0.6, curves=curves, refine=refine, held_out=False)
    prune(plain, tokens(8), sparsity=0.6, curves=curves, held_out=False)
    assert weights_hash(model) == weights_hash(plain) and result.allocation.method == "dp"
    assert result.refinement["points"][-1][2] >= result.refinement["start"]
    assert any("the refined allocation was not taken: pruned anew" in note for note in result.notes)


def test_the_result_is_the_best_on_held_out_data(curves, monkeypatch):
    """A search that ends at a worse allocation: the first one is applied, and a note says so."""

    def worse(judge, space, settings, file, progress, processes):
        counts = dict(judge.counts)
        names = sorted(counts, key=lambda name: counts[name])
        for up, down in zip(names[:5], names[::-1][:5], strict=True):
            counts = space.exchange(counts, [up], [down], 0.3) or counts
        assert counts != judge.counts
        return search.Descent(counts, 1, points=[(0, 0.0, 1.0, 0.1)], ended="evaluations")

    monkeypatch.setattr(refining, "descend", worse)
    model, plain = make_llama(2), make_llama(2)
    result = prune(model, tokens(10), sparsity=0.6, curves=curves, refine=replace(REFINE, data=tokens(4)))
    prune(plain, tokens(10), sparsity=0.6, curves=curves)
    assert weights_hash(model) == weights_hash(plain)
    assert result.allocation.method == "dp" and "the refined allocation costs" in result.notes[0]


def test_an_allocation_whose_outputs_overflow_is_not_applied(curves, monkeypatch):
    measured = Trial.additivity

    def overflowing(self, measurement, allocation, summed, **settings):
        cost = measured(self, measurement, allocation, summed, **settings)
        return replace(cost, joint=math.nan) if allocation.method == "dp" else cost

    monkeypatch.setattr(Trial, "additivity", overflowing)
    result = prune(make_llama(2), tokens(10), sparsity=0.6, curves=curves)
    assert result.allocation.method == "uniform"
    assert report_page(json.loads(json.dumps(result.to_dict())))


def test_a_search_does_not_begin_where_the_outputs_overflow(curves, monkeypatch, tmp_path):
    monkeypatch.setattr(JointJudge, "distortion", property(lambda judge: Distortion(math.nan, math.nan)))
    refine = replace(REFINE, state=tmp_path / "state.json", data=tokens(4))
    model, plain = make_llama(2), make_llama(2)
    result = prune(model, tokens(10), sparsity=0.6, curves=curves, refine=refine)
    prune(plain, tokens(10), sparsity=0.6, curves=curves)
    assert weights_hash(model) == weights_hash(plain) and [one.method for one in result.compared] == ["dp", "uniform"]
    assert result.refinement == {} and not refine.state.exists()
    assert any("not refined: with DP's allocation" in note for note in result.notes)
    assert report_page(json.loads(json.dumps(result.to_dict(), allow_nan=False)))


@pytest.mark.parametrize(
    "settings", [{"pattern": "N:8"}, {"granularity": "role"}, {"budget": "bytes"}, {"inputs": "dense"}]
)
def test_refinement_takes_every_kind_of_level(settings):
    model = make_llama(2)
    result = prune(
        model, tokens(20), sparsity=0.5, levels=None if "pattern" in settings else LEVELS, refine=REFINE, **settings
    )
    assert result.refinement["evaluations"] == 12
    assert result.budget["after"] <= result.budget["target"] * (1 + 1e-9)


def test_classifiers_are_refined(curves):
    result = prune(make_cnn(), images(30), sparsity=0.5, levels=LEVELS, refine=REFINE)
    assert result.refinement["evaluations"] == 12 and result.metric == "mse_logits"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allocation": "uniform"}, "expected allocation='dp', and a pattern .*; got 'uniform'"),
        ({"pattern": "2:4", "sparsity": None}, "got the pattern 2:4, by which every matrix keeps 2 of 4 weights"),
        ({"data": tokens(3)}, "sets at least 2 samples aside to judge, of 2; give more"),
        ({"refine": replace(REFINE, data=tokens(1))}, "give at least 2 to judge them"),
    ],
)
def test_refinement_that_cannot_be_is_refused(settings, message):
    model = make_llama(2)
    before = weights_hash(model)
    with pytest.raises(ValueError, match=message):
        prune(model, **({"data": tokens(10), "sparsity": 0.6, "levels": LEVELS, "refine": REFINE} | settings))
    assert weights_hash(model) == before


SMALL = ["--samples", "6", "--curve-samples", "3", "--held-out", "2", "--seq-len", "24", "--levels", "0.4,0.6,0.8"]
SEARCH = ["--refine-evaluations", "9", "--refine-samples", "4"]


def run(folder, out, *more):
    texts = ["--data", str(folder / "text.txt"), "--sparsity", "0.6", *SMALL, *SEARCH]
    return main(["prune", str(folder / "model"), "--out", str(out), *texts, *more])


def test_the_command_goes_on_where_it_was_interrupted_and_refuses_another_folder(tmp_path, monkeypatch, capsys):
    save_model(make_llama(2), tmp_path / "model")
    (tmp_path / "text.txt").write_text(sentences(60))
    assert run(tmp_path, tmp_path / "whole") == 0
    assert "refined        " in capsys.readouterr().out
    judge, number = JointJudge.judge, iter(range(5))

    def stopped(*given):
        if next(number, None) is None:
            raise KeyboardInterrupt
        return judge(*given)

    monkeypatch.setattr(JointJudge, "judge", stopped)
    monkeypatch.setattr(search.time, "monotonic", iter(range(10**6)).__next__)  # every state is saved
    assert run(tmp_path, tmp_path / "out") == 130
    monkeypatch.undo()
    state = tmp_path / "out.refine.json"
    assert json.loads(state.read_text().rpartition(" ")[0])["descent"]["evaluations"] == 5
    assert run(tmp_path, tmp_path / "out") == 2 and "--resume" in capsys.readouterr().err
    files = {path: path.read_bytes() for path in (state, tmp_path / "out.curves.jsonl")}
    (tmp_path / "model").rename(tmp_path / "first")
    save_model(make_llama(2, seed=1), tmp_path / "model")
    assert run(tmp_path, tmp_path / "out", "--resume") == 2
    assert "was measured under other circumstances (weights: " in capsys.readouterr().err
    (tmp_path / "out.curves.jsonl").unlink()
    assert run(tmp_path, tmp_path / "out", "--resume") == 2
    assert "out.refine.json was measured under other circumstances" in capsys.readouterr().err
    assert state.read_bytes() == files[state] and not (tmp_path / "out").exists()
    save_model(make_llama(2), tmp_path / "model")
    for path, content in files.items():
        path.write_bytes(content)
    assert run(tmp_path, tmp_path / "out", "--resume") == 0
    whole, resumed = (json.loads((tmp_path / name / "sparsity.json").read_text()) for name in ("whole", "out"))
    for key in ("allocation", "tensors", "compared"):
        assert whole[key] == resumed[key]
    assert not state.exists() and not (tmp_path / "out.curves.jsonl").exists()
