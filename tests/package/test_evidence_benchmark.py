"""The benchmark of allocations of a language model: what it prints of its results, and its page."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from comparison_runs import benchmark_modules, check_page
from pruned_models import make_llama, save_model

from leanstep.recipes.data.sources import sotu_corpus

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "name": "small", "samples": 4, "curve_samples": 2, "judge_samples": 4, "eval_samples": 4, "seq_len": 8,
    "anchor_minutes": 1.0, "refine_minutes": 2.0, "weights": "abcdef0123", "dtype": "bfloat16",
}  # fmt: skip
GAINS = {"uniform": 0.0, "anchored": 0.5, "refined": 1.0}
MACHINE = {"machine": "m, 1 threads, torch 2, commit aaa", "load": 1.5, "processors": 2}


@pytest.fixture(scope="module")
def evidence():
    yield from (parts.evidence for parts in benchmark_modules("pruning", ("evidence",)))


@pytest.fixture(scope="module")
def evidence_tables(evidence):
    return sys.modules[evidence.draw.__module__]


def row(score, sparsity, seed, allocation, kl, **more):
    cell = {"score": score, "sparsity": sparsity, "seed": seed, "allocation": allocation, "kl": kl}
    return cell | {"perplexity": 10 * kl, "seconds": 7.0, "gib": 1.25} | MACHINE | more


def write(path, rows):
    path.write_text("".join(json.dumps(line) + "\n" for line in [SETTINGS, *rows]))
    return path


def test_two_seeds_make_a_pair(evidence, tmp_path):
    rows = [row("wanda", 0.6, seed, name, 1.0) for seed in (0, 1) for name in ("anchored", "refined")]
    text = evidence.table(write(tmp_path / "r.jsonl", [row("", 0.0, 0, "dense", 0.0), *rows]))
    assert "| Wanda 60%, DP anchored and refined, to DP anchored | +0.0 [+0.0, +0.0] |" in text


def test_blocks_are_reconstructed_in_a_file_of_its_own(evidence, tmp_path):
    folder, rows = save_model(make_llama(2), tmp_path / "model"), []
    arguments = ["--model", str(folder), "--name", "tiny", "--samples", "24", "--judge-samples", "1", "--eval-samples"]
    arguments += ["2", "--seq-len", "16", "--allocations", "uniform", "--work", str(tmp_path), "--recover-batch", "2"]
    for steps in ("0", "10"):
        out = tmp_path / f"{steps}.jsonl"
        evidence.Bench(evidence.PARSER.parse_args([*arguments, "--out", str(out), "--reconstruct", steps])).run()
        rows.append([json.loads(line) for line in out.read_text().splitlines()])
        assert ("reconstructed in 10 steps of 2 x 16" in evidence.table(out)) == (steps == "10")
    assert rows[0][-1]["kl"] != rows[1][-1]["kl"] and rows[0][1]["kl"] == rows[1][1]["kl"]


def test_accuracies_stand_beside_perplexities(evidence, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra tasks")
    folder = save_model(make_llama(2, max_position_embeddings=512), tmp_path / "model")
    arguments = ["--model", str(folder), "--name", "tiny", "--samples", "2", "--judge-samples", "1", "--eval-samples"]
    arguments += ["2", "--seq-len", "16", "--allocations", "uniform", "owl", "--seeds", "0", "1", "--questions", "8"]
    out = tmp_path / "r.jsonl"
    evidence.Bench(evidence.PARSER.parse_args([*arguments, "--out", str(out), "--work", str(tmp_path)])).run()
    rows = [json.loads(line) for line in (tmp_path / "task" / "questions.jsonl").read_text().splitlines()]
    text = " ".join(" ".join(sotu_corpus().documents()).split())
    assert len(rows) == 8 and all(f"{row['begin']} {row['choices'][row['answer']]}" in text for row in rows)
    gains = [100 / 8 * n for n in range(9)]
    values = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert all(value["accuracy"] in gains and value["stderr"] >= 0 for value in values)
    assert re.search(r"\| Wanda 60%, OWL \| 0, 1 \| [\d.]+ ± [\d.]+ \| [+-][\d.]+ \[", evidence.table(out))


def test_recovery_trains_the_pruned_model_and_leaves_the_dense_one(evidence, tmp_path):
    """A cell and its recovery, of a tiny LLaMA: the zeros are held, and the weights come back."""
    folder = save_model(make_llama(2), tmp_path / "model")
    arguments = ["--model", str(folder), "--name", "tiny", "--samples", "2", "--judge-samples", "1", "--eval-samples"]
    arguments += ["2", "--seq-len", "16", "--allocations", "uniform", "--recover", "3", "--recover-samples", "4"]
    options = evidence.PARSER.parse_args([*arguments, "--out", str(tmp_path / "r.jsonl"), "--work", str(tmp_path)])
    bench = evidence.Bench(options)
    dense = {name: value.clone() for name, value in bench.model.state_dict().items()}
    bench.run()
    cell = evidence.Cell("wanda", 0.6, 0, "uniform")
    pruned, trained = bench.rows[cell], bench.rows[evidence.recovered(cell)]
    assert trained["kl_before"] == pruned["kl"] > trained["kl"] and trained["steps"] == 3
    assert all(torch.equal(value, dense[name]) for name, value in bench.model.state_dict().items())
    count = len(bench.rows)
    bench.run()
    assert len(bench.rows) == count == len((tmp_path / "r.jsonl").read_text().splitlines()) - 1


@pytest.mark.slow
def test_alps_takes_the_curves_of_sparsegpt_where_it_is_told_to(evidence, tmp_path):
    """Curves are measured once for both scores, and a row names the score of its curves."""
    folder = save_model(make_llama(2), tmp_path / "model")
    arguments = ["--model", str(folder), "--name", "tiny", "--samples", "2", "--judge-samples", "2", "--eval-samples"]
    arguments += ["2", "--seq-len", "16", "--refine-minutes", "0.02", "--anchor-minutes", "0.02", "--scores"]
    arguments += ["sparsegpt", "alps", "--allocations", "uniform", "measured", "refined", "evolution", "--curve-score"]
    arguments += ["sparsegpt", "--out", str(tmp_path / "r.jsonl"), "--work", str(tmp_path / "work")]
    bench = evidence.Bench(evidence.PARSER.parse_args(arguments))
    bench.run()
    curves = [cell for cell in bench.rows if cell.allocation.startswith("curves")]
    assert {cell.score for cell in curves} == {"sparsegpt"} and len(curves) == 3
    of_alps = {cell.allocation: row for cell, row in bench.rows.items() if cell.score == "alps"}
    assert [row.get("curve_score") for row in of_alps.values()] == [None, "sparsegpt", "sparsegpt", "sparsegpt"]
    assert not any("curve_score" in row for cell, row in bench.rows.items() if cell.score == "sparsegpt")
    assert of_alps["measured"]["seconds"] > bench.rows[curves[0]]["seconds"]
    text = evidence.table(tmp_path / "r.jsonl")
    assert "| ALPS 60%, DP measured by block (of SparseGPT) |" in text
    assert "A score in brackets is that of the curves" in text


def test_the_pictures_are_of_the_committed_results(evidence_tables):
    for name in ("prune-evidence-nano", "prune-evidence-smollm2"):
        points = evidence_tables.plotted(ROOT / "docs" / "results" / f"{name}.jsonl")
        picture = (ROOT / "docs" / f"{name}.svg").read_text("utf-8")
        assert f"<dc:description>{evidence_tables.identity(points)}</dc:description>" in "".join(picture.split())
    assert points["wanda"]["refined"][0.6] == pytest.approx((1.08, 0.0), abs=0.05)


def test_a_picture_shows_scores_of_several_sparsities_and_seeds(evidence, evidence_tables, tmp_path):
    rows = [row("wanda", sparsity, seed, "uniform", 1 + seed) for sparsity in (0.5, 0.6) for seed in (0, 1)]
    rows += [row("alps", 0.6, seed, "uniform", 1.0) for seed in (0, 1)] + [row("wanda", 0.7, 0, "uniform", 3.0)]
    path = write(tmp_path / "r.jsonl", rows)
    assert evidence_tables.plotted(path)["wanda"] == {"uniform": {0.5: (1.5, 0.5), 0.6: (1.5, 0.5)}}
    evidence.draw(path, tmp_path / "r.svg")
    picture = (tmp_path / "r.svg").read_text("utf-8")
    assert "Wanda's scores" in picture and "ALPS's scores" not in picture
    evidence.draw(write(tmp_path / "few.jsonl", rows[:2]), tmp_path / "few.svg")
    assert not (tmp_path / "few.svg").exists()


def test_measured_and_fisher_curves_serve_all_sparsities(evidence):
    cells = [evidence.Cell("wanda", sparsity, 1, "refined") for sparsity in (0.5, 0.6)]
    for kind, count in (("measured", 1), ("fisher", 1), ("anchored", 2)):
        keys = {evidence.curves_of(cell, kind) for cell in cells}
        assert len(keys) == count and {key.seed for key in keys} == {1}


def test_the_page_is_that_of_the_committed_results(evidence):
    check_page(evidence.table, "prune-evidence-*.jsonl")


def test_the_cross_trains_in_two_ways_and_compares_each_with_uniform(evidence, tmp_path, monkeypatch):
    [parts] = benchmark_modules("pruning", ("cross",))
    calls = []
    monkeypatch.setattr(parts.cross.subprocess, "run", lambda words, check: calls.append(words[3:]))
    parts.cross.run(parts.cross.PARSER.parse_args(["--out", str(tmp_path / "r.jsonl")]))
    recovery, reconstruction = map(evidence.PARSER.parse_args, calls)
    assert recovery.recover == 60 and recovery.recover_samples == recovery.samples == reconstruction.samples == 128
    assert reconstruction.reconstruct == 100 and reconstruction.out.name == "r-reconstructed.jsonl"
    rows = [row("wanda", 0.5, seed, name, 2.0 - gain) for seed in (0, 1) for name, gain in GAINS.items()]
    trained = [
        row("wanda", 0.5, seed, f"{name} recovered", 1.0, steps=60) for seed in (0, 1) for name in GAINS
    ]  # fmt: skip
    write(recovery.out, [row("", 0.0, 0, "dense", 0.0), *rows, *trained])
    reconstruction.out.write_text(json.dumps(SETTINGS | {"reconstruct": 100}) + "\n")
    text = parts.cross.table(recovery.out)
    assert "| Wanda 50%, none | 0, 1 | 2.0000 | -25.0 [-25.0, -25.0] | -50.0 [-50.0, -50.0] | 20.00 | 7 |" in text
    assert "| Wanda 50%, recovery | 0, 1 | 1.0000 | +0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] | 10.00 | 7 |" in text
    assert "reconstruction |" not in text
    check_page(parts.cross.table, "prune-cross.jsonl")


def test_the_table_of_levels_has_the_last_rows_of_each_commit(tmp_path, monkeypatch):
    [parts] = benchmark_modules("pruning", ("levels",))
    monkeypatch.setattr(parts.levels, "SHAPES", ((8, 16), (16, 8), (12, 8)))
    parts.levels.run(parts.levels.PARSER.parse_args(["--out", str(tmp_path / "r.jsonl"), "--repeats", "1"]))
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(rows) == 9 and all(row["prepare"] > 0 < row["level"] for row in rows)
    first = [row | {"machine": "m, commit a", "level": 9.0} for row in rows]
    rows = [*first, *(row | {"machine": "m, commit b", "prepare": 0.5, "level": 0.25} for row in rows)]
    rows += [row | {"prepare": 0.1234, "level": 0.5} for row in first]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = parts.levels.table(tmp_path / "r.jsonl")
    assert "| alps, 12 x 8 | 123.4 + 500.0 | 500.0 + 250.0 |" in text
    check_page(parts.levels.table, "prune-levels.jsonl")
