"""Files that llama.cpp opens: its logits and tokens are those of transformers and tokenizers, their sizes as said."""

import json

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp_py_sync")
import gguf_models  # noqa: E402
from gguf_models import MODELS, LlamaCpp, make_model, save_folder, save_tokenizer  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from leanstep._gguf.ggml import TYPES, dequantize, quantize  # noqa: E402
from leanstep._gguf.writer import check_writable, file_bytes, tensor_names, write_gguf  # noqa: E402
from leanstep.cli import main  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


@pytest.mark.sample(len(MODELS))
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(name, tmp_path):
    folder, out = save_folder(tmp_path / "folder", name), tmp_path / "model.gguf"
    check_writable(folder)
    write_gguf(folder, out, default="F32")
    assert out.stat().st_size == file_bytes(folder, {}, "F32")
    tokens = torch.randint(5, gguf_models.TOKENS, (40,)).tolist()
    with LlamaCpp(out) as engine:
        outputs = engine.outputs(tokens, embed=name == "bert")
    with torch.no_grad():
        answer = make_model(name)(torch.tensor([tokens]))
    expected = (answer.last_hidden_state if name == "bert" else answer.logits)[0]
    # llama.cpp looks GELU up in a table of fp16
    tolerance = 1e-5 if MODELS[name][0] in ("Llama", "Mistral", "Qwen2", "Qwen3") else 2e-3
    assert (outputs - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("name", ["llama, all rows of 256", "qwen2", "gpt2", "gemma2"])
def test_transformers_reads_the_weights_back(name, tmp_path):
    folder, out = save_folder(tmp_path / "folder", name), tmp_path / "model.gguf"
    values = load_file(folder / "model.safetensors")
    matrices = [key for key, shape in ((key, value.shape) for key, value in values.items()) if len(shape) == 2]
    matrices = [key for key in matrices if "wpe" not in key and key in tensor_names(folder)]
    encoded = {}
    for index, key in enumerate(matrices[:-1]):
        stored = values[key].T if "c_" in key else values[key]
        type = "Q4_K" if index % 2 and stored.shape[1] % 256 == 0 else "Q8_0"
        data = quantize(stored, type, torch.rand(stored.shape[1]))
        encoded[key] = type, data
        read = dequantize(data, type, stored.shape[1])
        values[key] = read.T if "c_" in key else read
    write_gguf(folder, out, encoded, default="F32")
    assert out.stat().st_size == file_bytes(folder, {key: type for key, (type, _) in encoded.items()}, "F32")
    state = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32).state_dict()
    for key, value in values.items():
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("default", ["Q4_K", "Q8_0", "IQ3_XXS", "BF16"])
def test_a_shape_that_cannot_have_the_default_gets_the_next_larger_type(default, tmp_path):
    folder, out = save_folder(tmp_path / "folder", "qwen2"), tmp_path / "model.gguf"
    write_gguf(folder, out, default=default)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    shorter = {"Q4_K": "IQ4_NL", "IQ3_XXS": "IQ4_NL"}.get(default, default)
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == shorter
    assert (
        types["blk.1.ffn_down.weight"] == default and types["blk.0.attn_q.bias"] == types["output_norm.weight"] == "F32"
    )
    assert set(tensor_names(folder).values()) == set(types)
    assert out.stat().st_size == file_bytes(folder, {}, default)
    with LlamaCpp(out) as engine:
        assert engine.outputs([5, 6, 7]).isfinite().all()


TEXTS = [
    "",
    "hello",
    " hello  world",
    "In 2024, 1234567 people's cafés\n\n\tdidn't\r\n close!",
    "naïve 中文 русский 😀 ½ _x1",
]


@pytest.mark.parametrize(
    ("kind", "model", "pre"),
    [
        ("recipe", "gpt2", "gpt-2"),
        ("digits", "gpt2", "smollm"),
        ("digits, begun and ended", "gpt2", "smollm"),
        ("llama 3", "gpt2", "llama-bpe"),
        ("sentence pieces", "llama", "default"),
        ("word pieces", "bert", "default"),
    ],
)
@pytest.mark.sample(6)
def test_llama_cpp_makes_the_same_tokens(kind, model, pre, tmp_path):
    folder, out = (
        save_folder(tmp_path / "folder", "bert" if model == "bert" else "llama", kind),
        tmp_path / "model.gguf",
    )
    write_gguf(folder, out, default="Q8_0")
    fields = gguf.GGUFReader(out).fields
    assert fields["tokenizer.ggml.model"].contents() == model and fields["tokenizer.ggml.pre"].contents() == pre
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with LlamaCpp(out) as engine:
        for text in TEXTS:
            assert engine.tokens(text) == tokenizer.encode(text).ids, text


def test_what_a_chat_needs_is_in_the_file(tmp_path):
    folder, out = save_folder(tmp_path / "folder", tokenizer="digits"), tmp_path / "model.gguf"
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    write_gguf(folder, out)
    contents = {name: field.contents() for name, field in gguf.GGUFReader(out).fields.items()}
    assert contents["tokenizer.chat_template"] == "{{ messages }}" and contents["general.name"] == "folder"
    assert contents["tokenizer.ggml.bos_token_id"] == 0 and contents["tokenizer.ggml.eos_token_id"] == 1
    types = contents["tokenizer.ggml.token_type"]
    assert types[0] == gguf.TokenType.CONTROL and gguf.TokenType.USER_DEFINED in types
    assert len(types) == gguf_models.TOKENS


def changed_weights(folder, change):
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors", {"format": "pt"})


def without(name):
    return lambda folder: changed_weights(folder, lambda values: values.pop(name))


BAD_FOLDERS = {
    "architecture": (dict(model_type="mamba"), None, "GGUF is written for llama, mistral, .*, got model_type 'mamba'"),
    "activation": (dict(hidden_act="relu"), None, "llama.cpp computes llama with hidden_act 'silu', got 'relu'"),
    "rotation": (
        dict(rope_parameters={"rope_type": "yarn"}),
        None,
        "rope_type default or linear or llama3, got 'yarn'",
    ),
    "rotation of another": (dict(model_type="qwen2", rope_parameters=gguf_models.LLAMA3), None, "linear, got 'llama3'"),
    "part": (dict(partial_rotary_factor=0.5), None, "partial_rotary_factor 1, got 0.5"),
    "window": (dict(model_type="mistral", sliding_window=8), None, "sliding_window null, got 8"),
    "setting": (
        dict(rms_norm_eps=None),
        lambda f: drop_setting(f, "rms_norm_eps"),
        "expected a number rms_norm_eps in config",
    ),
    "heads": (dict(num_key_value_heads=1), None, "llama.cpp refuses .* 'blk.0.attn_k.weight'"),
    "nonsense": (dict(rope_parameters=[1]), None, r"config.json cannot be understood \(AttributeError"),
    "compressed": (dict(quantization_config={"quant_method": "leanstep"}), None, "--format dense"),
    "tensor": (
        {},
        lambda f: changed_weights(f, lambda v: v.update(x=torch.ones(2, 3))),
        r"x \(2, 3\) cannot be written",
    ),
    "layer": ({}, without("model.layers.1.mlp.up_proj.weight"), "llama.cpp refuses .* 'blk.1.ffn_up.weight'"),
    "embedding": (dict(vocab_size=500), None, "expected an embedding of 500 tokens, got \\(400, 64\\)"),
    "no tokenizer": ({}, lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "unknown cut": ({}, lambda f: save_tokenizer(f, "vowels apart"), "llama.cpp makes other tokens than tokenizers of"),
    "case": ({}, lambda f: save_tokenizer(f, "word pieces with case"), "llama.cpp makes other tokens"),
    "unigram": ({}, lambda f: unigram(f), "GGUF files are written with BPE on bytes, .*; got Unigram"),
    "damaged": ({}, lambda f: (f / "tokenizer.json").write_text('{"model": {}}'), "cannot be read by tokenizers"),
    "weights": ({}, lambda f: (f / "model.safetensors").unlink(), "expected weights in model.safetensors"),
}


def drop_setting(folder, name):
    config = json.loads((folder / "config.json").read_text())
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))


def unigram(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["b", -1.0]], "byte_fallback": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.sample(len(BAD_FOLDERS))
@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_what_cannot_be_written_is_refused_before(case, tmp_path):
    settings, change, message = BAD_FOLDERS[case]
    folder = save_folder(tmp_path / "folder", **settings)
    if change is not None:
        change(folder)
    with pytest.raises(ValueError, match=message) as error:
        check_writable(folder)
    assert "\n" not in str(error.value)


GEMMA_SETTINGS = {
    "scale": (dict(query_pre_attn_scalar=100), "query_pre_attn_scalar 32, got 100"),
    "windows": (dict(layer_types=["full_attention"] * 2), "layer_types with full_attention in every layer of number 2"),
    "activation": (dict(hidden_activation="gelu"), "hidden_activation 'gelu_pytorch_tanh'"),
}


@pytest.mark.parametrize("case", GEMMA_SETTINGS)
def test_settings_of_gemma_that_llama_cpp_does_not_compute(case, tmp_path):
    settings, message = GEMMA_SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        check_writable(save_folder(tmp_path / "folder", "gemma2", **settings))


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path):
    folder, out = save_folder(tmp_path / "folder"), tmp_path / "out" / "model.gguf"
    out.parent.mkdir()
    name = "model.layers.1.mlp.up_proj.weight"

    def refused(message, **settings):
        with pytest.raises(ValueError, match=message):
            write_gguf(folder, out, **settings)
        assert not list(out.parent.iterdir())

    for value, message in (
        (torch.nan, "cannot write values that are not finite as F16"),
        (1e6, "F16 holds values up to"),
    ):
        changed_weights(folder, lambda values, value=value: values.update({name: torch.full((256, 64), value)}))
        refused(f"{name}: {message}")
    zeros = torch.zeros(256, 68, dtype=torch.uint8)
    refused("has no tensor 'x' to write in Q8_0", encoded={"x": ("Q8_0", zeros)})
    refused(r"as Q8_0 is uint8 of shape \(256, 68\), got torch.uint8 of \(68, 256\)", encoded={name: ("Q8_0", zeros.T)})
    refused("Q4_K needs rows of a multiple of 256", encoded={name: ("Q4_K", zeros)})
    norm = ("Q8_0", torch.zeros(1, 68, dtype=torch.uint8))
    refused("model.norm.weight is written in F32", encoded={"model.norm.weight": norm})
    refused("expected a type .* got 'IQ2_XXS'", default="IQ2_XXS")
    refused("expected a type .* got 'Q9'", default="Q9")
    out.write_text("mine")
    with pytest.raises(ValueError, match="exists already, and nothing is overwritten"):
        write_gguf(folder, out)
    assert out.read_text() == "mine"
    with pytest.raises(ValueError, match="is no folder"):
        write_gguf(folder, tmp_path / "nowhere" / "model.gguf")


def test_the_command_writes_a_file(tmp_path, capsys):
    folder, out = save_folder(tmp_path / "folder"), tmp_path / "model.gguf"
    assert main(["export", str(folder), "--format", "gguf", "--out", str(out), "--type", "Q8_0"]) == 0
    assert "16 tensors in Q8_0" in capsys.readouterr().out and out.stat().st_size == file_bytes(folder, {}, "Q8_0")
    assert main(["export", str(folder), "--format", "gguf", "--out", str(tmp_path / "b.gguf"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["tensors"] == {"F16": 16, "F32": 5} and answer["bytes"] == (tmp_path / "b.gguf").stat().st_size


BAD_COMMANDS = {
    "exists": (["--format", "gguf", "--out", "{folder}"], "exists already"),
    "values": (["--format", "gguf", "--out", "x.gguf", "--values", "int8"], "--values is of --format sparse"),
    "type": (["--format", "sparse", "--out", "x", "--type", "Q8_0"], "--type is of --format gguf"),
    "unknown type": (["--format", "gguf", "--out", "x.gguf", "--type", "Q9"], "got 'Q9'"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_command_that_cannot_be_done_ends_with_one_line(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_folder(tmp_path / "folder")
    arguments, message = BAD_COMMANDS[case]
    capsys.readouterr()
    assert main(["export", str(folder), *(one.format(folder=folder) for one in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_every_type_is_of_a_file_that_llama_cpp_opens(tmp_path):
    """One matrix in each type that needs no tables, read by the engine as ggml reads it."""
    folder, out = save_folder(tmp_path / "folder", "llama, all rows of 256"), tmp_path / "model.gguf"
    names = [name for name in TYPES if not name.startswith("IQ2")]
    values = load_file(folder / "model.safetensors")
    matrices = sorted(key for key in tensor_names(folder) if values[key].dim() == 2 and "embed" not in key)
    encoded = {key: (name, quantize(values[key], name)) for key, name in zip(matrices, names, strict=False)}
    write_gguf(folder, out, encoded, default="F32")
    model = make_model("llama, all rows of 256")
    for key, (type, data) in encoded.items():
        model.get_parameter(key).data = dequantize(data, type, values[key].shape[1])
    tokens = list(range(5, 35))
    with LlamaCpp(out) as engine, torch.no_grad():
        outputs, expected = engine.outputs(tokens), model(torch.tensor([tokens])).logits[0]
    # it rounds activations to 8 bits beside quantised weights
    assert (outputs - expected).norm() < 0.05 * expected.norm()
