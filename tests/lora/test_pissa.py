"""Adapters that begin with the principal part of the base weight (PiSSA)."""

import copy
import json

import peft
import pytest
import torch
from lora_models import GPT2_TARGETS, LLAMA_TARGETS, randomise, tiny_gpt2, tiny_llama, tokens
from safetensors.torch import load_file

from leanstep.lora import (
    LoraConfig,
    apply_lora,
    keep_zeros,
    load_adapter,
    merge,
    remove_lora,
    save_adapter,
    set_adapters,
    unmerge,
)
from leanstep.lora.apply import adapted_layers

MODELS = {"llama": (tiny_llama, LLAMA_TARGETS), "gpt2": (tiny_gpt2, GPT2_TARGETS)}


def begun(name="llama", dtype=torch.float32, **settings):
    make_model, targets = MODELS[name]
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": "pissa", **settings}
    )
    return apply_lora(make_model(dtype), config)


def logits(model):
    return model.eval()(input_ids=tokens()).logits


def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(steps):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_20"])
def test_the_factors_are_the_best_approximation_and_the_weight_is_the_rest(name, init):
    base, model = (
        dict(MODELS[name][0](torch.float64).named_modules()),
        begun(name, torch.float64, init_lora_weights=init),
    )
    for key, layer in adapted_layers(model):
        a, b = layer.factors()
        old = base[key].weight.t() if layer.lora.transposed else base[key].weight
        rest = layer.weight.t() if layer.lora.transposed else layer.weight
        torch.testing.assert_close(rest + layer.lora.scale * b @ a, old, rtol=1e-12, atol=1e-14)
        # the error of the best matrix of rank 4 is the fifth singular value
        values = torch.linalg.svdvals(old)
        error = torch.linalg.matrix_norm(rest, 2)
        torch.testing.assert_close(error, values[4], rtol=1e-6 if init == "pissa" else 0.1, atol=0)
        # both factors have the same singular values
        torch.testing.assert_close(torch.linalg.svdvals(a), torch.linalg.svdvals(b), rtol=1e-9, atol=0)
    torch.testing.assert_close(logits(model), logits(MODELS[name][0](torch.float64)), rtol=1e-9, atol=1e-11)


def test_the_start_is_pefts():
    ours = begun()
    theirs = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=LLAMA_TARGETS, init_lora_weights="pissa")
    )
    for name, layer in adapted_layers(ours):
        other = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.weight, other.base_layer.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.2}, {"save": "lora_fa"},
        {"use_rslora": True, "rank_pattern": {"c_fc|up_proj": 2}, "alpha_pattern": {"c_attn|q_proj": 3.0}},
    ],
    ids=str,
)  # fmt: skip
def test_the_saved_adapter_has_rank_2r_and_opens_over_the_plain_base(name, settings, tmp_path):
    model = train(begun(name, **settings))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    assert not torch.allclose(logits(model), logits(MODELS[name][0]()), atol=1e-2)
    theirs = peft.PeftModel.from_pretrained(MODELS[name][0](), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(logits(load_adapter(MODELS[name][0](), tmp_path)), logits(model), rtol=1e-4, atol=2e-5)


def test_training_goes_on_from_a_saved_adapter_bit_for_bit(tmp_path):
    model = train(begun())
    save_adapter(model, tmp_path)
    resumed = load_adapter(begun(), tmp_path)
    assert all(layer.lora_A.weight.shape[0] == 4 for _, layer in adapted_layers(resumed))
    assert torch.equal(logits(train(resumed.train())), logits(train(model.train())))


def test_a_start_of_another_machine_moves_the_base(tmp_path):
    model = train(begun())
    save_adapter(model, tmp_path)
    # a decomposition with other singular vectors, as a randomised one has
    other = load_adapter(begun(init_lora_weights="pissa_niter_1"), tmp_path)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)
    for (_, a), (_, b) in zip(adapted_layers(other), adapted_layers(model), strict=True):
        assert torch.equal(a.lora_start_A, b.lora_start_A) and torch.equal(a.lora_B.weight, b.lora_B.weight)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pefts_own_file_of_pissa_opens(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=LLAMA_TARGETS, init_lora_weights="pissa")
    theirs = randomise(peft.get_peft_model(tiny_llama(), config))
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_adapter(tiny_llama(), tmp_path)), logits(theirs), rtol=1e-4, atol=1e-5)


def test_off_merged_and_removed_it_is_what_it_should_be():
    base, model = logits(tiny_llama()), train(begun())
    trained = logits(model)
    set_adapters(model, False)
    torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    set_adapters(model, True)
    merge(model)
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-5)
    merged = remove_lora(copy.deepcopy(model))
    assert torch.equal(logits(merged), logits(model)) and set(merged.state_dict()) == set(tiny_llama().state_dict())
    unmerge(model)
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(remove_lora(model)), base, rtol=1e-4, atol=1e-5)


def test_a_bf16_base_keeps_the_rounding_of_its_rest():
    model = begun(dtype=torch.bfloat16)
    for name, layer in adapted_layers(model):
        assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.weight.dtype == torch.float32
        old = tiny_llama(torch.bfloat16).get_parameter(f"{name}.weight").float()
        a, b = layer.factors()
        error = (layer.weight.float() + layer.lora.scale * b @ a - old).abs().max()
        assert error <= 2**-8 * layer.weight.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, "embed_tokens cannot begin with 'pissa': it is an embedding"),
        ({"r": 17}, r"saved with rank 2 \* 17, and its weight is \(32, 32\); set r to at most 16"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights must be one of True, .* got 'pisa'"),
    ],
)
def test_what_has_no_principal_part_is_refused(settings, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        apply_lora(
            model, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa", **settings})
        )
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_shared_pruned_and_unfilled_weights_are_refused():
    tied = tiny_gpt2()
    with pytest.raises(ValueError, match=r"lm_head shares its weight with transformer.wte.weight"):
        apply_lora(tied, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights="pissa"))
    with torch.device("meta"):
        empty = torch.nn.Sequential(torch.nn.Linear(16, 16))
    with pytest.raises(ValueError, match="its weight has no values yet"):
        apply_lora(empty, LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa"))
    model = begun()
    with pytest.raises(ValueError, match="began with PiSSA"):
        keep_zeros(model, ["model.layers.0.self_attn.q_proj"])
    with pytest.raises(ValueError, match="began with PiSSA"):
        merge(model, keep_mask=True)
    assert torch.equal(logits(model), logits(begun()))


def test_the_file_has_the_start_with_its_sign(tmp_path):
    model = begun()
    save_adapter(model, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    a, b = state[key.format("A")], state[key.format("B")]
    assert torch.equal(a[:4], a[4:]) and torch.equal(b[:, :4], -b[:, 4:])
