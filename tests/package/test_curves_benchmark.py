"""Benchmark of the kinds of curves: what it measures of a ViT, its table, and the committed results."""

import copy
import functools
import importlib
import json
import statistics

import pytest
import scipy.stats
from comparison_runs import benchmark_modules, check_page

# of a seed, what does not depend on the clock
PRUNED = ("agreement", "divergence", "counts", "measured")


@pytest.fixture(scope="module")
def curves():
    yield from (parts.curves for parts in benchmark_modules("pruning", ("curves",)))


def test_the_differences_to_measured_curves_are_paired_by_seed(curves, tmp_path):
    settings = {"score": "wanda", "samples": 4, "curve_samples": 2, "seq_len": 8, "eval_samples": 4, "levels": [0.5]}
    settings |= {"sparsities": [0.6], "name": "nano", "weights": "abcdef0123", "made_by": "leanstep train x"}
    lines, measured, fisher = [settings | {"metric": "kl"}], (1.0, 2.0, 4.0), (1.1, 2.0, 5.0)
    for seed, (base, other) in enumerate(zip(measured, fisher, strict=True)):
        divergence = {rule: {"0.6": base} for rule in ("measured", "anchored", "uniform")} | {"fisher": {"0.6": other}}
        agreement = {"anchored": {"0.5": [1.0, 1.0]}, "fisher": {"0.5": [0.9 - 0.1 * seed, 1.5]}}
        row = {"seed": seed, "matrices": 7, "seconds": dict.fromkeys(curves.KINDS, 2.0 + seed)}
        row |= {"agreement": agreement, "divergence": divergence}
        lines.append(row | {"machine": "m, commit c", "load": 1.5, "processors": 2})
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = curves.table(path)
    percent = [10.0, 0.0, 25.0]
    low, high = scipy.stats.t.interval(0.95, 2, statistics.mean(percent), scipy.stats.sem(percent))
    assert f"| fisher | 2.7000 (+11.7 [{low:+.1f}, {high:+.1f}] %) |" in text
    assert "| fisher | 3.0 | 0.800, 1.50 |" in text
    assert "| measured | 3.0 | – |" in text
    assert "7 matrices" in text and "calibration seeds 0, 1, 2" in text
    path.write_text(path.read_text().partition("\n")[0] + "\n")
    with pytest.raises(SystemExit, match="no seed that was measured to the end"):
        curves.table(path)


def test_sums_of_distortions_are_those_of_the_curves_of_other_seeds(curves):
    """Two matrices of 100 weights, two levels, three seeds; allocations are at levels."""
    values = [((1.0, 4.0), (2.0, 6.0)), ((1.5, 3.0), (2.5, 7.0)), ((0.5, 5.0), (1.0, 8.0))]
    measured = [[[100, [100, 50, 20], [0.0, *matrix]] for matrix in seed] for seed in values]
    level = {50: 0, 20: 1}
    allocations = [
        {"measured": (50, 20), "anchored": (20, 50), "fisher": (20, 20), "uniform": (50, 50)},
        {"measured": (50, 50), "anchored": (50, 50), "fisher": (20, 50), "uniform": (50, 50)},
        {"measured": (20, 20), "anchored": (50, 20), "fisher": (20, 20), "uniform": (50, 50)},
    ]
    rows = [
        {"measured": curves_of_seed, "counts": {rule: {"0.5": counts} for rule, counts in rules.items()}}
        for curves_of_seed, rules in zip(measured, allocations, strict=True)
    ]
    table = curves._sum_table({"sparsities": [0.5]}, rows).splitlines()
    assert table[0] == "| sum of distortions | 50% |" and len(table) == 2 + 3

    def total(seed, rule):
        others = [values[other] for other in range(3) if other != seed]
        counts = allocations[seed][rule]
        return sum(m[level[count]] for other in others for m, count in zip(other, counts, strict=True))

    for line, rule in zip(table[2:], ("anchored", "fisher", "uniform"), strict=True):
        percent = [100 * (total(seed, rule) / total(seed, "measured") - 1) for seed in range(3)]
        low, high = scipy.stats.t.interval(0.95, 2, statistics.mean(percent), scipy.stats.sem(percent))
        assert line == f"| {rule} | {statistics.mean(percent):+.2f} [{low:+.2f}, {high:+.2f}] % |"


def test_the_caption_says_what_anchored_curves_measure(curves):
    settings = {"curve_samples": 8, "metric": "kl", "anchor_minutes": 0.5}
    whole, part = {"matrices": 7}, {"matrices": 7, "anchored": 7, "anchored_on": 2}
    assert curves._anchored(settings, [whole]) == ""  # of an earlier version
    assert curves._anchored(settings, [{**whole, "anchored": 7, "anchored_on": 8}]) == ""
    within = ", in at most 30 s by the clock after the Fisher curves."
    for rows, expected in (
        ([part, part], f"all matrices on the first 2 of these sequences{within}"),
        ([{**part, "anchored_on": 1}], f"all matrices on the first of these sequences{within}"),
        ([{**part, "anchored_on": 1}, part], f"all matrices on the first 1 to 2 of these sequences{within}"),
        ([{**part, "anchored": 3}, part], f"3 to 7 of the matrices on the first 2 of these sequences{within}"),
        ([{**whole, "anchored": 5}], f"5 of the matrices{within}"),
        (
            [{**whole, "anchored": [7, 4], "anchored_on": [2, 1]}],
            f"4 to 7 of the matrices on the first 1 to 2 of these sequences{within}",
        ),
    ):
        assert curves._anchored(settings, rows) == f" Anchored curves measure {expected}"
    assert "of these images" in curves._anchored({**settings, "metric": "mse_logits"}, [part])


@pytest.mark.slow
def test_a_vision_transformer_is_measured_seed_by_seed_and_inside_a_seed_goes_on(curves, tmp_path, monkeypatch):
    training = importlib.import_module("digits.training")
    train = functools.cache(training.trained)  # once for all calls
    monkeypatch.setattr(training, "trained", lambda run: copy.deepcopy(train(run)))
    out = tmp_path / "results.jsonl"
    settings = ["--model", "digits", "--samples", "16"]
    settings += ["--curve-samples", "8", "--eval-samples", "16", "--sparsities", "0.5", "--grid", "0.3", "0.5", "0.8"]
    settings += ["--levels", "0.3", "--work", str(tmp_path / "work"), "--out", str(out), "--seeds", "0", "1"]

    def call(*more):
        curves.run(curves.PARSER.parse_args([*settings, *more]))

    call()
    *done, last = out.read_text().splitlines(keepends=True)
    out.write_text("".join(done))
    call()
    assert out.read_text().splitlines(keepends=True)[:-1] == done
    first, second, again = json.loads(done[1]), json.loads(last), json.loads(out.read_text().splitlines()[-1])
    assert (first["seed"], second["seed"]) == (0, 1)
    for row in (first, second):
        assert row["agreement"]["fisher"]["0.3"][0] > 0.8
        assert row["divergence"]["measured"]["0.5"] < row["divergence"]["uniform"]["0.5"]
    # the files of its curves and their times were there
    assert again["seconds"] == second["seconds"] and None not in second["seconds"].values()
    assert [again[key] for key in PRUNED] == [second[key] for key in PRUNED]
    assert "| sum of distortions | 50% |" in curves.table(out)
    # curves that a call measured in part have no time
    out.write_text("".join(done))
    (points,) = (tmp_path / "work").glob("results-1-measured.jsonl")
    points.write_text("".join(points.read_text().splitlines(keepends=True)[:-1]))
    points.with_suffix(".seconds").unlink()
    call()
    again = json.loads(out.read_text().splitlines()[-1])
    assert again["seconds"] == second["seconds"] | {"measured": None}
    assert [again[key] for key in PRUNED] == [second[key] for key in PRUNED]
    with pytest.raises(SystemExit, match="of another model or other settings: give another --out"):
        call("--score", "magnitude")
    with pytest.raises(SystemExit, match="--levels 0.4: not in --grid, so nothing is measured there"):
        call("--levels", "0.4")


def test_the_page_is_that_of_the_committed_results(curves):
    check_page(curves.table, "prune-curves-*.jsonl")
