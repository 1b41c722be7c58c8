"""Tensors that a model of transformers makes itself and no file has, such as tables of sines."""

import pytest
import torch
from architectures import make
from pruned_models import save_model, tokens
from safetensors.torch import load_file, save_file

from leanstep.pruning import prune_checkpoint
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.loading import _is_computed, load_model, stored_names

QUICK = {"sparsity": 0.5, "levels": (0.4, 0.7), "batch_size": 4}
TABLES = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_that_no_file_has_is_made_again(tmp_path, dtype):
    model = make("marian")
    save_model(model.to(dtype), tmp_path / "in")
    stored = load_file(tmp_path / "in/model.safetensors")
    assert not any("embed_positions" in name for name in stored)
    # old files have no bias either, and it is zero
    del stored["final_logits_bias"]
    save_file(stored, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    dense = {name: weight.clone() for name, weight in model.named_parameters()}
    result = prune_checkpoint(tmp_path / "in", tmp_path / "out", tokens(8), held_out=False, **QUICK)
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    again = type(model).from_pretrained(tmp_path / "out").eval()
    inputs = {"input_ids": tokens(2), "decoder_input_ids": tokens(2, seed=1)}
    model.load_state_dict(load_file(tmp_path / "out/model.safetensors"), strict=False)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    for name, weight in again.named_parameters():
        assert torch.equal(weight, dense[name]) != (name in {t.name for g in result.groups for t in g.targets}), name


def test_a_weight_that_no_file_has_is_refused(tmp_path):
    model = make("marian")
    save_model(model, tmp_path / "in")
    stored = load_file(tmp_path / "in/model.safetensors")
    del stored["model.encoder.layers.0.fc1.weight"]
    save_file(stored, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(model.encoder.layers.0.fc1.weight\)"):
        load_model(open_checkpoint(tmp_path / "in"))


def test_a_tensor_that_is_drawn_at_random_or_was_changed_is_refused(tmp_path):
    model = make("marian")
    save_model(model, tmp_path / "in")
    checkpoint = open_checkpoint(tmp_path / "in")
    model = load_model(checkpoint)
    assert all(_is_computed(model, name) for name in TABLES) and not _is_computed(model, "lm_head.weight")
    model._keys_to_ignore_on_load_missing.add("fc1.weight")
    assert not _is_computed(model, "model.encoder.layers.0.fc1.weight")
    with torch.no_grad():
        model.get_parameter(TABLES[0])[0] += 1
    with pytest.raises(ValueError, match=f"no file has the model's tensor {TABLES[0]}"):
        stored_names(checkpoint, model)
