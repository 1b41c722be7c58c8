"""PEFT beside us: the same numbers on the same weights, each other's files, and its own layers on the fast path."""

import contextlib
import copy
import functools
import json
import warnings

import peft
import pytest
import torch
from lora_models import (
    GPT2_TARGETS,
    LLAMA_TARGETS,
    loss_and_gradients,
    randomise,
    relative_error,
    tiny_gpt2,
    tiny_llama,
    tokens,
)
from safetensors.torch import load_file, save_file

from leanstep.lora import (
    LoraConfig,
    accelerate_peft,
    apply_lora,
    load_adapter,
    merge,
    remove_lora,
    save_adapter,
    saved_bytes,
    unmerge,
)

CASES = {
    "llama": (tiny_llama, {"target_modules": LLAMA_TARGETS}),
    "gpt2": (tiny_gpt2, {"target_modules": GPT2_TARGETS, "fan_in_fan_out": True}),
    "dora": (tiny_llama, {"target_modules": LLAMA_TARGETS, "use_dora": True}),
    "gpt2 dora": (tiny_gpt2, {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "rslora": (tiny_llama, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        tiny_llama,
        {
            "target_modules": LLAMA_TARGETS,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
            "alpha_pattern": {"v_proj": 1},
        },
    ),
    "a pattern for names": (tiny_llama, {"target_modules": r".*layers\.1\..*_proj"}),
    "layers": (tiny_llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "lora bias": (tiny_gpt2, {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}),
    "modules_to_save": (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "bias lora_only": (tiny_gpt2, {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "bias all": (tiny_gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "embeddings": (tiny_gpt2, {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
}


def with_peft(build, settings, dtype=torch.float32, name="default"):
    config = peft.LoraConfig(**{"r": 4, "init_lora_weights": False, **settings})
    return randomise(peft.get_peft_model(build(dtype), config, adapter_name=name), scale=0.2)


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_we_write(case, tmp_path):
    build, settings = CASES[case]
    model = randomise(apply_lora(build(), LoraConfig(r=4, **settings)), scale=0.2)
    save_adapter(model, tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys and not any("default" in key for key in keys)
    base = build()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    # nothing is missing and nothing left over, by PEFT's own account
    report = peft.set_peft_model_state_dict(theirs, load_file(tmp_path / "adapter_model.safetensors"))
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "default" in key]
    torch.testing.assert_close(theirs(tokens()).logits, model.eval()(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_we_read_what_peft_writes(case, tmp_path):
    build, settings = CASES[case]
    theirs = with_peft(build, settings)
    with warnings.catch_warnings():
        # PEFT takes a bias of B for a factor that a sharded save has flattened
        warnings.filterwarnings("ignore", "(?s).*invalid shape", peft.utils.warning.PeftWarning)
        theirs.save_pretrained(tmp_path)
    model = load_adapter(build(), tmp_path)
    torch.testing.assert_close(model.eval()(tokens()).logits, theirs.eval()(tokens()).logits, rtol=1e-5, atol=1e-5)
    # and back: the same tensors under the same keys
    save_adapter(model, tmp_path / "again")
    first = load_file(tmp_path / "adapter_model.safetensors")
    second = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_adapter_with_a_name_of_its_own(tmp_path):
    theirs = with_peft(tiny_llama, {"target_modules": ["q_proj"]}, name="french")
    theirs.save_pretrained(tmp_path)
    model = load_adapter(tiny_llama(), tmp_path / "french")
    torch.testing.assert_close(model(tokens()).logits, theirs.eval()(tokens()).logits, rtol=1e-5, atol=1e-5)


def test_the_old_file_format(tmp_path):
    theirs = with_peft(tiny_llama, {"target_modules": ["q_proj"]})
    theirs.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    model = load_adapter(tiny_llama(), tmp_path)
    torch.testing.assert_close(model(tokens()).logits, theirs.eval()(tokens()).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_loaded_into_an_adapted_model_too(tmp_path):
    model = randomise(apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)))
    save_adapter(model, tmp_path)
    other = apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)).eval()
    other(tokens())
    load_adapter(other, tmp_path)
    assert torch.equal(other(tokens()).logits, model.eval()(tokens()).logits)


OTHERS = {
    "alpha": ({"lora_alpha": 16}, {"lora_alpha": 8}, "scale 4 in the file, 2 in the model"),
    "rslora": ({"use_rslora": True}, {}, "scale 4 in the file, 2 in the model"),
    "alpha_pattern": ({"alpha_pattern": {r"layers\.1\..*": 2}}, {}, "scale 0.5 in the file, 2 in the model"),
    "dora": ({"use_dora": True}, {}, "4 keys are not of this model|use_dora"),
    "bias of B": ({"lora_bias": True}, {}, "keys are not of this model"),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("swapped", [False, True])
def test_an_adapter_that_would_compute_something_else_is_not_loaded(case, swapped, tmp_path):
    """The tensors alone do not say what an adapter computes: its scales are in the configuration."""
    of_file, of_model, message = OTHERS[case]
    if swapped:
        of_file, of_model = of_model, of_file
        message = "does not fit this model"
    common = {"r": 4, "target_modules": ["q_proj", "k_proj"]}
    file = randomise(apply_lora(tiny_llama(), LoraConfig(**{**common, "lora_alpha": 8, **of_file})))
    save_adapter(file, tmp_path)
    model = randomise(apply_lora(tiny_llama(), LoraConfig(**{**common, "lora_alpha": 8, **of_model})), seed=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, tmp_path)
    if "scale" in message:
        assert "model.layers.1.self_attn" in str(caught.value) or "model.layers.0.self_attn" in str(caught.value)
        assert "remove_lora(model) first" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    remove_lora(model)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(tokens()).logits, file(tokens()).logits)


NAMES = [
    ("org/one", "org/one", None), ("org/one", "org/other", "made for 'org/one', and this model is 'org/other'"),
    ("org/one", "", None), (None, "org/one", None), ("HERE/base", "HERE/base/", None), ("base", "HERE/base", None),
    ("./base/../base", "base", None), ("HERE/base", "HERE/other", "made for '.*/base', and this model is '.*/other'"),
    ("org/one", "/cache/hub/models--org--one/snapshots/0123abc", None),
    ("org/one", "/cache/hub/models--org--two/snapshots/0123abc", "made for 'org/one'"),
]  # fmt: skip


@pytest.mark.parametrize(("of_file", "of_model", "message"), NAMES)
@pytest.mark.parametrize("adapted", [False, True])
def test_an_adapter_that_names_another_base_is_loaded_with_a_warning(
    of_file, of_model, message, adapted, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    of_file, of_model = (name and name.replace("HERE", str(tmp_path)) for name in (of_file, of_model))
    settings = LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path=of_file)
    file = randomise(apply_lora(tiny_llama(), settings))
    save_adapter(file, tmp_path / "adapter")
    model = apply_lora(tiny_llama(), settings) if adapted else tiny_llama()
    model.config._name_or_path = of_model
    with pytest.warns(UserWarning, match=message) if message else contextlib.nullcontext():
        load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model.eval()(tokens()).logits, file.eval()(tokens()).logits)


def test_another_way_to_say_the_same_scale_is_loaded(tmp_path):
    file = randomise(apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], lora_alpha=8)))
    save_adapter(file, tmp_path)
    same = {"lora_alpha": 4, "use_rslora": True, "lora_dropout": 0.2}
    model = apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=r".*\.q_proj", **same)).eval()
    load_adapter(model, tmp_path)
    assert torch.equal(model(tokens()).logits, file.eval()(tokens()).logits)


def test_an_adapter_is_not_loaded_into_a_merged_model(tmp_path):
    settings = LoraConfig(r=4, target_modules=["q_proj"])
    file = randomise(apply_lora(tiny_llama(), settings))
    save_adapter(file, tmp_path)
    model = randomise(apply_lora(tiny_llama(), settings), seed=2)
    base = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    merge(model, backup=True)
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj is merged; unmerge the model first"):
        load_adapter(model, tmp_path)
    unmerge(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, base)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(tokens()).logits, file(tokens()).logits)


def test_the_configuration_file_is_pefts(tmp_path):
    save_adapter(apply_lora(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", lora_alpha=16)), tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    fields = set(peft.LoraConfig().to_dict())
    assert set(found) <= fields
    assert found["peft_type"] == "LORA" and found["inference_mode"] is True and found["lora_alpha"] == 16
    assert len(found["target_modules"]) == 14
    assert list(found) == sorted(found)
    # PEFT 0.13 refuses fields that it does not know, and does not know these
    assert not {"exclude_modules", "lora_bias"} & set(found)


@pytest.mark.parametrize(
    ("how", "message"),
    [("missing", r"1 keys are missing, such as base_model\.model\.model\.layers\.0.*lora_A"), ("cut", "is damaged")],
)
def test_a_damaged_adapter_leaves_the_model_as_it_was(how, message, tmp_path):
    """tests/fuzz/test_adapters.py has other damage."""
    save_adapter(apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"])), tmp_path)
    path, model = tmp_path / "adapter_model.safetensors", tiny_llama()
    state = load_file(path)
    del state[next(key for key in state if "lora_A" in key)]
    save_file(state, path) if how == "missing" else path.write_bytes(path.read_bytes()[:100])
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_an_adapter_for_another_base_is_refused(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="org/wide")
    save_adapter(apply_lora(tiny_llama(hidden_size=64), config), tmp_path / "wide")
    with pytest.raises(ValueError, match=r"made for org/wide.*does not fit this model.*has shape \(4, 64\)"):
        load_adapter(tiny_llama(), tmp_path / "wide")
    with pytest.raises(ValueError, match=r"made for org/wide.*'q_proj' fits no module"):
        load_adapter(tiny_gpt2(), tmp_path / "wide")
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        load_adapter(tiny_llama(), tmp_path)


def test_adapters_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="expected an adapter of peft_type 'LORA', got 'IA3'"):
        LoraConfig.from_dict({"peft_type": "IA3"})
    with pytest.raises(ValueError, match="uses use_qalora, which leanstep.lora does not have; load it with peft"):
        LoraConfig.from_dict({"peft_type": "LORA", "use_qalora": True})
    with pytest.warns(UserWarning, match="ignored the unknown fields novelty"):
        LoraConfig.from_dict({"r": 3, "novelty": 1})


BRIDGED = ["llama", "gpt2", "dora", "gpt2 dora", "rslora", "patterns", "lora bias", "bias all", "embeddings"]


@pytest.mark.parametrize("case", BRIDGED)
def test_an_accelerated_model_computes_what_peft_computes(case):
    build, settings = CASES[case]
    theirs = with_peft(build, settings).train()
    wanted = loss_and_gradients(theirs, tokens())
    handle = accelerate_peft(theirs)
    assert all(path.on for path in handle.fast_path().values()), handle.fast_path()
    found = loss_and_gradients(theirs, tokens())
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=0)
    assert found[1].keys() == wanted[1].keys()
    for name in found[1]:
        assert relative_error(found[1][name], wanted[1][name]) < 2e-5, name


@pytest.mark.parametrize("case", ["llama", "dora", "rslora", "patterns"])
def test_an_adapted_model_computes_what_peft_computes(case, tmp_path):
    build, settings = CASES[case]
    theirs = with_peft(build, settings).train()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(build(), tmp_path).train()
    found, wanted = loss_and_gradients(ours, tokens()), loss_and_gradients(theirs, tokens())
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=0)
    named = {name.removeprefix("base_model.model.").replace(".default", ""): g for name, g in wanted[1].items()}
    named = {name.removesuffix(".weight") if "magnitude" in name else name: g for name, g in named.items()}
    assert found[1].keys() == named.keys()
    for name in named:
        assert relative_error(found[1][name], named[name]) < 2e-5, name


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_in_bf16_the_error_is_at_most_twice_pefts(settings):
    # against the model in fp64, with adapters of the same values
    common = {"target_modules": LLAMA_TARGETS, **settings}
    theirs = with_peft(tiny_llama, common, torch.bfloat16).train()
    exact = copy.deepcopy(theirs).double()
    fast = copy.deepcopy(theirs)
    accelerate_peft(fast)
    ids = tokens(4, 32)
    _, wanted = loss_and_gradients(exact, ids)

    def errors(model):
        _, gradients = loss_and_gradients(model, ids)
        total = sum(float((gradients[name].double() - wanted[name]).square().sum()) for name in wanted)
        norm = sum(float(g.square().sum()) for g in wanted.values())
        with torch.no_grad():
            logits = (model(ids).logits.double() - exact(ids).logits).norm() / exact(ids).logits.norm()
        return (total / norm) ** 0.5, float(logits)

    (gradient, logits), (best_gradient, best_logits) = errors(fast), errors(theirs)
    assert gradient < 2 * best_gradient
    assert logits < 2 * best_logits


def test_undoing_leaves_no_trace():
    theirs = with_peft(tiny_llama, {"target_modules": LLAMA_TARGETS})
    calls = []
    theirs.base_model.model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    before = {name: (type(m), sorted(vars(m))) for name, m in theirs.named_modules()}
    keys = list(theirs.state_dict())
    handle = accelerate_peft(theirs)
    assert list(theirs.state_dict()) == keys
    assert {name: type(m) for name, m in theirs.named_modules()} == {name: cls for name, (cls, _) in before.items()}
    theirs(tokens())
    assert calls == [1]
    accelerate_peft(theirs)
    handle.undo()
    handle.undo()
    assert {name: (type(m), sorted(vars(m))) for name, m in theirs.named_modules()} == before


def test_what_an_accelerated_model_cannot_do_fast_it_does_as_peft_does():
    theirs = with_peft(tiny_llama, {"target_modules": ["q_proj", "v_proj"]}).eval()
    plain = copy.deepcopy(theirs)
    handle = accelerate_peft(theirs)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    ids = tokens()

    def both():
        return theirs(ids).logits, plain(ids).logits

    for model in (theirs, plain):
        torch.manual_seed(0)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    assert handle.fast_path()[name] == (False, "2 adapters are active, the fast path takes one")
    torch.testing.assert_close(*both())
    for model in (theirs, plain):
        model.set_adapter("default")
    assert handle.fast_path()[name].on
    torch.testing.assert_close(*both(), rtol=1e-5, atol=1e-6)
    with theirs.disable_adapter(), plain.disable_adapter():
        assert "disabled" in handle.fast_path()[name].reason
        assert torch.equal(*both())
    for model in (theirs, plain):
        model.merge_adapter()
    assert "merged" in handle.fast_path()[name].reason
    assert torch.equal(*both())
    for model in (theirs, plain):
        model.unmerge_adapter()
    torch.testing.assert_close(*both(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fast_path", [None, True])
def test_an_adapter_on_fewer_layers_can_be_switched_to(fast_path):
    theirs = with_peft(tiny_llama, {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]}).eval()
    fewer = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj", "up_proj"], init_lora_weights=False)
    theirs.add_adapter("b", fewer)
    theirs.set_adapter("default")
    plain = copy.deepcopy(theirs)
    handle = accelerate_peft(theirs, fast_path=fast_path)
    for adapter in ("default", "b", "default"):
        for model in (theirs, plain):
            model.set_adapter(adapter)
        torch.testing.assert_close(theirs(tokens()).logits, plain(tokens()).logits, rtol=1e-5, atol=1e-6)
        paths = {name.rsplit(".", 1)[-1]: path for name, path in handle.fast_path().items()}
        assert paths["k_proj"].on and paths["v_proj"].on and paths["up_proj"].on
        assert paths["q_proj"].on == (adapter == "default")
    theirs.set_adapter("b")
    assert handle.fast_path()["base_model.model.model.layers.0.self_attn.q_proj"] == (
        False, "0 adapters are active, the fast path takes one"
    )  # fmt: skip


@pytest.mark.parametrize("copied", [False, True])
def test_an_accelerated_model_can_be_accelerated_again(copied):
    theirs = with_peft(tiny_llama, {"target_modules": LLAMA_TARGETS})
    wanted = theirs(tokens()).logits
    first = accelerate_peft(theirs)
    model = copy.deepcopy(theirs) if copied else theirs
    handle = accelerate_peft(model, fast_path=False, fused_blocks=False)
    assert len(handle.fast_path()) == 14
    assert all(path == (False, "turned off by fast_path=False") for path in handle.fast_path().values())
    assert torch.equal(model(tokens()).logits, wanted)
    if not copied:
        assert first.fast_path()["base_model.model.model.layers.0.self_attn.q_proj"].on is False
    with pytest.raises(ValueError, match="cannot: the adapter is merged"):
        model.merge_adapter()
        accelerate_peft(model, fast_path=True)
    model.unmerge_adapter()
    assert not any(path.on for path in handle.fast_path().values())
    handle = accelerate_peft(model, fast_path=True)
    assert len(handle.fast_path()) == 16 and all(path.on for path in handle.fast_path().values())
    torch.testing.assert_close(model(tokens()).logits, wanted, rtol=1e-5, atol=1e-6)
    handle.undo()
    assert not any("forward" in vars(module) for module in model.modules())
    assert any("forward" in vars(module) for module in theirs.modules()) == copied


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("undone", [False, True])
def test_an_unloaded_model_keeps_nothing(how, undone):
    theirs = with_peft(tiny_llama, {"target_modules": LLAMA_TARGETS}).eval()
    wanted = getattr(copy.deepcopy(theirs), how)()(tokens()).logits
    handle = accelerate_peft(theirs)
    plain = getattr(theirs, how)()
    if undone:
        handle.undo()
    else:
        assert torch.equal(plain(tokens()).logits, wanted)
    assert not any("forward" in vars(module) for module in plain.modules())
    assert torch.equal(plain(tokens()).logits, wanted)


HOOKED = ["lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector", "base_layer"]


@pytest.mark.parametrize("part", HOOKED)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_on_what_is_inside_a_layer_are_called(part, kind):
    theirs = with_peft(tiny_llama, {"target_modules": LLAMA_TARGETS, "use_dora": True, "lora_dropout": 1e-9}).train()
    handle = accelerate_peft(theirs)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    layer = theirs.get_submodule(name)
    inner = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
    calls = []
    hook = getattr(inner, kind)(lambda *_: calls.append(1))
    reason = handle.fast_path()[name].reason
    assert reason.startswith("the base layer has hooks" if part == "base_layer" else f"{part}.default has hooks")
    loss_and_gradients(theirs, tokens())
    assert calls
    hook.remove()
    assert all(path.on for path in handle.fast_path().values())


def test_a_model_without_linear_layers_of_pefts_is_refused_by_what_it_has():
    theirs = with_peft(tiny_gpt2, {"target_modules": ["wte"]})
    with pytest.raises(ValueError, match="no linear LoRA layer of PEFT, only Embedding, which keep PEFT's forward"):
        accelerate_peft(theirs)
    model = torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3))
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="only Conv1d"):
        accelerate_peft(theirs)
    with pytest.raises(ValueError, match="is adapted by apply_lora, and on the fast path already"):
        accelerate_peft(apply_lora(tiny_llama(), LoraConfig(target_modules=["q_proj"])))


def test_a_forward_of_somebody_elses_is_not_taken():
    theirs = with_peft(tiny_llama, {"target_modules": LLAMA_TARGETS})
    block = theirs.base_model.model.model.layers[0].mlp
    block.forward = own = functools.partial(type(block).forward, block)
    handle = accelerate_peft(theirs)
    theirs(tokens())
    assert len(handle.fast_path()) == 15
    handle.undo()
    assert block.forward is own
    block.up_proj.forward = block.up_proj.forward
    with pytest.raises(ValueError, match="up_proj has a custom forward already; remove that first"):
        accelerate_peft(theirs)


def test_what_is_trained_is_left_to_peft():
    theirs = with_peft(lambda _: torch.nn.Sequential(torch.nn.Linear(64, 64)), {"target_modules": ["0"], "r": 2})
    with pytest.raises(ValueError, match=r"lora_fa' freezes A.*requires_grad_\(False\) and take save='min'"):
        accelerate_peft(theirs, save="lora_fa")
    assert not any("forward" in vars(module) for module in theirs.modules())
    accelerate_peft(theirs)
    theirs.base_model.model[0].lora_A.default.weight.requires_grad_(False)
    x = torch.randn(50, 64)
    assert saved_bytes(lambda: theirs(x * 1), theirs.parameters()) == 4 * 50 * 2


def test_a_model_that_cannot_be_accelerated_is_refused():
    with pytest.raises(ValueError, match="no LoRA layer of PEFT; for a plain model, use apply_lora"):
        accelerate_peft(tiny_llama())
    theirs = with_peft(tiny_llama, {"target_modules": ["q_proj"]})
    with pytest.raises(ValueError, match="this is a PEFT model; make it fast with accelerate_peft"):
        apply_lora(theirs, LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match="save must be one of 'min', 'full', 'lora_fa', got 'most'"):
        accelerate_peft(theirs, save="most")
    theirs.merge_adapter()
    with pytest.raises(ValueError, match="q_proj cannot: the adapter is merged"):
        accelerate_peft(theirs, fast_path=True)
    assert not any("forward" in vars(module) for module in theirs.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_a_saves_as_little_as_lora_fa(dtype):
    """Backward needs A x alone, also where the sum of weight and update would take fewer operations."""
    base = torch.nn.Sequential(torch.nn.Linear(64, 64))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["0"])).to(dtype)
    accelerate_peft(theirs)
    for name, parameter in theirs.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    x = torch.randn(256, 64, dtype=dtype)
    assert saved_bytes(lambda: theirs(x * 1), theirs.parameters()) == 256 * 8 * dtype.itemsize
