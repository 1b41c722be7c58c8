"""Sparse checkpoint folders: every architecture comes back bit for bit, in the form of fewest bytes."""

import json
import math
import re

import pytest
import torch
from architectures import CAUSAL, ENCODER_DECODER, make
from pruned_models import make_llama, save_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sparse_folders import config, drop, save_sparse, tensors

from leanstep._checkpoint import files as checkpoint_files
from leanstep.cli import main
from leanstep.sparsity import load_sparse, nm_mask, verify
from leanstep.sparsity.inference import export_folder
from leanstep.sparsity.inference.manifest import CHECKSUM_KEY, KEY, Manifest
from leanstep.sparsity.inference.matrices import compress, decompress, smallest_form
from leanstep.sparsity.inference.reader import SparseFiles


def matrices(folder):
    """Names of the weights that a folder stores, whole or in parts."""
    return {name.rpartition(".weight")[0] + ".weight" for name in tensors(folder)}


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODER_DECODER])
def test_every_architecture_comes_back_bit_for_bit(name, tmp_path):
    dense = save_sparse(tmp_path / "dense", make(name))
    export = export_folder(dense, tmp_path / "sparse")
    assert export.forms and config(tmp_path / "sparse")["quantization_config"] == {"quant_method": "leanstep"}
    export_folder(tmp_path / "sparse", tmp_path / "back", format="dense")
    assert tensors(tmp_path / "back") == tensors(dense) and config(tmp_path / "back") == config(dense)
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"README.md"} | {
        path.name for path in dense.iterdir()
    }


def test_files_of_several_shards_keep_their_names_and_tokenizers(tmp_path):
    dense = save_sparse(tmp_path / "dense", make_llama(), shard="5KB")
    save_model(make_llama(), tmp_path / "with tokenizer")
    (dense / "tokenizer.json").write_bytes((tmp_path / "with tokenizer" / "tokenizer.json").read_bytes())
    export_folder(dense, tmp_path / "sparse")
    names = {"README.md"} | {path.name for path in dense.iterdir()}
    assert {path.name for path in (tmp_path / "sparse").iterdir()} == names and len(names) > 5
    index = json.loads((tmp_path / "sparse" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(tmp_path / "sparse"))
    export_folder(tmp_path / "sparse", tmp_path / "back", format="dense")
    assert tensors(tmp_path / "back") == tensors(dense)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index == json.loads((dense / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 32), (4, 70), (3, 4, 40), (64, 1)], ids=str)
def test_any_shape_and_dtype(shape, dtype):
    """Negative zeros and NaN are values; rows may be empty."""
    generator = torch.Generator().manual_seed(1)
    weight = drop(torch.randn(shape, generator=generator).to(dtype), 0.9, generator)
    weight[0] = 0.0
    weight.view(-1)[-1] = -0.0
    if weight.numel() > 100:
        weight.view(-1)[-2] = math.nan
    form = smallest_form(weight)
    if form is None:
        assert weight.numel() < 100
        return
    back = decompress(form, compress(weight, form))
    assert back.shape == weight.shape and torch.equal(back.view(torch.uint8), weight.view(torch.uint8))


def test_the_form_of_fewest_bytes_is_taken():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator).bfloat16()
    assert smallest_form(weight) is None and smallest_form(weight, codes="int8") is None
    assert smallest_form(drop(weight, 0.03, generator)) is None
    half = smallest_form(drop(weight, 0.5, generator))
    assert half.pattern is None and half.shape == (64, 128)
    assert str(smallest_form(weight * nm_mask(weight, "1:8") + 0.0).pattern) == "1:8"
    assert smallest_form(weight * nm_mask(weight, "1:8") + 0.0, codes="int8").parts[-1] == "scales"
    assert smallest_form(torch.zeros(64, dtype=torch.bfloat16)) is None
    assert smallest_form(torch.zeros(64, 128, dtype=torch.int64)) is None
    # the pattern has no room for as many negative zeros
    crowded = weight * nm_mask(weight, "1:8")
    assert torch.signbit(crowded[crowded == 0]).any() and smallest_form(crowded).pattern is None


def test_bytes_of_a_bit_mask_are_those_of_its_formula():
    generator = torch.Generator().manual_seed(0)
    weight = drop(torch.randn(128, 256, generator=generator).bfloat16(), 0.6, generator)
    nnz = int((weight != 0).sum())
    stored = sum(part.nbytes for part in compress(weight, smallest_form(weight)).values())
    assert stored == 2 * nnz + 128 * 256 // 8 + 8 * 129


@pytest.mark.parametrize("codes", ["int8", "int4"])
def test_quantised_values_are_rounded_to_nearest_with_their_scales(codes, tmp_path):
    dense = save_sparse(tmp_path / "dense", make_llama(), dtype=torch.float32)
    export = export_folder(dense, tmp_path / "sparse", values=codes)
    assert export.forms and all(form.codes == codes for form in export.forms.values())
    assert f"{len(export.forms)} matrices by bit masks with {codes} values" in str(export)
    export_folder(tmp_path / "sparse", tmp_path / "back", format="dense")
    before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    for name, weight in before.items():
        restored = after[name]
        if name not in export.forms:
            assert torch.equal(restored, weight)
            continue
        size, most = (weight.shape[1], 127) if codes == "int8" else (64, 7)
        blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
        scales = blocks.abs().amax(dim=2) / most
        scales = (scales if codes == "int8" else scales.bfloat16()).double().repeat_interleave(size, dim=1)
        scales = scales[:, : weight.shape[1]]
        expected = (weight.double() / scales).nan_to_num().round() * scales
        # a quotient beside a half may round to the other side in fp32
        error = (restored.double() - expected).abs()
        assert bool((error <= scales * 1.0001).all()) and float((error > 1e-4 * scales).double().mean()) < 1e-3
        assert bool((restored[weight == 0] == 0).all())


def test_int8_refuses_weights_that_are_not_finite(tmp_path):
    dense = save_sparse(tmp_path / "dense", make_llama())
    weights = load_file(dense / "model.safetensors")
    weights["lm_head.weight"][0, 0] = math.inf
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight holds NaN or infinity; expected finite"):
        export_folder(dense, tmp_path / "sparse", values="int8")
    assert not (tmp_path / "sparse").exists()
    export_folder(dense, tmp_path / "sparse")


def test_tied_weights_are_stored_once(tmp_path):
    """save_pretrained drops one of the names; files of others hold both."""
    dense = save_sparse(tmp_path / "dense", make_llama(tie_word_embeddings=True))
    weights = load_file(dense / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    export_folder(dense, tmp_path / "sparse")
    assert len({"lm_head.weight", "model.embed_tokens.weight"} & matrices(tmp_path / "sparse")) == 1
    export_folder(tmp_path / "sparse", tmp_path / "back", format="dense")
    assert tensors(tmp_path / "back") == tensors(dense)
    # equal matrices of a model without ties are two
    untied = config(dense) | {"tie_word_embeddings": False}
    (dense / "config.json").write_text(json.dumps(untied))
    export_folder(dense, tmp_path / "untied")
    assert {"lm_head.weight", "model.embed_tokens.weight"} < matrices(tmp_path / "untied")


@pytest.mark.parametrize("format", ["sparse", "dense"])
def test_a_disk_without_room_is_found_before_anything_is_written(format, tmp_path, monkeypatch):
    """A dense folder is larger than the sparse one it is made from."""
    dense = save_sparse(tmp_path / "dense", make_llama(tie_word_embeddings=True))
    weights = load_file(dense / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in weights.values())
    source = dense if format == "sparse" else export_folder(dense, tmp_path / "sparse").out
    monkeypatch.setattr(checkpoint_files, "free_bytes", lambda path: size - 1)
    with pytest.raises(ValueError, match="GB free; make room"):
        export_folder(source, tmp_path / "out", format=format)
    assert not list(tmp_path.glob("*out*"))
    monkeypatch.setattr(checkpoint_files, "free_bytes", lambda path: size + 100_000)
    export_folder(source, tmp_path / "out", format=format)


def test_equal_matrices_that_are_no_embedding_are_not_tied(tmp_path):
    """Such as those of layers without a nonzero; the model would miss all but one."""
    model = make_llama(tie_word_embeddings=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    dense = save_sparse(tmp_path / "dense", model)
    export_folder(dense, tmp_path / "sparse")
    assert matrices(tmp_path / "sparse") == matrices(dense)
    for layer in load_sparse(tmp_path / "sparse").model.layers:
        assert layer.self_attn.q_proj.weight.count_nonzero() == 0


def test_equal_matrices_of_layers_as_large_as_the_embedding_are_not_tied(tmp_path):
    model = make_llama(tie_word_embeddings=True, vocab_size=32, hidden_size=32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.copy_(torch.eye(32))
            layer.self_attn.o_proj.weight.copy_(torch.eye(32))
    dense = save_sparse(tmp_path / "dense", model, sparsity=0.0, dtype=torch.float32)
    export_folder(dense, tmp_path / "sparse")
    assert matrices(tmp_path / "sparse") == matrices(dense)
    assert load_sparse(tmp_path / "sparse").model.layers[1].self_attn.o_proj.weight.shape == (32, 32)


def test_a_tied_weight_in_a_file_of_its_own_comes_back(tmp_path):
    """An index lists no file without tensors."""
    dense = save_sparse(tmp_path / "dense", make_llama(tie_word_embeddings=True))
    weights = load_file(dense / "model.safetensors")
    (dense / "model.safetensors").unlink()
    files = {
        "a.safetensors": weights,
        "b.safetensors": {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
    }
    for name, stored in files.items():
        save_file(stored, dense / name, metadata={"format": "pt"})
    weight_map = {name: file for file, stored in files.items() for name in stored}
    (dense / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    export_folder(dense, tmp_path / "sparse")
    export_folder(tmp_path / "sparse", tmp_path / "back", format="dense")
    assert tensors(tmp_path / "back") == tensors(dense)


def save_shards(folder, **shards):
    """A folder without a model, of weight files with these tensors."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name, stored in shards.items():
        save_file(stored, folder / f"{name}.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"{file}.safetensors" for file, stored in shards.items() for name in stored}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_tensor_without_a_name_comes_back(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number, tensor in enumerate((torch.ones(3), drop(torch.randn(64, 64, generator=generator), 0.8, generator))):
        source = save_shards(tmp_path / f"dense {number}", a={"": tensor, "b": torch.ones(2)})
        export_folder(source, tmp_path / f"sparse {number}")
        export_folder(tmp_path / f"sparse {number}", tmp_path / f"back {number}", format="dense")
        assert tensors(tmp_path / f"back {number}") == tensors(source)


@pytest.mark.parametrize("name", ["w", "w_values"])
def test_names_that_clash_between_files_are_refused_with_both_files(name, tmp_path):
    """A sparse weight w becomes w_values, among others."""
    generator = torch.Generator().manual_seed(0)
    weight = drop(torch.randn(64, 64, generator=generator), 0.8, generator)
    source = save_shards(
        tmp_path / "dense", a={"w": weight, "first": torch.ones(3)}, b={name: torch.ones(3), "other": torch.ones(3)}
    )
    with pytest.raises(ValueError, match=f"b.safetensors: {name} .*(in|of) .*a.safetensors"):
        export_folder(source, tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()


def test_files_of_two_exports_are_refused(tmp_path):
    """One stores a weight sparse, the other stores it dense."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    files = []
    for name, tensor in (("sparse", drop(weight, 0.8, generator)), ("dense", weight)):
        (tmp_path / name).mkdir()
        save_file({"a.weight": tensor}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
        files.append(export_folder(tmp_path / name, tmp_path / f"{name} export").out / "model.safetensors")
    with pytest.raises(ValueError, match="a.weight is stored twice; expected files of one export"):
        SparseFiles(files)


def test_a_damaged_sparse_file_is_called_damaged(tmp_path):
    sparse = export_folder(save_sparse(tmp_path / "dense", make_llama()), tmp_path / "sparse").out
    file = sparse / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: .*copy or download it again"):
        export_folder(sparse, tmp_path / "back", format="dense")
    assert not (tmp_path / "back").exists()


def test_verify_reads_sparse_folders(tmp_path):
    dense = save_sparse(tmp_path / "dense", make_llama(), pattern="2:4")
    assert " matrices as 2:4" in str(export_folder(dense, tmp_path / "sparse"))
    assert verify(tmp_path / "sparse").tensors == verify(dense).tensors
    assert main(["verify", str(tmp_path / "sparse"), "--expect", "2:4"]) == 0


def test_the_command_writes_both_ways(tmp_path, capsys):
    dense = save_sparse(tmp_path / "dense", make_llama(hidden_size=128, intermediate_size=256))
    assert main(["export", str(dense), "--format", "sparse", "--out", str(tmp_path / "sparse")]) == 0
    text = capsys.readouterr().out
    assert "matrices by bit masks" in text and "of before" in text and "N:M" not in text and " as " not in text
    arguments = ["export", str(tmp_path / "sparse"), "--format", "dense", "--out", str(tmp_path / "back"), "--json"]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["matrices"] == {} and answer["bytes_after"] > answer["bytes_before"]
    assert tensors(tmp_path / "back") == tensors(dense)


def test_a_run_folder_is_exported_with_a_word_on_speed(tmp_path, capsys):
    save_sparse(tmp_path / "run" / "final", make_llama())
    assert main(["export", str(tmp_path / "run"), "--format", "sparse", "--out", str(tmp_path / "sparse")]) == 0
    assert re.search("(?m)^it generates slower than the dense folder here: .*, of at most ", capsys.readouterr().out)
    assert main(["export", str(tmp_path), "--format", "sparse", "--out", str(tmp_path / "other")]) == 2
    assert "is no Hugging Face model: expected config.json and model.safetensors in it" in capsys.readouterr().err


def test_what_cannot_be_exported_is_named(tmp_path, capsys):
    dense = save_sparse(tmp_path / "dense", make_llama())
    sparse = export_folder(dense, tmp_path / "sparse").out

    def refused(match, source, out, **settings):
        with pytest.raises(ValueError, match=match):
            export_folder(source, out, **settings)

    refused("has sparse files already", sparse, tmp_path / "out")
    refused("dense has dense weights already, in model.safetensors", dense, tmp_path / "out", format="dense")
    refused("sparse exists already, and nothing is overwritten", dense, sparse)
    refused("is, contains or lies in the checkpoint", dense, dense / "inside")
    refused("is no folder", tmp_path / "nowhere", tmp_path / "out")
    refused("format should be sparse or dense, got 'onnx'", dense, tmp_path / "out", format="onnx")
    refused("values should be int8 or int4, of the format sparse, got 'int3'", dense, tmp_path / "out", values="int3")
    refused("of the format sparse, got 'int8'", sparse, tmp_path / "out", format="dense", values="int8")
    (dense / "config.json").write_text(json.dumps(config(dense) | {"quantization_config": {"quant_method": "gptq"}}))
    refused("is quantised", dense, tmp_path / "out")
    (dense / "config.json").unlink()
    refused("it has no config.json", dense, tmp_path / "out")
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    refused("has no model.safetensors and no", dense, tmp_path / "out")
    assert main(["export", str(dense), "--format", "sparse", "--out", str(tmp_path / "out")]) == 2
    assert "expected config.json and model.safetensors in it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_manifest_of_another_version_or_content_is_refused(tmp_path):
    sparse = export_folder(save_sparse(tmp_path / "dense", make_llama()), tmp_path / "sparse").out
    with safe_open(sparse / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    manifest = Manifest.from_metadata(metadata)
    assert manifest.to_metadata() == {KEY: metadata[KEY], CHECKSUM_KEY: metadata[CHECKSUM_KEY]}
    with pytest.raises(ValueError, match="the checksum is wrong"):
        Manifest.from_metadata(metadata | {KEY: metadata[KEY].replace('"version":1', '"version":2')})
    changed = Manifest.from_metadata(metadata)
    name = next(iter(changed.matrices))
    changed.matrices[name] = changed.matrices[name]._replace(shape=(7, 7))
    with pytest.raises(ValueError, match=f"{name}.* should be BF16"):
        Manifest.from_metadata(changed.to_metadata())
