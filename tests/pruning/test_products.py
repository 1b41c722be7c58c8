"""Products of a model in another dtype than its weights': which, with what result, and what stays as it was."""

import copy

import pytest
import torch
from architectures import make
from pruned_models import images, make_llama, save_model, tokens

from leanstep.pruning import measure_curves, prune, prune_checkpoint
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.loading import load_model
from leanstep.pruning.measure import products
from leanstep.pruning.measure.batches import as_batches
from leanstep.pruning.measure.products import product_dtype, products_in, products_of

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def fast(monkeypatch):
    """Set which 16-bit dtypes the processor multiplies fast."""

    def set_fast(*dtypes):
        monkeypatch.setattr(products, "_is_fast", lambda dtype: dtype in dtypes)

    set_fast(BF16)
    return set_fast


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ((BF16, FP16), {FP32: FP32, BF16: BF16, FP16: FP16}),
        ((BF16,), {FP32: FP32, BF16: BF16, FP16: BF16}),
        ((), {FP32: FP32, BF16: FP32, FP16: FP32}),
    ],
)
def test_the_dtype_of_products_follows_from_weights_and_processor(processor, expected, fast):
    fast(*processor)
    assert {stored: product_dtype(stored) for stored in expected} == expected
    for stored in expected:
        assert product_dtype(stored, "stored") == product_dtype(stored, "auto", "cuda") == stored
        assert product_dtype(stored, "bf16") == BF16
    with pytest.raises(ValueError, match="products must be one of auto, stored, bf16, got 'fp8'"):
        product_dtype(FP32, "fp8")


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "t5", "bert", "vit"])
@pytest.mark.parametrize(("stored", "asked"), [(FP16, "auto"), (FP32, "bf16")])
def test_outputs_are_as_near_to_fp32_as_those_of_a_bf16_model(name, stored, asked, fast):
    model, data = make(name), images(4) if name == "vit" else tokens(4, 16)
    if name == "mixtral":  # all experts, since another rounding may choose other ones
        model = type(model)(type(model.config)(**model.config.to_dict() | {"num_experts_per_tok": 3})).eval()
    for parameter in model.parameters():  # of the usual size, so that rounding is not amplified
        if parameter.dim() > 1 and name != "mixtral":
            parameter.data.div_(6.0)
    model.to(stored)

    def logits(model):
        with torch.no_grad():
            return as_batches(data, model)[0].run(model).logits

    expected = logits(copy.deepcopy(model).float())
    rounded = (logits(copy.deepcopy(model).bfloat16()) - expected).norm()
    before = logits(model)
    with products_in(model, asked):
        output = logits(model)
    assert torch.equal(logits(model), before)
    assert output.dtype == stored and not torch.equal(output, before)
    assert (output - expected).norm() < 1.5 * rounded


def test_what_runs_outside_of_a_pass_keeps_its_dtype(fast):
    model, matrix = make_llama(1).half(), torch.randn(8, 8, dtype=FP16)
    with products_in(model):
        assert torch.equal(matrix @ matrix, matrix.clone() @ matrix.clone())
        inside = matrix @ matrix
    assert torch.equal(inside, matrix @ matrix)


def test_gradients_are_those_of_the_stored_dtype_to_rounding(fast):
    model = make_llama(2).half().requires_grad_(True)
    batch = as_batches(tokens(2, 8), model)[0]

    def gradients():
        loss = batch.run(model).logits.float().square().mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    expected = gradients()
    with products_in(model):
        actual = gradients()
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == FP16 and (a - b).double().norm() < 0.05 * b.double().norm()


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_a_folder_keeps_its_dtype_and_weights_are_zero_or_as_stored(score, fast, tmp_path):
    save_model(make_llama(2).half(), tmp_path / "in")
    result = prune_checkpoint(
        tmp_path / "in", tmp_path / "out", tokens(12, 16), score=score, sparsity=0.5, levels=(0.4, 0.6), curves="fisher"
    )
    assert "products were computed in bf16, weights and activations are fp16" in result.notes
    before, after = (load_model(open_checkpoint(tmp_path / name)).state_dict() for name in ("in", "out"))
    for name, tensor in after.items():
        assert tensor.dtype == FP16
        if score == "wanda":
            assert torch.equal(tensor[tensor != 0], before[name][tensor != 0])


def test_stored_products_and_those_of_a_fast_processor_are_untouched(fast):
    model, data = make_llama(2).half(), tokens(8, 16)
    settings = {"sparsity": 0.5, "levels": (0.4, 0.6), "method": "fisher"}
    changed = measure_curves(model, data, **settings)
    stored = measure_curves(model, data, products="stored", **settings)
    fast(BF16, FP16)
    assert measure_curves(model, data, **settings) == stored != changed
    assert not prune(model, data, sparsity=0.5, allocation="uniform").notes


def test_a_context_inside_another_changes_nothing(fast):
    model = make_llama(1).half()
    assert products_of(model) == "bf16" and products_of(model, "stored") == ""
    with products_in(model, "stored"):
        with products_in(model, "bf16"):
            assert products_of(model) == ""
        assert products_of(model, "bf16") == ""
    with products_in(model, "bf16"), products_in(model, "stored"):
        assert products_of(model) == "bf16"


def test_curves_of_other_products_are_not_resumed(fast, tmp_path):
    model, data = make_llama(1).half(), tokens(6, 16)
    settings = {"sparsity": 0.5, "levels": (0.5,), "resume": tmp_path / "curves.jsonl"}
    measure_curves(model, data, products="stored", **settings)
    with pytest.raises(ValueError, match="products"):
        measure_curves(model, data, **settings)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(("avx512_bf16", "amx"), [(False, False), (True, False), (False, True)])
def test_avx512_alone_is_not_fast_in_bf16(machine, avx512_bf16, amx, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(products, "uses_instructions", {"avx512_bf16": avx512_bf16, "amx_tile": amx}.get)
    # what oneDNN answers with AVX-512, and on Arm with bf16
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert product_dtype(BF16) == (BF16 if machine == "aarch64" or avx512_bf16 or amx else FP32)
