"""`verify` and its command: what each tensor of a checkpoint is, and an exit code that says so."""

import json
import struct

import pytest
import torch
from pruned_models import make_llama
from safetensors.torch import save_file
from sparse_folders import save_sparse
from sparse_models import MLP, make_mlp, train

from leanstep.cli import main
from leanstep.sparsity import NM, export_compressed, export_folder, load_sparse, nm_mask, sparsify, squash, verify
from leanstep.sparsity.training.masks import tightest, violations


def finished():
    model = make_mlp()
    controller = sparsify(model, MLP)
    train(model, controller, steps=2)
    return model, controller


def rows(found):
    return {report.name: report for report in found.tensors}


def test_every_tensor_is_named_for_what_it_is(tmp_path):
    model, _ = finished()
    squash(model)
    found = verify(model)
    assert found.ok is None
    assert [(r.name, r.pattern, r.sparsity, r.dim) for r in found.tensors] == [
        ("0.weight", "2:4", 0.5, 1), ("2.weight", "1:4", 0.75, 1), ("4.weight", "2:4", 0.5, 1)
    ]  # fmt: skip
    assert "3 of 3 matrices are N:M sparse" in str(found)
    # whatever it is stored as
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    export_compressed(model, tmp_path / "small.safetensors")
    for path in tmp_path.iterdir():
        assert verify(path).tensors == found.tensors
    assert verify(model.state_dict()).tensors == found.tensors


def test_expectations_are_met_or_counted():
    model, _ = finished()
    found = verify(model, MLP)
    assert found.ok is True and "3 of 3 obey the expected pattern" in str(found)
    found = verify(model, {"0": "2:4", "2": "1:8"})
    assert found.ok is False and rows(found)["0.weight"].ok and rows(found)["4.weight"].ok is None
    wrong = rows(found)["2.weight"]
    assert wrong.violations == 32 and "NO: 32 groups have more" in str(found)
    with pytest.raises(ValueError, match="matches no layer"):
        verify(model, {"nothing": "2:4"})


def test_the_sparsest_pattern_and_its_axis_are_found():
    weight = torch.randn(6, 24)
    assert tightest(weight, 1) is None
    for text in ("1:2", "2:4", "1:3", "5:6", "1:8", "2:12", "1:24"):
        masked = weight * nm_mask(weight, text)
        found = tightest(masked, 1)
        assert found.density <= NM.parse(text).density and violations(masked, found, 1) == 0
        assert violations(masked, NM.parse(text), 1) == 0
    # every mask of 1:8 is one of 2:16 and 4:32; the shortest groups are named
    assert str(tightest(torch.eye(8).repeat(1, 4), 1)) == "1:8"
    assert rows(verify({"w": (weight * nm_mask(weight, "1:8")).T.contiguous()}))["w"].dim == 0
    assert str(tightest(torch.zeros(2, 4), 1)) == "0:2"


def test_zeros_anywhere_are_called_unstructured_and_not_by_a_pattern_they_obey_by_chance():
    torch.manual_seed(0)
    tensors = {}
    for sparsity in (0.3, 0.5, 0.8, 0.95):
        weight = torch.randn(64, 384)
        tensors[f"any {sparsity}"] = weight * (weight.abs() > weight.abs().flatten().quantile(sparsity))
        kept = weight.abs().argsort(dim=1, descending=True).argsort(dim=1) < round(384 * (1 - sparsity))
        tensors[f"rows {sparsity}"] = weight * kept
    assert all(tightest(tensor, 1) is not None for name, tensor in tensors.items() if "0.3" not in name)
    found = verify(tensors)
    assert [report.pattern for report in found.tensors] == [None] * 8
    for seed in range(20):  # the two halves of a row, which has as many as any other, differ little
        wide = torch.randn(384, 128, generator=torch.Generator().manual_seed(seed))
        assert verify({"w": wide * (wide.abs().argsort(dim=1).argsort(dim=1) < 72)}).tensors[0].pattern is None
    rows_of_128 = torch.randn(64, 128)
    rows_of_128 = rows_of_128 * (rows_of_128.abs().argsort(dim=1).argsort(dim=1) < 26)
    assert verify({"w": rows_of_128}).tensors[0].pattern is None
    assert verify({"w.weight": rows_of_128}, "26:128").tensors[0].pattern == "26:128"
    assert str(found).count("unstructured") == 9 and "0 of 8 matrices are N:M sparse, 8 unstructured" in str(found)
    # some of the places that a pattern leaves may be empty; a zero by itself is no sparsity
    holes = torch.randn(64, 384)
    holes = holes * nm_mask(holes, "2:4") * (torch.rand(64, 384) < 0.6)
    dense = torch.randn(64, 384)
    dense[0, 0] = 0
    found = verify({"holes": holes, "dense": dense})
    assert [report.pattern for report in found.tensors] == ["2:4", None]
    assert "1 of 2 matrices are N:M sparse" in str(found) and "unstructured" not in str(found)


def test_a_training_checkpoint_is_not_taken_for_a_sparse_one(tmp_path):
    model, _ = finished()
    torch.save(model.state_dict(), tmp_path / "training.pt")
    found = verify(tmp_path / "training.pt", MLP)
    assert found.ok is False
    assert all("squash before saving" in report.note for report in found.tensors)
    # the model itself is judged by what it computes with
    assert verify(model, MLP).ok


def test_a_folder_says_what_it_should_be(tmp_path):
    model, _ = finished()
    state = squash(model).state_dict()
    final = tmp_path / "final"
    final.mkdir()
    save_file(state, final / "model.safetensors")
    said = {"0.weight": {"pattern": "2:4", "dim": 1}, "2.weight": {"pattern": "1:4", "dim": 1}}
    (final / "sparsity.json").write_text(json.dumps(said))
    assert verify(tmp_path).ok is True
    (final / "sparsity.json").write_text(json.dumps({"0.weight": {"pattern": "1:4", "dim": 1}}))
    assert verify(tmp_path).ok is False
    for content, message in (
        ("{", "is not a patterns file"),
        ('{"9.weight": {"pattern": "1:4", "dim": 1}}', "no tensor '9"),
    ):
        (final / "sparsity.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            verify(tmp_path)


def test_the_command(tmp_path, capsys):
    model, _ = finished()
    save_file(squash(model).state_dict(), tmp_path / "model.safetensors")
    path = str(tmp_path / "model.safetensors")
    assert main(["verify", path]) == 0
    printed = capsys.readouterr().out
    assert "2.weight" in printed and "1:4" in printed and "3 of 3 matrices" in printed
    assert main(["verify", path, "--expect", "0=2:4", "--expect", "2=1:4"]) == 0
    assert main(["verify", path, "--expect", "1:4"]) == 1
    assert "NO: " in capsys.readouterr().out
    assert main(["verify", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"][1]["pattern"] == "1:4"


def test_sparse_files_that_share_weights_are_read_together(tmp_path):
    torch.manual_seed(0)
    model = make_llama(hidden_size=64, intermediate_size=96)
    save_sparse(tmp_path / "dense", model, dtype=torch.float32, shard="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    export_folder(tmp_path / "dense", tmp_path / "sparse")
    load_sparse(tmp_path / "sparse").save_pretrained(tmp_path / "saved", max_shard_size="9KB")
    dense = {row.name: row.sparsity for row in verify(tmp_path / "dense").tensors}
    for folder in ("sparse", "saved"):
        assert len(list((tmp_path / folder).glob("*.safetensors"))) > 1
        assert {row.name: row.sparsity for row in verify(tmp_path / folder).tensors} == dense


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not there"),
        (["broken.safetensors"], "broken.safetensors is damaged"),
        (["broken.pt"], "broken.pt cannot be read as tensors"),
        (["."], "broken.safetensors is damaged"),
        (["whole.safetensors", "--expect", "5:4"], "0 <= n <= m"),
        (["whole.safetensors", "--expect", "x=2:4"], "'x' .* matches no layer"),
        (["whole.safetensors", "--expect", "2:4", "--expect", "*=1:8"], "--expect: two patterns for '\\*'"),
        (["vector.safetensors"], "holds no matrix"),
    ],
)
def test_what_cannot_be_verified_is_said(arguments, message, tmp_path, monkeypatch, capsys):
    import re

    monkeypatch.chdir(tmp_path)
    save_file({"a.weight": torch.ones(4, 4)}, "whole.safetensors")
    save_file({"a": torch.ones(4)}, "vector.safetensors")
    for name in ("broken.safetensors", "broken.pt"):
        (tmp_path / name).write_bytes(b"no checkpoint at all")
    assert main(["verify", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("entry", [{"dim": 7}, {"dim": "1"}, {"dim": True}, {"pattern": 3}, {"pattern": "5:4"}])
def test_recorded_patterns_out_of_range_are_refused(tmp_path, entry, capsys):
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "sparsity.json").write_text(json.dumps({"a.weight": {"pattern": "2:4", "dim": 1} | entry}))
    assert main(["verify", str(tmp_path)]) == 2
    assert "sparsity.json is not a patterns file" in capsys.readouterr().err


def test_links_out_of_a_folder_are_not_followed_and_links_that_are_named_are(tmp_path, capsys):
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "outside.safetensors")
    (tmp_path / "folder").mkdir()
    link = tmp_path / "folder" / "model.safetensors"
    link.symlink_to(tmp_path / "outside.safetensors")
    assert main(["verify", str(tmp_path / "folder")]) == 2
    assert "outside of the checkpoint" in capsys.readouterr().err
    assert main(["verify", str(link)]) == 0


@pytest.mark.parametrize(("name", "message"), [("b.safetensors", "is incomplete"), ("../b.safetensors", "plain name")])
def test_an_index_names_files_that_are_there(tmp_path, name, message, capsys):
    save_file({"w": torch.ones(2, 4)}, tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    assert main(["verify", str(tmp_path)]) == 0
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": name}}))
    assert main(["verify", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("entry", ["dangling link", "folder"])
def test_a_record_that_cannot_be_read_is_not_taken_for_none(tmp_path, entry):
    save_file({"w": torch.ones(2, 4)}, tmp_path / "model.safetensors")
    record = tmp_path / "sparsity.json"
    record.mkdir() if entry == "folder" else record.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="sparsity.json is not a patterns file"):
        verify(tmp_path)


ODD = {
    "sparse": torch.eye(4).to_sparse(),
    "without values": torch.empty(4, 4, device="meta"),
    "larger than the file": torch.zeros(1).expand(2**20, 2**20),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ODD)
def test_files_of_torch_hold_plain_tensors(case, tmp_path):
    torch.save({"w": ODD[case], "v": torch.ones(2, 4)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt holds a tensor (that is (sparse|without values)|of .* bytes, and)"):
        verify(tmp_path / "model.pt")


def test_a_dtype_without_arithmetic_is_named(tmp_path):
    header = json.dumps({"w": {"dtype": "F4", "shape": [4, 8], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ValueError, match=r"w \(float4_e2m1fn_x2\) cannot be examined"):
        verify(tmp_path)


def test_negative_zeros_of_2_4_matrices_are_noted():
    """Masks leave a negative zero where the weight was negative; readers that count bits take it for a value."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator)
    masked = weight * nm_mask(weight, "2:4")
    count = int((masked.signbit() & (masked == 0)).sum())
    (report,) = verify({"w": masked}, "2:4").tensors
    assert (
        count and report.ok and f"{count} negative zeros" in report.note and report.note in str(verify({"w": masked}))
    )
    (clean,) = verify({"w": masked + 0.0}).tensors
    assert clean.pattern == "2:4" and clean.note == ""
    (other,) = verify({"w": weight * nm_mask(weight, "1:8")}).tensors
    assert other.pattern == "1:8" and other.note == ""
