"""Benchmark of the kinds of curves: what it measures of a ViT, its table, and the committed results."""

import copy
import functools
import importlib
import json

import pytest
from comparison_runs import benchmark_modules, check_page

# of a seed, what does not depend on the clock
PRUNED = ("agreement", "divergence", "counts", "measured")


@pytest.fixture(scope="module")
def curves():
    yield from (parts.curves for parts in benchmark_modules("pruning", ("curves",)))


def test_a_file_without_a_seed_has_no_table(curves, tmp_path):
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="no seed that was measured to the end"):
        curves.table(tmp_path / "results.jsonl")


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
