"""The benchmark of searches over allocations: the evolutionary search it compares with, its table, its page."""

import sys

import pytest
from comparison_runs import benchmark_modules, check_page
from pruned_models import make_llama, tokens

from leanstep.pruning import allocate, find_targets
from leanstep.pruning.measure.activation_cache import ActivationCache
from leanstep.pruning.measure.batches import as_batches, evaluating
from leanstep.pruning.measure.checks import Trial
from leanstep.pruning.measure.joint import JointJudge
from leanstep.pruning.measure.measurement import Measurement
from leanstep.pruning.score.calibration import Pruning
from leanstep.pruning.score.targets import WeightSnapshot, make_groups

SIZES = {"a": 1000, "b": 3000, "c": 2000}
SETTINGS = {
    "name": "nano", "score": "wanda", "curves": "anchored", "samples": 4, "curve_samples": 2, "judge_samples": 4,
    "eval_samples": 4, "seq_len": 8, "budgets": [1.0, 2.0], "weights": "abcdef0123", "made_by": "leanstep train x",
}  # fmt: skip
MACHINE = {"machine": "m, commit c", "load": 1.5, "processors": 2}


@pytest.fixture(scope="module")
def search():
    yield from (parts.search for parts in benchmark_modules("pruning", ("search",)))


@pytest.fixture(scope="module")
def evolution(search):
    return sys.modules[search.evolution_of.__module__]


def test_the_evolutionary_search_keeps_the_budget_and_comes_near_the_optimum(evolution):
    """Of distortions that add up; the first batches are a part of all."""
    calls = []

    def fitness(counts, batches):
        calls.append(batches)
        assert sum(counts.values()) == 3000 and all(50 <= count <= SIZES[name] for name, count in counts.items())
        scales = {"a": 9.0, "b": 1.0, "c": 0.1}
        return sum(scale * (1 - counts[name] / SIZES[name]) ** 2 for name, scale in scales.items())

    start = {name: size // 2 for name, size in SIZES.items()}
    bounds = {name: (50, size) for name, size in SIZES.items()}
    run = evolution.Evolution(start, bounds, fitness, 8, seed=0)
    before, values = run.value, [run.value]
    for _ in range(40):
        run.generation()
        values.append(run.value)
    assert values == sorted(values, reverse=True) and run.parent["a"] == pytest.approx(1000, abs=110)
    assert values[-1] < 0.3 * before
    # a generation: all children on an eighth, the best on half, the best of these on all
    assert calls[1:22] == [1] * 16 + [4] * 4 + [8]
    again = evolution.Evolution(start, bounds, fitness, 8, seed=0)
    for _ in range(40):
        again.generation()
    assert again.parent == run.parent


def test_the_evolutionary_search_prunes_a_level_once_and_runs_what_its_switches_change(evolution):
    """Its judge has the levels of the parent, so that no child is dearer after many generations."""
    model = make_llama(2)
    groups = make_groups(find_targets(model), "matrix")
    cache = ActivationCache(model, as_batches(tokens(4), model))
    measurement = Measurement(model, as_batches(tokens(8, seed=1), model, batch_size=1), like=cache)
    trial = Trial(groups, Pruning(cache, "wanda"), WeightSnapshot(find_targets(model)))
    start = allocate([group.layer for group in groups], 0.6, method="uniform")
    pruners, pruned = {}, []
    with evaluating(model):
        trial.apply(start, pruners)
        for name, pruner in pruners.items():
            prune = pruner.prune
            pruner.prune = lambda count, prune=prune, name=name: pruned.append((name, count)) or prune(count)
        judge = JointJudge(groups, measurement, evolution.remembering(pruners), start.counts, {})
        bounds = {group.name: (1, group.layer.numel) for group in groups}
        run, differing = evolution.evolution_of(judge, bounds, 8, seed=0), []
        at = judge.at
        run._fitness = lambda counts, batches: differing.append(judge._differing(counts, {})) or at(counts, batches)
        accepted = sum(run.generation() for _ in range(20))
        assert accepted > 3 and judge.counts == run.parent != start.counts
        assert run.value == pytest.approx(measurement.joint().mean, rel=1e-9)
    assert len(pruned) == len(set(pruned))
    assert max(map(len, differing)) <= 6  # three switches


def test_a_line_that_was_cut_does_not_count_and_is_removed_by_the_next(search, tmp_path):
    path = tmp_path / "results.jsonl"
    search.append_json_line(path, {"a": 1})
    path.write_text(path.read_text() + '{"cut')
    assert search.read_json_lines(path) == [{"a": 1}]
    search.append_json_line(path, {"b": 2})
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n'
    for damaged in ("[]", "{"):
        path.write_text(f'{{"a": 1}}\n{damaged}\n')
        with pytest.raises(SystemExit, match="results.jsonl:2: expected a JSON object"):
            search.read_json_lines(path)


def test_the_page_is_that_of_the_committed_results(search):
    check_page(search.table, "prune-search-*.jsonl")
