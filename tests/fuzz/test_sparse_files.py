"""Compressed N:M files and sparsity.json: damage is told, and `verify` answers by a table or one line."""

import json
import zlib
from random import Random

import pytest
import torch
from fuzzing import (
    ENTRIES,
    damaged,
    edits,
    fuzz,
    json_files,
    judged,
    plant,
    replaced,
    safetensors_files,
    same_as,
    told,
    write,
)
from hypothesis import given
from hypothesis import strategies as st
from pruned_models import make_llama
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from sparse_folders import save_sparse

from leanstep.sparsity import SparseLinear, export_compressed, load_compressed, load_sparse, nm_mask, verify
from leanstep.sparsity.files import _checksum
from leanstep.sparsity.inference import export_folder
from leanstep.sparsity.inference.manifest import CHECKSUM_KEY, KEY, Manifest
from leanstep.sparsity.inference.reader import SparseFiles

PATTERNS = {"a.weight": "2:4", "b.weight": "1:8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain file with sparsity.json, and a compressed file of the same weights."""
    root = tmp_path_factory.mktemp("sparse")
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, pattern in PATTERNS.items():
        weight = torch.randn(4, 16, generator=generator)
        state[name] = weight * nm_mask(weight, pattern) + 0.0
    state["a.bias"] = torch.randn(4, generator=generator)
    for name in ("plain", "compressed", "outside"):
        (root / name).mkdir()
    save_file(state, root / "plain" / "model.safetensors")
    rows = {name: {"pattern": pattern, "dim": 1} for name, pattern in PATTERNS.items()}
    (root / "plain" / "sparsity.json").write_text(json.dumps(rows))
    export_compressed(state, root / "compressed" / "model.safetensors", patterns=PATTERNS)
    return root


def bits(state):
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in state.items()
    }


@pytest.fixture(scope="module")
def file(folder):
    return folder / "compressed" / "model.safetensors"


@pytest.mark.slow
@given(data=st.data())
@fuzz(120)
def test_damaged_compressed_files(folder, file, data):
    """Tensors in another order are the same file."""
    whole, expected = file.read_bytes(), bits(load_compressed(file))
    with replaced(file, data.draw(safetensors_files(whole))):
        judged("compressed files", lambda: bits(load_compressed(file)), same_as(expected), outside=folder / "outside")


def _with_layout(file, change_layout, change_tensors=lambda stored: None):
    """A compressed file with another layout or other tensors, and right checksums of both."""
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    layout, stored = json.loads(header["layout"]), load_file(file)
    change_tensors(stored)
    layout = change_layout(layout)
    if isinstance(layout, dict) and isinstance(layout.get("crc32"), dict):
        layout["crc32"] = {name: _checksum(tensor) for name, tensor in stored.items()}
    text = json.dumps(layout)
    return save(stored, {**header, "layout": text, "layout_crc32": str(zlib.crc32(text.encode()))})


@given(data=st.data())
@fuzz(100)
def test_compressed_files_with_other_layouts_and_right_checksums(folder, file, data):
    """Whoever writes right checksums may write other tensors: those of the layout, in its shapes."""
    expected = bits(load_compressed(file))

    def change(layout):
        return data.draw(edits(layout))

    def swap(stored):
        names = list(stored)
        one, other = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
        stored[one], stored[other] = stored[other].clone(), stored[one].clone()

    with replaced(file, _with_layout(file, change, swap if data.draw(st.booleans()) else lambda stored: None)):
        judged("compressed files", lambda: bits(load_compressed(file)), lambda state: state == expected)


@given(content=st.data())
@fuzz(100)
def test_other_records_of_patterns(folder, content):
    """A record of other patterns is another expectation; the tensors are the same."""
    record, plain = folder / "plain" / "sparsity.json", folder / "plain"
    whole, expected = record.read_bytes(), verify(plain)

    def right(found):
        same = [(row.name, row.shape, row.dtype, row.sparsity) for row in found.tensors]
        assert same == [(row.name, row.shape, row.dtype, row.sparsity) for row in expected.tensors]
        assert str(found)
        return found == expected

    with replaced(record, content.draw(json_files(whole))):
        judged("sparsity.json", lambda: verify(plain), right, outside=folder / "outside")


@given(data=st.data())
@fuzz(60)
def test_damaged_files_of_torch(folder, data):
    """Their archive has checksums of a part only: other numbers of the same tensors may come through."""
    path = folder / "plain.pt"
    torch.save(load_file(folder / "plain" / "model.safetensors"), path)
    whole, expected = path.read_bytes(), verify(path)
    write(path, data.draw(damaged(whole)))

    def right(found):
        assert str(found)
        return found == expected

    judged("files of torch", lambda: verify(path), right, outside=folder / "outside")


@given(data=st.data())
@fuzz(15)
def test_verify_tells_damage_in_one_line(folder, data):
    """Other bits of a plain file, which has no checksum, are other weights."""
    kind = data.draw(st.sampled_from(("plain", "compressed")))
    path = folder / kind / data.draw(st.sampled_from(sorted(entry.name for entry in (folder / kind).iterdir())))
    whole = path.read_bytes()

    def right(out):
        assert "matrices are N:M sparse" in out
        return False

    with replaced(path, data.draw(safetensors_files(whole) if path.suffix == ".safetensors" else damaged(whole))):
        told("verify, command", "verify", folder / kind, right=right, outside=folder / "outside", failures=(1, 2))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["model.safetensors", "sparsity.json"])
def test_nothing_but_a_file_is_read(folder, tmp_path, name, entry):
    """Without sparsity.json no pattern is expected."""
    for source in (folder / "plain").iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    plant(tmp_path / name, entry, folder / "outside" / "copy")

    def right(found):
        assert name == "sparsity.json" and found.ok is None
        return False

    read = judged("sparsity.json" if name == "sparsity.json" else "verify, command", lambda: verify(tmp_path), right)
    assert read == (name == "sparsity.json" and entry == "nothing")


# ---- sparse checkpoint folders


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A sparse folder with bit masks, N:M, and int8 and int4 values."""
    root = tmp_path_factory.mktemp("sparse folder")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 40, generator=generator)
    state = {"a.weight": weight * (torch.rand(6, 40, generator=generator) < 0.4) + 0.0}
    state |= {"b.weight": weight * nm_mask(weight, "1:8") + 0.0, "a.bias": weight[0].clone()}
    (root / "dense").mkdir()
    (root / "outside").mkdir()
    save_file(state, root / "dense" / "model.safetensors")
    (root / "dense" / "config.json").write_text("{}")
    for name, values in (("plain", None), ("int8", "int8"), ("int4", "int4")):
        export_folder(root / "dense", root / name, values=values)
    return root


def read_sparse(path):
    with SparseFiles([path]) as files:
        files.check_content()
        return bits(dict(files.stored(path)))


@pytest.mark.parametrize("name", ["plain", "int8", "int4"])
@given(data=st.data())
@fuzz(100)
def test_damaged_sparse_files(sparse, name, data):
    """A manifest has checksums of every tensor and of itself. Other metadata is not read."""
    file = sparse / name / "model.safetensors"
    whole, expected = file.read_bytes(), read_sparse(file)
    with replaced(file, data.draw(safetensors_files(whole))):
        judged("sparse folders", lambda: read_sparse(file), same_as(expected), outside=sparse / "outside")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "int8", "int4"])
@given(data=st.data())
@fuzz(100)
def test_sparse_files_with_other_manifests_and_right_checksums(sparse, name, data):
    """Other matrices may be asked for than were written, as long as offsets, masks and positions fit."""
    file = sparse / name / "model.safetensors"
    expected = read_sparse(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    content = data.draw(edits(json.loads(metadata[KEY])))
    text = json.dumps(content)
    with replaced(file, save(load_file(file), {KEY: text, CHECKSUM_KEY: str(zlib.crc32(text.encode()))})):
        judged("sparse folders", lambda: read_sparse(file), lambda state: state == expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "int8", "int4"])
@given(data=st.data())
@fuzz(100)
def test_sparse_files_with_other_tensors_and_right_checksums(sparse, name, data):
    """Offsets out of range, masks that do not fit and scales below zero are refused, whoever wrote them."""
    file = sparse / name / "model.safetensors"
    stored = load_file(file)
    with safe_open(file, "pt") as opened:
        manifest = Manifest.from_metadata(opened.metadata())
    part = data.draw(st.sampled_from(sorted(stored)))
    raw = bytearray(stored[part].contiguous().view(torch.uint8).numpy().tobytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed = torch.frombuffer(raw, dtype=torch.uint8).view(stored[part].dtype).view(stored[part].shape)
    stored[part] = changed.clone()
    manifest.add(stored)
    with replaced(file, save(stored, manifest.to_metadata())):
        read = judged("sparse folders", lambda: read_sparse(file), lambda state: False)
    assert not (read and part.endswith(("_mask", "_offsets")))


@pytest.mark.parametrize("entry", ENTRIES)
def test_nothing_but_a_file_is_exported(sparse, tmp_path, entry):
    source = tmp_path / "source"
    source.mkdir()
    for file in (sparse / "plain").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    plant(source / "model.safetensors", entry, tmp_path / "copy")
    assert not told(
        "sparse folders", "export", source, "--format", "dense", "--out", tmp_path / "out", right=bool, outside=tmp_path
    )
    assert not (tmp_path / "out").exists()


def dense_weights(model):
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    return bits({name: layer.dense_weight() for name, layer in layers.items()})


@pytest.fixture(scope="module")
def sparse_model(tmp_path_factory):
    root = tmp_path_factory.mktemp("sparse model")
    save_sparse(root / "dense", make_llama(layers=1), dtype=torch.float32)
    export_folder(root / "dense", root / "sparse")
    return root / "sparse", dense_weights(load_sparse(root / "sparse"))


@pytest.mark.parametrize("seed", range(20))
def test_models_of_damaged_sparse_folders(sparse_model, seed):
    """A bit flipped, or the file cut off: a line that says so, or the weights that were written."""
    folder, expected = sparse_model
    path, random = folder / "model.safetensors", Random(seed)
    whole = path.read_bytes()
    changed, place = bytearray(whole), random.randrange(len(whole))
    if seed % 4:
        changed[place] ^= 1 << random.randrange(8)
    else:
        del changed[place:]
    with replaced(path, bytes(changed)):
        judged("sparse models", lambda: dense_weights(load_sparse(folder)), same_as(expected))
