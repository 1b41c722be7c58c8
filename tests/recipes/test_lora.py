"""Runs with a `lora:` section: from a base to an adapter that peft opens."""

import json
import shutil
from functools import partial

import pytest
import torch
from faults import held_at
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from training import Training, numbers, run, write_recipe, write_text
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from leanstep.lora import load_adapter
from leanstep.pruning.folder.loading import open_config
from leanstep.recipes.check.check import Check, Section, check
from leanstep.recipes.check.costs import estimate, flops_per_token, unique_bytes
from leanstep.recipes.config.differences import config_differences
from leanstep.recipes.config.loader import ConfigError, load
from leanstep.recipes.methods.lora import adapt, describe_adapters
from leanstep.recipes.training.build import build_model, missing_here
from leanstep.recipes.training.initial import check_initial_config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run whose model is adapted, and the recipe with another text."""
    folder = tmp_path_factory.mktemp("base")
    recipe = write_recipe(folder)
    training = run(recipe, ["steps=3"], folder / "base")
    assert training.codes == [0], training.text()
    write_text(folder / "other.txt", seed=1)
    options = [
        f"model.init_from={folder}/base/final", "model.config={}", f"data.tokenizer={folder}/base/final",
        f"data.path={folder}/other.txt", "lora.target_modules=[c_attn, c_fc]", "lora.r=4", "lora.lora_dropout=0.2",
        "optimizer.lr=1e-2",
    ]  # fmt: skip
    return recipe, folder / "base" / "final", options


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    recipe, _, options = base
    out = tmp_path_factory.mktemp("adapted") / "run"
    training = run(recipe, [*options, "steps=12"], out)
    assert training.codes == [0], training.text()
    return training


def problems(*overrides):
    with pytest.raises(ConfigError) as caught:
        load("llama-nano-lora", overrides)
    return "".join(caught.value.problems)


def test_mistakes_are_named_before_torch_is_imported():
    assert "must be at least 1, got 0" in problems("lora.r=0")
    assert "must be less than 1, got 1.0" in problems("lora.lora_dropout=1.0")
    assert "did you mean 'lora.target_modules'" in problems("lora.target_module=[q_proj]")
    assert "name its folder in model.init_from" in problems("model.init_from=null")
    assert "goes with distributed.strategy ddp" in problems("distributed.strategy=fsdp2")
    assert "goes with adapters" in problems("lora.target_modules=[]", "lora.lr_ratio=4")
    assert "must be at least 1, got 0.5" in problems("lora.lr_ratio=0.5")
    assert "lora.init_lora_weights" in problems("lora.init_lora_weights=pisa")
    assert "leaves no zeros" in problems("lora.init_lora_weights=pissa", "pruning.keep_masks=true")
    # orders by time would differ between the starts of a run
    assert "unknown key 'lora.order'" in problems("lora.order=time")
    assert "leaves the base as it is" in problems("sparsity.patterns={'*': '2:4'}")


def test_the_section_says_nothing_where_it_is_empty(base):
    recipe, _, _ = base
    before = {"steps": 24, "model": {"family": "gpt2"}}
    config = load(recipe)
    assert not [line for line in config_differences(before, config)[0] if line.startswith("lora")]


def test_cards_of_the_model_and_of_its_adapter_say_data_loss_and_speed(finished):
    final, checkpoint = finished.out / "final", finished.out / "last" / "hf"
    model, adapter = (ModelCard.load(folder / "README.md") for folder in (final, final / "adapter"))
    assert {(checkpoint / name / "README.md").is_file() for name in ("", "adapter")} == {True}
    assert (model.data.library_name, model.data.pipeline_tag) == ("transformers", "text-generation")
    assert (adapter.data.library_name, adapter.data.tags) == ("peft", ["leanstep", "lora"])
    for text in (
        "| Base model | base |",
        "| Data | text other.txt |",
        "| Held-out loss |",
        "(standard error over the sequences)",
        "tok/s on ",
    ):
        assert text in model.text and text in adapter.text


def test_the_adapter_opens_in_peft_and_the_folder_is_the_merged_model(base, finished):
    peft = pytest.importorskip("peft")
    _, folder, _ = base
    final = finished.out / "final"
    assert "adapters    4 layers, " in finished.text()
    ids = torch.arange(32).view(1, -1)
    merged = AutoModelForCausalLM.from_pretrained(final)(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.allclose(plain(ids).logits, merged, atol=1e-3)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), final / "adapter")
    torch.testing.assert_close(theirs(ids).logits, merged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load_adapter(plain, final / "adapter").eval()(ids).logits, merged, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in load_file(final / "model.safetensors"))


def test_pissa_and_lora_plus_end_in_an_adapter_for_the_plain_base(base, tmp_path):
    peft = pytest.importorskip("peft")
    recipe, folder, options = base
    options = [*options, "lora.init_lora_weights=pissa", "lora.lr_ratio=4", "lora.lora_dropout=0", "optimizer.lr=1e-3"]
    section = Section("groups")
    Check(load(recipe, options), vocabulary=300).groups(section)
    rows = [line for line in section.lines if "lora_" in line]
    assert "0.004" in "".join(row for row in rows if "lora_B" in row)
    training = run(recipe, [*options, "steps=3"], tmp_path / "run")
    assert training.codes == [0], training.text()
    final, ids = tmp_path / "run" / "final", torch.arange(32).view(1, -1)
    merged = AutoModelForCausalLM.from_pretrained(final)(ids).logits
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), final / "adapter")
    assert theirs.peft_config["default"].r == 8
    torch.testing.assert_close(theirs(ids).logits, merged, rtol=1e-4, atol=1e-5)


def test_validation_improves(finished):
    losses = [row[2] for row in numbers(finished.out) if row[0] == "eval"]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_killed_run_continues_as_if_it_had_not_been(base, finished, tmp_path):
    recipe, _, options = base
    options = [*options, "steps=12"]
    broken = Training(recipe, options, tmp_path / "broken", prepare=partial(held_at, 8))
    broken.wait_for(lambda training: training.last_step() >= 7)
    broken.kill()
    broken.wait()
    again = run(recipe, options, tmp_path / "broken")
    assert again.codes == [0] and "resuming from" in again.text(), again.text()
    assert numbers(tmp_path / "broken") == numbers(finished.out)
    files = [out / "final" / "adapter" / "adapter_model.safetensors" for out in (tmp_path / "broken", finished.out)]
    first, second = map(load_file, files)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_estimate_counts_what_is_trained_only(base):
    recipe, _, options = base
    whole = estimate(load(recipe, [*options, "lora.target_modules=[]"]), 300)
    adapted = estimate(load(recipe, options), 300)
    trained = 2 * 4 * (32 + 96 + 32 + 128)
    assert adapted.gradients == 4 * trained
    assert adapted.optimizer_state < whole.optimizer_state / 4
    assert adapted.activations < whole.activations


def test_check_shows_what_is_trained(base):
    recipe, _, options = base
    section = Section("groups")
    Check(load(recipe, [*options, "lora.use_dora=true"]), vocabulary=300).groups(section)
    text = "\n".join(section.lines)
    assert "lora_A" in text and "lora_magnitude_vector" in text and "wte" not in text


def test_settings_that_adapters_exclude_are_one_problem_of_check(base, capsys):
    recipe, _, options = base
    assert check(load(recipe, [*options, "lora.target_parameters=[wte.weight]"])) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  - ")]
    assert any("lora: LoraConfig: target_parameters excludes lora_dropout, as in PEFT; unset it" in p for p in problems)


@pytest.mark.parametrize("targets", ["[nothing]", "[c_atn]"])
def test_targets_that_fit_nothing_end_the_run_with_a_reason(base, tmp_path, targets):
    recipe, _, options = base
    training = run(recipe, [*options, f"lora.target_modules={targets}"], tmp_path / "run")
    assert training.codes == [2]
    assert "fits no module of the model" in training.text()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a LLaMA in bf16 whose layers torch.nn.Linear computes."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantized(base, llama, kind):
    recipe, _, options = base
    targets = "lora.target_modules=[q_proj, v_proj, down_proj]"
    return recipe, [*options, f"model.init_from={llama}", targets, f"lora.quantize_base={kind}", "lora.lora_dropout=0"]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_ends_in_the_model_that_was_trained(base, llama, tmp_path, kind):
    recipe, options = quantized(base, llama, kind)
    training = run(recipe, [*options, "steps=12", "eval.every=12"], tmp_path / "run")
    assert training.codes == [0], training.text()
    final, ids = tmp_path / "run" / "final", torch.arange(32).view(1, -1)
    assert f"rank 4 of q_proj, v_proj, down_proj, base in {kind}" in (final / "README.md").read_text("utf-8")
    merged = AutoModelForCausalLM.from_pretrained(final)
    assert getattr(merged.config, "quantization_config", None) is None
    again = build_model(load(recipe, options).model, 300, quantize=kind).eval()
    assert not torch.equal(again(ids).logits, merged(ids).logits)
    load_adapter(again, final / "adapter")
    torch.testing.assert_close(again(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
    # layers without an adapter, too: what is quantised differs from what the folder stores, and the head does not
    start, end = AutoModelForCausalLM.from_pretrained(llama).float().state_dict(), merged.state_dict()
    changed = {name.split(".")[-2] for name in start if not torch.equal(start[name], end[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.slow
def test_a_killed_run_on_four_bits_continues_as_if_it_had_not_been(base, llama, tmp_path):
    recipe, options = quantized(base, llama, "nf4")
    options = [*options, "steps=12"]
    whole = run(recipe, options, tmp_path / "whole")
    broken = Training(recipe, options, tmp_path / "broken", prepare=partial(held_at, 8))
    broken.wait_for(lambda training: training.last_step() >= 7)
    broken.kill()
    broken.wait()
    again = run(recipe, options, tmp_path / "broken")
    assert again.codes == whole.codes == [0] and "resuming from" in again.text(), again.text()
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_estimate_counts_the_bits_of_a_quantised_base(base, llama, kind):
    recipe, options = quantized(base, llama, kind)
    config = load(recipe, options)
    model = build_model(config.model, 300, quantize=kind)
    adapt(config, model)
    real = unique_bytes(p for p in model.parameters() if type(p) is torch.nn.Parameter)
    for weight in (p for p in model.parameters() if type(p) is not torch.nn.Parameter):
        if kind == "nf4":
            scales = weight.quant_state
            parts = [weight.data, scales.absmax, scales.code, scales.offset, scales.state2.absmax, scales.state2.code]
        else:
            parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
        real += sum(part.nbytes for part in parts)
    counted = estimate(config, 300)
    assert counted.weights == real
    dense = estimate(load(recipe, [*options, "lora.quantize_base=null"]), 300)
    assert counted.merged == dense.merged == unique_bytes(build_model(config.model, 300).parameters())
    assert (counted.activations, counted.gradients) == (dense.activations, dense.gradients)
    plain = build_model(config.model, 300)
    adapt(config, plain)
    assert flops_per_token(model, 32) == flops_per_token(plain, 32)
    assert describe_adapters(model) == describe_adapters(plain)


def test_bases_that_cannot_be_quantised_are_named(base, tmp_path, monkeypatch):
    recipe, folder, options = base
    pissa = problems("lora.quantize_base=nf4", "lora.init_lora_weights=pissa")
    assert "which PiSSA changes; take lora.init_lora_weights=true" in pissa
    assert "rounds zeros" in problems("lora.quantize_base=nf4", "pruning.keep_masks=true")
    assert "lora.quantize_base" in problems("lora.quantize_base=int3")
    assert "goes with adapters" in problems("lora.quantize_base=nf4", "lora.target_modules=[]")
    config = load(recipe, [*options, "lora.quantize_base=nf4"])
    with pytest.raises(ValueError, match="no torch.nn.Linear besides its head"):
        build_model(config.model, 300, quantize="nf4")
    with monkeypatch.context() as patch:
        patch.setattr("leanstep.recipes.methods.lora.find_spec", lambda name: None)
        assert list(missing_here(config, cpu=True)) == [
            "lora.quantize_base: nf4 needs bitsandbytes, which is not installed: pip install bitsandbytes"
        ]
    stored = tmp_path / "stored"
    shutil.copytree(folder, stored)
    settings = json.loads((stored / "config.json").read_text())
    method = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (stored / "config.json").write_text(json.dumps(settings | {"quantization_config": method}))
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes\).*made from, for adapters .*quantize_base=nf4"):
        check_initial_config(str(stored), open_config(stored))
