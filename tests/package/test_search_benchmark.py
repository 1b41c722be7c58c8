"""The benchmark of searches over allocations: the evolutionary search it compares with, its table, its page."""

import json
import statistics
import sys

import pytest
import scipy.stats
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


def test_the_table_pairs_the_seeds_and_reads_their_intervals(search, tmp_path):
    ours, theirs = {0: (0.5, 0.4), 1: (0.6, 0.41), 2: (0.55, 0.39)}, {0: (0.6, 0.5), 1: (0.5, 0.5), 2: (0.6, 0.5)}
    lines = [SETTINGS]
    for method, cells in (("refined", ours), ("evolution", theirs)):
        for seed, values in cells.items():
            costs = dict(zip(("1", "2"), values, strict=True))
            row = {"seed": seed, "sparsity": 0.7, "method": method, "held_out": costs, "uniform": 1.0, "changes": 2}
            row |= MACHINE | {"moves": True}
            lines.append(row | {"programme": 0.7, "curve_seconds": 0.5})
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = search.table(path)
    percent = [100 * (ours[seed][1] / theirs[seed][1] - 1) for seed in range(3)]
    low, high = scipy.stats.t.interval(0.95, 2, statistics.mean(percent), scipy.stats.sem(percent))
    assert "| 70% | 2 | 3 | 1.0000 | 0.7000 | 0.4000 | 0.5000 | -42.9 [" in text
    assert f"] | -20.0 [{low:+.1f}, {high:+.1f}] |" in text
    assert "nano (SHA-256 of its weights: abcdef01), made by `leanstep train x`, score wanda" in text
    assert "m, commit c; load 1.5 to 1.5 on 2 processors" in text
    assert "ahead of evolution in 1 of 2 rows, behind in 0; in the others no difference is seen" in text
    assert "from DP" not in text.splitlines()[2]
    # the same cells of a second rival; before a refinement both have the programme's allocation, and no row counts
    third = [json.dumps(line | {"method": "evolution_from_programme"}) for line in lines[1:4]]
    path.write_text(path.read_text() + "".join(line + "\n" for line in third[:2]))
    assert search.table(path) == text
    path.write_text(path.read_text() + third[2] + "\n")
    text = search.table(path)
    assert "| evolution | evolution from DP | refined to DP, % | refined to evolution, % |" in text
    assert f"] | -20.0 [{low:+.1f}, {high:+.1f}] | +0.0 [+0.0, +0.0] |" in text
    assert "ahead of evolution from DP in 0 of 2 rows, behind in 0; in the others no difference is seen" in text
    path.write_text(path.read_text().replace(', "moves": true', ""))
    assert "| evolution* | evolution from DP* |" in search.table(path)
    assert "the refined search is ahead of evolution* in" in search.table(path)
    assert search.table(path).count("In searches with a *, by an earlier version") == 1
    unrefined = path.read_text().replace('"programme": 0.7', '"programme": 0.5')
    path.write_text(
        unrefined.replace('{"1": 0.6, "2": 0.41}', '{"1": 0.5, "2": 0.41}').replace('"1": 0.55', '"1": 0.5')
    )
    text = search.table(path)
    assert "in 1 of 1 rows, behind in 0. 1 rows have one seed, or no refinement yet, and do not count." in text


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
