"""``leanstep compress``: from a folder to a GGUF file of a size, or to one line and nothing."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp_py_sync")
import gguf_models  # noqa: E402
from gguf_models import TEXT, LlamaCpp, make_model, save_folder  # noqa: E402

from leanstep._gguf.ggml import TYPES, dequantize  # noqa: E402
from leanstep.cli import main  # noqa: E402
from leanstep.pruning import InfeasibleBudget, Recovery, compress_checkpoint, prune_checkpoint  # noqa: E402
from leanstep.pruning.compress import menu  # noqa: E402
from leanstep.pruning.compress.checkpoint import sized  # noqa: E402
from leanstep.pruning.compress.compress import Size, menu_of  # noqa: E402
from leanstep.pruning.folder.files import open_checkpoint  # noqa: E402
from leanstep.pruning.measure.checks import Trial  # noqa: E402

FEW = ("Q8_0", "Q5_0", "Q4_0")
# rows of 18 bytes in Q4_0, an odd number of them
ODD = {"hidden_size": 32, "vocab_size": 401}
TOKENS = torch.randint(5, 400, (10, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def few_types(monkeypatch):
    """ggml makes large tables for the smallest."""
    monkeypatch.setattr(menu, "_TYPES", FEW)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_folder(folder / "llama")
    (folder / "text.txt").write_text(TEXT * 20)
    return folder


def arguments(base, out, *more: str) -> list[str]:
    small = ["--samples", "6", "--curve-samples", "3", "--held-out", "2", "--seq-len", "24", "--curves", "fisher"]
    return ["compress", str(base / "llama"), "--out", str(out), "--data", str(base / "text.txt"), *small, *more]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_llama_cpp_computes_what_the_compressed_model_does(tmp_path, name):
    folder, size = save_folder(tmp_path / "model", name), 420_000 if name == "gpt2" else 170_000
    result = compress_checkpoint(
        folder, tmp_path / "out", TOKENS, size=size, curves="measured", score="nearest", held_out=TOKENS[:2]
    )
    file = tmp_path / "out" / "model.gguf"
    assert 0.97 * size < file.stat().st_size <= size
    assert len({type for type, _ in result.encoded.values()}) > 1
    with LlamaCpp(file) as engine:
        outputs = engine.outputs(TOKENS[0].tolist(), embed=name == "bert")
    other = _with_values(name, result.encoded)
    with torch.no_grad():
        expected = other(input_ids=TOKENS[:1])
    expected = (expected.last_hidden_state if name == "bert" else expected.logits)[0]
    # llama.cpp rounds activations to 8 bits in products with such matrices
    assert (outputs - expected).square().mean() < 2e-3 * expected.square().mean()


def _with_values(name, encoded):
    model = make_model(name)
    with torch.no_grad():
        for key, (type, data) in encoded.items():
            parameter = model.get_parameter(key)
            values = dequantize(data, type, len(data[0]) // TYPES[type].size * TYPES[type].block)
            parameter.copy_(values.T if "c_" in key else values)
    return model


def test_the_command_writes_a_file_of_the_size_and_says_what_it_cost(base, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(base, out, "--size", "150kB", "--eval")) == 0
    printed = capsys.readouterr().out
    assert "bits per weight" in printed and "formats" in printed and "perplexity" in printed
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.gguf", "report.html", "sparsity.json"]
    assert (out / "model.gguf").stat().st_size <= 150_000
    content = json.loads((out / "sparsity.json").read_text())
    assert {row["pattern"] for row in content["layers"]} <= {"F16", *FEW}
    page = (out / "report.html").read_text()
    assert "Bits per weight of each matrix" in page and "dynamic programming" in page and "Sparsity over" not in page
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", trust_remote_code=False)
    assert model.config.hidden_size == 64


def test_the_other_commands_open_the_file_and_read_the_tokens_of_the_dense_model(base, tmp_path, capsys):
    out, text = tmp_path / "out", ["--data", str(base / "text.txt"), "--seq-len", "24", "--json"]
    assert main(arguments(base, out, "--bits-per-weight", "8", "--score", "nearest")) == 0
    capsys.readouterr()
    assert main(["eval", str(out), *text]) == main(["eval", str(base / "llama"), *text]) == 0
    compressed, dense = map(json.loads, capsys.readouterr().out.splitlines())
    assert compressed["tokens"] == dense["tokens"] and compressed["parameters"] == dense["parameters"]
    assert 0 < abs(compressed["loss"] - dense["loss"]) < 0.01
    assert main(["generate", str(out), "the", "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 4
    assert main(["prune", str(out), "--out", str(tmp_path / "pruned"), "--sparsity", "0.5", *text[:2]]) == 2
    assert "weights in GGUF only, which are quantised" in capsys.readouterr().err


def test_one_format_for_all_is_written_and_reported_where_it_is_better(base, tmp_path, monkeypatch):
    measured = Trial.additivity

    def favoured(self, measurement, allocation, *rest, **options):
        cost = measured(self, measurement, allocation, *rest, **options)
        return replace(cost, joint=0.0) if allocation.method == "uniform" else cost

    monkeypatch.setattr(Trial, "additivity", favoured)
    out = tmp_path / "out"
    assert main(arguments(base, out, "--bits-per-weight", "6", "--format", "dense")) == 0
    assert len({row["pattern"] for row in json.loads((out / "sparsity.json").read_text())["layers"]}) == 1
    page = (out / "report.html").read_text()
    assert "one format for all 0: the latter was applied" in page and "Bits per weight of each matrix" in page


def test_an_interrupted_run_goes_on_to_the_same_bytes(base, tmp_path, monkeypatch):
    assert main(arguments(base, tmp_path / "whole", "--bits-per-weight", "6")) == 0
    from leanstep.pruning.measure.curve_file import PartialCurves

    added, add = [], PartialCurves.add

    def interrupted(self, *args):
        add(self, *args)
        added.append(args)
        if len(added) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(PartialCurves, "add", interrupted)
    out = tmp_path / "out"
    assert main(arguments(base, out, "--bits-per-weight", "6")) == 130 and not out.exists()
    monkeypatch.setattr(PartialCurves, "add", add)
    assert main(arguments(base, out, "--bits-per-weight", "6")) == 2
    assert main(arguments(base, out, "--bits-per-weight", "6", "--resume")) == 0
    assert (out / "model.gguf").read_bytes() == (tmp_path / "whole" / "model.gguf").read_bytes()


def test_a_dense_folder_has_the_values(base, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(base, out, "--bits-per-weight", "5", "--format", "dense")) == 0
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).state_dict()
        for folder in (base / "llama", out)
    )
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert changed and all(after[name].dim() == 2 for name in changed)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bits-per-weight", "2"], "2.00 bits per weight) is out of reach: from .* (4.50 bits per weight)"),
        (["--size", "1kB"], "is out of reach"),
        (["--bytes", "0.5", "--format", "dense"], "a dense folder has the dense size"),
        (["--bits-per-weight", "5", "--dry-run"], ""),
    ],
)
def test_what_cannot_be_is_one_line_and_a_dry_run_writes_nothing(base, tmp_path, capsys, more, message):
    out = tmp_path / "out"
    code = main(arguments(base, out, *more))
    output = capsys.readouterr()
    assert not out.exists() and list(tmp_path.iterdir()) == []
    if "--dry-run" in more:
        assert code == 0 and "time about" in output.out
        assert re.search(r"sizes in reach: from .* \(4.50 bits per weight\) to below .* \(16.00 bits", output.out)
        return
    assert code == 2 and re.search(message.replace("(", r"\(").replace(")", r"\)"), output.err.splitlines()[-1])


def test_a_tokenizer_that_no_engine_has_is_refused_before_anything_is_measured(tmp_path, capsys):
    folder = save_folder(tmp_path / "llama", tokenizer="vowels apart")
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(arguments(tmp_path, tmp_path / "out", "--bits-per-weight", "5")) == 2
    error = capsys.readouterr().err
    assert "curves" not in error and str(folder) in error and not (tmp_path / "out").exists()


def test_the_least_size_is_met_where_tensors_are_filled_up(tmp_path, monkeypatch):
    monkeypatch.setitem(gguf_models.MODELS, "odd", ("Llama", {**gguf_models.SIZES, **gguf_models.HEADS, **ODD}))
    folder = save_folder(tmp_path / "model", "odd")
    settings = {"curves": "fisher", "score": "nearest", "held_out": TOKENS[:2]}
    with pytest.raises(InfeasibleBudget) as error:
        compress_checkpoint(folder, tmp_path / "out", TOKENS, size=1000, **settings)
    matrices = sized(open_checkpoint(folder), menu_of("gguf"), Size(size=90_000), "gguf").budget.target
    size = int(error.value.lowest + 90_000 - matrices)
    compress_checkpoint(folder, tmp_path / "out", TOKENS, size=size, **settings)
    assert (tmp_path / "out" / "model.gguf").stat().st_size <= size


def test_folders_of_sentence_transformers_are_compressed(tmp_path):
    folder = save_folder(tmp_path / "model", "bert")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    settings = {"curves": "fisher", "score": "nearest", "held_out": TOKENS[:2]}
    compress_checkpoint(folder, tmp_path / "out", TOKENS, bits_per_weight=6, **settings)
    assert (tmp_path / "out" / "model.gguf").is_file() and not (tmp_path / "out" / "1_Pooling").exists()


@pytest.mark.parametrize(
    ("call", "settings", "message"),
    [
        (compress_checkpoint, {"bits_per_weight": 6, "recovery": Recovery(steps=2)}, "recovery .*: give reconstruct"),
        (
            prune_checkpoint,
            {"sparsity": 0.5, "format": "gguf"},
            "gguf has the levels of pattern ggml; got pattern unstructured",
        ),
        (prune_checkpoint, {"sparsity": 0.5, "format": "onnx"}, "dense, gguf, sparse; got 'onnx'"),
    ],
)
def test_what_does_not_go_with_a_format_is_refused_at_once(base, tmp_path, call, settings, message):
    with pytest.raises(ValueError, match=message):
        call(base / "llama", tmp_path / "out", TOKENS, **settings)
    assert list(tmp_path.iterdir()) == []


def test_tensors_under_other_names_than_the_models_are_refused_with_advice(tmp_path):
    folder = save_folder(tmp_path / "model", "gpt2")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="transformer.h.0.attn.c_attn.weight under that name; .* save_pretrained"):
        compress_checkpoint(folder, tmp_path / "out", TOKENS, bits_per_weight=6)


@pytest.mark.parametrize("size", ["90 bananas", "-3MB", ""])
def test_a_size_is_a_number_with_a_unit(base, tmp_path, capsys, size):
    with pytest.raises(SystemExit):
        main(arguments(base, tmp_path / "out", f"--size={size}"))
    assert "90MB or 1.5GB" in capsys.readouterr().err
