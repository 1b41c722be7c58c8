"""Benchmark of compressed files: what it measures of a tiny LLaMA in llama.cpp, and the committed results."""

import json

import pytest
import torch
from comparison_runs import benchmark_modules, check_page

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp_py_sync")
from gguf_models import save_folder  # noqa: E402

from leanstep.pruning.compress import menu  # noqa: E402


@pytest.fixture(scope="module")
def compress():
    yield from (parts.compress for parts in benchmark_modules("pruning", ("compress",)))


@pytest.fixture(scope="module")
def rounding():
    yield from (parts.rounding for parts in benchmark_modules("pruning", ("rounding",)))


def test_files_are_no_larger_than_the_mix_and_judged_in_llama_cpp(compress, tmp_path, monkeypatch):
    monkeypatch.setattr(menu, "_TYPES", ("Q8_0", "Q5_0", "Q4_0"))
    folder = save_folder(tmp_path / "model", "llama")
    arguments = ["--model", str(folder), "--samples", "3", "--curve-samples", "2", "--eval-samples", "2"]
    arguments += ["--seq-len", "16", "--seeds", "0", "--mixes", "Q5_0", "--out", str(tmp_path / "r.jsonl")]
    options = compress.PARSER.parse_args(arguments)
    compress.run(options)
    settings, *rows = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    assert [row["method"] for row in rows] == ["mix", "mix-imatrix", "uniform", "nearest", "gptq"]
    assert abs(settings["dense"]["kl"]) < 1e-5  # llama.cpp's F32 is transformers' model
    assert all(row["bytes"] <= rows[0]["bytes"] and row["kl"] > 0 for row in rows)
    assert len({row["kl"] for row in rows}) == 5
    compress.run(options)
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 6
    assert "Q5_0: programme, compensated" in compress.table(tmp_path / "r.jsonl")


@pytest.mark.parametrize("search", ["largest", "squares"])
def test_a_search_ends_where_no_step_of_one_weight_gains(search, rounding, monkeypatch):
    monkeypatch.setattr(rounding, "_TRIED", 64)
    chance = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(3, 64, generator=chance), torch.randn(40, 64, generator=chance)
    start, end = (
        rounding.rounded_by(name, "Q4_0", weight, inputs, inputs, 1000) for name in ("gptq", f"gptq-{search}")
    )

    def cost(values):
        errors = (values - weight) @ inputs.T
        return errors.abs().amax(dim=1) if search == "largest" else errors.square().sum(dim=1)

    assert (cost(end) < cost(start)).all()
    step = (end[:, None] - end[:, :, None]).abs()  # of a block's values, which are multiples of its scale
    for block in (slice(0, 32), slice(32, 64)):
        distances = step[:, block, block].flatten(1)
        scale = distances.masked_fill(distances < 1e-4, torch.inf).amin(dim=1)
        for column in range(block.start, block.stop):
            for change in (scale, -scale):
                moved = end.clone()
                moved[:, column] += change
                inside = (moved[:, column] / scale).abs() < 7.5
                assert (cost(moved)[inside] > cost(end)[inside] * (1 - 1e-5)).all()


@pytest.mark.slow
def test_an_embedding_model_is_pruned_and_compressed_beside_uniform_allocations(tmp_path):
    folder, out = save_folder(tmp_path / "model", "bert"), tmp_path / "r.jsonl"
    for parts in benchmark_modules("pruning", ("minilm",)):
        arguments = ["--samples", "20", "--held-out", "4", "--seq-len", "16", "--curves", "fisher", "--seeds", "0"]
        options = parts.minilm.PARSER.parse_args(["--model", str(folder), *arguments, "--out", str(out)])
        parts.minilm.run(options)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["metric"] for row in rows] == ["cosine", "cosine"]
        assert all(len(row["costs"]) == 2 and min(row["costs"].values()) > 0 for row in rows)
        parts.minilm.run(options)  # nothing is missing
        assert len(out.read_text().splitlines()) == 2
        assert "| 50 % zeros, dp | " in parts.minilm.table(out)


def test_the_page_is_that_of_the_committed_results(compress, rounding):
    for parts in benchmark_modules("pruning", ("minilm",)):
        check_page(parts.minilm.table, "minilm.jsonl")
    check_page(compress.table, "compress-*.jsonl")
    check_page(rounding.table, "rounding-*.jsonl")
