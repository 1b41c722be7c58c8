"""Adapters folded into the base and out again."""

import copy

import pytest
import torch
import transformers
from lora_models import (
    GPT2_TARGETS,
    LLAMA_TARGETS,
    loss_and_gradients,
    randomise,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tokens,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from leanstep.lora import LoraConfig, apply_lora, load_adapter, merge, remove_lora, save_adapter, unmerge
from leanstep.lora.merge import config_of_merged, merged_state_dict

CASES = {
    "llama": (tiny_llama, {"target_modules": LLAMA_TARGETS}),
    "dora": (tiny_llama, {"target_modules": LLAMA_TARGETS, "use_dora": True}),
    "gpt2 dora": (tiny_gpt2, {"target_modules": GPT2_TARGETS, "use_dora": True}),
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


def test_a_backup_gives_a_bias_back_bit_for_bit():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8)).bfloat16()
    bias = model[0].bias.detach().clone()
    adapted(lambda _: model, {"target_modules": ["0"], "lora_bias": True})
    with torch.no_grad():
        model[0].lora_B.bias.mul_(100)
    merge(model, backup=True)
    assert not torch.equal(model[0].bias, bias)
    unmerge(model)
    assert torch.equal(model[0].bias, bias)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_sum_that_its_dtype_makes_infinite_is_refused(part):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8)).half()
    adapted(lambda _: model, {"target_modules": ["0"], "lora_bias": True})
    with torch.no_grad():
        getattr(model[0].lora_B, part).mul_(1e7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"the merged {part} of 0 holds NaN or infinity in torch.float16; nothing was"):
        merge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("case", "magnitude"), [("dora", 0.0), ("dora", 1e-6), ("gpt2 dora", 0.0), ("embeddings", 0.0)]
)
def test_rows_that_a_magnitude_scaled_away_come_back(case, magnitude, dtype):
    model = adapted(*CASES[case], dtype)
    layers = [module for module in model.modules() if hasattr(module, "lora")]
    with torch.no_grad():
        for layer in layers:
            layer.lora_magnitude_vector[1] = magnitude
    before = [layer.weight.detach().clone() for layer in layers]
    merge(model)
    unmerge(model)
    for layer, weight in zip(layers, before, strict=True):
        outputs_first = isinstance(layer, torch.nn.Linear)
        found, wanted = (w if outputs_first else w.t() for w in (layer.weight, weight))
        assert torch.equal(found[1], wanted[1])
        assert torch.isfinite(found).all()


def test_the_largest_rounding_is_what_the_report_says():
    model = adapted(*CASES["llama"], torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        exact = layer.weight.float() + layer.lora.scale * (layer.lora_B.weight @ layer.lora_A.weight)
        report = merge(model)
        lost = float((layer.weight.float() - exact).abs().max())
    assert report.layers["model.layers.0.self_attn.q_proj"] == pytest.approx(lost, rel=1e-3)
    assert str(report).startswith("14 layers, largest drift ") and " (layer model.layers." in str(report)


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
    with pytest.raises(ValueError, match="has a bias on B, but its base layer has none"):
        merge(biased)
    model = adapted(*CASES["llama"])
    merge(model)
    with pytest.raises(ValueError, match="is merged already"):
        merge(model)


def reloaded(model, folder, kind=transformers.AutoModelForCausalLM):
    model.save_pretrained(folder)
    return kind.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("backup", [False, True])
@pytest.mark.parametrize(
    ("build", "target", "other"),
    [
        (tiny_gpt2, "transformer.wte", "lm_head"),
        (lambda: tiny_llama(tie_word_embeddings=True), "lm_head", "model.embed_tokens"),
    ],
)
def test_a_tied_weight_is_untied_until_it_is_unmerged(build, target, other, dora, backup, tmp_path):
    model = adapted(lambda _: build(), {"target_modules": [target], "use_dora": dora})
    layer, tied = model.get_submodule(target), model.get_submodule(other)
    shared, before, pairs = tied.weight, tied.weight.detach().clone(), dict(model.all_tied_weights_keys)
    wanted = model(tokens()).logits
    with pytest.warns(UserWarning, match=rf"{other}.weight.* were one parameter.*tie_word_embeddings is False"):
        report = merge(model, backup=backup)
    assert report.drift == 0 and tied.weight is shared and layer.weight is not shared
    assert report.untied == {f"{target}.weight": [f"{other}.weight"]} and "1 untied" in str(report)
    assert torch.equal(tied.weight, before)
    torch.testing.assert_close(model(tokens()).logits, wanted, rtol=1e-4, atol=1e-4)
    assert unmerge(model).drift == 0
    assert layer.weight is tied.weight and torch.equal(tied.weight, before) and not hasattr(model, "lora_ties")
    assert model.config.tie_word_embeddings and model.all_tied_weights_keys == pairs
    assert torch.equal(model(tokens()).logits, wanted)
    with pytest.warns(UserWarning, match="were one parameter"):
        merge(model)
    remove_lora(model)
    assert all(p.requires_grad for p in model.parameters())
    loaded = reloaded(model, tmp_path)
    torch.testing.assert_close(loaded(tokens()).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not loaded.config.tie_word_embeddings


def test_the_merged_state_of_a_tied_model_opens_too(tmp_path):
    model = adapted(tiny_gpt2, {"target_modules": ["wte", "c_attn"]})
    wanted, state = model(tokens()).logits, merged_state_dict(model)
    assert all(tensor.is_meta for tensor in merged_state_dict(model, device="meta").values())
    with config_of_merged(model):
        model.save_pretrained(tmp_path, state_dict=state)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded(tokens()).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not loaded.config.tie_word_embeddings and model.config.tie_word_embeddings
    assert model.lm_head.weight is model.transformer.wte.weight
    # nothing tied is adapted: nothing is said
    plain = adapted(tiny_gpt2, {"target_modules": ["c_attn"]})
    with config_of_merged(plain):
        assert plain.config.tie_word_embeddings
    merge(plain)
    assert plain.lm_head.weight is plain.transformer.wte.weight


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("target", ["shared", "lm_head"])
def test_a_weight_that_many_share(target, resized, tmp_path):
    model = adapted(lambda _: tiny_t5(resized), {"target_modules": [target]})
    holders = [model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head]
    assert len({id(holder.weight) for holder in holders}) == 1
    call = {"input_ids": tokens(), "decoder_input_ids": tokens(seed=1)}
    wanted, state = model(**call).logits, merged_state_dict(model)
    with config_of_merged(model):
        model.save_pretrained(tmp_path / "state", state_dict=state)
    with pytest.warns(UserWarning, match="were one parameter"):
        merge(model)
    torch.testing.assert_close(model(**call).logits, wanted, rtol=1e-4, atol=1e-4)
    other = reloaded(remove_lora(copy.deepcopy(model)), tmp_path / "merged", transformers.T5ForConditionalGeneration)
    torch.testing.assert_close(other(**call).logits, wanted, rtol=1e-4, atol=1e-4)
    other = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "state", dtype=torch.float32)
    torch.testing.assert_close(other(**call).logits, wanted, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert len({id(holder.weight) for holder in holders}) == 1


@pytest.mark.filterwarnings("ignore:apply_lora. shared.weight was one parameter")
@pytest.mark.parametrize("settings", [{"modules_to_save": ["shared"]}, {"trainable_token_indices": [3, 63]}])
def test_the_merged_state_of_a_module_with_many_names_opens(settings, tmp_path):
    model = adapted(lambda _: tiny_t5(resized=True), {"target_modules": ["q"], **settings})
    assert model.encoder.embed_tokens is model.shared
    call = {"input_ids": tokens(vocabulary=64), "decoder_input_ids": tokens(seed=1, vocabulary=64)}
    with config_of_merged(model):
        model.save_pretrained(tmp_path, state_dict=merged_state_dict(model))
    other = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(other(**call).logits, model(**call).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["0"], ["0", "2"]])
def test_linear_layers_that_share_a_weight_and_a_bias(targets):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    # another parameter in the same memory
    model[3].weight = torch.nn.Parameter(model[0].weight.data)
    model = adapted(lambda _: model, {"target_modules": targets, "lora_bias": True})
    x, names = torch.randn(5, 8), [name for name, _ in model.named_parameters(remove_duplicate=False)]
    wanted, before = model(x), model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"0.weight and 2.weight and 3.weight; 0.bias and 2.bias were one parameter"):
        merge(model)
    torch.testing.assert_close(model(x), wanted)
    assert torch.equal(model[3].weight, before)
    unmerge(model)
    assert (
        model[0].weight is model[2].weight and model[0].bias is model[2].bias and torch.equal(model[0].weight, before)
    )
    assert model[3].weight.data_ptr() == model[0].weight.data_ptr()
    torch.testing.assert_close(model(x), wanted)
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names


def test_a_merged_model_that_is_to_train_says_that_it_cannot():
    model = randomise(apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])))
    merge(model, backup=True)
    model.eval()
    with pytest.warns(UserWarning, match=r"merged adapters, whose factors get no gradient; unmerge\(model\) first"):
        model.train()
    unmerge(model)
    model.eval().train()
    loss_and_gradients(model, tokens())
    assert model.model.layers[0].self_attn.q_proj.lora_A.weight.grad is not None


def test_the_merged_state_has_the_weights_that_only_sound_like_factors():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.explora_head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.lora_table = torch.nn.Parameter(torch.ones(3))

    model, plain = Model(), Model()
    apply_lora(model, LoraConfig(r=2, target_modules=["a"]))
    assert list(merged_state_dict(model)) == list(plain.state_dict())


def test_a_tied_head_that_is_trained_whole_is_no_longer_tied(tmp_path):
    """Neither tie_weights() nor a program that trusts config.json may put the embedding in its place."""
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="lm_head.weight was one parameter with that of another module"):
        apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    randomise(model).eval()
    assert model.config.tie_word_embeddings is False
    expected = model(tokens()).logits
    model.tie_weights()
    assert torch.equal(model(tokens()).logits, expected)
    merge(model)
    remove_lora(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings is False
    torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def test_ties_that_a_trained_head_leaves_stay():
    model = tiny_t5()
    keys = dict(model.all_tied_weights_keys)
    assert "lm_head.weight" in keys and len(keys) > 1
    with pytest.warns(UserWarning, match="lm_head.weight was one parameter"):
        apply_lora(model, LoraConfig(r=2, target_modules=["q"], modules_to_save=["lm_head"]))
    assert model.all_tied_weights_keys == {a: b for a, b in keys.items() if "lm_head" not in a + b}
    assert model.config.tie_word_embeddings is True


def test_the_merged_state_sees_through_activation_checkpoints(tmp_path):
    """A wrapper leaves itself out of state_dict, and not out of named_modules."""
    model, plain = tiny_llama(), tiny_llama()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    randomise(apply_lora(model, LoraConfig(r=2, target_modules="all-linear")), scale=0.2).eval()
    expected = model(tokens()).logits
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(tiny_llama(), tmp_path).eval()(tokens()).logits, expected)
    assert load_adapter(model, tmp_path) is model
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(plain.eval()(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
