"""QK-clip: after it, a head's logits are the old ones times min(1, threshold / largest)."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from leanstep._torch import attention_projections
from leanstep.lora import LoraConfig, NormMonitor, QKClip, apply_lora
from leanstep.lora.attention.clip import clip_factors
from leanstep.lora.trainer import QKClipCallback
from leanstep.optimizers import SinkGD, param_groups

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4)),
    "grouped queries": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)),
    "biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2)),
    "gpt 2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
}
IDS = torch.arange(48).view(2, 24) % 32


def with_large_logits(name, dtype=torch.float32):
    """A model whose heads have logits of very different sizes."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for layer in (m for m in model.modules() if attention_projections(m)):
            for module in {part.module for part in attention_projections(layer).values()}:
                for param in module.parameters(recurse=False):
                    param.copy_(torch.randn(param.shape))
    return model


def logits_of(monitor, model):
    """Largest logits of all heads, by layer."""
    monitor.arm()
    model(IDS)
    return {name: values.double() for name, values in monitor.logits().items()}


def first_layer(logits):
    """The layer whose input does not depend on clipped weights."""
    return next(iter(logits.values()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_formula(name, dtype, tolerance):
    model = with_large_logits(name, dtype)
    with NormMonitor(model) as monitor:
        before = first_layer(logits_of(monitor, model))
        threshold = float(before.sort().values[1:3].mean())  # some heads pass it, some do not
        clip = QKClip(monitor, threshold=threshold, alpha=0.3)
        clip.arm()
        model(IDS)
        assert clip.step() >= 2
        assert clip.step() == 0  # nothing was measured since
        after = first_layer(logits_of(monitor, model))
    gamma = (threshold / before).clamp(max=1.0)
    assert 0 < (gamma == 1).sum() < 4
    torch.testing.assert_close(after, gamma * before, rtol=tolerance, atol=0)


def test_the_monitor_measures_the_largest_logit():
    """Against all logits in float64, by the definition."""
    model = with_large_logits("grouped queries")
    layer = model.model.layers[0].self_attn
    states = {}
    layer.register_forward_pre_hook(lambda m, a, k: states.update(k), with_kwargs=True)
    with NormMonitor(model) as monitor:
        measured = first_layer(logits_of(monitor, model))
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = states["hidden_states"]
    q, k = (p(x).view(2, 24, -1, 8).transpose(1, 2).double() for p in (layer.q_proj, layer.k_proj))
    q, k = apply_rotary_pos_emb(q, k, *(t.double() for t in states["position_embeddings"]))
    logits = q @ k.repeat_interleave(2, dim=1).mT * layer.scaling
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    torch.testing.assert_close(measured, logits.masked_fill(~causal, -torch.inf).amax(dim=(0, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_factors(alpha):
    logits = torch.tensor([50.0, 200.0, 400.0, 100.0, -3.0, torch.inf, torch.nan, -torch.inf], dtype=torch.float64)
    gamma = torch.tensor([1, 0.5, 0.25, 1, 1, 1, 1, 1], dtype=torch.float64)
    query, key = clip_factors(logits, 8, 100.0, alpha)  # one key head a query head: the paper's
    torch.testing.assert_close(query, gamma**alpha)
    torch.testing.assert_close(key, gamma ** (1 - alpha))
    query, key = clip_factors(logits, 4, 100.0, alpha)
    torch.testing.assert_close(key, torch.tensor([0.5, 0.25, 1, 1], dtype=torch.float64) ** (1 - alpha))
    torch.testing.assert_close(query * key.repeat_interleave(2), gamma)


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "master", "split"])
def test_rounding_states_are_scaled_too(rounding):
    """The weight of more than 16 bits is that of the formula: the next step does not bring the old one back."""
    model = with_large_logits("grouped queries", torch.bfloat16).train()
    optimizer = SinkGD(param_groups(model), lr=1e-3, rounding=rounding)
    with NormMonitor(model) as monitor:
        clip = QKClip(monitor, optimizer, threshold=1.0)
        for step in range(2):
            if step == 1:
                clip.arm()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        name, layer = next(iter(monitor.layers().items()))
        weight = f"{name}.k_proj.weight"
        before = optimizer.full_precision_state_dict(model)[weight].double()
        assert clip.step() > 0
        after = optimizer.full_precision_state_dict(model)[weight].double()
        _, key = clip_factors(clip._logits[name], 2, 1.0)
    expected = before * key.repeat_interleave(8)[:, None]
    tolerance = {"nearest": 2**-8, "kahan": 2**-15, "master": 2**-22, "split": 2**-15}[rounding]
    assert ((after - expected).abs() <= tolerance * expected.abs() + 1e-30).all()
    assert (key < 0.9).any()


def test_what_does_not_scale_is_refused():
    torch.manual_seed(0)
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    adapted = MODELS["llama"]()
    apply_lora(adapted, LoraConfig(r=2, target_modules=["q_proj"]))
    parametrized = MODELS["llama"]()
    nn.utils.parametrizations.weight_norm(parametrized.model.layers[1].self_attn.k_proj)
    for model, reason in (
        (qwen3, "q_norm, k_norm normalizes them"),
        (adapted, "an adapter adds to them"),
        (parametrized, "layers.1.self_attn .* a parametrization computes them"),
    ):
        with NormMonitor(model) as monitor, pytest.raises(ValueError, match=reason):
            QKClip(monitor)
    with NormMonitor(MODELS["llama"]()) as monitor:
        for settings in ({"threshold": 0.0}, {"alpha": 1.5}, {"threshold": float("nan")}):
            with pytest.raises(ValueError, match="expected threshold > 0 and alpha"):
                QKClip(monitor, **settings)


def test_logits_that_are_not_finite_change_nothing():
    model = with_large_logits("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:8] = 1e30
        model.model.layers[0].self_attn.k_proj.weight[:8] = 1e30
    before = copy.deepcopy(model.model.layers[0].self_attn.state_dict())
    with NormMonitor(model) as monitor:
        clip = QKClip(monitor, threshold=1e-3)
        clip.arm()
        model(IDS)
        clip.step()
    after = model.model.layers[0].self_attn.state_dict()
    assert torch.equal(after["q_proj.weight"][:8], before["q_proj.weight"][:8])
    assert not torch.equal(after["q_proj.weight"][8:16], before["q_proj.weight"][8:16])


def test_the_trainer_clips(tmp_path):
    model = with_large_logits("llama").train()
    data = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True,
        learning_rate=0.0, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="every >= 1"):
        QKClipCallback(every=0)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[QKClipCallback(threshold=5.0)])
    trainer.train()
    first, second = (row for row in trainer.state.log_history if "qk_clip/heads" in row)
    layer = "qk_clip/logit/model.layers.0.self_attn"
    assert first["qk_clip/heads"] > 0 and first[layer] > 6
    assert second[layer] == pytest.approx(5.0, rel=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_a_training_after_an_interrupted_one_leaves_nothing_behind():
    model, callback = with_large_logits("llama"), QKClipCallback()
    objects = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    for _ in range(2):
        callback.on_train_begin(None, None, None, **objects)
    callback.on_train_end(None, None, None)
    assert model.config._attn_implementation == "sdpa"


def test_the_largest_logit_is_that_of_all_calls_of_a_shared_layer():
    model = with_large_logits("llama")
    model.model.layers[1] = model.model.layers[0]
    calls = []

    def observe(call):
        logits = call.inputs.scale * call.inputs.query @ call.inputs.key.mT
        later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        calls.append(logits.detach().masked_fill(later, -torch.inf).amax((0, 2, 3)).double())

    with NormMonitor(model) as monitor:
        for tap in monitor._taps.values():
            tap.observers.append(observe)
        measured = first_layer(logits_of(monitor, model))
    first, second = calls
    assert (first > second + 1).any(), "the last call does not hold the largest logit of every head"
    torch.testing.assert_close(measured, torch.maximum(first, second), rtol=1e-4, atol=1e-4)
