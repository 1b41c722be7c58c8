"""Pruned folders in formats of other engines: what becomes of the zeros in GGUF files."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[2] / "benchmarks"
# of transformers' reader of GGUF files
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def checker():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        before = set(sys.modules)
        yield importlib.import_module("sparsity.gguf_zeros")
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("sparsity", "common"):
                del sys.modules[name]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A folder of a small LLaMA, half of the weights of its blocks zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes, **heads)).eval()
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                weight[weight.abs() < weight.abs().median()] = 0.0
    folder = tmp_path_factory.mktemp("pruned")
    model.save_pretrained(folder)
    return folder, model


def rows_of_ggml(name, weight, config):
    """Rows of queries and keys in llama.cpp's order: the halves of a head alternate."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(model, path, kind):
    """The weights of a LLaMA, without a tokenizer, by the package that llama.cpp's converter writes with."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, weight in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        array = rows_of_ggml(name, weight, config).numpy() if weight.dim() == 2 else weight.numpy()
        stored = gguf.GGMLQuantizationType.F32 if weight.dim() == 1 else kind
        data = gguf.quants.quantize(array, stored)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("kind", "error"), [("F32", 1e-6), ("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 2e-2), ("Q4_0", 0.3)]
)
def test_zeros_survive_in_gguf_files(kind, error, checker, pruned, tmp_path):
    gguf = pytest.importorskip("gguf")
    folder, model = pruned
    write_gguf(model, tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    zeros = checker.compare(folder, tmp_path / "model.gguf")
    count = sum(int((w == 0).sum()) for w in model.model.layers.parameters())
    assert zeros == (count, count, 0.0) and count > 20_000
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        want = model(tokens).logits
        back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
        assert (back(tokens).logits - want).norm() < error * want.norm()


def test_types_with_an_offset_lose_zeros(checker, pruned, tmp_path, capsys, monkeypatch):
    gguf = pytest.importorskip("gguf")
    folder, model = pruned
    path = tmp_path / "model.gguf"
    write_gguf(model, path, gguf.GGMLQuantizationType.Q4_1)
    zeros = checker.compare(folder, path)
    assert zeros.file < 0.5 * zeros.folder and zeros.largest > 0
    monkeypatch.setattr(sys, "argv", ["gguf_zeros", str(folder), str(path)])
    assert checker.main() == 1
    assert f"{zeros.file:,} of {zeros.folder:,} zeros are zeros; the largest of the others" in capsys.readouterr().out
