"""Adapters whose product is masked where the base is zero: the merged model is as sparse, and is what was trained."""

import copy

import pytest
import torch
from pruned_models import make_gpt2, make_llama
from torch import nn

from leanstep.lora import LoraConfig, apply_lora, keep_zeros, merge, saved_bytes, unmerge
from leanstep.lora.layers.linear import LoRALinearLayer
from leanstep.lora.layers.pruned import masked_linear
from leanstep.lora.merge import merged_state_dict
from leanstep.pruning import prune


def adapted(make=make_llama, dtype=torch.float32, **settings):
    """A model of which half is zero, with adapters that do something."""
    torch.manual_seed(0)
    model = make()
    prune(model, sparsity=0.5, allocation="erk", score="magnitude")
    model = model.to(dtype).eval()
    apply_lora(model, LoraConfig(r=4, target_modules="all-linear", **settings))
    for layer in layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    return model


def layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinearLayer)}


IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_model_keeps_every_zero_and_computes_the_same(make, dtype):
    model = adapted(make, dtype)
    before = {name: layer.weight == 0 for name, layer in layers(model).items()}
    assert keep_zeros(model) == [name for name, zeros in before.items() if zeros.any()]
    logits = model(IDS).logits
    stored = merged_state_dict(model)
    report = merge(model, backup=True)
    assert sum(report.masked.values()) == sum(int(zeros.sum()) for zeros in before.values()) > 0
    for name, layer in layers(model).items():
        assert not layer.weight[before[name]].any()
        assert torch.equal(layer.weight, stored[f"{name}.weight"])
        assert bool(layer.weight[~before[name]].count_nonzero())
    torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=0)
    unmerge(model)
    torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=0)


def test_the_zeros_are_filled_without_it():
    model = adapted()
    zeros = {name: layer.weight == 0 for name, layer in layers(model).items()}
    merge(model)
    assert all(layer.weight[zeros[name]].any() for name, layer in layers(model).items())


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_the_masked_sum(dropout, transposed):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = Conv1D(6, 5) if transposed else nn.Linear(5, 6)
    model = nn.Sequential(layer).double()
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand_like(layer.weight) < 0.5, 0)
    apply_lora(model, LoraConfig(r=2, target_modules=["0"], lora_dropout=dropout, lora_bias=True))
    for parameter in (layer.lora_B.weight, layer.lora_B.bias):
        nn.init.normal_(parameter)
    assert keep_zeros(model) == ["0"]
    model.train()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    out = model(x)
    torch.manual_seed(1)
    weight = layer.weight.t() if transposed else layer.weight
    # what dropout left is seen in a layer that gives its input back
    update = (layer.lora_B.weight @ layer.lora_A.weight) * layer.lora.scale * (weight != 0)
    from leanstep.lora.layers.autograd import new_seed, seeded_dropout

    inputs = seeded_dropout(x, dropout, new_seed()) if dropout else x
    expected = x @ weight.t() + inputs @ update.t() + layer.bias + layer.lora_B.bias * layer.lora.scale
    torch.testing.assert_close(out, expected)
    trained = [x, layer.lora_A.weight, layer.lora_B.weight, layer.lora_B.bias]
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, trained, upstream)
    for one, other in zip(found, torch.autograd.grad(expected, trained, upstream), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_agree_with_differences_of_the_output_also_those_of_the_base():
    torch.manual_seed(0)
    weight, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 5), (2, 5), (6, 2)))
    weight[torch.rand_like(weight) < 0.5] = 0
    x, bias = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    nonzero = weight != 0

    def output(x, left, a, b, bias):
        # differences must not fill the zeros, which decide what the mask is
        return masked_linear(x, torch.zeros_like(weight).masked_scatter(nonzero, left), a, b, bias, 0.5)

    inputs = [value.requires_grad_(True) for value in (x, weight[nonzero], a, b, bias)]
    torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradcheck(lambda x, a: output(x, inputs[1].detach(), a, b.detach(), None), [x, a])
    frozen = [value.detach() for value in inputs[1:]]
    assert torch.autograd.gradcheck(lambda x: output(x, *frozen), [x])


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_autograd_saves_no_matrix_of_the_size_of_a_weight(make):
    model = adapted(make).train()
    keep_zeros(model)
    for layer in layers(model).values():
        x = torch.randn(1, layer.input_width(), requires_grad=True)
        assert saved_bytes(lambda layer=layer, x=x: layer(x), model.parameters()) == x.nbytes


def test_training_runs_through_fused_blocks_and_copies():
    model = adapted()
    keep_zeros(model)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one.train()
        loss = one(IDS, labels=IDS).loss
        loss.backward()
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    reasons = [layer.fast_path.reason for layer in layers(model).values()]
    assert all("keep_zeros needs" in reason for reason in reasons)


def test_what_cannot_be_is_refused():
    for model, names, message in (
        (adapted(use_dora=True), None, "has DoRA"),
        (adapted(), ["model.norm"], "is not an adapted linear layer"),
        (adapted(fast_path=True), None, "fast path"),
    ):
        with pytest.raises(ValueError, match=message):
            keep_zeros(model, names)
        assert not any(layer.lora.keep_zeros for layer in layers(model).values())
    model = adapted()
    merge(model)
    with pytest.raises(ValueError, match="merged already"):
        keep_zeros(model, list(layers(model)))


@pytest.mark.parametrize("inside", [False, True], ids=["backward-outside", "backward-inside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_factors_get_gradients_of_their_dtype(dtype, inside):
    model, x = adapted().train(), torch.randn(2, 32)
    layer = next(iter(layers(model).values()))
    keep_zeros(model)
    gradients = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype, enabled=enabled):
            y = layer(x[:, : layer.in_features]).float().square().sum()
            if inside:
                y.backward()
        if not inside:
            y.backward()
        gradients.append(layer.lora_B.weight.grad)
        layer.zero_grad()
    assert gradients[0].dtype == torch.float32
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.02 * float(gradients[1].abs().max()))
