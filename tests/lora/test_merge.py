"""Adapters folded into the base and out again."""

import copy

import pytest
import torch
import transformers
from lora_models import GPT2_TARGETS, LLAMA_TARGETS, randomise, tiny_gpt2, tiny_llama, tokens

from leanstep.lora import LoraConfig, apply_lora, merge, remove_lora, unmerge

CASES = {
    "llama": (tiny_llama, {"target_modules": LLAMA_TARGETS}),
    "dora": (tiny_llama, {"target_modules": LLAMA_TARGETS, "use_dora": True}),
    "gpt2 dora": (tiny_gpt2, {"target_modules": GPT2_TARGETS, "use_dora": True, "lora_bias": True}),
    "embeddings": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
}


def adapted(build, settings, dtype=torch.float32):
    return randomise(apply_lora(build(dtype), LoraConfig(r=4, **settings)), scale=0.2).eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_merged_and_adapted_models_agree(case, dtype):
    build, settings = CASES[case]
    model = adapted(build, settings, dtype)
    exact = copy.deepcopy(model).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted, rough = exact(tokens()).logits, model(tokens()).logits.double()
    report = merge(model)
    found = model(tokens()).logits.double()
    eps = torch.finfo(dtype).eps
    # what rounding every weight once costs, beside what 16-bit arithmetic costs anyway
    assert (found - wanted).norm() <= 2 * (rough - wanted).norm() + 12 * eps * wanted.norm()
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    assert report.drift <= largest * eps
    assert (report.drift == 0) == (dtype != torch.bfloat16)
    unmerge(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=16 * eps, atol=16 * eps)


def test_a_backup_gives_the_weights_back_bit_for_bit():
    model = adapted(*CASES["dora"], torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert merge(model, backup=True).drift > 0
    assert unmerge(model).drift == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_largest_rounding_is_what_the_report_says():
    model = adapted(*CASES["llama"], torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        exact = layer.weight.float() + layer.lora.scale * (layer.lora_B.weight @ layer.lora_A.weight)
        report = merge(model)
        lost = float((layer.weight.float() - exact).abs().max())
    assert report.layers["model.layers.0.self_attn.q_proj"] == pytest.approx(lost, rel=1e-3)
    assert str(report).startswith("14 layers, largest drift ")


def test_training_goes_on_after_unmerging():
    model = adapted(*CASES["llama"])
    wanted = model(tokens()).logits
    merge(model)
    assert "merged" in model.model.layers[0].mlp.fast_path.reason
    unmerge(model)
    assert model.model.layers[0].mlp.fast_path.on
    torch.testing.assert_close(model(tokens()).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_merged_model_is_an_ordinary_one(tmp_path):
    model = adapted(*CASES["llama"])
    wanted = model(tokens()).logits
    merge(model)
    remove_lora(model)
    assert model.state_dict().keys() == tiny_llama().state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded(tokens()).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_a_pruned_base_stays_pruned_if_asked(dora):
    model = tiny_llama()
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight[:, ::2] = 0
        weight[3] = 0
    zeros = weight == 0
    model = randomise(apply_lora(model, LoraConfig(r=4, target_modules=["q_proj"], use_dora=dora)))
    dense = copy.deepcopy(model)
    report = merge(model, keep_mask=True)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight == 0, zeros)
    assert report.masked["model.layers.0.self_attn.q_proj"] == int(zeros.sum())
    merge(dense)
    other = dense.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight[~zeros], other[~zeros])
    assert (other[zeros] != 0).any()
    unmerge(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight == 0, zeros)


def test_what_cannot_be_merged_leaves_every_weight_as_it_was():
    model = adapted(*CASES["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_B.weight[0, 0] = float("nan")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"merged weight of model\.layers\.1\.mlp\.down_proj holds NaN"):
        merge(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="the model has no adapters"):
        merge(tiny_llama())
    with pytest.raises(ValueError, match="expected a model with merged adapters"):
        unmerge(model)
    biased = adapted(tiny_llama, {"target_modules": ["q_proj"], "lora_bias": True})
    with pytest.raises(ValueError, match="has a bias on B and none of its own"):
        merge(biased)
    model = adapted(*CASES["llama"])
    merge(model)
    with pytest.raises(ValueError, match="is merged already"):
        merge(model)
