"""Sparse checkpoints as models of transformers: compressed in memory, the same logits, generation, adapters."""

import copy
import io
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, CAUSAL, ENCODER_DECODER, IMAGE, MASKED, VOCABULARY, make
from pruned_models import make_gpt2, make_llama, tokens
from safetensors.torch import load_file, save_file
from sparse_folders import config, save_sparse, tensors
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import leanstep  # noqa: F401
from leanstep.kernels.cpp_impl._build import why_not_cpp
from leanstep.kernels.cpp_impl.sparse import linear as cpp
from leanstep.lora import LoraConfig, apply_lora, merge
from leanstep.pruning.folder.loading import open_model
from leanstep.sparsity import load_sparse, to_few_token_linear, verify
from leanstep.sparsity.inference import SparseLinear, export_folder
from leanstep.sparsity.inference.manifest import Manifest
from leanstep.sparsity.inference.matrices import Form


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense folder and its sparse ones, by name."""
    root = tmp_path_factory.mktemp("sparse")
    model = make_llama(hidden_size=64, intermediate_size=96)
    save_sparse(root / "dense", model, dtype=torch.float32)
    export_folder(root / "dense", root / "sparse")
    export_folder(root / "dense", root / "int8", values="int8")
    export_folder(root / "dense", root / "int4", values="int4")
    save_sparse(root / "dense nm", make_llama(hidden_size=64, intermediate_size=96), pattern="1:8")
    export_folder(root / "dense nm", root / "nm")
    return root


def logits(model, length=16):
    with torch.no_grad():
        return model(tokens(3, length)).logits


def compressed(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture_computes_what_the_dense_model_does(name, tmp_path):
    """In fp32 products differ by the order of their sums: a hundred roundings at most."""
    save_sparse(tmp_path / "dense", make(name), dtype=torch.float32)
    export_folder(tmp_path / "dense", tmp_path / "sparse")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    expected = logits(dense)
    assert compressed(sparse)
    assert float((logits(sparse) - expected).abs().max()) <= 100 * 2**-24 * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["sparse", "nm"])
def test_weights_stay_compressed_in_memory(folders, kind):
    sparse = load_sparse(folders / kind)
    dense = AutoModelForCausalLM.from_pretrained(folders / ("dense nm" if kind == "nm" else "dense"))
    linears = {name for name, layer in dense.named_modules() if isinstance(layer, nn.Linear)}
    assert set(compressed(sparse)) == linears
    assert not [name for name, _ in sparse.named_parameters() if name.removesuffix(".weight") in linears]
    weights = sum(dense.get_submodule(name).weight.nbytes for name in linears)
    stored = sum(b.nbytes for layer in compressed(sparse).values() for b in layer.buffers())
    # of four bytes, 0.3 remain and one bit; of two, one eighth; and eight bytes per row
    assert stored < (0.3 + 1 / 32 if kind == "sparse" else 1 / 8 + 1 / 16) * weights * 1.05 + 8 * 2000
    for name, layer in compressed(sparse).items():
        assert torch.equal(layer.dense_weight(), dense.get_submodule(name).weight)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_generation_is_that_of_the_dense_model(folders, settings):
    sparse, dense = load_sparse(folders / "sparse"), AutoModelForCausalLM.from_pretrained(folders / "dense")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}
    assert torch.equal(sparse.generate(tokens(2, 5), **settings), dense.generate(tokens(2, 5), **settings))


@pytest.mark.parametrize("codes", ["int8", "int4"])
def test_quantised_values_compute_what_their_dense_weights_do(folders, codes, tmp_path):
    export_folder(folders / codes, tmp_path / "back", format="dense")
    sparse = load_sparse(folders / codes)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back"))
    assert all(layer.weight_scales is not None for layer in compressed(sparse).values())
    assert float((logits(sparse) - expected).abs().max()) <= 1000 * 2**-24 * float(expected.abs().max())
    # the scales keep their dtype where the rest is cast
    cast = copy.deepcopy(sparse).to(torch.bfloat16)
    layer = next(iter(compressed(cast).values()))
    scale_dtype = torch.float32 if codes == "int8" else torch.bfloat16
    assert layer.weight_scales.dtype == scale_dtype and layer.weight.dtype == torch.bfloat16
    assert logits(cast).dtype == torch.bfloat16
    layer = next(iter(compressed(copy.deepcopy(sparse).to(torch.float16)).values()))
    assert layer.weight_scales.dtype == scale_dtype and layer.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_model_loads_in_another_dtype(folders, dtype):
    sparse = load_sparse(folders / "sparse", dtype=dtype)
    expected = AutoModelForCausalLM.from_pretrained(folders / "dense", dtype=dtype)
    assert all(layer.weight.dtype == layer.weight_values.dtype == dtype for layer in compressed(sparse).values())
    difference = (logits(sparse).double() - logits(expected).double()).abs().max()
    assert float(difference) <= 50 * torch.finfo(dtype).eps * float(logits(expected).double().abs().max())


def test_values_below_the_smallest_of_another_dtype_are_zero_there(tmp_path):
    model = make_llama(hidden_size=64, intermediate_size=96)
    save_sparse(tmp_path / "dense", model, pattern="1:8", dtype=torch.float32)
    shard = tmp_path / "dense" / "model.safetensors"
    weights = load_file(shard)
    name = next(name for name in weights if "up_proj" in name)
    first = weights[name].flatten().nonzero()[0]
    weights[name].view(-1)[first] = 1e-9  # no number of fp16
    save_file(weights, shard, {"format": "pt"})
    export_folder(tmp_path / "dense", tmp_path / "nm")
    sparse = load_sparse(tmp_path / "nm", dtype=torch.float16)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float16)
    difference = (logits(sparse).double() - logits(expected).double()).abs().max()
    assert float(difference) <= 50 * torch.finfo(torch.float16).eps * float(logits(expected).double().abs().max())


@pytest.mark.slow
def test_transformers_trainer_trains_adapters_on_top(folders, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = apply_lora(load_sparse(folders / "sparse"), LoraConfig(r=2, target_modules=["q_proj"]))
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    before = model.model.layers[0].self_attn.q_proj.lora_B.weight.detach().clone()
    Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.lora_B.weight, before)


def test_conv1d_layers_are_compressed_too(tmp_path):
    save_sparse(tmp_path / "dense", make_gpt2(), dtype=torch.float32)
    export_folder(tmp_path / "dense", tmp_path / "sparse")
    sparse = load_sparse(tmp_path / "sparse")
    assert len(compressed(sparse)) == 8
    # files have these weights as (in, out)
    sparse.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again = load_sparse(tmp_path / "again")
    assert torch.equal(logits(again), logits(sparse)) and len(compressed(again)) == 8
    export_folder(tmp_path / "again", tmp_path / "back", format="dense")
    assert tensors(tmp_path / "back") == tensors(tmp_path / "dense")


@pytest.mark.parametrize("kind", ["sparse", "int8", "int4", "nm"])
def test_save_pretrained_writes_a_sparse_folder(folders, kind, tmp_path):
    sparse = load_sparse(folders / kind)
    sparse.save_pretrained(tmp_path, max_shard_size="20KB")
    again = load_sparse(tmp_path)
    assert torch.equal(logits(again), logits(sparse)) and len(compressed(again)) == len(compressed(sparse))


def test_weights_of_fp64_are_not_saved(folders, tmp_path):
    """No sparse file has them."""
    model = load_sparse(folders / "sparse").double()
    with pytest.raises(ValueError, match=r"a compressed weight of torch.float64 cannot .*model.to\(torch.float32\)"):
        model.save_pretrained(tmp_path / "fp64")
    model.to(torch.float32).save_pretrained(tmp_path / "fp32")
    assert torch.equal(logits(load_sparse(tmp_path / "fp32")), logits(load_sparse(folders / "sparse")))


def test_a_tied_head_is_dense_and_tied(tmp_path):
    save_sparse(tmp_path / "dense", make_llama(tie_word_embeddings=True), dtype=torch.float32)
    export_folder(tmp_path / "dense", tmp_path / "sparse")
    sparse = load_sparse(tmp_path / "sparse")
    assert sparse.lm_head.weight is sparse.model.embed_tokens.weight and "lm_head" not in compressed(sparse)
    torch.testing.assert_close(logits(sparse), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")))


def test_layers_that_stay_dense_generate_by_the_loop_and_train_as_before(tmp_path, monkeypatch):
    """In bf16 a step of one token calls the loop for the tied head, and nothing else of a sparse model."""
    if why_not_cpp() is not None:
        pytest.skip(f"needs the C++ kernels: {why_not_cpp()}")
    save_sparse(tmp_path / "dense", make_llama(tie_word_embeddings=True))
    export_folder(tmp_path / "dense", tmp_path / "sparse")
    sparse, dense = load_sparse(tmp_path / "sparse"), AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    widths, loop = [], cpp.dense_linear
    monkeypatch.setattr(cpp, "dense_linear", lambda x, w, b: widths.append(len(w)) or loop(x, w, b))
    monkeypatch.setattr(cpp, "is_faster_than_torch", lambda x, _: x.dtype is torch.bfloat16 and x[..., 0].numel() == 1)
    one = tokens(1, 1)
    with torch.no_grad():
        torch.testing.assert_close(sparse(one).logits, dense(one).logits, rtol=0.02, atol=0.02)
    assert widths == [sparse.config.vocab_size]
    names = to_few_token_linear(dense)
    assert len(names) == 7 * 3 + 1 and "lm_head" in names and to_few_token_linear(dense) == []
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    with torch.no_grad():
        dense(one)
    assert len(widths) == 1 + len(names)
    apply_lora(dense, LoraConfig(r=2, target_modules=["q_proj"]))
    dense(tokens(2), labels=tokens(2)).loss.backward()
    assert len(widths) == 1 + len(names)


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_a_base_model_gets_the_embedding_that_is_stored_as_the_head(sparsity, tmp_path):
    """The head is in the first file, so that the embedding is the tied name."""
    dense = save_sparse(tmp_path / "dense", make_llama(tie_word_embeddings=True), sparsity)
    weights = load_file(dense / "model.safetensors")
    (dense / "model.safetensors").unlink()
    files = {
        "a.safetensors": {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        "b.safetensors": weights,
    }
    files["a.safetensors"]["model.norm.weight"] = weights.pop("model.norm.weight")
    for name, stored in files.items():
        save_file(stored, dense / name, metadata={"format": "pt"})
    weight_map = {name: file for file, stored in files.items() for name in stored}
    (dense / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    export_folder(dense, tmp_path / "sparse")
    model, report = AutoModel.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert expected.lm_head.weight is expected.model.embed_tokens.weight
    assert torch.equal(model(tokens(3, 16)).last_hidden_state, expected.model(tokens(3, 16)).last_hidden_state)


def test_a_base_model_loads_without_the_head_of_the_files(folders):
    model = AutoModel.from_pretrained(folders / "sparse")
    expected = load_sparse(folders / "sparse").model
    assert len(compressed(model)) == len(compressed(expected))
    assert torch.equal(model(tokens(3, 16)).last_hidden_state, expected(tokens(3, 16)).last_hidden_state)


# as BART, with tables of sines for positions, and biases of logits that are a buffer
OF_BART = ["MBart", "Pegasus", "Blenderbot", "BlenderbotSmall"]


def made(name):
    """A model of tests/helpers/architectures.py, or one with BART's configuration."""
    if name not in OF_BART:
        return make(name)
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    torch.manual_seed(0)
    return model_class(model_class.config_class(**ARCHITECTURES["bart"][1])).eval()


def inputs_of(model):
    text = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": text, "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    inputs["input_features"] = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    taken = {model.main_input_name: inputs[model.main_input_name]}
    return taken | ({"decoder_input_ids": text} if model.config.is_encoder_decoder else {})


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", [*OF_BART, *ENCODER_DECODER, *MASKED, *IMAGE])
def test_a_folder_opens_as_the_class_that_its_config_names(name, tmp_path):
    save_sparse(tmp_path / "dense", made(name), dtype=torch.float32)
    model = type(made(name)).from_pretrained(tmp_path / "dense")
    export_folder(tmp_path / "dense", tmp_path / "sparse")
    sparse = load_sparse(tmp_path / "sparse")
    assert type(sparse) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(
            sparse(**inputs_of(model)).logits, model(**inputs_of(model)).logits, rtol=1e-4, atol=1e-4
        )


def test_names_in_a_config_that_are_no_models_of_transformers_choose_no_class(folders, tmp_path):
    folder = shutil.copytree(folders / "sparse", tmp_path / "named")
    for names in (["os", "AutoTokenizer", 3], "LlamaModel", None):
        (folder / "config.json").write_text(json.dumps(config(folder) | {"architectures": names}))
        assert type(load_sparse(folder)).__name__ == "LlamaForCausalLM"


def test_a_model_that_is_slower_than_the_dense_one_is_told(folders, caplog):
    load_sparse(folders / "sparse")
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("leanstep")]
    assert "sparse: a token takes longer here than with dense weights: " in line and "--format dense" in line


@pytest.mark.parametrize("kind", ["sparse", "int8", "nm"])
def test_a_model_is_pickled_and_saved_by_torch(folders, kind):
    sparse = load_sparse(folders / kind)
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(sparse)), torch.load(file, weights_only=False)):
        assert torch.equal(logits(again), logits(sparse)) and len(compressed(again)) == len(compressed(sparse))


def test_weights_that_rwkv_divides_are_dense(tmp_path):
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    rwkv = transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=VOCABULARY, rescale_every=1, **sizes))
    save_sparse(tmp_path / "dense", rwkv.eval(), dtype=torch.float32)
    export_folder(tmp_path / "dense", tmp_path / "sparse")
    sparse = load_sparse(tmp_path / "sparse")
    assert len(compressed(sparse)) == 3 * 5 + 1
    text = {"input_ids": torch.arange(12)[None]}
    with torch.no_grad():
        torch.testing.assert_close(sparse(**text).logits, rwkv(**text).logits)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_an_export_to_onnx_is_told_to_take_dense_weights(dynamo):
    layer = torch.nn.Sequential(SparseLinear.from_dense(torch.eye(8)))
    with pytest.raises(Exception, match="ONNX has no product with a packed matrix; export a model with dense weights"):
        torch.onnx.export(layer, (torch.ones(2, 8),), io.BytesIO(), dynamo=dynamo, verbose=False)


def test_adapters_train_on_top(folders):
    """Their gradients are those on the dense model, and the base has none."""
    gradients = []
    for model in (load_sparse(folders / "sparse"), AutoModelForCausalLM.from_pretrained(folders / "dense")):
        torch.manual_seed(0)
        apply_lora(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        model(tokens(2), labels=tokens(2)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    sparse, dense = gradients
    assert sparse.keys() == dense.keys() and all("lora_" in name for name in sparse)
    for name, gradient in dense.items():
        torch.testing.assert_close(sparse[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_adapters_train_on_top_and_do_not_merge(folders):
    import peft

    model = peft.get_peft_model(load_sparse(folders / "sparse"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model(tokens(2), labels=tokens(2)).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained and all("lora_" in name for name in trained)
    with pytest.raises(TypeError, match="the weight of a SparseLinear is compressed and cannot be changed"):
        model.merge_and_unload()


def test_adapters_do_not_merge_into_a_compressed_weight(folders):
    model = apply_lora(load_sparse(folders / "sparse"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj is a CompressedWeight, which cannot be changed"):
        merge(model)


def test_a_compressed_weight_can_be_read_and_not_changed(folders):
    layer = next(iter(compressed(load_sparse(folders / "sparse")).values()))
    assert layer.weight.shape == (64, 64) and not layer.weight.requires_grad
    assert torch.equal(layer.weight.t() + 0, layer.dense_weight().t())
    with pytest.raises(TypeError, match="cannot be changed"):
        layer.weight.mul_(2)
    with pytest.raises(TypeError, match="cannot be changed"):
        layer.weight.data = torch.zeros(64, 64)


@pytest.mark.slow
def test_the_model_compiles_whole(folders):
    model = load_sparse(folders / "sparse")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model))


@pytest.mark.slow
def test_leanstep_registers_its_loader_before_and_after_transformers(folders):
    """Without importing transformers itself."""
    for first, second in (("transformers", "leanstep"), ("leanstep", "transformers")):
        code = (
            f"import {first}, {second}, sys; from transformers import AutoModelForCausalLM as A\n"
            f"print(type(A.from_pretrained(sys.argv[1]).lm_head).__name__)"
        )
        run = subprocess.run(
            [sys.executable, "-P", "-c", code, str(folders / "sparse")], capture_output=True, text=True, check=False
        )
        assert run.stdout.strip() == "SparseLinear", run.stderr


def rewrite(folder, change, to):
    """A copy of a sparse folder with other tensors and manifest, and right checksums."""
    to.mkdir()
    stored = load_file(folder / "model.safetensors")
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        manifest = Manifest.from_metadata(file.metadata())
    change(stored, manifest)
    manifest.tensors.clear()
    manifest.add(stored)
    save_file(stored, to / "model.safetensors", metadata={"format": "pt", **manifest.to_metadata()})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


def test_files_that_do_not_fit_are_refused(folders, tmp_path, caplog):
    sparse = folders / "sparse"
    name = "model.layers.0.mlp.up_proj.weight"

    def drop_norm(stored, manifest):
        del stored["model.norm.weight"]

    def other_shape(stored, manifest):
        stored[f"{name}_offsets"] = stored[f"{name}_offsets"][:-1].clone()
        stored[f"{name}_mask"] = stored[f"{name}_mask"][:-1].clone()
        stored[f"{name}_values"] = stored[f"{name}_values"][: int(stored[f"{name}_offsets"][-1])].clone()
        manifest.matrices[name] = manifest.matrices[name]._replace(shape=(95, 64))

    def rename(stored, manifest):
        for part in ("values", "mask", "offsets"):
            stored[f"model.norn.weight_{part}"] = stored.pop(f"{name}_{part}")
        manifest.matrices["model.norn.weight"] = manifest.matrices.pop(name)

    def flip(stored, manifest):
        stored[f"{name}_mask"][3] ^= 1

    cases = {
        drop_norm: "model.safetensors: the files lack the weight model.norm.weight .*, 1 in all; copy the folder again",
        other_shape: r"up_proj.weight is \(95, 64\), expected \(96, 64\)",
        rename: "its model has no weight model.norn.weight",
        flip: f"{name}: .*row 3",
    }
    for change, match in cases.items():
        folder = rewrite(sparse, change, tmp_path / change.__name__)
        with pytest.raises(ValueError, match=match):
            load_sparse(folder)
    for change in cases:
        with pytest.raises(ValueError, match=cases[change]):
            AutoModelForCausalLM.from_pretrained(tmp_path / change.__name__)


def test_a_config_of_another_size_is_refused_where_the_weight_is_dense(tmp_path):
    save_sparse(tmp_path / "dense", make_llama(), sparsity=0.0)
    export_folder(tmp_path / "dense", tmp_path / "sparse")
    settings = config(tmp_path / "sparse")
    shape = rf"\({settings['vocab_size']}, {settings['hidden_size']}\), expected \(7, {settings['hidden_size']}\)"
    (tmp_path / "sparse" / "config.json").write_text(json.dumps(settings | {"vocab_size": 7}))
    for load in (load_sparse, AutoModelForCausalLM.from_pretrained, open_model):
        with pytest.raises(ValueError, match=f"the weights do not fit config.json: .*weight is {shape}"):
            load(tmp_path / "sparse")


def test_a_classifier_of_another_number_of_labels_gets_a_new_head(tmp_path):
    language_model = make_llama()
    classes = {"num_labels": 2, "pad_token_id": 0}
    classifier = LlamaForSequenceClassification(LlamaConfig(**language_model.config.to_dict() | classes))
    save_sparse(tmp_path / "dense", classifier, sparsity=0.0)
    export_folder(tmp_path / "dense", tmp_path / "sparse")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "sparse", num_labels=3, ignore_mismatched_sizes=True
    )
    assert model.score.weight.shape[0] == 3


def test_sparse_files_beside_the_config_of_a_dense_model_are_refused(folders, tmp_path):
    for kind in ("removed", "null"):
        folder = shutil.copytree(folders / "sparse", tmp_path / kind)
        settings = config(folder)
        settings["quantization_config"] = None
        if kind == "removed":
            del settings["quantization_config"]
        (folder / "config.json").write_text(json.dumps(settings))
        for load in (load_sparse, open_model, verify):
            with pytest.raises(ValueError, match="sparse weight files, and its config.json has no quantization_config"):
                load(folder)


def test_an_error_of_transformers_in_two_lines_keeps_its_cause(folders, tmp_path):
    folder = shutil.copytree(folders / "sparse", tmp_path / "heads")
    (folder / "config.json").write_text(json.dumps(config(folder) | {"hidden_size": 65}))
    for load in (load_sparse, open_model):
        with pytest.raises(ValueError, match=r"(?s)\A[^\n]*hidden size \(65\) is not a multiple[^\n]*\Z"):
            load(folder)


def test_the_8_bit_code_that_no_export_writes_is_refused(folders, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"

    def set_code(stored, manifest):
        stored[f"{name}_values"][5] = -128

    folder = rewrite(folders / "int8", set_code, tmp_path / "code")
    for load in (load_sparse, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"{name}: .*value 5 has the code -128, expected -127 to 127"):
            load(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool])
def test_weights_that_are_not_floating_point_are_refused(folders, dtype, tmp_path):
    def convert(stored, manifest):
        stored["model.norm.weight"] = stored["model.norm.weight"].to(dtype)

    folder = rewrite(folders / "sparse", convert, tmp_path / "converted")
    for load in (load_sparse, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            ValueError, match=r"norm.weight is of dtype (I32|I64|BOOL): expected floating-point weights"
        ):
            load(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("kind", "part"), [("sparse", "_values"), ("nm", "_nm_values"), ("int8", "")])
def test_weights_that_are_not_finite_are_refused(folders, kind, part, value, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight" if part else "model.norm.weight"

    def damage(stored, manifest):
        stored[name + part].view(-1)[5] = value

    folder = rewrite(folders / kind, damage, tmp_path / "damaged")
    for load in (load_sparse, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            ValueError, match=f"model.safetensors: {name} holds NaN or infinity; expected finite weights"
        ):
            load(folder)


@pytest.mark.parametrize("codes", ["int8", "int4"])
def test_scales_by_which_codes_overflow_are_refused(folders, codes, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"

    def enlarge(stored, manifest):
        stored[f"{name}_scales"][3] = 1e38

    folder = rewrite(folders / codes, enlarge, tmp_path / "scales")
    for read in (load_sparse, lambda folder: export_folder(folder, tmp_path / "dense", format="dense")):
        with pytest.raises(
            ValueError, match=f"{name}: the scale .*e\\+3[78] of row 3 takes codes of {codes} beyond F32"
        ):
            read(folder)


def test_a_classifier_on_a_sparse_language_model_gets_a_new_head(folders, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(folders / "sparse", num_labels=3)
    assert classifier.score.weight.shape == (3, 64) and compressed(classifier)

    def drop_norm(stored, manifest):
        del stored["model.norm.weight"]

    folder = rewrite(folders / "sparse", drop_norm, tmp_path / "no norm")
    for auto_class in (AutoModelForSequenceClassification, AutoModel):
        with pytest.raises(ValueError, match="model.safetensors: the files lack the weight .*norm.weight"):
            auto_class.from_pretrained(folder)


def test_other_folders_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="is no sparse checkpoint: quant_method in config.json is None"):
        load_sparse(folders / "dense")
    with pytest.raises(ValueError, match="is no folder"):
        load_sparse(tmp_path / "nowhere")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "model.safetensors").write_bytes((folders / "sparse" / "model.safetensors").read_bytes())
    (damaged / "config.json").write_text(json.dumps(config(folders / "sparse") | {"quantization_config": "leanstep"}))
    with pytest.raises(ValueError, match="is no sparse checkpoint: .*expected leanstep"):
        load_sparse(damaged)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((folders / "sparse" / "model.safetensors").read_bytes())
    settings = config(folders / "sparse")
    settings["quantization_config"]["block"] = 3
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="quantization_config of leanstep has the entry 'block'"):
        load_sparse(other)
    (other / "model.safetensors").write_bytes((folders / "dense" / "model.safetensors").read_bytes())
    (other / "config.json").write_text((folders / "sparse" / "config.json").read_text())
    with pytest.raises(ValueError, match="it has no manifest"):
        load_sparse(other)
    whole = (folders / "sparse" / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        load_sparse(other)


def test_zeros_that_no_file_bounds_are_refused():
    entry = {"shape": [2**20, 2**12], "dtype": "BF16", "stored": "nm", "pattern": "0:4", "dim": 1}
    with pytest.raises(ValueError, match="expected at most 1,073,741,824 entries of pattern 0:4, got shape"):
        Form.from_json(entry)
