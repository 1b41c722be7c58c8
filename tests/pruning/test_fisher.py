"""Fisher curves are the second-order form of the distortion, and anchored ones are exact where they were measured."""

import contextlib
import copy
import itertools
from dataclasses import replace

import pytest
import torch
from architectures import make
from pruned_models import MODELS, make_llama, tokens
from torch import nn

from leanstep import _processes
from leanstep.pruning import find_targets, measure_curves, prune
from leanstep.pruning.measure.batches import Batch, as_batches, evaluating
from leanstep.pruning.measure.blocks import recomputed_blocks
from leanstep.pruning.measure.curve_file import PartialCurves, checked_line, weights_hash
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.fisher import anchored
from leanstep.pruning.measure.fisher import second_order as fisher
from leanstep.pruning.measure.fisher.second_order import SecondOrder
from leanstep.pruning.measure.metrics import Distortion, Metric, make_metric
from leanstep.recipes.report.formatting import format_duration
from leanstep.recipes.report.progress import ProgressBar

LEVELS = (0.5, 0.9)
SMALL = (0.02, 0.05)


class _PerToken(nn.Module):
    """Layers applied to every token alone; with ``mean``, one output per sample."""

    def __init__(self, *, mean: bool):
        super().__init__()
        self.mean = mean
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 5)])

    def forward(self, x):
        z = self.layers[1](self.layers[0](x).tanh())
        return z.mean(1) if self.mean else z


def make_per_token(*, mean: bool):
    torch.manual_seed(0)
    model = _PerToken(mean=mean).double()
    data = torch.randn(4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model, [Batch((rows,)) for rows in data.split(2)]


def changes_of(model, size=1.0):
    generator = torch.Generator().manual_seed(2)
    return [
        (t, t.weight + size * torch.randn(t.weight.shape, generator=generator, dtype=torch.float64))
        for t in find_targets(model, include=["*"])
    ]


def jvp(model, batch, changed):
    """Derivative of the output in the direction of a change of the weights, by autograd."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tangents = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for target, weight in changed:
        tangents[target.name] = weight - target.weight
    run = lambda values: torch.func.functional_call(model, values, batch.args)  # noqa: E731
    return torch.func.jvp(run, (parameters,), (tangents,))


def exact(model, batches, changed, metric):
    """``dz^T H dz / 2``, a mean over tokens, with H the Hessian of the metric at the dense output."""
    values = []
    for batch in batches:
        z, dz = (tensor.flatten(0, -2) for tensor in jvp(model, batch, changed))
        if metric == "kl":
            p = z.softmax(-1)
            values.append(((p * dz**2).sum(-1) - (p * dz).sum(-1) ** 2) / 2)
        else:
            values.append((dz**2).mean(-1))
    return float(torch.cat(values).mean())


@pytest.mark.parametrize("metric", ["kl", "kl_topk", "mse_logits"])
def test_one_output_per_sample_gives_the_exact_form(metric):
    model, batches = make_per_token(mean=True)
    with evaluating(model):
        second = SecondOrder(model, batches, make_metric(metric, model))
        changed = changes_of(model)
        second.collect([target for target, _ in changed])
        for some in ([changed[0]], [changed[1]], changed):
            assert second.distortion(some).mean == pytest.approx(exact(model, batches, some, metric[:2]), rel=1e-9)


@pytest.mark.parametrize("metric", ["kl", "mse_logits"])
def test_tokens_give_the_exact_form_in_expectation(metric, monkeypatch):
    model, batches = make_per_token(mean=False)
    monkeypatch.setattr(fisher, "DRAWS", 256)
    with evaluating(model):
        second = SecondOrder(model, batches, make_metric(metric, model))
        changed = changes_of(model)
        second.collect([target for target, _ in changed])
        for some in ([changed[0]], [changed[1]], changed):
            # 28 tokens x 256 directions; the variance of a square is at most twice its squared mean
            assert second.distortion(some).mean == pytest.approx(exact(model, batches, some, metric[:2]), rel=0.08)


def test_drawn_rows_stand_for_all_rows(monkeypatch):
    model, batches = make_per_token(mean=False)
    changed = changes_of(model)
    monkeypatch.setattr(fisher, "DRAWS", 64)
    distortions = {}
    for rows in (20, 28):
        monkeypatch.setattr(fisher, "ROWS", rows)
        with evaluating(model):
            second = SecondOrder(model, batches, make_metric("kl", model))
            second.collect([target for target, _ in changed])
            part = second._collected[changed[0][0].name]
            assert len(part.inputs) == rows and float(part.weight.sum()) == 28
            distortions[rows] = second.distortion(changed).mean
    assert distortions[20] == pytest.approx(distortions[28], rel=0.4) and distortions[20] != distortions[28]


class _Repeated(nn.Module):
    """One matrix, applied six times to every token alone by one module or by two in turns, and another one."""

    def __init__(self, modules: int):
        super().__init__()
        self.layers = nn.ModuleList([*(nn.Linear(6, 6) for _ in range(modules)), nn.Linear(6, 5)])
        self.layers[modules - 1].weight = self.layers[0].weight

    def forward(self, x):
        for call in range(6):
            x = self.layers[call % (len(self.layers) - 1)](x).tanh()
        return self.layers[-1](x)


@pytest.mark.parametrize("modules", [1, 2])
def test_the_calls_of_a_matrix_are_summed_before_the_square_and_planned_for(modules, monkeypatch):
    torch.manual_seed(0)
    model = _Repeated(modules).double()
    batches = [Batch((torch.randn(4, 7, 6, dtype=torch.float64),))]
    monkeypatch.setattr(fisher, "DRAWS", 256)
    monkeypatch.setattr(fisher, "ROWS", 28)
    with evaluating(model):
        second = SecondOrder(model, batches, make_metric("kl", model))
        changed = changes_of(model)
        second.collect([target for target, _ in changed])
        for some in ([changed[0]], [changed[1]], changed):
            assert second.distortion(some).mean == pytest.approx(exact(model, batches, some, "kl"), rel=0.1)
        for target, _ in changed:
            pairs = second._collected[target.name]
            assert second.bytes_of(target) == pairs.inputs.nbytes + pairs.gradients.nbytes


def test_the_divergence_of_a_small_change_is_the_form():
    model, batches = make_per_token(mean=True)
    metric = make_metric("kl", model)
    with evaluating(model):
        second = SecondOrder(model, batches, metric)
        changed = changes_of(model, 1e-3)
        second.collect([target for target, _ in changed])
        before = copy.deepcopy(model)
        expected = second.distortion(changed).mean
        for target, weight in changed:
            target.weight.copy_(weight)
        p, q = (torch.cat([m(*b.args) for b in batches]).log_softmax(-1) for m in (before, model))
        assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("kind", MODELS)
def test_small_changes_cost_what_is_measured(kind):
    make, data = MODELS[kind]
    model, samples = make(), data(8)
    before, modes = weights_hash(model), [p.requires_grad for p in model.parameters()]
    settings = {"levels": SMALL, "score": "magnitude"}
    approximate = measure_curves(model, samples, method="fisher", **settings)
    measured = measure_curves(model, samples, **settings)
    assert weights_hash(model) == before and [p.requires_grad for p in model.parameters()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert list(approximate) == list(measured)
    assert {curve.source for curve in approximate.values()} == {"fisher"}
    a, b = (torch.tensor([c.distortion[2] for c in curves.values()]) for curves in (approximate, measured))
    # a mean of ratios would be that of the few tokens that go to another expert
    assert 0.7 < float((a / b)[b > 0].median()) < 1.4
    assert rank_correlation(a, b) > 0.6


@pytest.mark.parametrize("products", ["auto", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_blocks_that_are_computed_again_change_no_bit(kind, products, monkeypatch):
    make, data = MODELS[kind]
    settings = {"levels": SMALL, "score": "magnitude", "method": "fisher", "products": products}
    computed = []
    monkeypatch.setattr(
        fisher, "recomputed_blocks", lambda *args: computed.append(recomputed_blocks(*args)) or computed[-1]
    )
    again = measure_curves(make(), data(3), **settings)
    assert len(computed) == 3  # once for each sample: no pass failed and was made again without it
    monkeypatch.setattr(fisher, "recomputed_blocks", lambda *args: contextlib.nullcontext())
    assert measure_curves(make(), data(3), **settings) == again


class _WritingBlock(nn.Module):
    """A matrix and an activation that overwrites the inputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(nn.functional.silu(x, inplace=True))


class _WritesIntoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(_WritingBlock() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x * 1.0)
        return x


def test_a_block_that_writes_into_its_inputs_is_not_computed_again():
    torch.manual_seed(0)
    model = _WritesIntoInputs().double()
    batches = [Batch((torch.randn(4, 7, 6, dtype=torch.float64),))]
    with evaluating(model):
        second = SecondOrder(model, batches, make_metric("kl", model))
        changed = changes_of(model)
        second.collect([target for target, _ in changed])
        value = second.distortion(changed).mean
    assert not second._recomputes and value == pytest.approx(exact(model, batches, changed, "kl"), rel=0.5)


class _KeywordBlock(nn.Module):
    """A block with keywords that torch.utils.checkpoint has, too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, *, debug, use_reentrant, preserve_rng_state):
        return self.linear(x).tanh() * (debug + use_reentrant + preserve_rng_state)


class _KeywordModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(_KeywordBlock() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, debug=0.5, use_reentrant=0.25, preserve_rng_state=0.25)
        return x


def test_keywords_of_a_block_are_its_own():
    torch.manual_seed(0)
    model = _KeywordModel().double()
    batches = [Batch((torch.randn(4, 7, 6, dtype=torch.float64),))]
    with evaluating(model):
        second = SecondOrder(model, batches, make_metric("kl", model))
        second.collect([target for target, _ in changes_of(model)])
        assert second._recomputes


@pytest.mark.parametrize("name", ["gemma3", "t5", "gpt2"])
def test_no_keys_and_values_are_stored(name, tmp_path):
    model = make(name)
    inner = model.config.get_text_config()
    inner.use_cache = True
    batch = Batch((), {model.main_input_name: tokens(2)} | ({"decoder_input_ids": tokens(2)} if name == "t5" else {}))
    with evaluating(model):
        second = SecondOrder(model, [batch], make_metric("kl", model))
        assert all(sample.kwargs["use_cache"] is False for sample in second.samples)
        second.collect(find_targets(model))
        assert second._recomputes


def rank_correlation(a, b):
    return float(torch.corrcoef(torch.stack([x.argsort().argsort().double() for x in (a, b)]))[0, 1])


def test_portions_change_no_bit(monkeypatch):
    model, samples = make_llama(2), tokens(4)
    whole = measure_curves(model, samples, levels=LEVELS, method="fisher")
    monkeypatch.setattr(_processes, "free_memory", lambda device: 0)
    assert measure_curves(model, samples, levels=LEVELS, method="fisher") == whole


def test_short_data_is_collected_at_once(monkeypatch):
    """Rows that the data does not have take no memory."""
    model, samples = make_llama(4), tokens(4)
    with evaluating(model):
        second = SecondOrder(model, as_batches(samples, model), make_metric("kl", model))
        targets = find_targets(model)
        second.collect(targets)
        taken = [second._collected[target.name] for target in targets]
        assert [second.bytes_of(t) for t in targets] == [t.inputs.nbytes + t.gradients.nbytes for t in taken]
    collect, calls = SecondOrder.collect, []
    monkeypatch.setattr(SecondOrder, "collect", lambda self, targets: (calls.append(1), collect(self, targets)))
    monkeypatch.setattr(fisher, "COLLECTED_BYTES", sum(t.inputs.nbytes + t.gradients.nbytes for t in taken))
    measure_curves(model, samples, levels=LEVELS, method="fisher")
    assert len(calls) == 1


def test_updates_of_the_remaining_weights_lower_the_curves():
    model, samples = make_llama(2), tokens(16)
    sums = {
        score: sum(c.distortion[1] for c in measure_curves(model, samples, **settings(score)).values())
        for score in ("wanda", "sparsegpt")
    }
    assert sums["sparsegpt"] < sums["wanda"]


def settings(score):
    return {"levels": (0.3,), "score": score, "method": "fisher"}


def test_fisher_and_anchored_curves_go_on_where_they_were_cut(tmp_path):
    model, samples, file = make_llama(2), tokens(4), tmp_path / "curves.jsonl"
    whole = {m: measure_curves(model, samples, levels=LEVELS, method=m, resume=file) for m in ("fisher", "anchored")}
    lines = file.read_text().splitlines(keepends=True)
    # the first line is the identity, then come the Fisher curves and the number of samples to measure on, and at the
    # end that of the measurements
    assert 3 + 14 * 2 + 14 <= len(lines) <= 3 + 14 * 4
    points = []
    for cut in (10, 35):
        file.write_text("".join(lines[:cut]) + lines[cut][:7])
        points.clear()
        again = measure_curves(
            model, samples, levels=LEVELS, method="anchored", resume=file, progress=lambda *p: points.append(p)
        )
        assert again == whole["anchored"]
        assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)
        assert len(points) == len(lines) - cut - (2 if cut < 30 else 1)
        done, total, _ = points[-1]
        assert done == total  # of the points that are measured, not of all levels
    assert measure_curves(model, samples, levels=LEVELS, method="fisher", resume=file) == whole["fisher"]
    # measured points of the same file are not measured again
    assert measure_curves(model, samples, levels=LEVELS, resume=file) == measure_curves(model, samples, levels=LEVELS)


def test_the_time_left_of_measured_points_is_by_their_own_rate(monkeypatch, capsys):
    clock = itertools.count(0, 31)
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    bar = ProgressBar()
    for done in range(1, 100):  # of Fisher curves
        bar(done, 100, "a")
    capsys.readouterr()
    for done in (1, 2, 3):
        bar(done, 10, "b")
    # 31 seconds a point; by the rate since the first of the Fisher points it would be hours
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"3/10 points, b, {format_duration(7 * 31)} left")


def test_what_the_clock_decided_holds_for_a_run_that_goes_on(tmp_path):
    model, samples, file = make_llama(2), tokens(4), tmp_path / "curves.jsonl"
    arguments = {"levels": LEVELS, "method": None, "resume": file}
    first = measure_curves(model, samples, minutes=1e-9, **arguments)
    whole = file.read_text()
    # with the time of a full measurement, still the curves from which a search has begun
    assert measure_curves(model, samples, minutes=60.0, **arguments) == first and file.read_text() == whole
    # cut before its end it measures on, by the method that it chose
    file.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    curves = measure_curves(model, samples, minutes=60.0, **arguments)
    assert {curve.source for curve in curves.values()} == {"anchored"}
    assert measure_curves(model, samples, minutes=1e-9, **arguments) == curves


def test_a_run_for_another_sparsity_measures_near_that(tmp_path):
    """Points are of any sparsity, and stay; the end of measurements near another one is no end."""
    model, samples, file = make_llama(2), tokens(4), tmp_path / "curves.jsonl"
    arguments = {"levels": (0.1, 0.2, 0.5, 0.7, 0.9), "method": "anchored", "resume": file}
    measure_curves(model, samples, sparsity=0.3, **arguments)
    before = len(file.read_text().splitlines())
    curves = measure_curves(model, samples, sparsity=0.8, **arguments)
    assert len(file.read_text().splitlines()) > before + 7
    fresh = measure_curves(model, samples, sparsity=0.8, **{**arguments, "resume": None})
    for name, curve in fresh.items():
        # measured levels near the new solution are in both
        assert curves[name].distortion[-2:] == pytest.approx(curve.distortion[-2:], rel=0.5)
    whole = file.read_text()
    assert measure_curves(model, samples, sparsity=0.8, **arguments) == curves and file.read_text() == whole


@pytest.mark.parametrize("decision", [{"method": "guessed"}, {"complete": "yes"}, {"other": 1}])
def test_a_decision_that_is_none_is_refused(tmp_path, decision):
    file = tmp_path / "curves.jsonl"
    partial = PartialCurves(file, {"model": "a"})
    partial.choose("anchored")
    partial.finish()
    again = PartialCurves(file, {"model": "a"})
    assert (again.method, again.complete) == ("anchored", True)
    file.write_text(file.read_text() + checked_line(decision))
    with pytest.raises(ValueError, match="holds no measured curves"):
        PartialCurves(file, {"model": "a"})


def test_anchored_curves_are_exact_where_they_were_measured():
    model, samples = make_llama(2), tokens(8)
    arguments = {"levels": (0.3, 0.5, 0.7, 0.9), "sparsity": 0.6}
    measured = measure_curves(model, samples, **arguments)
    curves = measure_curves(model, samples, method="anchored", **arguments)
    assert {curve.source for curve in curves.values()} == {"anchored"}
    for name, curve in curves.items():
        equal = [a == b for a, b in zip(curve.distortion, measured[name].distortion, strict=True)]
        assert 2 <= sum(equal) <= 4, name  # the dense level, and one to three anchors


def test_anchors_scale_a_curve():
    base = measure_curves(make_llama(1), tokens(2), levels=(0.2, 0.5, 0.8), method="fisher")
    curve = replace(next(iter(base.values())), distortion=(0.0, 1.0, 2.0, 4.0))
    low, middle, high = curve.counts[1:]
    assert anchored.anchored(curve, {}) is curve
    one = anchored.anchored(curve, {middle: Distortion(6.0, 0.5)})
    assert one.distortion == pytest.approx((0.0, 3.0, 6.0, 12.0)) and one.stderr[2] == 0.5
    two = anchored.anchored(curve, {low: Distortion(1.0, 0.1), high: Distortion(36.0, 0.1)})
    # 0.5 is in the middle of 0.2 and 0.8: the factor is the geometric mean of 1 and 9
    assert two.distortion == pytest.approx((0.0, 1.0, 6.0, 36.0), rel=0.02)


def curve_of_name(name, *distortion):
    counts = tuple(range(8, 8 - len(distortion), -1))
    return Curve(name, 8, counts, distortion, (0.0, *(0.1 for _ in distortion[1:])), "kl", source="fisher")


def test_curves_without_a_measurement_are_scaled_as_those_of_their_kind():
    names = [f"layers.{block}.{kind}.weight" for block in range(3) for kind in ("q_proj", "v_proj", "down_proj")]
    fisher = {name: curve_of_name(name, 0.0, 1.0, 3.0) for name in names}
    factors = {"layers.0.q_proj.weight": 2.0, "layers.1.q_proj.weight": 8.0, "layers.0.v_proj.weight": 0.5}
    measured = {name: {7: Distortion(factors[name], 0.1)} if name in factors else {} for name in names}
    curves = anchored.all_anchored(fisher, measured)
    for name in factors:
        assert curves[name].distortion == pytest.approx((0.0, factors[name], 3 * factors[name]))
        assert curves[name].source == "anchored"
    # the median of the three is 2; of the kind of q there are 2 and 8, of that of v a half, of the last none
    for kind, expected in (("q_proj", (2 * 8 * 2) ** (1 / 3)), ("v_proj", (0.5 * 2) ** 0.5), ("down_proj", 2.0)):
        curve = curves[f"layers.2.{kind}.weight"]
        assert curve.source == "fisher" and curve.distortion == pytest.approx((0.0, expected, 3 * expected))
        assert curve.stderr == pytest.approx((0.0, 0.1 * expected, 0.1 * expected))
    assert anchored.all_anchored(fisher, dict.fromkeys(names, {})) == fisher
    # a measurement that gives no factor is no measurement of its kind
    nothing = {**dict.fromkeys(names, {}), names[0]: {7: Distortion(0.0, 0.0)}}
    assert anchored.all_anchored(fisher, nothing)[names[3]] == fisher[names[3]]


def test_every_kind_is_measured_and_of_each_the_largest_distortions_first():
    distortion = {"0.mlp": 9.0, "1.mlp": 8.0, "2.mlp": 7.0, "3.mlp": 6.0, "0.v": 0.3, "1.v": 0.4, "head": 0.1}
    order = anchored.in_order(distortion, {})
    assert order == ["0.mlp", "1.v", "head", "1.mlp", "2.mlp", "0.v", "3.mlp"]
    # fc1 and fc2 are two kinds; blocks, roles and experts are not
    assert anchored.without_numbers("layers.0.fc1.weight") != anchored.without_numbers("layers.0.fc2.weight")
    for pair in (("h.0.fc1", "h.11.fc1"), ("block 0: q_k", "block 3: q_k"), ("experts.w1[0]", "experts.w1[7]")):
        assert anchored.without_numbers(pair[0]) == anchored.without_numbers(pair[1])
    # a group that was measured at another level comes last
    again = anchored.in_order(distortion, {"0.mlp": {7: Distortion(1.0, 0.1)}})
    assert again == [*order[1:], "0.mlp"]


def test_without_time_there_are_no_anchors_and_with_little_the_largest_come_first():
    model, samples = make_llama(2), tokens(4)
    none = measure_curves(model, samples, levels=LEVELS, method="anchored", minutes=1e-9)
    assert {curve.source for curve in none.values()} == {"fisher"}
    assert none == measure_curves(model, samples, levels=LEVELS, method="fisher")
    by_default = measure_curves(model, samples, levels=LEVELS, method=None, minutes=1e-9)
    assert by_default == none
    quick = measure_curves(model, samples, levels=LEVELS, method=None)
    assert {curve.source for curve in quick.values()} == {"measured"}


class _Plain(Metric):
    """A metric without a root."""

    name = "plain"

    def reference(self, output, batch):
        return output.logits

    def compare(self, reference, output, batch):
        sums = (output.logits - reference).abs().sum((1, 2)).double()
        return sums, torch.full((batch.size,), float(reference.shape[1]), dtype=torch.float64)


def test_what_cannot_be_done_is_refused():
    model, samples = make_llama(1), tokens(4)
    for method in ("fisher", "anchored"):
        with pytest.raises(ValueError, match="'plain' defines no root"):
            measure_curves(model, samples, levels=LEVELS, method=method, metric=_Plain())
    by_default = measure_curves(model, samples, levels=LEVELS, method=None, minutes=1e-9, metric=_Plain())
    assert {curve.source for curve in by_default.values()} == {"measured"}
    with pytest.raises(ValueError, match="method must be one of measured, fisher, anchored"):
        measure_curves(model, samples, method="hessian")
    with pytest.raises(ValueError, match="curves must be one of measured, fisher, anchored, got 'hessian'"):
        prune(model, samples, sparsity=0.5, curves="hessian")
    with pytest.raises(ValueError, match="are for allocation='dp' only"):
        prune(model, samples, sparsity=0.5, curves="fisher", allocation="uniform")
    with pytest.raises(ValueError, match="minutes .* must be positive"):
        prune(model, samples, sparsity=0.5, minutes=0)
    unused = make_llama(1)
    unused.extra = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="does not depend on extra.weight"):
        measure_curves(unused, samples, levels=LEVELS, score="magnitude", method="fisher")


def test_data_and_masks_are_only_read():
    model = make_llama(2)
    batch = {"input_ids": tokens(4), "attention_mask": torch.ones(4, 16, dtype=torch.long)}
    batch["attention_mask"][:2, 10:] = 0
    arguments = {"levels": SMALL, "score": "magnitude"}
    a = measure_curves(model, [batch], method="fisher", **arguments)
    b = measure_curves(model, [batch], **arguments)
    ratio = sum(c.distortion[2] for c in a.values()) / sum(c.distortion[2] for c in b.values())
    assert 0.5 < ratio < 2
    assert len(as_batches([batch], model)) == 1 and "labels" not in batch


@pytest.mark.parametrize("method", ["fisher", "anchored"])
@pytest.mark.parametrize("granularity", ["matrix", "role"])
def test_prune_takes_the_method(method, granularity):
    model = make_llama(2)
    result = prune(
        model, tokens(8), sparsity=0.5, curves=method, levels=(0.3, 0.5, 0.7), granularity=granularity, batch_size=2
    )
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)
    assert {curve.source for curve in result.curves.values()} == {method}
    assert all(curve["source"] == method for curve in result.to_dict()["curves"].values())
