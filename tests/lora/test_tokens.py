"""Trained rows of embeddings and heads: PEFT's outputs, gradients and files, merging, and what is refused."""

import copy
import pickle

import peft
import pytest
import torch
from architectures import make
from safetensors.torch import load_file
from torch import nn

from leanstep.lora import (
    LoraConfig,
    apply_lora,
    load_adapter,
    lora_groups,
    merge,
    remove_lora,
    save_adapter,
    set_adapters,
    unmerge,
)
from leanstep.lora.apply import token_layers
from leanstep.lora.merge import merged_state_dict

TRAINED = [5, 1, 2]


def base(tied=False, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, tie_word_embeddings=tied, **sizes)).to(dtype).eval()


def ids():
    return torch.arange(24).view(2, 12) % 7


def peft_model(tied, asked, folder):
    """A PEFT model with random rows, saved in a folder."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=asked, init_lora_weights=False)
    model = peft.get_peft_model(base(tied), config)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model.eval()


def gradients(model):
    logits = model(ids()).logits
    logits.double().square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


CASES = pytest.mark.parametrize(
    ("tied", "asked"),
    [(False, TRAINED), (True, TRAINED), (False, {"embed_tokens": TRAINED, "lm_head": [3]})],
    ids=["untied", "tied", "embedding-and-head"],
)


@CASES
def test_adapters_of_peft_load_with_its_outputs_and_gradients(tied, asked, tmp_path):
    expected, theirs = gradients(peft_model(tied, asked, tmp_path))
    model = load_adapter(base(tied), tmp_path)
    logits, ours = gradients(model)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert len(ours) == len(theirs) and any("lora_token_rows" in name for name in ours)
    for name, gradient in ours.items():
        end = name.replace("lora_token_rows", "token_adapter.trainable_tokens_delta")
        end = end.removesuffix(".weight")
        (theirs_name,) = [n for n in theirs if n.startswith(f"base_model.model.{end}")]
        torch.testing.assert_close(gradient, theirs[theirs_name], rtol=1e-4, atol=1e-7)


@CASES
def test_peft_opens_what_is_saved(tied, asked, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=asked, init_lora_weights=False)
    model = apply_lora(base(tied), config)
    assert torch.equal(model.get_input_embeddings().lora_token_rows, model.get_input_embeddings().weight[TRAINED])
    for _, module in token_layers(model):
        nn.init.normal_(module.lora_token_rows)
    save_adapter(model, tmp_path)
    keys = [key for key in load_file(tmp_path / "adapter_model.safetensors") if "token" in key.rpartition(".")[2]]
    assert len(keys) == (2 if isinstance(asked, dict) else 1)
    opened = peft.PeftModel.from_pretrained(base(tied), tmp_path).eval()
    torch.testing.assert_close(opened(ids()).logits, model(ids()).logits, rtol=1e-5, atol=1e-6)
    again = load_adapter(base(tied), tmp_path)
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    assert load_adapter(model, tmp_path) is model


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_writes_the_rows_and_unmerging_returns_the_weights(tied, asked, dtype):
    plain = base(tied, dtype)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=asked, init_lora_weights=False)
    model = apply_lora(copy.deepcopy(plain), config)
    for _, module in token_layers(model):
        nn.init.normal_(module.lora_token_rows)
    expected = model(ids()).logits
    state = merged_state_dict(model)
    assert not any("lora_" in key for key in state)
    merged = base(tied, dtype)
    merged.load_state_dict(state)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(merged(ids()).logits, expected, **tolerance)
    merge(model, backup=True)
    assert torch.equal(model(ids()).logits, merged(ids()).logits)
    assert torch.equal(model.get_input_embeddings().weight, state["model.embed_tokens.weight"])
    unmerge(model)
    assert torch.equal(model(ids()).logits, expected)
    set_adapters(model, False)
    assert torch.equal(model(ids()).logits, plain(ids()).logits)
    remove_lora(model)
    assert type(model.get_input_embeddings()) is nn.Embedding and type(model.lm_head) is nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]


def test_merging_keeps_zeros_on_request():
    model = base()
    model.get_input_embeddings().weight.data[1, :4] = 0
    apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TRAINED))
    rows = model.get_input_embeddings().lora_token_rows
    nn.init.normal_(rows)
    report = merge(model, keep_mask=True)
    assert report.masked["model.embed_tokens"] == 4
    weight = model.get_input_embeddings().weight
    assert not weight[1, :4].any() and torch.equal(weight[1, 4:], rows[TRAINED.index(1), 4:])


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "not-finite"])
def test_rows_that_cannot_be_merged_are_refused_before_anything_changes(sharded, monkeypatch):
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TRAINED, init_lora_weights=False)
    model = apply_lora(base(), config)
    if sharded:
        monkeypatch.setattr("leanstep.lora.layers.tokens.is_dtensor", lambda tensor: True)
    else:
        model.get_input_embeddings().lora_token_rows.data[0, 0] = torch.nan
    before = {name: tensor.nan_to_num() for name, tensor in model.state_dict().items()}
    for write in (merge, merged_state_dict):
        with pytest.raises(ValueError, match="sharded; merge before" if sharded else "hold NaN or infinity"):
            write(model)
    assert all(torch.equal(tensor.nan_to_num(), before[name]) for name, tensor in model.state_dict().items())


def test_only_the_rows_are_trained_and_a_step_changes_no_other_token():
    model = apply_lora(base(), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TRAINED))
    groups = {group["name"]: [name for name, _ in group["params"]] for group in lora_groups(model, lr=1e-2)}
    assert groups["rest"] == ["model.embed_tokens.lora_token_rows"]
    optimizer = torch.optim.AdamW(lora_groups(model, lr=1e-1), weight_decay=0.5)
    before = model.get_input_embeddings()(torch.arange(12)).detach()
    gradients(model)
    optimizer.step()
    after = model.get_input_embeddings()(torch.arange(12)).detach()
    assert [t for t in range(12) if not torch.equal(before[t], after[t])] == sorted(TRAINED)


def test_the_output_of_a_scaled_embedding_is_scaled():
    plain = make("gemma3")
    model = apply_lora(make("gemma3"), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    torch.testing.assert_close(model(ids()).logits, plain(ids()).logits)


def test_the_row_of_a_padding_token_gets_no_gradient():
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=2), nn.Linear(4, 4))
    apply_lora(model, LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [2, 3]}))
    model(torch.tensor([2, 3])).sum().backward()
    assert model[0].lora_token_rows.grad.any(dim=1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": [1, 1]}, "must be a list of whole numbers from 0, each once"),
        ({"trainable_token_indices": [-1]}, "must be a list of whole numbers"),
        ({"trainable_token_indices": []}, "must be a list of whole numbers"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, "and such lists, got {'embed_tokens': 3}"),
        ({"trainable_token_indices": [12]}, "rows of model.embed_tokens cannot be trained: it has 12 tokens, and 12"),
        ({"trainable_token_indices": {"head": [1]}}, "trainable_token_indices names 'head', which fits no module"),
        ({"trainable_token_indices": {"norm": [1]}}, "it is a LlamaRMSNorm; expected an embedding or a linear"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "is trained whole by modules_to_save"),
        (
            {"trainable_token_indices": [1], "target_modules": ["q_proj", "embed_tokens"]},
            "model.embed_tokens has an adapter and trained rows",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_and_changes_nothing(settings, message):
    model = base()
    before = {name: (type(module), module.training) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings}))
    assert before == {name: (type(module), module.training) for name, module in model.named_modules()}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modules_with_one_weight_have_one_list():
    asked = {"embed_tokens": [1], "lm_head": [2]}
    with pytest.raises(ValueError, match=r"embed_tokens and lm_head have one weight.* different tokens"):
        apply_lora(base(tied=True), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=asked))


def test_files_of_other_tokens_do_not_load_into_an_adapted_model(tmp_path):
    peft_model(False, TRAINED, tmp_path)
    model = apply_lora(base(), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1]))
    with pytest.raises(ValueError, match=r"trainable_token_indices \[5, 1, 2\], the model \[1\]; call remove_lora"):
        load_adapter(model, tmp_path)


def test_a_tied_model_is_saved_and_copied(tmp_path):
    model = apply_lora(base(tied=True), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TRAINED))
    assert [name for name in model.state_dict() if "lora_token" in name] == ["model.embed_tokens.lora_token_rows"]
    model.save_pretrained(tmp_path)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.lm_head.lora_token_rows is twin.get_input_embeddings().lora_token_rows
        assert twin.lm_head.lora_token_rows is not model.lm_head.lora_token_rows
        assert torch.equal(twin(ids()).logits, model(ids()).logits)
