"""Compressed files: the size of the formula, every bit back, and damage found."""

import json
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sparse_models import MLP, batch, make_mlp, train
from torch import nn

from leanstep.sparsity import NM, export_compressed, files, load_compressed, nm_mask, sparsify, squash
from leanstep.sparsity.inference.matrices import compressed_bytes

PATTERNS = ["1:2", "2:4", "1:4", "4:8", "3:8", "1:8", "1:16", "4:32", "1:32", "2:7", "1:128", "8:128", "3:3", "0:4"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def sparse_tensor(shape, pattern, dtype=torch.float32, dim=1):
    """Random entries of that pattern; some groups have fewer nonzeros, some kept entries are subnormal."""
    weight = torch.randn(shape, dtype=torch.float64).movedim(dim, -1)
    mask = nm_mask(weight, pattern) & (torch.rand(weight.shape) > 0.2)
    tiny = torch.finfo(dtype).smallest_normal / 4
    weight = torch.where(torch.rand(weight.shape) < 0.1, tiny, weight)
    return torch.where(mask, weight, 0.0).movedim(-1, dim).to(dtype).contiguous()


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    # the dtype only sets the size of a value
    [*((pattern, torch.float32) for pattern in PATTERNS), *(("3:8", dtype) for dtype in DTYPES[1:])],
)
def test_round_trip_is_exact_and_as_small_as_the_formula(pattern, dtype, tmp_path):
    nm = NM.parse(pattern)
    weight = sparse_tensor((6, 5 * nm.m), nm, dtype)
    rows = export_compressed({"w": weight}, tmp_path / "w.safetensors", patterns={"w": nm})
    assert torch.equal(bits(load_compressed(tmp_path / "w.safetensors")["w"]), bits(weight))
    kept = 6 * 5 * nm.n
    expected = kept * weight.element_size() + -(-kept * (nm.m - 1).bit_length() // 8)
    assert rows[0].stored_bytes == expected == compressed_bytes(weight.shape, weight.element_size(), nm)
    stored = load_file(tmp_path / "w.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == expected


def test_a_view_of_another_dtype_is_a_tensor_of_its_own(tmp_path):
    weight = torch.randn(4, 8)
    tensors = {"a": weight, "b": weight.view(torch.int32), "c": weight, "d": torch._neg_view(weight), "e": weight[:2]}
    export_compressed(tensors, tmp_path / "w.safetensors")
    state = load_compressed(tmp_path / "w.safetensors")
    assert torch.equal(state["d"], -weight) and torch.equal(state["e"], weight[:2])
    assert state["b"].dtype == torch.int32 and torch.equal(state["b"], weight.view(torch.int32))
    assert torch.equal(state["a"], weight) and torch.equal(state["c"], weight)


def test_ratios_of_half_precision():
    """Bits of a dense group over those of its kept values and indices, and the ratios that the paper rounds them to."""
    published = {
        "2:4": 1.78, "4:8": 1.68, "1:4": 3.56, "1:8": 6.7, "1:16": 12.8, "1:32": 24.4, "1:64": 46.5, "1:128": 89,
    }  # fmt: skip
    bits_of_groups = [(64, 36), (128, 76), (64, 18), (128, 19), (256, 20), (512, 21), (1024, 22), (2048, 23)]
    for (pattern, rounded), (dense, stored) in zip(published.items(), bits_of_groups, strict=True):
        ratio = 1024 * 1024 * 2 / compressed_bytes((1024, 1024), 2, NM.parse(pattern))
        assert ratio == pytest.approx(dense / stored) == pytest.approx(rounded, rel=0.006)


def test_negative_zeros_survive_or_are_refused(tmp_path):
    kept = torch.tensor([[-0.0, 0, 3, 0, 0, -0.0, 0, -0.0]])
    export_compressed({"w": kept}, tmp_path / "w.safetensors", patterns={"w": "2:4"})
    assert torch.equal(bits(load_compressed(tmp_path / "w.safetensors")["w"]), bits(kept))
    crowded = torch.tensor([[-0.0, 1, 3, 0]])
    with pytest.raises(ValueError, match="w: it has more negative zeros than 2:4 has room for; add 0.0"):
        export_compressed({"w": crowded}, tmp_path / "x.safetensors", patterns={"w": "2:4"})
    assert not (tmp_path / "x.safetensors").exists()
    export_compressed({"w": crowded + 0.0}, tmp_path / "x.safetensors", patterns={"w": "2:4"})


def test_two_four_indices_are_laid_out_as_documented(tmp_path):
    # places 0 and 3, then 1 and 2: two bits each, the first index lowest
    weight = torch.tensor([[1.0, 0, 0, 1, 0, 1, 1, 0]])
    export_compressed({"w": weight}, tmp_path / "w.safetensors", patterns={"w": "2:4"})
    assert load_file(tmp_path / "w.safetensors")["w.nm_indices"].tolist() == [0b10011100]


def test_a_trained_model_is_stored_and_comes_back(tmp_path):
    model = make_mlp()
    controller = sparsify(model, MLP)
    train(model, controller, steps=3)
    path = tmp_path / "model.safetensors"
    rows = {row.name: row for row in export_compressed(model, path)}
    assert rows["0.weight"].pattern == NM(2, 4) and rows["0.bias"].pattern is None
    assert rows["2.weight"].stored_bytes * 3 < rows["2.weight"].dense_bytes
    other = make_mlp(9)
    state = load_compressed(path, other)
    assert torch.equal(other(batch()[0]), model(batch()[0]))
    squash(model)
    assert all(torch.equal(bits(value), bits(state[name])) for name, value in model.state_dict().items())
    # once squashed, the patterns are found in the weights
    again = {row.name: row for row in export_compressed(model, tmp_path / "again.safetensors")}
    assert again == rows
    assert all(torch.equal(v, state[k]) for k, v in load_compressed(tmp_path / "again.safetensors").items())


def test_convolutions_other_axes_short_groups_and_tied_tensors(tmp_path):
    conv = sparse_tensor((4, 8, 3, 3), NM(2, 4))
    transposed = sparse_tensor((8, 6), NM(1, 4), dim=0)
    short = torch.zeros(3, 10)
    short[:, [0, 5, 9]] = 1.5
    model = nn.Module()
    model.a, model.b = nn.Parameter(conv), nn.Parameter(transposed)
    model.c = model.a
    rows = export_compressed(model, tmp_path / "m.safetensors")
    assert [row.name for row in rows] == ["a", "b"] and rows[1].pattern == NM(1, 4)
    state = load_compressed(tmp_path / "m.safetensors")
    assert torch.equal(state["a"], conv) and torch.equal(state["b"], transposed) and state["c"] is state["a"]
    export_compressed({"s": short}, tmp_path / "s.safetensors", patterns={"s": "1:4"})
    assert torch.equal(load_compressed(tmp_path / "s.safetensors")["s"], short)
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert json.loads(file.metadata()["layout"])["tensors"]["s"]["shape"] == [3, 10]


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "model.safetensors"
    export_compressed(squash(_sparse()), path)
    return path


def test_a_failed_export_leaves_the_older_file(exported, monkeypatch):
    before = exported.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_compressed(squash(_sparse()), exported)
    assert exported.read_bytes() == before and list(exported.parent.iterdir()) == [exported]


def _sparse():
    model = make_mlp()
    sparsify(model, MLP)
    return model


def rewrite(path, change, metadata=lambda layout: None, *, checksums="old"):
    """Change tensors and layout of a file; its checksums stay the ``old`` ones or are made ``new``; or ``none``."""
    stored = load_file(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    layout = json.loads(header["layout"])
    change(stored)
    metadata(layout)
    if checksums == "new":
        layout["crc32"] = {name: files._checksum(tensor) for name, tensor in stored.items()}
    if checksums == "none":
        del layout["crc32"], header["layout_crc32"]
    header["layout"] = json.dumps(layout)
    if checksums == "new":
        header["layout_crc32"] = str(zlib.crc32(header["layout"].encode()))
    save_file(stored, path, metadata=header)


def test_damage_is_found_and_the_model_left_alone(exported):
    whole = exported.read_bytes()

    def flip(stored):
        stored["2.weight.nm_indices"][3] ^= 1

    def edit(change, metadata=lambda layout: None, checksums="old"):
        return lambda: rewrite(exported, change, metadata, checksums=checksums)

    def entry(**changes):
        return lambda layout: layout["tensors"]["0.weight"].update(changes)

    def same(stored):
        pass

    cases = [
        (lambda: exported.write_bytes(whole[:-10]), "incomplete metadata.*cuts files short"),
        (lambda: exported.write_bytes(whole[:40]), "no whole safetensors file"),
        (edit(flip), "the checksum of 2.weight.nm_indices is wrong"),
        (edit(lambda s: s["0.bias"].add_(1)), "the checksum of 0.bias is wrong"),
        (edit(lambda s: s.update({"0.bias": s["0.bias"].view(torch.int32)})), "the checksum of 0.bias is wrong"),
        (edit(lambda s: s["0.weight.nm_indices"].fill_(255), checksums="new"), "not ascending numbers below 4"),
        (edit(lambda s: s.pop("0.weight.nm_values")), "only its tensors or only its layout has 0.weight.nm_values"),
        (edit(lambda s: s.pop("0.weight.nm_values"), checksums="new"), "0.weight.nm_values should be .*got none"),
        (edit(lambda s: s.update({"more": torch.ones(1)})), "only its tensors or only its layout has more"),
        (edit(lambda s: s.update({"more": torch.ones(1)}), checksums="new"), "of another model: more"),
        (edit(same, entry(pattern="1:4")), "the checksum of its layout is wrong"),
        (edit(same, lambda layout: layout["aliases"].update(more="0.bias")), "the checksum of its layout is wrong"),
        (edit(same, entry(pattern="1:4"), "new"), "0.weight.nm_values should be"),
        (edit(same, entry(dim=0), "new"), "0.weight.nm_values should be"),
        (edit(same, entry(dim=7), "new"), "a dim of .*got 2:4 and 7"),
        (edit(same, entry(dim=True), "new"), "a dim of .*got 2:4 and True"),
        (edit(same, entry(shape=[-1, 4]), "new"), "expected a shape, got"),
        (edit(same, entry(shape=[2**60, 4], pattern="0:4"), "new"), "expected a shape, got"),
        (edit(same, entry(shape=[2**20, 2**12], pattern="0:4"), "new"), "at most 1,073,741,824 entries of pattern 0:4"),
        (edit(same, entry(pattern=3), "new"), "expected 'N:M'"),
        (edit(same, lambda layout: layout.update(aliases=[1]), "new"), "expected an object 'aliases', got list"),
        (edit(same, lambda layout: layout["aliases"].update(more=["0.bias"]), "new"), "expected the name of a weight"),
        (edit(same, lambda layout: layout.pop("crc32")), "the checksum of its layout is wrong"),
        (edit(same, checksums="none"), "the checksum of its layout is wrong; versions before 0.1.0 wrote none"),
        (
            edit(
                lambda s: s.update({"0.weight.nm_indices": s["0.weight.nm_indices"].to(torch.int16)}), checksums="new"
            ),
            "0.weight.nm_indices should be U8 .*got I16",
        ),
        (lambda: save_file({"w": torch.ones(2)}, exported), "has the format None, expected 'leanstep-nm-1'"),
        (lambda: exported.unlink(), "is not there"),
    ]
    for damage, message in cases:
        exported.write_bytes(whole)
        damage()
        model = make_mlp(3)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_compressed(exported, model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_exported_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="w: .*is not 2:4"):
        export_compressed({"w": torch.ones(2, 8)}, path, patterns={"w": "2:4"})
    sparse = torch.tensor([[1.0, 0, 0, 0]])
    with pytest.raises(ValueError, match="w.nm_values has the name of a part of w"):
        export_compressed({"w.nm_values": torch.ones(1), "w": sparse}, path, patterns={"w": "1:4"})
    with pytest.raises(ValueError, match="there is no tensor 'v'"):
        export_compressed({"w": torch.ones(2, 8)}, path, patterns={"v": "2:4"})
    model = make_mlp()
    sparsify(model, MLP, schedule=9, method="mdgf-linear")
    with pytest.raises(ValueError, match="^export_compressed: .* on its way to 2:4.*squash it with unfinished='keep'"):
        export_compressed(model, path)
    assert not path.exists()
    with pytest.raises(ValueError, match="the model has parametrized weights"):
        export_compressed(squash(_sparse()), path)
        load_compressed(path, _sparse())
