"""``leanstep train`` on a pruned checkpoint: its zeros stay, through every optimizer, a crash and the final folder."""

import pytest
import torch
from pruned_models import make_gpt2
from training import read_log, run, write_text

from leanstep.pruning import find_targets, prune
from leanstep.recipes.loader import ConfigError, load

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
log: {every: 1}
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
        (
            ["release_gradients=true", "max_grad_norm=null", "batch.micro_batch_size=8"],
            "which are one in release_gradients",
        ),
        (['sparsity.patterns={"*": "2:4"}'], "take one of them"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(str(recipe), changes)


def test_a_model_without_zeros_is_refused(recipe, tmp_path):
    make_gpt2(vocab_size=300).save_pretrained(tmp_path / "dense")
    done = run(recipe, [f"model.init_from={tmp_path / 'dense'}"], tmp_path / "run")
    assert done.codes == [2]
    assert "no matrix of the model has a zero" in done.text()
