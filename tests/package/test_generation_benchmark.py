"""The benchmark of generation: its specs, its engines, its page."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from comparison_runs import benchmark_modules
from transformers import LlamaConfig, LlamaForCausalLM

from leanstep.sparsity import export_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parts():
    yield from benchmark_modules("generation", ("engines", "tables"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small dense folder with zeros, and the sparse folder of it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(torch.bfloat16)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                weight[weight.abs() < weight.abs().median()] = 0.0
    root = tmp_path_factory.mktemp("generation")
    model.save_pretrained(root / "dense")
    export_folder(root / "dense", root / "sparse")
    return root


def test_specs_name_a_path_and_a_variant(parts):
    spec = parts.engines.Spec.parse
    assert spec("a=runs/x") == ("a", Path("runs/x"), "")
    assert spec("a b=runs/x@int8-dynamic") == ("a b", Path("runs/x"), "int8-dynamic")
    for wrong in ("runs/x", "=runs/x", "a=", "a=runs/x@int9"):
        with pytest.raises(ValueError, match="expected NAME=PATH"):
            spec(wrong)


@pytest.mark.filterwarnings("ignore")  # of torch's int8 quantisation
def test_engines_of_a_folder_generate_and_score_alike(parts, folders):
    texts = {"dense": "dense", "fp32": "dense@float32", "int8": "dense@int8-dynamic", "sparse": "sparse"}
    texts["loop"] = "dense@few-token-linear"
    specs = {name: parts.engines.Spec.parse(f"{name}={folders}/{text}") for name, text in texts.items()}
    engines = {name: parts.engines.open_engine(spec, threads=1) for name, spec in specs.items()}
    tokens = list(range(1, 40))
    want = torch.nn.functional.cross_entropy(
        engines["fp32"].model(torch.tensor([tokens])).logits[0, :-1], torch.tensor(tokens[1:]), reduction="none"
    )
    for engine in engines.values():
        generated = engine.generate(6)
        assert len(generated) == 6 and all(0 <= token < 64 for token in generated)
        losses = engine.losses(tokens)
        assert losses.shape == (38,) and torch.allclose(losses, want, atol=0.02)
    assert engines["fp32"].losses(tokens).tolist() == pytest.approx(want.tolist())
    assert engines["dense"].zeros() is None and abs(engines["sparse"].zeros() - 0.5) < 0.01
    assert {name: parts.engines.file_bytes(spec) is None for name, spec in specs.items()} == {
        "dense": False, "fp32": True, "int8": True, "sparse": False, "loop": False,
    }  # fmt: skip


def test_zeros_are_counted_by_the_masks(parts, folders):
    """A byte of 4-bit values holds two of them."""
    export_folder(folders / "dense", folders / "int4", values="int4")
    engine = parts.engines.open_engine(parts.engines.Spec("int4", folders / "int4"), threads=1)
    assert abs(engine.zeros() - 0.5) < 0.01


def row(name, seconds, **more):
    return {"name": name, "file_bytes": None, "zeros": None, "resident_bytes": 2_000_000, "seconds": seconds,
            "tokens_per_second": 4 / sorted(seconds)[len(seconds) // 2], **more}  # fmt: skip


def test_a_table_joins_calls_and_compares_with_the_first_of_each(parts, tmp_path):
    call = {"title": "x", "new_tokens": 4, "rounds": 3, "cpu_time": True, "tokens": 0, "machine": "m", "load": 1.0}
    calls = [
        call | {"models": [row("dense", [2.0, 4.0, 3.0]), row("sparse", [1.0, 1.5, 2.0], zeros=0.6, file_bytes=5e6)]},
        call | {"load": 2.5, "models": [row("dense", [6.0, 6.0, 6.0]), row("Q8_0", [1.5, 1.5, 1.5])]},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in calls))
    ((name, text),) = parts.tables.tables(tmp_path / "r.jsonl").items()
    caption, *table = text.split("\n\n")
    assert name == "generation-x" and caption.endswith("m, load 1.0 to 2.5.") and "Perplexity" not in caption
    assert table[0].splitlines()[2:] == [
        "| dense | – | – | 2 | 1.3 | 1.00 (0.75 to 1.50) |",
        "| sparse | 60 % | 5 | 2 | 2.7 | 2.00 (1.50 to 3.00) |",
        "| Q8_0 | – | – | 2 | 2.7 | 4.00 (4.00 to 4.00) |",
    ]
    (page := tmp_path / "docs" / "a" / "page.md").parent.mkdir(parents=True)
    page.write_text("<!-- table:generation-x -->\n<!-- /table:generation-x -->\n")
    parts.tables.write(tmp_path / "r.jsonl", tmp_path)
    assert text in page.read_text()
    picture = (tmp_path / "docs" / "generation-x.svg").read_text()
    assert "New tokens per second of processor time" in picture and "Q8_0: 2.7" in picture
    assert "Perplexity" not in picture


def test_a_call_needs_a_title_and_different_names(parts, monkeypatch, capsys):
    script = runpy.run_path(str(ROOT / "benchmarks" / "sparsity" / "generation.py"))
    monkeypatch.setattr(sys, "argv", ["generation", "a=x", "a=y", "--title", "t"])
    with pytest.raises(SystemExit):
        script["main"]()
    assert "expected models of different names and a --title" in capsys.readouterr().err


def test_the_page_is_that_of_the_committed_results(parts):
    blocks = parts.tables.tables(ROOT / "docs" / "results" / "generation.jsonl")
    page = (ROOT / "docs" / "measured" / "generation.md").read_text("utf-8")
    for name, text in blocks.items():
        assert f"<!-- table:{name} -->\n{text}\n<!-- /table:{name} -->" in page
    assert set(blocks) == {
        f"generation-{model}{processor}" for model in ("smollm2", "llama-1b") for processor in ("", "-avx2")
    }
    for name, picture in parts.tables.pictures(ROOT / "docs" / "results" / "generation.jsonl").items():
        assert (ROOT / "docs" / name).read_text("utf-8") == picture and f"(../{name})" in page
