"""Folders that somebody else wrote: pruning reads nothing outside of them, and writes nothing but its output folder."""

import ctypes
import json
import os
import shutil
import socket
from contextlib import suppress
from inspect import signature

import pytest
import torch
import transformers
from pruned_models import make_llama, save_model, save_tokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from leanstep._checkpoint.configuration import check_folder
from leanstep._checkpoint.files import check_finite
from leanstep.cli import main
from leanstep.pruning import prune_checkpoint
from leanstep.pruning.folder.checkpoint import copy_others
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.loading import open_tokenizer, position_count
from leanstep.recipes.data.tokens import encode

PLAIN = {"sparsity": 0.5, "score": "magnitude", "allocation": "uniform"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(make_llama(1), tmp_path_factory.mktemp("foreign") / "llama", max_shard_size="12KB")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy in a folder of its own, ``tmp_path / "a" / "in"``."""
    return shutil.copytree(saved, tmp_path / "a" / "in")


def contents(root):
    """Every file below a folder, links not followed, with its bytes."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink())
    return {str(path): path.read_bytes() for path in files}


def point_index(folder, change):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: change(file) for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("where", ["beside", "absolute", "nested", "renamed"])
def test_shards_outside_of_the_folder_are_refused_and_stay_as_they_are(folder, tmp_path, where, capsys):
    elsewhere = tmp_path / "a" / "victim"
    elsewhere.mkdir()
    for shard in folder.glob("*.safetensors"):
        shutil.move(shard, elsewhere / shard.name)
    names = {
        "beside": lambda file: f"../victim/{file}",
        "absolute": lambda file: str(elsewhere / file),
        "nested": lambda file: f"sub/../../victim/{file}",
        "renamed": lambda file: "config.json",
    }
    (folder / "sub").mkdir()
    point_index(folder, names[where])
    before = contents(tmp_path)
    flags = ["--sparsity", "0.5", "--score", "magnitude", "--allocation", "uniform"]
    code = main(["prune", str(folder), "--out", str(tmp_path / "out"), *flags])
    assert code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "model.safetensors.index.json" in message
    assert contents(tmp_path) == before


def test_an_index_with_a_tensor_twice_is_refused(folder, tmp_path):
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    row = next(line for line in text.splitlines() if "lm_head" in line).strip().rstrip(",")
    index.write_text(text.replace('"weight_map": {', f'"weight_map": {{ {row},'))
    with pytest.raises(ValueError, match=r"index.json cannot be read: it has the name 'lm_head.weight' twice"):
        open_checkpoint(folder)


def test_links_to_folders_are_not_copied(folder, tmp_path):
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "id_rsa").write_text("secret")
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("{{ messages }}")
    (templates / "more").symlink_to(secrets)
    (templates / "loop").symlink_to(templates)
    (folder / "loop").symlink_to(folder)
    (tmp_path / "out").mkdir()
    copy_others(open_checkpoint(folder), tmp_path / "out")
    copies = [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")]
    assert "additional_chat_templates/tool.jinja" in copies
    assert not any("id_rsa" in name or "loop" in name or "more" in name for name in copies)


@pytest.mark.parametrize("name", ["README.md", "model-00001-of-00008.safetensors", "config.json"])
def test_links_to_files_outside_are_refused_by_name(folder, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"{name} is a link to .*secret, outside of the checkpoint"):
        prune_checkpoint(folder, tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()


def test_a_linked_folder_of_templates_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="additional_chat_templates is a link"):
        open_checkpoint(folder)


def test_links_inside_the_folder_and_of_the_hubs_cache_are_followed(folder, tmp_path):
    (folder / "COPY.md").symlink_to(folder / "config.json")
    open_checkpoint(folder)
    (folder / "COPY.md").unlink()
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", str(number)))
    prune_checkpoint(snapshot, tmp_path / "out", **PLAIN)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    (blobs / "0").unlink()
    (blobs / "0").symlink_to(tmp_path / "a" / "in" / "config.json")
    with pytest.raises(ValueError, match="outside of the checkpoint"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize("name", ["pipe.json", "config.json", "additional_chat_templates/x.jinja", "socket", "circle"])
def test_pipes_sockets_and_circles_are_refused_and_never_opened(folder, name):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if name == "socket":
        with socket.socket(socket.AF_UNIX) as endpoint:
            current = os.getcwd()
            os.chdir(folder)  # a socket's path is short
            try:
                endpoint.bind(name)
            finally:
                os.chdir(current)
    elif name == "circle":
        path.symlink_to(path)
    else:
        os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{name} (is no ordinary file|cannot be opened)"):
        open_checkpoint(folder)


def test_the_output_is_not_in_the_source(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, folder / "out", tmp_path / "link", tmp_path / "link" / "out", folder.parent):
        with pytest.raises(ValueError, match="exists already|lies in the checkpoint"):
            prune_checkpoint(folder, out, **PLAIN)
        with pytest.raises(ValueError, match="exists already|lies in the checkpoint"):
            prune_checkpoint(tmp_path / "link", out, **PLAIN)
    assert "out" not in os.listdir(folder)


def test_nonfinite_weights_are_named_and_weights_without_values_are_left_out():
    tensors = {"meta": torch.empty(2, device="meta"), "ids": torch.ones(2, dtype=torch.int64), "w": torch.ones(3)}
    check_finite(tensors.items(), "here")
    broken = torch.tensor([1.0, float("nan")], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="here: b\\.x holds NaN or infinity, and 1 more tensors"):
        check_finite([*tensors.items(), ("b.x", broken), ("c", broken)], "here")


@pytest.mark.parametrize("longest", ["512", -1, 0, True, [3]])
def test_a_tokenizer_without_a_length_is_refused_when_it_is_opened(tmp_path, longest):
    save_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": longest}))
    with pytest.raises(ValueError, match="model_max_length"):
        open_tokenizer(tmp_path)


def test_a_tokenizer_whose_unknown_token_is_no_token_is_refused_when_it_is_opened(tmp_path):
    save_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": ""}))
    with pytest.raises(ValueError, match="could not open the tokenizer"):
        open_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_encode_the_text_is_named(tmp_path):
    save_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["unk_token"] = "no such token"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = open_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} could not encode the text"):
        encode(tokenizer, ["\N{SNOWMAN}"])


@pytest.mark.parametrize("positions", ["64", -64, 64.5, True, [64]])
def test_positions_of_another_type_are_refused(tmp_path, positions):
    with pytest.raises(ValueError, match="config.json has .* positions, expected a whole number"):
        position_count({"max_position_embeddings": positions}, tmp_path)


def tokenizer_classes():
    """Names of transformers' tokenizer classes, each with the parameters of it and of its bases."""
    names = {name for name in dir(transformers) if "Tokenizer" in name}
    for name in sorted(names | {str(name) for name in TOKENIZER_MAPPING_NAMES.values() if name}):
        with suppress(ImportError, ValueError):  # of a library that is not installed
            bases = [base for base in getattr(transformers, name, object).__mro__ if "__init__" in base.__dict__]
            yield (
                name,
                {"gguf_file", *(key for base in bases for key in signature(base.__init__).parameters)} - {"self"},
            )


@pytest.fixture
def canary(tmp_path):
    """A file that no library may open, and a function that says whether one has, in any language."""
    file = tmp_path / "canary.txt"
    file.write_text("[UNK]\ncanaryword\n")
    libc = ctypes.CDLL(None)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert libc.inotify_add_watch(descriptor, os.fsencode(file), 0x20) >= 0  # IN_OPEN

    def was_opened():
        with suppress(BlockingIOError):
            return bool(os.read(descriptor, 4096))
        return False

    yield file, was_opened
    os.close(descriptor)


def refuses(folder, files):
    """Whether the tokenizer of a folder with these files is refused for what they name."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(json.dumps(content))
    try:
        open_tokenizer(folder)
    except ValueError as error:
        return "names" in str(error) and next(iter(reversed(files))) in str(error)
    return False


@pytest.mark.slow
def test_no_class_of_tokenizers_reads_a_file_that_a_configuration_names(tmp_path, canary):
    file, was_opened = canary
    folder = tmp_path / "folder"
    for name, keys in tokenizer_classes():
        for key in keys:
            assert refuses(folder, {"tokenizer_config.json": {"tokenizer_class": name, key: str(file)}}), (name, key)
            assert not was_opened(), (name, key)


@pytest.mark.parametrize("text", ["{}", "../canary.txt", "~/canary.txt", "sub/../../canary.txt", "canary.txt", "link"])
@pytest.mark.parametrize("where", ["positions", "tokens", "pieces", "part", "version", "nested"])
def test_a_name_of_a_file_outside_is_refused_in_every_form_and_place(text, where, tmp_path, canary, monkeypatch):
    file, was_opened = canary
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(file)
    value, bert = text.format(file), {"tokenizer_class": "BertTokenizer"}
    files = {
        "positions": {"tokenizer_config.json": {**bert, "init_inputs": [value]}},
        "tokens": {"tokenizer_config.json": bert, "special_tokens_map.json": {"vocab_file": value}},
        "pieces": {"tokenizer_config.json": bert, "tokenizer.json": {"model": {"type": "WordPiece", "vocab": value}}},
        "part": {"tokenizer_config.json": bert, "generator_tokenizer/tokenizer_config.json": {"vocab": value}},
        "version": {"tokenizer_config.json": bert, "config.4.0.json": {"vocab": value}},
        "nested": {"tokenizer_config.json": {**bert, "kwargs": [{"vocab": value}]}},
    }
    assert refuses(folder, files[where]) and not was_opened()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "config.4.0.json"])
def test_a_name_on_the_hub_is_held_to_the_same_rule(name, tmp_path, canary, monkeypatch):
    file, was_opened = canary
    model, commit = tmp_path / "models--org--name", "0" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    files = {"config.json": {"model_type": "bert", "configuration_files": ["config.4.0.json"]}}
    files |= {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}, "config.4.0.json": {"model_type": "bert"}}
    files[name] = {**files.get(name, {}), "vocab": str(file)}
    (model / "snapshots" / commit).mkdir(parents=True)
    for entry, content in files.items():
        (model / "snapshots" / commit / entry).write_text(json.dumps(content))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"{name}: vocab names .*canary.txt, which is outside"):
        open_tokenizer("org/name")
    assert not was_opened()


def test_numbers_in_place_of_tokens_are_no_open_files(tmp_path):
    files = {
        "tokenizer_config.json": {"tokenizer_class": "TapasTokenizer"},
        "special_tokens_map.json": {"vocab_file": 0},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="special_tokens_map.json: vocab_file is 0, expected a token"):
        open_tokenizer(tmp_path)


def test_a_configuration_names_folders_and_words_as_before(folder, monkeypatch):
    """A file or folder with the name of a label, a token or a kind of model is none that a library opens."""
    monkeypatch.chdir(folder.parent)
    for name in ("llama", "org"):
        (folder.parent / name).mkdir()
    (folder.parent / "cat").write_text("")
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": str(folder.parent), "id2label": {"0": "cat"}, "base": "org"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"added_tokens_decoder": {"1": {"content": "cat", "special": False}}, "chat_template": "/\n" * 5000}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    pieces = json.loads((folder / "tokenizer.json").read_text())
    pieces["normalizer"] = {"type": "Replace", "pattern": {"String": "//"}, "content": "/"}
    (folder / "tokenizer.json").write_text(json.dumps(pieces))
    open_checkpoint(folder)
    open_tokenizer(folder)


def test_the_configurations_that_transformers_reads_are_those_that_are_checked(tmp_path):
    constants = {"CONFIG_NAME", "GENERATION_CONFIG_NAME", "FEATURE_EXTRACTOR_NAME", "IMAGE_PROCESSOR_NAME"}
    constants |= {"VIDEO_PROCESSOR_NAME", "AUDIO_TOKENIZER_NAME", "PROCESSOR_NAME"}
    names = {getattr(transformers.utils, name) for name in constants if hasattr(transformers.utils, name)}
    base = transformers.tokenization_utils_base
    names |= {base.TOKENIZER_CONFIG_FILE, base.SPECIAL_TOKENS_MAP_FILE, base.FULL_TOKENIZER_FILE}
    outside = tmp_path.parent / "outside"
    outside.touch()
    for name in names:
        (tmp_path / name).write_text(json.dumps({"anything": str(outside)}))
        with pytest.raises(ValueError, match=f"{name}: anything names .*, which is outside of the folder"):
            check_folder(tmp_path, tokenizer=True)
        (tmp_path / name).unlink()
