"""Checkpoints: every fault is found before anything is done, and what is written is what was read but for zeros."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch
from forked import finish_code
from pruned_models import make_deit, make_gpt2, make_llama, make_mixtral, make_vit, save_model, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from leanstep._checkpoint.files import check_output, new_folder
from leanstep.pruning import Refinement, prune_checkpoint
from leanstep.pruning.folder.checkpoint import copy_others, write_weights
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.loading import checkpoint_values, load_model, stored_parameters
from leanstep.pruning.score.targets import find_targets

MAKERS = {"llama": make_llama, "gpt2": make_gpt2, "mixtral": make_mixtral, "vit": make_vit, "deit": make_deit}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A LLaMA in several shards."""
    return save_model(make_llama(), tmp_path_factory.mktemp("saved") / "llama", max_shard_size="12KB")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def prune_half(model) -> None:
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for target in find_targets(model):
            target.weight.masked_fill_(torch.rand(target.weight.shape, generator=chance) < 0.5, 0)


def rewrite(source, out, change=prune_half):
    """Open, change in memory, write; returns the model that was written."""
    checkpoint = open_checkpoint(source)
    model = load_model(checkpoint)
    change(model)
    with new_folder(out) as staged:
        write_weights(checkpoint, checkpoint_values(checkpoint, model), staged)
        copy_others(checkpoint, staged)
    return model


def tensors_of(path):
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("shard", ["12KB", "5GB"])
def test_a_folder_comes_back_the_same_but_for_the_zeros(kind, shard, tmp_path):
    model = MAKERS[kind]()
    model.to(torch.bfloat16 if shard == "5GB" else torch.float32).save_pretrained(tmp_path / "in", max_shard_size=shard)
    written = rewrite(tmp_path / "in", tmp_path / "out")
    old, new = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    assert [file.name for file in sorted(tmp_path.glob("out/*"))] == [
        file.name for file in sorted(tmp_path.glob("in/*"))
    ]
    assert list(old) == list(new)
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert len(changed) >= len({target.parameter for target in find_targets(written)})
    for name in old:
        assert new[name].dtype == old[name].dtype
        assert torch.equal(new[name], torch.where(new[name] == 0, new[name], old[name]))
    assert (tmp_path / "in/config.json").read_bytes() == (tmp_path / "out/config.json").read_bytes()
    for file in sorted((tmp_path / "in").glob("*.safetensors")):
        with safe_open(file, "pt") as one, safe_open(tmp_path / "out" / file.name, "pt") as other:
            assert (one.keys(), one.metadata()) == (other.keys(), other.metadata())
    again = type(model).from_pretrained(tmp_path / "out", dtype="auto")
    state = written.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_files_of_torch_become_safetensors_and_tied_weights_stay_tied(tmp_path):
    model = make_gpt2()
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in/model.safetensors").unlink()
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    torch.save(state, tmp_path / "in/pytorch_model.bin")
    written = rewrite(tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))
    again = type(model).from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, written.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert again.lm_head.weight is again.transformer.wte.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


def test_sharded_files_of_torch_get_an_index_of_safetensors(tmp_path):
    model = make_llama(1)
    model.save_pretrained(tmp_path / "in")
    state = list(model.state_dict().items())
    names = {}
    for part, items in enumerate((state[:5], state[5:]), 1):
        file = f"pytorch_model-0000{part}-of-00002.bin"
        torch.save(dict(items), tmp_path / "in" / file)
        names |= {name: file for name, _ in items}
    (tmp_path / "in/model.safetensors").unlink()
    (tmp_path / "in/pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    written = rewrite(tmp_path / "in", tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{part}-of-00002.safetensors" for part in (1, 2)}
    again = type(model).from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, written.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_weights_that_the_file_has_in_a_wider_dtype_keep_it(tmp_path):
    make_llama(1).save_pretrained(tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    wide = "model.layers.0.mlp.up_proj.weight"
    tensors = {name: tensor if name == wide else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "in/config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    rewrite(tmp_path / "in", tmp_path / "out")
    new = load_file(tmp_path / "out/model.safetensors")[wide]
    assert new.dtype == torch.float32
    assert torch.equal(new, torch.where(new == 0, new, tensors[wide]))


FAULTS = {
    "nothing there": (lambda f: shutil.rmtree(f), "does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), "no checkpoint: it has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "no weights": (lambda f: [file.unlink() for file in f.glob("model*")], "no weights"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "neither model.safetensors.index.json nor"),
    "missing shard": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "incomplete.*00002-of-.* is missing"),
    "truncated shard": (lambda f: os.truncate(sorted(f.glob("*.safetensors"))[0], 900), "00001-of.*is damaged"),
    "empty shard": (lambda f: os.truncate(sorted(f.glob("*.safetensors"))[0], 0), "00001-of.*is damaged"),
    "garbled shard": (lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b"x" * 100), "00001-of.*is damaged"),
}


def test_a_file_that_the_system_does_not_map_is_not_called_damaged(folder, monkeypatch):
    def refuse(path, writable):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("leanstep._checkpoint.safetensors.map_file", refuse)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ValueError, match="the system maps no file of .* max_shard_size"):
        checkpoint.tensor(*next((file, names[0]) for file, names in checkpoint.files.items()))


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(("file", "message"), [
    ("adapter_config.json", "holds a PEFT adapter, not a model: merge it first"),
    ("model-Q4_0.gguf", "has weights in GGUF only, .* Prune the model that they were made from"),
])  # fmt: skip
def test_an_adapter_and_a_gguf_file_are_named(folder, file, message, config):
    for weights in folder.glob("model*"):
        weights.unlink()
    (folder / file).write_text("{}")
    if not config:
        (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)
    if file.endswith(".gguf"):
        with pytest.raises(ValueError, match=message):
            open_checkpoint(folder / file)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_no_whole_checkpoint_is_refused_by_name(fault, folder):
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


def test_a_file_and_a_name_that_the_hub_cannot_give_are_refused(folder):
    with pytest.raises(ValueError, match="is a file: expected a Hugging Face folder"):
        open_checkpoint(folder / "config.json")
    with pytest.raises(ValueError, match="the hub did not give such a model"):
        open_checkpoint("nobody/nothing")


def test_quantised_weights_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"quantised \(gptq\)"):
        open_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(config))
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, shard)
    with pytest.raises(ValueError, match="is quantised: .* is of dtype I8"):
        open_checkpoint(folder)


def test_weights_that_do_not_fit_the_configuration_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="do not fit its config.json"):
        load_model(open_checkpoint(folder))


def test_an_output_that_exists_or_has_no_place_is_refused(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already, and nothing is overwritten"):
        check_output(tmp_path / "there")
    with pytest.raises(ValueError, match=r"cannot be made: .*no does not exist; make it, or name another"):
        check_output(tmp_path / "no" / "where")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder; name another"):
        check_output(tmp_path / "file" / "where")
    with pytest.raises(ValueError, match="GB free; make room"):
        check_output(tmp_path / "out", 10**18)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_file_that_is_copied_and_changed_is_the_file_that_would_be_written(kind, tmp_path, monkeypatch):
    from leanstep.pruning.folder import checkpoint as module

    MAKERS[kind]().to(torch.bfloat16).save_pretrained(tmp_path / "in", max_shard_size="12KB")
    rewrite(tmp_path / "in", tmp_path / "copied")
    monkeypatch.setattr(module, "_has_format", lambda path: False)
    rewrite(tmp_path / "in", tmp_path / "written")
    for file in (tmp_path / "in").iterdir():
        assert (tmp_path / "copied" / file.name).read_bytes() == (tmp_path / "written" / file.name).read_bytes()


def test_stored_parameters_are_those_of_the_files_under_their_own_names(tmp_path):
    save_model(make_llama(), tmp_path / "llama", max_shard_size="12KB")
    checkpoint = open_checkpoint(tmp_path / "llama")
    model = load_model(checkpoint)
    stored = stored_parameters(checkpoint, model)
    prune_half(model)
    for name, parameter in make_llama().named_parameters():
        assert torch.equal(stored(name), parameter)
    assert stored("no.such.weight") is None
    # experts are several tensors in the files and one in the model
    MAKERS["mixtral"]().save_pretrained(tmp_path / "mixtral")
    checkpoint = open_checkpoint(tmp_path / "mixtral")
    model = load_model(checkpoint)
    stored = stored_parameters(checkpoint, model)
    for name, parameter in model.named_parameters():
        value = stored(name)
        assert value is None if "experts" in name else torch.equal(value, parameter)


@pytest.mark.parametrize("writer", ["copied", "written"])
def test_a_disk_that_fills_leaves_nothing(writer, saved, tmp_path, monkeypatch):
    from leanstep.pruning.folder import checkpoint as module

    def full(source, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    if writer == "copied":
        monkeypatch.setattr(module.shutil, "copyfile", full)
    else:
        monkeypatch.setattr(module, "_has_format", lambda path: False)
        monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="the disk is full. Nothing of it was kept"):
        rewrite(saved, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from leanstep._checkpoint.files import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_no_folder_and_the_next_one_cleans_up(tmp_path):
    out = tmp_path / "out"
    assert finish_code(KILLED, out).returncode == -signal.SIGKILL
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.writing-")
    check_output(out)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_is_writing_is_left_alone(tmp_path):
    with new_folder(tmp_path / "out") as staged:
        check_output(tmp_path / "out")
        assert staged.is_dir()
    assert (tmp_path / "out").is_dir()


def test_a_search_writes_the_file_that_its_settings_name(saved, tmp_path):
    refine = Refinement(evaluations=1, data=tokens(4, seed=1), state=tmp_path / "search.json")
    settings = {"sparsity": 0.5, "score": "magnitude", "curves": "fisher", "refine": refine}
    prune_checkpoint(saved, tmp_path / "out", tokens(5), **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "search.json"}
