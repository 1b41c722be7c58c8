"""Adapters in training: PEFT's losses step by step, every optimizer, sparse bases, quantised bases."""

import copy

import peft
import pytest
import torch
import transformers
from lora_models import LLAMA_TARGETS, randomise, tiny_gpt2, tiny_llama, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from leanstep.lora import (
    LoraConfig,
    accelerate_peft,
    apply_lora,
    load_adapter,
    lora_groups,
    merge,
    remove_lora,
    save_adapter,
)
from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD, param_groups
from leanstep.sparsity import Schedule, is_nm, nm_mask, sparsify

OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(lora_groups(model, b={"lr": 2e-2}), lr=1e-2),
    "sinkgd": lambda model: SinkGD(param_groups(model), lr=2e-2),
    "lanton": lambda model: LANTON(param_groups(model), lr=2e-2),
    "lion": lambda model: Lion(param_groups(model), lr=3e-3),
    "mfac": lambda model: MFAC(param_groups(model), lr=1e-3, window=8, damping=1e-3),
}


def losses(model, steps, optimizer=None, accumulate=1):
    model.train()
    # the usual eps of 1e-8 makes steps of the rate's size out of the rounding of gradients that are nearly zero
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, eps=1e-6)
    found = []
    for step in range(steps):
        for part in range(accumulate):
            ids = tokens(4, 16, seed=(step * accumulate + part) % 6, vocabulary=20)
            loss = model(input_ids=ids, labels=ids).loss
            (loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "steps", "accumulate"),
    [({}, 100, 1), ({"use_rslora": True}, 50, 2), ({"use_dora": True}, 200, 1)],
    ids=["lora", "rslora, 2 passes", "dora"],
)
def test_losses_are_pefts_step_by_step(settings, steps, accumulate, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=LLAMA_TARGETS, **settings)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(tiny_llama(layers=1), config)
    theirs.save_pretrained(tmp_path)
    ours, fast = load_adapter(tiny_llama(layers=1), tmp_path), copy.deepcopy(theirs)
    accelerate_peft(fast)
    wanted = losses(theirs, steps, accumulate=accumulate)
    assert wanted[-1] < wanted[0] - 0.1
    for model in (ours, fast):
        assert losses(model, steps, accumulate=accumulate) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_the_factors_and_nothing_else(name):
    torch.manual_seed(0)
    model = apply_lora(tiny_llama(layers=1), LoraConfig(r=4, target_modules=LLAMA_TARGETS, use_dora=True))
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    found = losses(model, 20, OPTIMIZERS[name](model))
    assert min(found[-3:]) < found[0] - 0.02
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_adapters_on_a_base_under_an_nm_mask():
    model = tiny_llama(layers=1)
    control = sparsify(model, {"*.mlp.*": "2:4"}, schedule=Schedule(total_steps=1), method="fixed")
    apply_lora(model, LoraConfig(r=4, target_modules=LLAMA_TARGETS))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.fast_path.on and control is not None
    found = losses(model, 10)
    assert found[-1] < found[0]
    with torch.no_grad():
        x = torch.randn(3, 32)
        wanted = x @ (layer.weight + layer.lora.scale * layer.lora_B.weight @ layer.lora_A.weight).t()
    torch.testing.assert_close(layer(x), wanted)


def test_a_base_made_sparse_after_its_adapters_leaves_them_dense(tmp_path):
    model = apply_lora(tiny_llama(layers=1), LoraConfig(r=4, target_modules=LLAMA_TARGETS))
    control = sparsify(model, {"*.mlp.*": "2:4"}, schedule=Schedule(total_steps=1), method="fixed")
    assert not [layer.name for layer in control.layers if "lora_" in layer.name]
    save_adapter(model, tmp_path / "adapter")
    load_adapter(apply_lora(tiny_llama(layers=1), LoraConfig(r=4, target_modules=LLAMA_TARGETS)), tmp_path / "adapter")


def test_a_pruned_model_is_fine_tuned_merged_and_still_pruned():
    model = tiny_llama(layers=1)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(nm_mask(weight, "2:4"))
    apply_lora(model, LoraConfig(r=4, target_modules=LLAMA_TARGETS))
    losses(model, 5)
    merge(model, keep_mask=True)
    remove_lora(model)
    assert is_nm(model.model.layers[0].mlp.up_proj.weight, "2:4")


def test_lora_fa_trains_b_alone():
    model = apply_lora(tiny_llama(layers=1), LoraConfig(r=4, target_modules=LLAMA_TARGETS, save="lora_fa"))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
    found = losses(model, 10)
    assert found[-1] < found[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_lora_fa_trains_both_factors_of_an_embedding():
    model = apply_lora(tiny_gpt2(), LoraConfig(r=4, target_modules=["wte", "c_attn"], save="lora_fa"))
    layer = model.transformer.wte
    assert layer.lora_embedding_A.requires_grad and not model.transformer.h[0].attn.c_attn.lora_A.weight.requires_grad
    before = layer.lora_embedding_B.detach().clone()
    losses(model, 3)
    assert layer.lora_embedding_A.any() and not torch.equal(layer.lora_embedding_B, before)


def test_half_precision_bases_keep_fp32_factors():
    model = randomise(apply_lora(tiny_llama(torch.bfloat16, layers=1), LoraConfig(r=4, target_modules=LLAMA_TARGETS)))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    found = losses(model, 20)
    assert found[-1] < found[0]
    assert model.model.layers[0].self_attn.q_proj(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16


def quantised(bits, seed=0):
    """One linear layer of bitsandbytes."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    options = {"compute_dtype": torch.float32} if bits == 4 else {"has_fp16_weights": False}
    model = torch.nn.Sequential(kind(64, 64, bias=True, **options))
    torch.manual_seed(seed)
    model[0].load_state_dict(torch.nn.Linear(64, 64).state_dict())
    model = model.to("cpu")
    model(torch.randn(2, 64))
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases_compute_with_what_they_hold(bits, dora):
    from leanstep.lora.layers.frozen import dequantizer

    model = quantised(bits)
    apply_lora(model, LoraConfig(r=4, target_modules=["0"], use_dora=dora))
    randomise(model)
    layer, x = model[0], torch.randn(5, 64, requires_grad=True)
    w = dequantizer(layer)(layer.weight).float()
    w = w + layer.lora.scale * layer.lora_B.weight @ layer.lora_A.weight
    if dora:
        w = w * (layer.lora_magnitude_vector / w.detach().norm(dim=1)).unsqueeze(1)
    y = model(x)
    torch.testing.assert_close(y, x @ w.t() + layer.bias, rtol=1e-4, atol=1e-4)
    leaves = [x, layer.lora_A.weight, layer.lora_B.weight]
    found = torch.autograd.grad(y.square().sum(), leaves)
    for a, b in zip(found, torch.autograd.grad((x @ w.t() + layer.bias).square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="to be quantised again after"):
        merge(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_refuses_pissa_and_trains_with_lora_plus(bits, tmp_path):
    model = quantised(bits)
    with pytest.raises(ValueError, match="0 cannot begin with 'pissa': it is a Linear.*bit.*PiSSA changes the base"):
        apply_lora(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa"))
    apply_lora(model, LoraConfig(r=4, target_modules=["0"]))
    stored = model[0].weight.clone()
    groups = lora_groups(model, lr=1e-3, lr_ratio=16)
    assert sorted(group["lr"] for group in groups) == [1e-3, 16e-3]
    optimizer = torch.optim.AdamW(groups)
    x, y = torch.randn(64, 64), torch.randn(64, 64)
    values = []
    for _ in range(20):
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert values[-1] < 0.95 * values[0]
    assert torch.equal(model[0].weight, stored)
    save_adapter(model, tmp_path)
    outputs = model(x)
    torch.testing.assert_close(load_adapter(quantised(bits), tmp_path)(x), outputs)
    theirs = peft.PeftModel.from_pretrained(quantised(bits), tmp_path)
    # to evaluate, bitsandbytes packs 4-bit weights with scales in bf16
    assert (outputs - quantised(bits)(x)).abs().max() > 0.3
    torch.testing.assert_close(theirs(x), outputs, rtol=0, atol=0.05)


@pytest.mark.parametrize("optimizer", [SinkGD, LANTON])
def test_factors_are_matrices_and_no_warning_says_that_they_may_be_embeddings(optimizer):
    model = apply_lora(tiny_gpt2(), LoraConfig(r=2, target_modules=["wte", "c_attn"], use_dora=True))
    optimizer(lora_groups(model))
    model = apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.warns(UserWarning, match=r": 1 parameters of two or more dimensions .* Embeddings and heads"):
        optimizer(lora_groups(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of trl, datasets and transformers
def test_dpo_takes_the_model_at_its_start_as_the_reference(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    rows = [{"prompt": "a b ", "chosen": "c d", "rejected": "e f"}] * 8
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    # a model made from a config has no name, by which TRL would load a second model as the reference
    arguments = trl.DPOConfig(str(tmp_path), precompute_ref_log_probs=True, **settings, **quiet)
    model = apply_lora(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    trainer = trl.DPOTrainer(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    assert abs(margins[0]) < 1e-4 < margins[-1]
