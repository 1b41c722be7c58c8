"""``leanstep train`` on a pruned checkpoint: its zeros stay, through every optimizer, a crash and the final folder."""

import json

import pytest
import torch
from pruned_models import make_gpt2
from training import read_log, run, write_text

from leanstep.pruning import find_targets, prune
from leanstep.recipes.check.check import Check, Section
from leanstep.recipes.check.costs import estimate
from leanstep.recipes.config.loader import ConfigError, load
from leanstep.sparsity.verify import verify

RECIPE = """\
recipe: pretrain
steps: 6
model: {init_from: %s}
data: {source: text, path: %s, tokenizer: "train:300", seq_len: 32, val_tokens: 300}
batch: {tokens_per_step: 256, micro_batch_size: 4}
optimizer: {name: adamw, lr: 1e-2, weight_decay: 0.1}
pruning: {keep_masks: true}
max_grad_norm: 1.0
precision: fp32
eval: {every: 0}
checkpoint: {every: 3}
log: {every: 1, trackers: []}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe that goes on with a GPT-2 of which half is zero."""
    folder = tmp_path_factory.mktemp("recovery")
    model = make_gpt2(vocab_size=300)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.2)
    prune(model, sparsity=0.5, allocation="erk", score="magnitude")
    model.save_pretrained(folder / "pruned")
    file = folder / "recover.yaml"
    file.write_text(RECIPE % (folder / "pruned", write_text(folder / "text.txt")))
    return file


def masks_of(folder):
    model = type(make_gpt2()).from_pretrained(folder)
    return {target.name: target.weight != 0 for target in find_targets(model)}, model


def test_zeros_stay_zero_and_the_rest_learns_also_when_it_is_resumed(recipe, tmp_path):
    before, pruned = masks_of(recipe.parent / "pruned")
    whole = run(recipe, [], tmp_path / "whole")
    assert whole.codes == [0], whole.text()
    after, trained = masks_of(tmp_path / "whole/final")
    assert all(torch.equal(after[name], before[name]) for name in before)
    moved = zip(find_targets(trained), find_targets(pruned), strict=True)
    assert all(bool((new.weight != old.weight)[before[new.name]].float().mean() > 0.9) for new, old in moved)
    losses = [entry["loss"] for entry in read_log(tmp_path / "whole") if entry["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert "stay zero" in whole.text()
    first = run(recipe, ["stop.max_hours=1e-9"], tmp_path / "cut")
    assert first.codes != [0]
    second = run(recipe, [], tmp_path / "cut")
    assert second.codes == [0], second.text()
    again = masks_of(tmp_path / "cut/final")[1].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in trained.state_dict().items())


def test_a_recipe_that_cannot_keep_masks_is_refused(recipe):
    for changes, message in (
        (["model.init_from=null"], "name its folder in model.init_from"),
        (["release_gradients=true", "max_grad_norm=null", "batch.micro_batch_size=8"], "which release_gradients joins"),
        (['sparsity.patterns={"*": "2:4"}'], "take one of them"),
        (["lora.target_modules=[c_attn]", "lora.use_dora=true"], "norms of the unmasked sum"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(str(recipe), changes)


def test_a_model_without_zeros_is_refused(recipe, tmp_path):
    make_gpt2(vocab_size=300).save_pretrained(tmp_path / "dense")
    done = run(recipe, [f"model.init_from={tmp_path / 'dense'}"], tmp_path / "run")
    assert done.codes == [2]
    assert "no matrix of the model has a zero" in done.text()


def test_the_final_folder_says_how_sparse_it_is(recipe, tmp_path):
    pruned = recipe.parent / "pruned"
    before = masks_of(pruned)[0]
    names = list(before)
    (pruned / "sparsity.json").write_text(json.dumps({"tensors": {names[0]: {"pattern": "7:8", "dim": 0}}}))
    try:
        done = run(recipe, ["steps=2"], tmp_path / "run")
    finally:
        (pruned / "sparsity.json").unlink()
    assert done.codes == [0], done.text()
    final = tmp_path / "run/final"
    said = json.loads((final / "sparsity.json").read_text())
    after = masks_of(final)[0]
    assert said["source"] == str(pruned)
    assert {name: row["sparsity"] for name, row in said["tensors"].items()} == {
        name: float((~mask).double().mean()) for name, mask in after.items()
    }
    assert said["tensors"][names[0]] | {"sparsity": 0} == {"sparsity": 0, "pattern": "7:8", "dim": 0}
    assert set(said["tensors"][names[1]]) == {"sparsity"}
    zeros = sum(int((~mask).sum()) for mask in after.values())
    assert said["sparsity"] == zeros / sum(mask.numel() for mask in after.values())
    assert verify(final).tensors


def test_zeros_that_will_be_filled_are_told(recipe, tmp_path):
    said = recipe.parent / "pruned/sparsity.json"
    said.write_text("{}")
    try:
        config = load(str(recipe), ["pruning.keep_masks=false"])
        section = Section("Pruning")
        Check(config, vocabulary=300).pruning(section)
        done = run(recipe, ["steps=1", "pruning.keep_masks=false"], tmp_path / "run")
    finally:
        said.unlink()
    assert "training fills its zeros; pruning.keep_masks=true keeps them" in section.lines[0]
    assert done.codes == [0] and "WARNING: " in done.text() and "training fills its zeros" in done.text()
    section = Section("Pruning")
    Check(config, vocabulary=300).pruning(section)
    assert not section.lines


@pytest.mark.slow
def test_adapters_on_a_pruned_base_keep_its_zeros_to_the_merged_model(recipe, tmp_path):
    before = masks_of(recipe.parent / "pruned")[0]
    options = ["lora.target_modules=[c_attn, c_fc]", "lora.r=4", "lora.lora_dropout=0.1", "steps=8"]
    whole = run(recipe, options, tmp_path / "whole")
    assert whole.codes == [0], whole.text()
    assert "stay zero" in whole.text()
    after, trained = masks_of(tmp_path / "whole/final")
    old = masks_of(recipe.parent / "pruned")[1].state_dict()
    for name, mask in before.items():
        assert torch.equal(after[name], mask), name
        adapted = "c_attn" in name or "c_fc" in name
        assert torch.equal(old[name], trained.state_dict()[name]) != adapted, name
    losses = [entry["loss"] for entry in read_log(tmp_path / "whole") if entry["kind"] == "train"]
    assert losses[-1] < losses[0]
    said = json.loads((tmp_path / "whole/final/sparsity.json").read_text())
    assert set(said["tensors"]) <= set(before)
    first = run(recipe, [*options, "stop.max_hours=1e-9"], tmp_path / "cut")
    assert first.codes != [0]
    second = run(recipe, options, tmp_path / "cut")
    assert second.codes == [0], second.text()
    again = masks_of(tmp_path / "cut/final")[1].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in trained.state_dict().items())


def test_check_and_the_memory_estimate_know_of_the_masks(recipe, tmp_path):
    make_gpt2(vocab_size=300).save_pretrained(tmp_path / "dense")
    before = masks_of(recipe.parent / "pruned")[0]
    numel = sum(mask.numel() for mask in before.values())
    for lora in ([], ["lora.target_modules=[c_attn]"]):
        config = load(str(recipe), lora)
        section = Section("Pruning")
        Check(config, vocabulary=300).pruning(section)
        assert not section.problems
        zeros = sum(int((~mask).sum()) for mask in before.values())
        assert f"{zeros:,} weights, which stay zero" in section.lines[0]
        assert ("masked" in section.lines[-1]) == bool(lora)
        assert estimate(config, 300).sparsity == numel
    assert estimate(load(str(recipe), ["pruning.keep_masks=false"]), 300).sparsity == 0
    section = Section("Pruning")
    Check(load(str(recipe), [f"model.init_from={tmp_path / 'dense'}"]), vocabulary=300).pruning(section)
    assert "has a zero to keep" in section.problems[0]
    with pytest.raises(ValueError, match=r"pruning\.keep_masks: the rule 'nothing' matches no matrix"):
        Check(load(str(recipe), ["pruning.exclude=[nothing]"]), vocabulary=300).pruning(Section("Pruning"))
