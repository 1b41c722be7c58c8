"""A vision transformer that was trained: pruned by :func:`prune` and by the command, images in and a checkpoint out."""

import copy
import json
import re

import pytest
import torch
from pruned_models import make_llama, save_model
from safetensors.torch import save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from leanstep.cli import main
from leanstep.pruning import find_targets, prune

CLASSES = 8


def draw(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 1, 8, 8], each the pattern of its class in noise, and the classes."""
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=chance)
    return patterns[labels] + 0.7 * torch.randn(count, 1, 8, 8, generator=chance), labels


def accuracy(model, images, labels) -> float:
    with torch.no_grad():
        return float((model(images).logits.argmax(-1) == labels).double().mean())


@pytest.fixture(scope="module")
def trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        vision = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": CLASSES}
        model = ViTForImageClassification(ViTConfig(**sizes, **vision))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(250):
            images, labels = draw(64, 100 + step)
            nn.functional.cross_entropy(model(images).logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    found = tmp_path_factory.mktemp("vision")
    trained.save_pretrained(found / "vit")
    save_model(make_llama(1), found / "llama")
    save_file({"pixel_values": draw(60, 1)[0]}, found / "images.safetensors")
    save_file({"pixel_values": draw(60, 1)[0][0]}, found / "one.safetensors")
    save_file({"images": draw(60, 1)[0]}, found / "named.safetensors")
    save_file({"pixel_values": draw(60, 1)[0], "labels": draw(59, 1)[1]}, found / "labels.safetensors")
    (found / "cut.safetensors").write_bytes(b"cut")
    return found


def leanstep_prune(folder, out, *more, data="images.safetensors", checkpoint="vit"):
    amounts = ["--samples", "40", "--curve-samples", "16", "--held-out", "16"]
    paths = [str(folder / checkpoint), "--out", str(out), "--data", str(folder / data)]
    return main(["prune", *paths, *amounts, "--sparsity", "0.6", "--levels", "0.3,0.5,0.7,0.85", *more])


@pytest.mark.slow
@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_a_vision_transformer_keeps_its_accuracy_no_worse_than_by_uniform_sparsity(score, trained):
    test, labels = draw(400, 3)
    dense = accuracy(trained, test, labels)
    assert dense > 0.9
    found = {}
    for allocation in ("dp", "uniform"):
        model = copy.deepcopy(trained)
        settings = {"levels": (0.3, 0.5, 0.7, 0.85)} if allocation == "dp" else {}
        result = prune(model, draw(80, 1)[0], sparsity=0.6, allocation=allocation, score=score, **settings)
        zeros = sum(int((target.weight == 0).sum()) for target in find_targets(model))
        total = sum(target.layer.numel for target in find_targets(model))
        assert result.metric == "kl" and zeros == pytest.approx(0.6 * total, abs=1)
        assert {target.layer.block for target in find_targets(model)} == {0, 1, 2}
        found[allocation] = (result.held_out.joint, accuracy(model, test, labels))
    # never worse: of the two, the better one is taken
    assert found["dp"][0] <= found["uniform"][0]
    assert found["dp"][1] > 0.9 * dense


@pytest.mark.slow
def test_the_command_takes_images_and_gives_what_the_function_gives(trained, folder, tmp_path, capsys):
    assert leanstep_prune(folder, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    chosen = draw(60, 1)[0][torch.randperm(60, generator=torch.Generator().manual_seed(0))[:56]]
    model = copy.deepcopy(trained)
    expected = prune(
        model, chosen[16:], sparsity=0.6, held_out=chosen[:16], curve_data=chosen[16:32], levels=(0.3, 0.5, 0.7, 0.85)
    )
    content = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert f"allocation     {expected.allocation.method}, score wanda" in printed
    assert content["allocation"]["counts"] == expected.allocation.counts
    again = ViTForImageClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(chosen).logits, model(chosen).logits)


def test_the_command_counts_operations_of_a_vision_transformer(folder, tmp_path):
    assert leanstep_prune(folder, tmp_path / "out", "--budget", "flops", "--granularity", "role") == 0
    budget = json.loads((tmp_path / "out" / "sparsity.json").read_text())["budget"]
    assert 0.39 * budget["dense"] < budget["after"] <= budget["target"] == pytest.approx(0.4 * budget["dense"])


def test_the_images_that_judge_exchanges_are_others_than_those_of_the_scores(folder, tmp_path, monkeypatch):
    judged = []

    class Noted(Exception):
        pass

    def noting(*given, config, **settings):
        judged.append((config.refine, settings))
        raise Noted

    monkeypatch.setattr("leanstep.pruning.prune_checkpoint", noting)
    with pytest.raises(Noted):
        leanstep_prune(folder, tmp_path / "out", "--refine-evaluations", "2", "--refine-samples", "4")
    [(refine, settings)] = judged
    drawn = draw(60, 1)[0][torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(refine.data, drawn[56:])
    assert torch.equal(settings["held_out"], drawn[:16]) and torch.equal(settings["data"], drawn[16:56])


def test_help_names_its_groups_of_options(capsys):
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    shown = capsys.readouterr().out
    groups = (
        "calibration data",
        "how far each matrix is pruned",
        "which weights are pruned",
        "recovery and evaluation",
    )
    places = [shown.index(f"\n{group}:\n") for group in groups]
    assert places == sorted(places) and places[0] < shown.index("\n  --samples") < places[1]


REFUSED = {
    "too few": (["--samples", "60"], {}, "has 60 images; --held-out 16, --samples 60 take 76"),
    "too few to judge": (
        ["--refine-evaluations", "1", "--refine-samples", "5"],
        {},
        "--held-out 16, --samples 40, --refine-samples 5 take 61",
    ),
    "one to judge": (["--refine-evaluations", "1", "--refine-samples", "1"], {}, "--refine-samples must be at least 2"),
    "judges of no search": (["--refine-samples", "4"], {}, "--refine-samples goes with --refine MINUTES"),
    "one image": ([], {"data": "one.safetensors"}, r"expected a floating tensor pixel_values .* got \(1, 8, 8\)"),
    "another name": ([], {"data": "named.safetensors"}, "expected a floating tensor pixel_values .* got none"),
    "a file cut short": ([], {"data": "cut.safetensors"}, "cut.safetensors cannot be read"),
    "no file": ([], {"data": "none.safetensors"}, "none.safetensors cannot be read"),
    "labels of tokens": ([], {"data": "labels.safetensors"}, r"expected labels of int64 \[60\], .* got \(59,\) of"),
    "a language model": ([], {"checkpoint": "llama"}, "LlamaForCausalLM takes token numbers, got torch.float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_images_that_cannot_be_used_are_refused_with_nothing_written(case, folder, tmp_path, capsys):
    more, changes, message = REFUSED[case]
    assert leanstep_prune(folder, tmp_path / "out", *more, **changes) == 2
    (error,) = capsys.readouterr().err.splitlines()[-1:]
    assert error.startswith("error: ") and re.search(message, error), error
    assert list(tmp_path.iterdir()) == []
