"""Files of PEFT's that differ from what this package writes: which open, and which are refused in which words."""

import json

import peft
import pytest
import torch
from lora_models import randomise, tiny_llama, tokens
from safetensors.torch import load_file, save_file

from leanstep.lora import LoraConfig, apply_lora, load_adapter

# PEFT asks transformers by a name that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def written(folder, model=None, **settings):
    """A model that PEFT adapted, with its adapter in a folder."""
    theirs = peft.get_peft_model(
        model or tiny_llama(), peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    )
    randomise(theirs, scale=0.2).save_pretrained(folder)
    return theirs.eval()


def edit(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


CHANGED = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]


@pytest.mark.parametrize("start", CHANGED)
def test_an_adapter_that_changed_its_base_is_refused(start, tmp_path):
    written(tmp_path)
    edit(tmp_path, init_lora_weights=start)
    model = tiny_llama()
    with pytest.raises(ValueError, match=f"{start}.*changes the base.*path_initial_model_for_weight_conversion"):
        load_adapter(model, tmp_path)
    assert not any("lora" in name for name in model.state_dict())


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_how_factors_began_does_not_matter_otherwise(start, tmp_path):
    theirs = written(tmp_path)
    edit(tmp_path, init_lora_weights=start)
    model = load_adapter(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(model(tokens()).logits, theirs(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("value", "message"), [(float("nan"), "NaN"), (-float("inf"), "infinity"), (1, "is int64")])
def test_tensors_that_are_no_weights_are_refused(value, message, adapted, tmp_path):
    written(tmp_path, lora_alpha=8)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    key = next(key for key in state if "layers.1.self_attn.q_proj.lora_B" in key)
    state[key] = torch.full_like(state[key], value, dtype=torch.int64 if value == 1 else None)
    save_file(state, path)
    model = tiny_llama()
    if adapted:
        randomise(apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"])), seed=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"layers\.1\.self_attn\.q_proj\.lora_B\.weight .*{message}"):
        load_adapter(model, tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
