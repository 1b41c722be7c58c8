"""Model folders: the weights that a command gets are those of the files, or one line says why there are none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fuzzing import CACHE, ENTRIES, damaged, edits, fuzz, json_files, judged, plant, safetensors_files, told, write
from hypothesis import given
from hypothesis import strategies as st
from pruned_models import VOCABULARY, make_llama, save_model
from safetensors.torch import load_file, save_file

from leanstep.cli import main
from leanstep.lora import load_adapter
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.loading import open_model, open_tokenizer
from leanstep.recipes.config.schema import ModelConfig
from leanstep.recipes.data.tokens import encode, vocabulary_size
from leanstep.recipes.training.build import build_model

INDEX = "model.safetensors.index.json"
TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in two shards with an index, its tokenizer, and a text."""
    root = tmp_path_factory.mktemp("models")
    save_model(make_llama(layers=1), root / "model", max_shard_size="8KB")
    assert (root / "model" / INDEX).is_file() and len(list((root / "model").glob("*.safetensors"))) > 1
    shutil.copytree(root / "model", root / "whole")
    for name in ("outside", "out"):
        (root / name).mkdir()
    (root / "text.txt").write_text(TEXT)
    return root


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def expected(folder):
    return weights_of(open_model(folder / "whole"))


def restore(folder):
    shutil.rmtree(folder / "model")
    shutil.copytree(folder / "whole", folder / "model")
    return folder / "model"


def changed(data, path):
    whole = path.read_bytes()
    if path.suffix == ".json":
        write(path, data.draw(json_files(whole)))
    else:
        write(path, data.draw(safetensors_files(whole) if path.suffix == ".safetensors" else damaged(whole)))


def model_of_a_run(source):
    return build_model(ModelConfig(init_from=str(source)), VOCABULARY)


def check_model(folder, expected, read=open_model):
    """Weights of a plain file have no checksum: other bits in it are other finite weights."""
    source = folder / "model"

    def right(model):
        state = weights_of(model)
        assert all(bool(tensor.isfinite().all()) for tensor in state.values())
        stored = [name for file in source.glob("*.safetensors") for name in load_file(file)]
        assert set(state) <= set(stored), "a weight is in none of the files"
        return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)

    return judged("model folders", lambda: read(source), right, outside=folder / "outside")


@given(data=st.data())
@fuzz(50)
def test_damaged_models(folder, expected, data):
    source = restore(folder)
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    names = ("config.json", "config.json", "generation_config.json", INDEX, INDEX, *shards)
    changed(data, source / data.draw(st.sampled_from(names)))
    check_model(folder, expected, data.draw(st.sampled_from((open_model, model_of_a_run))))


@given(data=st.data())
@fuzz(40)
def test_swapped_tensors_and_indices(folder, expected, data):
    """Tensors that change their names, shards or dtypes; an index that names files elsewhere."""
    source = restore(folder)
    shards = sorted(source.glob("*.safetensors"))
    action = data.draw(st.sampled_from(("swap", "dtype", "drop", "double", "shard", "name")))
    one, other = data.draw(st.sampled_from(shards)), data.draw(st.sampled_from(shards))
    tensors = load_file(one)
    name = data.draw(st.sampled_from(sorted(tensors)))
    if action == "swap":
        second = data.draw(st.sampled_from(sorted(tensors)))
        tensors[name], tensors[second] = tensors[second].clone(), tensors[name].clone()
    elif action == "dtype":
        dtypes = (torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
        tensors[name] = tensors[name].to(data.draw(st.sampled_from(dtypes)))
    elif action == "drop":
        del tensors[name]
    elif action == "double" and one != other:
        save_file({**load_file(other), name: tensors[name] + 1}, other, {"format": "pt"})
    elif action == "shard":
        one.rename(source / "moved")
        other.rename(one) if other != one else None
    if action in ("swap", "dtype", "drop"):
        save_file(tensors, one, {"format": "pt"})
    if action == "name":
        index = json.loads((source / INDEX).read_text())
        names = ("../whole/" + one.name, str(folder / "whole" / one.name), "", ".", one.name + "/", "x.safetensors", 3)
        index["weight_map"][name] = data.draw(st.sampled_from(names))
        (source / INDEX).write_text(json.dumps(index))
    check_model(folder, expected)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00002.safetensors", "tokenizer.json"])
def test_nothing_but_a_file_is_read(folder, expected, name, entry):
    source = restore(folder)
    name = name if name in {path.name for path in source.iterdir()} else sorted(source.glob("*.safetensors"))[0].name
    plant(source / name, entry, folder / "copy")
    assert not check_model(folder, expected) or name == "tokenizer.json"
    read = judged("tokenizers", lambda: open_tokenizer(source), lambda _: True, outside=folder / "outside")
    assert not read or name != "tokenizer.json"


@given(data=st.data())
@fuzz(60)
def test_damaged_tokenizers(folder, data):
    """A well-formed tokenizer of other pieces is another tokenizer; its numbers stay below its size."""
    source = restore(folder)
    text = "the Quick fox. 012\N{SNOWMAN}"

    def read():
        tokenizer = open_tokenizer(source)
        return encode(tokenizer, [text])[0].tolist(), vocabulary_size(tokenizer), tokenizer.model_max_length

    def right(result):
        numbers, size, longest = result
        assert all(0 <= number < size for number in numbers)
        assert type(longest) is int and longest > 0
        return result == expected_result

    expected_result = read()
    changed(data, source / data.draw(st.sampled_from(("tokenizer.json", "tokenizer_config.json"))))
    judged("tokenizers", read, right, outside=folder / "outside")


@given(data=st.data())
@fuzz(40)
def test_values_that_name_a_file_outside(folder, data):
    source = restore(folder)
    text = data.draw(st.sampled_from((str(folder / "text.txt"), "../text.txt", "x/../../text.txt", "/dev/stdin")))
    (source / "x").mkdir()
    value = data.draw(st.sampled_from((text, [text], {"a": text}, [{"a": [text]}])))
    key = data.draw(st.sampled_from(("vocab", "merges", "model_type", "extra")) | st.from_regex(r"\A[a-z_]{1,9}\Z"))
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
    path = source / data.draw(st.sampled_from(names))
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {key: value}))
    for read in (open_model, open_tokenizer):
        judged("model folders", lambda read=read: read(source), _never, outside=folder / "outside")


def _never(_):
    raise AssertionError("a file outside was taken")


@given(data=st.data())
@fuzz(16)
def test_commands_answer_or_tell_it_in_one_line(folder, data):
    """`prune` makes a folder that opens, or none; `eval` a number."""
    source, out = restore(folder), folder / "out" / "pruned"
    shutil.rmtree(out, ignore_errors=True)
    path = source / data.draw(st.sampled_from(sorted(path.name for path in source.iterdir())))
    changed(data, path)
    commands = {
        "eval": ("eval", source, "--data", folder / "text.txt", "--seq-len", "16", "--batches", "1", "--json"),
        "prune": (
            "prune",
            source,
            "--out",
            out,
            "--sparsity",
            "0.5",
            "--score",
            "magnitude",
            "--allocation",
            "uniform",
        ),
    }
    name = data.draw(st.sampled_from(sorted(commands)))

    def right(printed):
        if name == "prune":
            assert open_checkpoint(out).names
        else:
            assert json.loads(printed)["loss"] > 0
        return False

    ended = told(
        f"model folders, {name}",
        *commands[name],
        right=right,
        folders=(folder / "out", CACHE),
        outside=folder / "outside",
    )
    assert out.exists() == (ended and name == "prune")
    assert not [entry for entry in out.parent.iterdir() if entry != out], "something half written was left"


@given(data=st.data())
@fuzz(20)
def test_other_values_of_a_configuration(folder, expected, data):
    source = restore(folder)
    path = source / "config.json"
    path.write_text(json.dumps(data.draw(edits(json.loads(path.read_text())))))
    check_model(folder, expected)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_of_torch_run_nothing_and_say_nothing_of_weights_only(folder, tmp_path, capsys):
    source, marker = shutil.copytree(folder / "whole", tmp_path / "model"), tmp_path / "marker"
    for file in (source / INDEX, *source.glob("*.safetensors")):
        file.unlink()
    torch.save({"w": Payload(marker)}, source / "pytorch_model.bin")
    (tmp_path / "adapter").mkdir()
    shutil.copyfile(source / "pytorch_model.bin", tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    out = ["--out", str(tmp_path / "out"), "--sparsity", "0.5", "--score", "magnitude", "--allocation", "uniform"]
    for command in (["eval", "--data", str(folder / "text.txt")], ["prune", *out], ["verify"]):
        assert main([command[0], str(source), *command[1:]]) == 2
    printed = capsys.readouterr().err
    for read in (lambda: model_of_a_run(source), lambda: load_adapter(make_llama(layers=1), tmp_path / "adapter")):
        with pytest.raises(ValueError, match="nothing in it is run") as refusal:
            read()
        printed += str(refusal.value)
    assert "weights_only" not in printed and printed.count("nothing in it is run") == 5
    assert not marker.exists()
