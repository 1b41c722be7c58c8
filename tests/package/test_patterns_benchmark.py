"""Benchmark of N:M patterns: what it measures of a tiny LLaMA, its table, and the committed results."""

import json

import pytest
from comparison_runs import benchmark_modules, check_page
from pruned_models import make_llama, save_model


@pytest.fixture(scope="module")
def patterns():
    yield from (parts.patterns for parts in benchmark_modules("pruning", ("patterns",)))


def test_every_cell_is_measured_once_and_the_model_is_restored(patterns, tmp_path):
    folder = save_model(make_llama(2), tmp_path / "model")
    arguments = ["--model", str(folder), "--samples", "2", "--eval-samples", "2", "--seq-len", "16", "--seeds", "0"]
    arguments += ["--patterns", "2:4", "--out", str(tmp_path / "r.jsonl")]
    options = patterns.PARSER.parse_args(arguments)
    patterns.run(options)
    settings, *rows = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    assert [row["score"] for row in rows] == ["wanda", "sparsegpt", "alps"] and settings["dense"]["kl"] == 0
    assert all(row["kl"] > 0 for row in rows) and len({row["kl"] for row in rows}) == 3
    patterns.run(options)
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 4
    options.samples = 1
    with pytest.raises(SystemExit, match="other settings"):
        patterns.run(options)


def test_the_page_is_that_of_the_committed_results(patterns):
    check_page(patterns.table, "prune-patterns-*.jsonl")
