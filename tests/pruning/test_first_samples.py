"""Anchored curves from measurements on the first samples alone."""

import json
import math
import time

import numpy as np
import pytest
import torch
from pruned_models import make_llama, tokens

from leanstep.pruning import measure_curves, prune
from leanstep.pruning.measure.activation_cache import ActivationCache, take_note
from leanstep.pruning.measure.batches import as_batches, first_samples
from leanstep.pruning.measure.curve_file import PartialCurves, Points, checked_content, checked_line
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.fisher import sampling
from leanstep.pruning.measure.fisher.anchored import all_anchored
from leanstep.pruning.measure.measurement import Measurement
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.score.calibration import Pruning
from leanstep.pruning.score.targets import find_targets, make_groups

LEVELS = (0.3, 0.5, 0.7)


@pytest.fixture
def two_samples(monkeypatch):
    """The time suffices for two samples."""
    monkeypatch.setattr(sampling, "samples_within", lambda *_: 2)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_first_samples_are_those_of_the_data(batch_size):
    model, samples = make_llama(1), tokens(7)
    masked = {"input_ids": samples, "attention_mask": torch.ones_like(samples)}
    for batches in (as_batches(samples, model, batch_size=batch_size), as_batches([masked], model)):
        for count in range(1, 8):
            first = first_samples(batches, count)
            assert sum(batch.size for batch in first) == count
            assert torch.equal(torch.cat([batch.kwargs["input_ids"] for batch in first]), samples[:count])
            assert torch.equal(torch.cat([batch.labels for batch in first]), samples[:count])
            assert all(batch.mask is None or batch.mask.shape == batch.labels.shape for batch in first)
            # a batch that is whole stays the same object, of which nothing is computed again
            assert all(a is b for a, b in zip(first[:-1], batches, strict=False))


def points_in(file, prefix):
    """(name, count) -> the distortion of the points of a prefix in a file."""
    contents = [checked_content(line.rstrip("\n")) for line in file.read_text().splitlines()]
    rows = [content for content in contents if isinstance(content, list) and content[0].startswith(prefix)]
    return {(name.removeprefix(prefix), count): mean for name, count, mean, _ in rows}


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_anchors_are_measurements_on_the_first_samples(two_samples, tmp_path, score, batch_size):
    model, samples, file = make_llama(2), tokens(6), tmp_path / "curves.jsonl"
    settings = {"levels": LEVELS, "score": score, "batch_size": batch_size, "score_data": samples}
    curves = measure_curves(model, samples, method="anchored", resume=file, **settings)
    assert {(curve.source, curve.samples) for curve in curves.values()} == {("anchored", 2)}
    fisher, on_first, measured = (
        measure_curves(model, data, method=method, **settings)
        for data, method in ((samples, "fisher"), (samples[:2], "fisher"), (samples[:2], "measured"))
    )
    points, factors, of_samples = points_in(file, "first 2: "), {}, {}
    for name, curve in curves.items():
        levels = [k for k in (1, 2, 3) if (name, curve.counts[k]) in points]
        assert levels, name
        for k in levels:
            assert points[name, curve.counts[k]] == pytest.approx(measured[name].distortion[k], rel=1e-5)
        whole, first = (np.log(one[name].distortion[1:]) for one in (fisher, on_first))
        at = [k - 1 for k in levels]
        of_samples[name] = (first - whole)[at].mean()
        estimates = np.log([points[name, curve.counts[k]] for k in levels]) - 0.5 * (first - whole)[at]
        x = curve.coordinate(np.array(curve.counts[1:]))
        factors[name] = np.interp(x, x[at], estimates - whole[at]), (estimates - whole[at]).mean()
    # the only neighbour is the matrix of the same kind in the other block
    other = {name: name.replace(".0.", ".x.").replace(".1.", ".0.").replace(".x.", ".1.") for name in curves}
    above = {name: factors[name][1] - factors[other[name]][1] for name in curves}
    noise = np.mean([(of_samples[name] - of_samples[other[name]]) ** 2 for name in curves])
    drawn = min(1.0, 0.6 * noise / np.mean([value**2 for value in above.values()]))
    assert drawn > 0.02
    for name, curve in curves.items():
        expected = fisher[name].distortion[1:] * np.exp(factors[name][0] - drawn * above[name])
        assert curve.distortion[1:] == pytest.approx(expected, rel=1e-5), name


def made_up_curve(name, *distortion):
    counts = tuple(range(8, 8 - len(distortion), -1))
    return Curve(name, 8, counts, distortion, (0.0,) * len(distortion), "kl", source="fisher")


def test_what_the_choice_of_the_samples_does_is_taken_off():
    """Measured distortions that it changes by the square root of what it does to Fisher curves are those of all."""
    names = [f"layers.{block}.{kind}.weight" for block in range(3) for kind in ("q_proj", "v_proj")]
    fisher = {name: made_up_curve(name, 0.0, 1.0, 3.0) for name in names}
    first = {n: made_up_curve(n, 0.0, 4.0 if "q" in n else 1.0, 12.0 if "q" in n else 3.0) for n in names}
    measured = {name: {7: Distortion(4.0 if "q" in name else 2.0, 0.2)} for name in names}
    assert sampling.on_all_samples(measured, fisher, first) == {
        name: {7: Distortion(2.0, 0.1 if "q" in name else 0.2)} for name in names
    }
    for name, curve in all_anchored(fisher, measured, first).items():
        assert curve.distortion == pytest.approx((0.0, 2.0, 6.0)), name
    # without a Fisher distortion, as of an expert that no token of the first samples reaches
    first[names[0]] = made_up_curve(names[0], 0.0, 0.0, 0.0)
    assert sampling.on_all_samples(measured, fisher, first)[names[0]] == measured[names[0]]
    assert all_anchored(fisher, {name: {} for name in names}, first) == fisher


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_factors_are_drawn_to_neighbours_by_the_noise_in_them(noise):
    blocks, kinds = (0, 1, 2, 5), ("q_proj", "v_proj")
    names = [f"layers.{block}.{kind}.weight" for block in blocks for kind in kinds] + ["lm_head.weight"]
    generator = np.random.default_rng(0)
    factors = dict(zip(names, generator.normal(size=len(names)).tolist(), strict=True))
    ratios = dict(zip(names, (noise * generator.normal(size=len(names))).tolist(), strict=True))
    fisher = {name: made_up_curve(name, 0.0, 1.0) for name in names}
    first = {name: made_up_curve(name, 0.0, math.exp(ratios[name])) for name in names}
    actual = sampling.towards_neighbours(factors, fisher, first, {name: {7: Distortion(1.0, 0.0)} for name in names})

    def above(values):
        result = {}
        for kind in kinds:
            for block in blocks:
                weights = {other: 1 / (1 + ((block - other) / 2) ** 2) for other in blocks if other != block}
                near = sum(w * values[f"layers.{b}.{kind}.weight"] for b, w in weights.items()) / sum(weights.values())
                result[name] = values[name := f"layers.{block}.{kind}.weight"] - near
        return result

    mean_square = lambda values: sum(value**2 for value in values.values()) / len(values)  # noqa: E731
    drawn = min(1.0, 0.6 * mean_square(above(ratios)) / mean_square(above(factors)))
    assert (drawn == 0, drawn == 1) == (noise == 0, noise == 3)
    expected = {name: factors[name] - drawn * above(factors).get(name, 0.0) for name in names}
    assert actual == pytest.approx(expected, rel=1e-12)
    # many experts of a block are neighbours, too
    experts = {f"layers.{block}.experts.{expert}.up": float(block + expert) for block in (0, 4) for expert in range(3)}
    assert sampling._above_neighbours(experts)["layers.0.experts.0.up"] == pytest.approx(
        0.0 - (1 + 2 + (4 + 5 + 6) / 5) / (2 + 3 / 5)
    )


def test_a_curve_of_the_first_samples_that_ends_early_has_no_ratio_beyond():
    whole = Curve("a", 8, (8, 4, 2), (0.0, 1.0, 4.0), (0.0,) * 3, "kl")
    first = Curve("a", 8, (8, 4), (0.0, math.e), (0.0,) * 2, "kl")
    assert sampling._log_ratios(whole, first, (4, 2)) == [1.0, 0.0]
    assert sampling._log_ratios(first, whole, (4, 2)) == [-1.0, 0.0]


def test_weights_are_as_before(two_samples):
    model, samples = make_llama(2), tokens(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_curves(model, samples, levels=LEVELS, method="anchored")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_measurement_on_the_first_samples_is_one_of_them_alone():
    model, samples = make_llama(2), tokens(5)
    batches = as_batches(samples, model, batch_size=3)
    part = Measurement(model, batches).of_first(4)
    alone = Measurement(model, as_batches(samples[:4], model, batch_size=3))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(0.5)
    assert part.joint() == alone.joint() and part.joint().mean > 0
    assert torch.equal(part.outputs, alone.outputs) and part.outputs.tolist() == [16.0] * 4


def test_without_a_cache_of_activations_there_is_none_on_the_first_samples(two_samples):
    model, samples = make_llama(2), tokens(4)
    settings = {"levels": LEVELS, "method": "anchored"}
    assert measure_curves(model, samples, prefix_cache=False, **settings) == measure_curves(model, samples, **settings)
    assert not Measurement(model, as_batches(samples, model), prefix_cache=False).of_first(2).cache.stages
    cached = Measurement(model, as_batches(samples, model))
    assert len(cached.cache.starts) > 1
    cached.cache.disable("a reason")
    assert cached.of_first(2).cache.starts == (0,)
    take_note(model)


@pytest.mark.parametrize("rounds_cut", [1, 2, 3])
def test_a_run_that_was_cut_in_its_last_round_goes_on_in_it(monkeypatch, tmp_path, rounds_cut):
    model, samples, file = make_llama(2), tokens(4), tmp_path / "curves.jsonl"
    rounds, real = [], Points.limit_to

    def noted(self, levels):
        rounds.append(len(levels))
        real(self, levels)

    monkeypatch.setattr(Points, "limit_to", noted)
    settings = {"method": "anchored", "resume": file, "sparsity": 0.5}
    whole = measure_curves(model, samples, **settings)
    lines = file.read_text().splitlines(keepends=True)
    assert rounds[0] == 14 and all(rounds[:3]) and not any(rounds[3:]), rounds
    # before the last line, which is the end of the measurements, come those of the last round
    file.write_text("".join(lines[: -1 - rounds_cut]))
    assert measure_curves(model, samples, **settings) == whole
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)


@pytest.mark.parametrize("cut", [1, 2, 10, 30, 58, 64])
def test_a_run_goes_on_with_as_many_samples_as_it_began(two_samples, monkeypatch, tmp_path, cut):
    model, samples, file = make_llama(2), tokens(4), tmp_path / "curves.jsonl"
    settings = {"levels": LEVELS[1:], "method": "anchored", "resume": file}
    whole = measure_curves(model, samples, **settings)
    lines = file.read_text().splitlines(keepends=True)
    # identity, the number of samples, points of Fisher curves on these and on all, measured ones, and the end
    assert len(lines) >= 2 + 2 * 28 + 14 + 1
    assert lines[1] == checked_line({"samples": 2, "target": [0.5]})
    if cut > 1:  # the clock would decide otherwise now
        monkeypatch.setattr(sampling, "samples_within", lambda *_: 3)
    file.write_text("".join(lines[:cut]) + lines[cut][:9])
    assert measure_curves(model, samples, **settings) == whole
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)
    monkeypatch.setattr(sampling, "samples_within", lambda *_: 1 / 0)
    assert measure_curves(model, samples, **settings) == whole


def test_points_of_other_samples_are_no_anchors(monkeypatch, tmp_path):
    """Measured on all samples, then near another sparsity on two: distortions on different data are not compared."""
    model, samples, file = make_llama(2), tokens(4), tmp_path / "curves.jsonl"
    settings = {"levels": LEVELS, "method": "anchored", "resume": file}
    measure_curves(model, samples, sparsity=0.4, **settings)
    monkeypatch.setattr(sampling, "samples_within", lambda *_: 2)
    curves = measure_curves(model, samples, sparsity=0.6, **settings)
    fresh = measure_curves(model, samples, sparsity=0.6, **{**settings, "resume": tmp_path / "fresh.jsonl"})
    assert curves == fresh and {curve.samples for curve in curves.values()} == {2}


def test_a_finished_file_of_an_earlier_version_is_of_all_samples(tmp_path, monkeypatch):
    model, samples, file = make_llama(2), tokens(4), tmp_path / "curves.jsonl"
    settings = {"levels": LEVELS, "method": "anchored", "resume": file}
    whole = measure_curves(model, samples, **settings)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if '"samples"' not in line))
    monkeypatch.setattr(sampling, "samples_within", lambda *_: 2)
    assert measure_curves(model, samples, **settings) == whole


@pytest.mark.parametrize("samples", [0, -1, True, "2", 1.5])
def test_a_number_of_samples_that_is_none_is_refused(tmp_path, samples):
    file = tmp_path / "curves.jsonl"
    file.write_text(checked_line({"identity": {"model": "a"}}) + checked_line({"samples": samples}))
    with pytest.raises(ValueError, match="expected a method, a number of samples or an end"):
        PartialCurves(file, {"model": "a"})


def test_the_note_and_the_curves_say_on_how_many_samples(two_samples):
    model, samples = make_llama(2), tokens(6)
    result = prune(model, samples, sparsity=0.5, curves="anchored", levels=LEVELS, held_out=False, minutes=1.5)
    expected = "curves are scaled to measurements on the first 2 of 6 samples: to measure all matrices on all of them"
    assert any(note.startswith(expected) for note in result.notes)
    for curve in result.curves.values():
        assert curve.samples == 2 and Curve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve
    with pytest.raises(ValueError, match="samples must be a number of samples, or 0 for all; got -1"):
        Curve.from_dict({**curve.to_dict(), "samples": -1})
    with pytest.raises(ValueError, match="whole numbers"):
        Curve.from_dict({**curve.to_dict(), "samples": "2"})


class _Measurement:
    """Eight samples, of which a pass takes eight seconds, or eight and what each pass takes besides its samples."""

    def __init__(self, outputs, preparation=0.0, besides=0.0):
        self.outputs, self.seconds, self.besides = torch.tensor(outputs, dtype=torch.float64), 8.0 + besides, besides
        self.preparation_seconds, self.sample_seconds = preparation, self.seconds / 8

    def passes_of(self, groups):
        return float(len(groups))

    def seconds_of_singles(self, groups):
        return (self.seconds + self.preparation_seconds) * len(groups)


@pytest.fixture
def line(monkeypatch):
    monkeypatch.setattr(sampling, "_passes_besides", lambda measurement, groups: 0.0)
    monkeypatch.setattr(sampling, "_seconds_of_first", lambda measurement, samples: measurement.besides + samples)


def pruning_of(model, samples, score="magnitude", **settings):
    return Pruning(ActivationCache(model, as_batches(samples, model)), score, **settings)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    # ten groups: ten seconds for each sample, in four fifths of the time
    [(1.0, 1), (24.9, 1), (25.0, 2), (62.5, 5), (99.0, 7), (100.0, 8), (1e9, 8)],
)
def test_the_samples_are_those_on_which_all_groups_fit_once_into_four_fifths_of_the_time(seconds, expected, line):
    model = make_llama(2)
    groups = make_groups(find_targets(model), "matrix")[:10]
    pruning = pruning_of(model, tokens(4))
    assert sampling.samples_within(_Measurement([200.0] * 8), groups, pruning, seconds) == expected
    # half a second of ten groups for their pruners, or for what a pass takes besides the samples
    for measurement in (_Measurement([200.0] * 8, preparation=0.5), _Measurement([200.0] * 8, besides=0.5)):
        assert sampling.samples_within(measurement, groups, pruning, seconds + 5 / 0.8) == expected
    # few tokens in each: no fewer than 128 of them
    assert sampling.samples_within(_Measurement([50.0] * 8), groups, pruning, seconds) == max(expected, 3)
    # a classifier has one output for each
    assert sampling.samples_within(_Measurement([1.0] * 8), groups, pruning, seconds) == 8
    # Wanda's statistics: two passes over four samples, each of a second
    needy = pruning_of(model, tokens(4), "wanda")
    assert sampling.samples_within(_Measurement([200.0] * 8), groups, needy, seconds + 8 / 0.8) == expected


@pytest.mark.parametrize(("besides", "expected"), [(0.0, 1), (4.0, 1), (12.0, 3), (33.0, 8), (1000.0, 8)])
def test_samples_add_a_quarter_at_least_to_what_does_not_depend_on_them(besides, expected, line):
    """One alone would save next to nothing where pruners, or copies of weights, take most of the time."""
    model = make_llama(2)
    groups, pruning = make_groups(find_targets(model), "matrix")[:10], pruning_of(model, tokens(4))
    for measurement in (_Measurement([200.0] * 8, preparation=besides), _Measurement([200.0] * 8, besides=besides)):
        assert sampling.samples_within(measurement, groups, pruning, 1.0) == expected


def test_the_clock_gives_a_number_of_samples(monkeypatch):
    """A pass of the model takes a second for each sample."""
    model, samples, now = make_llama(2), tokens(8), [0.0]
    groups = make_groups(find_targets(model), "matrix")
    # each measurement runs the blocks from its matrix on
    measurement = Measurement(model, as_batches(samples, model))
    assert 7 < measurement.passes_of(groups) < 14 and 3 < sampling._passes_besides(measurement, groups) < 4
    passes = measurement.passes_of(groups) + sampling._passes_besides(measurement, groups)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sampling, "_FEWEST_OUTPUTS", 16)

    def later(module, args, kwargs, output):
        now[0] += len(kwargs["input_ids"])

    handle = model.register_forward_hook(later, with_kwargs=True)
    try:
        settings = {"levels": LEVELS, "score": "magnitude", "method": "anchored", "batch_size": 4}
        curves = measure_curves(model, samples, minutes=5.5 * passes / 60 / 0.8, **settings)
    finally:
        handle.remove()
    assert {curve.samples for curve in curves.values()} == {5}
    assert {curve.source for curve in curves.values()} == {"anchored"}


@pytest.mark.parametrize(("score", "stores"), [("wanda", True), ("sparsegpt", False)])
def test_sums_of_squares_of_the_same_weights_are_computed_once(score, stores, monkeypatch):
    model, samples = make_llama(2), tokens(4)
    groups = make_groups(find_targets(model), "matrix")
    fresh = pruning_of(model, samples, score)
    pruning = pruning_of(model, samples, score, same_weights=True)
    assert pruning.passes_for(groups) == 2
    first = pruning.pruners(groups)
    assert pruning.passes_for(groups) == (0 if stores else 2)
    runs = []
    real = ActivationCache.until
    monkeypatch.setattr(ActivationCache, "until", lambda self, *a: (runs.append(1), real(self, *a))[1])
    second = pruning.pruners(groups[:3])
    assert bool(runs) is not stores
    expected = fresh.pruners(groups)
    for group in groups[:3]:
        first.release(group)  # leaves what is stored
        count = group.layer.numel // 2
        weights = [one[group.name].prune(count).weight for one in (second, expected)]
        assert torch.equal(*weights)


def test_statistics_are_taken_once_for_all_rounds(monkeypatch):
    model, samples = make_llama(2), tokens(4)
    collected = []
    from leanstep.pruning.score import calibration

    real = calibration.statistics_for
    monkeypatch.setattr(
        calibration,
        "statistics_for",
        lambda cache, targets, needs: (collected.extend(t.name for t in targets), real(cache, targets, needs))[1],
    )
    measure_curves(model, samples, levels=LEVELS, method="anchored")
    assert len(collected) == len(set(collected)) == 14
