"""Benchmark of N:M patterns: what it measures of a tiny LLaMA, its table, and the committed results."""

import json
import statistics

import pytest
import scipy.stats
from comparison_runs import benchmark_modules, check_page
from pruned_models import make_llama, save_model


@pytest.fixture(scope="module")
def patterns():
    yield from (parts.patterns for parts in benchmark_modules("pruning", ("patterns",)))


def test_the_differences_to_sparsegpt_are_paired_by_seed(patterns, tmp_path):
    lines = [{"name": "small", "samples": 4, "eval_samples": 4, "seq_len": 8, "weights": "abcdef0123"}]
    lines[0] |= {"dtype": "float32", "dense": {"perplexity": 3.25, "kl": 0.0}}
    kl = {"sparsegpt": (1.0, 1.2, 1.1), "alps": (0.9, 1.0, 1.1)}
    for score, values in kl.items():
        for seed, value in enumerate(values):
            row = {"seed": seed, "pattern": "2:4", "score": score, "kl": value, "perplexity": 10 * value}
            row |= {"seconds": 7.0, "gib": 1.25 + seed, "machine": "m, commit c", "load": 1.5, "processors": 2}
            lines.append(row)
    lines.append(lines[-1] | {"pattern": "4:8"})
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = patterns.table(path)
    percent = [100 * (mine / base - 1) for mine, base in zip(kl["alps"], kl["sparsegpt"], strict=True)]
    low, high = scipy.stats.t.interval(0.95, 2, statistics.mean(percent), scipy.stats.sem(percent))
    difference = f"{statistics.mean(percent):+.1f} [{low:+.1f}, {high:+.1f}]"
    assert f"| 2:4, ALPS | 0, 1, 2 | 1.0000 | {difference} | 10.00 | 7.0 | 3.25 |" in text.splitlines()
    assert "| 2:4, SparseGPT | 0, 1, 2 | 1.1000 | – | 11.00 | 7.0 | 3.25 |" in text.splitlines()
    assert "| 4:8, ALPS | 2 | 1.1000 | – | 11.00 | 7.0 | 3.25 |" in text.splitlines()
    assert "small (SHA-256 of its weights: abcdef01), float32, perplexity 3.25 before pruning" in text


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
