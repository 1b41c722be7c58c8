"""Bases whose weights torchao has quantised."""

import copy
import functools

import pytest
import torch
from lora_models import LLAMA_TARGETS, loss_and_gradients, tiny_llama, tokens

from leanstep.lora import LoraConfig, apply_lora, load_adapter, merge, save_adapter

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

WEIGHT_ONLY = {
    "int8": quantization.Int8WeightOnlyConfig,
    "float8": quantization.Float8WeightOnlyConfig,
    "intx": functools.partial(quantization.IntxWeightOnlyConfig, weight_dtype=torch.int4),
}


def quantized(config, dtype=torch.float32):
    model = tiny_llama(dtype)
    quantization.quantize_(model, config(), lambda module, name: isinstance(module, torch.nn.Linear))
    return model


def dense(model):
    """The same model with dequantised weights."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.detach().dequantize(), requires_grad=False)
    return model


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
@pytest.mark.parametrize(
    "settings", [{}, {"lora_dropout": 0.3}, {"use_dora": True}, {"fast_path": False, "use_dora": True}], ids=str
)
def test_a_quantised_base_gives_the_gradients_of_its_dequantised_weights(kind, settings):
    base = quantized(WEIGHT_ONLY[kind])
    results = []
    for model in (base, dense(base)):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=LLAMA_TARGETS, init_lora_weights=False, **settings)
        apply_lora(model, config).train()
        assert model.model.layers[0].self_attn.q_proj.fast_path.on == settings.get("fast_path", True)
        torch.manual_seed(1)
        results.append(loss_and_gradients(model, tokens()))
    (loss, gradients), (wanted_loss, wanted) = results
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    for name in wanted:
        torch.testing.assert_close(gradients[name], wanted[name], rtol=1e-3, atol=1e-5)


def test_its_adapter_is_saved_loaded_and_not_merged(tmp_path):
    base = quantized(WEIGHT_ONLY["int8"])
    model = apply_lora(copy.deepcopy(base), LoraConfig(r=4, target_modules=LLAMA_TARGETS, init_lora_weights=False))
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(base, tmp_path)(tokens()).logits, model(tokens()).logits)
    with pytest.raises(ValueError, match="is a Int8Tensor, to be quantised again after a merge"):
        merge(model)


def test_quantised_inputs_are_refused_by_name():
    model = quantized(quantization.Int8DynamicActivationInt8WeightConfig)
    message = "q_proj cannot be adapted: its weight is torchao's Int8Tensor with act_quant_kwargs, .*weight-only"
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoraConfig(r=4, target_modules=["q_proj"]))
    assert not any(hasattr(module, "lora") for module in model.modules())
