"""Weights mapped from files and activations on disk: the results of memory, bit for bit, in memory that is bounded."""

import itertools
import json
import mmap
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from architectures import make
from pruned_models import images, save_model, tokens
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from leanstep._checkpoint.mapped import CopiesInFiles, FileTensor, ResidentSet, Scratch, forget_sources, is_mapped
from leanstep._checkpoint.safetensors import MappedFile
from leanstep.pruning import Recovery, prune, prune_checkpoint
from leanstep.pruning.folder import run
from leanstep.pruning.folder.checkpoint import map_weights, unmapped_note
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.loading import load_model
from leanstep.pruning.score.targets import WeightSnapshot

QUICK = {"sparsity": 0.5, "levels": (0.4, 0.7), "batch_size": 4}
KINDS = (("sparsegpt", torch.bfloat16), ("wanda", torch.float32))
NAMES = ("llama", "gpt2", "mixtral", "t5", "bert", "vit", "opt", "qwen3")


def data_for(name):
    return images(8) if name == "vit" else tokens(8, 16)


def tensors_of(path):
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(
    "name, score, dtype",
    # neither files nor architectures ask for the score: they take turns; fused experts have both
    [(name, *kind) for name, kind in zip(NAMES, itertools.cycle(KINDS), strict=False)] + [("mixtral", *KINDS[1])],
)
def test_mapped_weights_and_files_of_activations_give_the_bits_of_memory(name, score, dtype, tmp_path):
    save_model(make(name).to(dtype), tmp_path / "in", max_shard_size="20KB")
    model, data = load_model(open_checkpoint(tmp_path / "in")), data_for(name)
    expected = prune(model, data, score=score, **QUICK)
    result = prune_checkpoint(
        tmp_path / "in", tmp_path / "out", data, score=score, resident=0, activations="disk", **QUICK
    )
    assert result.allocation == expected.allocation and result.curves == expected.curves
    assert result.compared == expected.compared
    again = load_model(open_checkpoint(tmp_path / "out"))
    assert {parameter.dtype for parameter in again.parameters()} == {
        parameter.dtype for parameter in model.parameters()
    }
    for (key, weight), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(weight, other), key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert not [path for path in (tmp_path / "out").iterdir() if "scratch" in path.name]


def test_the_written_file_is_the_one_that_memory_gave_and_keeps_negative_zeros(tmp_path):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = -0.0
    save_model(model, tmp_path / "in")
    for out, resident in (("one", 2**30), ("other", 0)):
        prune_checkpoint(tmp_path / "in", tmp_path / out, tokens(8, 16), resident=resident, **QUICK)
    written, other, stored = (tensors_of(tmp_path / name) for name in ("one", "other", "in"))
    assert all(torch.equal(bits(written[name]), bits(other[name])) for name in stored)
    row = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(bits(written[row][0]), bits(stored[row][0]))


def test_a_result_can_be_changed_and_the_folder_stays_what_it_is(tmp_path):
    save_model(make("llama"), tmp_path / "in")
    result = prune_checkpoint(tmp_path / "in", tmp_path / "out", tokens(8, 16), **QUICK)
    before = tensors_of(tmp_path / "out")
    before = {name: tensor.clone() for name, tensor in before.items()}
    for target in (target for group in result.groups for target in group.targets):
        assert torch.equal(target.weight, before[target.name])
        target.weight.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(tmp_path / "out").items())


def test_parameters_that_are_held_in_memory_are_said(tmp_path):
    for name, held in (("mixtral", "experts"), ("llama", "")):
        save_model(make(name), tmp_path / name)  # experts below a megabyte
        prune_checkpoint(tmp_path / name, tmp_path / f"{name} out", tokens(8, 16), **QUICK)
        notes = json.loads((tmp_path / f"{name} out" / "sparsity.json").read_text())["notes"]
        said = [note for note in notes if "held in memory, not mapped" in note]
        assert len(said) == bool(held) and all(held in note for note in said)


def test_an_error_leaves_the_source_and_no_folder(tmp_path):
    save_model(make("llama"), tmp_path / "in")
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}

    def stop(done, total, name):
        if name in dict(make("llama").named_parameters()):  # a point of its curve
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", tokens(8, 16), progress=stop, activations="disk", **QUICK)
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["in"]


def test_released_pages_keep_what_was_written(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    save_model(LlamaForCausalLM(config), tmp_path / "in")  # with matrices of several pages
    checkpoint = open_checkpoint(tmp_path / "in")
    model = load_model(checkpoint)
    (tmp_path / "copy").mkdir()
    mapped = map_weights(checkpoint, model, tmp_path / "copy", ResidentSet(0))
    assert unmapped_note(mapped) == "" and mapped.names == set(dict(model.named_parameters()))
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.fill_(3.0)
    mapped.resident.release(weight)
    assert bool((weight == 3.0).all())
    assert bool((tensors_of(tmp_path / "copy")["model.layers.0.mlp.up_proj.weight"] == 3.0).all())


def test_a_resident_set_releases_what_was_used_longest_ago(monkeypatch):
    released = []
    monkeypatch.setattr("leanstep._checkpoint.mapped.release_pages", lambda address, size: released.append(address))
    first, second, third = (torch.zeros(10, dtype=torch.uint8) for _ in range(3))
    resident = ResidentSet(20)
    for tensor in (first, second, first, third):
        resident.touch(tensor)
    assert released == [second.data_ptr()]
    resident.touch(second)
    assert released == [second.data_ptr(), first.data_ptr()]


def test_scratch_keeps_a_tree_of_tensors_in_files_that_leave_no_name(tmp_path):
    scratch = Scratch(tmp_path, ResidentSet(0))
    tree = (torch.randn(300, 40), {"a": torch.arange(5), "b": None}, torch.zeros(0))
    stored = scratch.store(tree)
    assert isinstance(stored[0], FileTensor) and not list(tmp_path.iterdir())
    opened = Scratch.open(stored)
    assert torch.equal(opened[0], tree[0]) and torch.equal(opened[1]["a"], tree[1]["a"]) and opened[1]["b"] is None
    stored[0].clone().zero_()
    assert torch.equal(Scratch.open(stored)[0], tree[0])


def test_settings_out_of_range_are_refused(tmp_path):
    save_model(make("llama"), tmp_path / "in")
    for settings in ({"activations": "tape"}, {"resident": -1}):
        with pytest.raises(ValueError, match="expected activations of memory or disk and resident bytes"):
            prune_checkpoint(tmp_path / "in", tmp_path / "out", tokens(8, 16), **settings, **QUICK)


def test_fused_experts_are_in_files_and_give_the_bits_of_memory(tmp_path, monkeypatch):
    save_model(make("mixtral"), tmp_path / "in", max_shard_size="20KB")
    monkeypatch.setattr(run, "CopiesInFiles", lambda scratch: CopiesInFiles(scratch, least=1))
    held, mapped_model = [], run.map_weights

    def mapping(checkpoint, model, *others):
        mapped = mapped_model(checkpoint, model, *others)
        held.extend(name for name, parameter in model.named_parameters() if not is_mapped(parameter))
        return mapped

    monkeypatch.setattr(run, "map_weights", mapping)
    data = tokens(8, 16)
    expected = prune(model := load_model(open_checkpoint(tmp_path / "in")), data, score="sparsegpt", **QUICK)
    copies = []
    monkeypatch.setattr(
        WeightSnapshot, "take", lambda self, take=WeightSnapshot.take: copies.append(take_all(self, take))
    )
    result = prune_checkpoint(tmp_path / "in", tmp_path / "out", data, score="sparsegpt", resident=0, **QUICK)
    assert held == [] and copies and not any(copies)
    assert result.allocation == expected.allocation and result.compared == expected.compared
    assert not [note for note in result.notes if "held in memory" in note]
    again = load_model(open_checkpoint(tmp_path / "out"))
    for (key, weight), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(weight, other), key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def take_all(snapshot, take):
    """Names of the parameters of which a snapshot has a copy in memory."""
    take(snapshot)
    return list(snapshot._copies)


def test_large_copies_are_in_files_and_small_ones_and_views_are_not(tmp_path):
    parts = [torch.randn(8, 4) for _ in range(3)]
    with CopiesInFiles(Scratch(tmp_path), least=3 * 8 * 4 * 4):
        joined, small = torch.stack(parts), torch.cat(parts[:2])
        turned, same = joined.transpose(1, 2).contiguous(), joined.contiguous()
    assert [is_mapped(tensor) for tensor in (joined, small, turned)] == [True, False, True]
    assert same.data_ptr() == joined.data_ptr() and not list(tmp_path.iterdir())
    assert torch.equal(joined, torch.stack(parts)) and torch.equal(turned, torch.stack(parts).transpose(1, 2))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
def test_what_is_joined_from_files_and_in_files_leaves_the_memory(tmp_path):
    parts = {str(number): torch.randn(256, 1024) for number in range(4)}
    save_file(parts, tmp_path / "weights.safetensors")
    with MappedFile(tmp_path / "weights.safetensors", writable=True, is_source=True) as opened:
        stored = [opened.get_tensor(name) for name in parts]
    with CopiesInFiles(Scratch(tmp_path)):
        joined = torch.stack(stored)
        turned = joined.transpose(1, 2).contiguous()
    forget_sources()
    # ends that share a page with a neighbour stay
    assert max(resident_bytes(tensor) for tensor in (*stored, joined, turned)) <= 8 * mmap.PAGESIZE
    assert torch.equal(joined, torch.stack(list(parts.values()))) and torch.equal(turned, joined.transpose(1, 2))
    assert resident_bytes(joined) > 3 * 2**20  # it has been read


def resident_bytes(tensor):
    """Resident bytes of the mapping that holds a tensor."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    for mapping in mappings[1:]:
        start, stop = (int(address, 16) for address in mapping.split(maxsplit=1)[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return int(re.search(r"^Rss: +(\d+) kB", mapping, re.MULTILINE)[1]) * 1024
    raise AssertionError("not mapped")


def test_what_is_written_to_a_source_after_loading_stays(tmp_path):
    save_file({"weight": torch.ones(2048)}, tmp_path / "weights.safetensors")
    with MappedFile(tmp_path / "weights.safetensors", writable=True, is_source=True) as opened:
        weight = opened.get_tensor("weight")
    forget_sources()
    weight.zero_()
    with CopiesInFiles(Scratch(tmp_path), least=1):
        assert not torch.cat([weight, weight]).any()
    assert not weight.any()


@pytest.mark.skipif(not hasattr(transformers, "NomicBertConfig"), reason="an earlier transformers")
def test_matrices_that_were_split_on_loading_keep_their_zeros_in_recovery(tmp_path, monkeypatch):
    config = transformers.NomicBertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    save_model(transformers.NomicBertForMaskedLM(config), tmp_path / "in")
    monkeypatch.setattr(run, "CopiesInFiles", lambda scratch: CopiesInFiles(scratch, least=1))
    settings = {"sparsity": 0.5, "allocation": "uniform", "recovery": Recovery(2)}
    prune_checkpoint(tmp_path / "in", tmp_path / "out", tokens(8, 16), **settings)
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    [name] = [name for name in after if name.endswith("Wqkv.weight")]
    assert float((after[name] == 0).double().mean()) == 0.5
    unchanged = (after[name] == before[name]) & (after[name] != 0)
    assert int(unchanged.sum()) < 0.01 * after[name].numel()  # trained
