"""What is refused, in which words, and that a refused call changes nothing."""

from collections import OrderedDict

import pytest
import torch
from lora_models import tiny_llama, tokens
from torch import nn

from leanstep.lora import LoraConfig, apply_lora, load_adapter, remove_lora, save_adapter, set_adapters
from leanstep.sparsity import FewTokenLinear


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_prj"]}, "target_modules 'q_prj' fits no module of the model; did you mean 'q_proj'"),
        ({"target_modules": r".*\.attn\..*"}, "fits no module of the model"),
        ({"target_modules": ["q_proj", "vproj"]}, "'vproj' fits no module.*'v_proj'"),
        ({"target_modules": None}, "target_modules is not set; this model has .*q_proj.*or take 'all-linear'"),
        (
            {"target_modules": ["q_proj"], "r": 33},
            r"q_proj has a weight of \(32, 32\), rank 33 is larger; set at most 32",
        ),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}}, "rank_pattern 'k_proj' fits none of the 2"),
        ({"target_modules": "all-linear", "rank_pattern": {"q_prj": 2}}, "rank_pattern 'q_prj' fits none of the 14"),
        ({"target_modules": "all-linear", "alpha_pattern": {"q_prj": 2}}, "alpha_pattern 'q_prj' fits none of the 14"),
        ({"target_modules": ["mlp"]}, "model.layers.0.mlp is a LlamaMLP; expected a linear layer"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["heads"]}, "modules_to_save 'heads' fits no module"),
        (
            {"target_modules": "q_proj"},
            r"regular expression for the whole name.*whose names end so, write \['q_proj'\]",
        ),
        ({"target_modules": "all_linear"}, "'all_linear' fits no module.*did you mean 'all-linear'"),
        ({"target_modules": ["all-linear"]}, "'all-linear' fits no module.*did you mean 'all-linear', as a text"),
        (
            {"target_modules": ["embed_tokens", "q_proj"], "lora_bias": True},
            "embed_tokens is an embedding.*no bias on B",
        ),
        ({"target_modules": ["lm_head"], "r": 33}, "at most 32 with rank_pattern, or leave it out with exclude_m"),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*"}, "all of which exclude_modules.*leave out"),
    ],
    ids=str,
)
def test_targets_that_cannot_be(settings, message):
    model = tiny_llama()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoraConfig(**{"r": 4, **settings}))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert not any("lora" in name for name in model.state_dict())


def test_the_layers_that_a_message_names_may_be_of_classes_of_their_own():
    model = nn.Sequential(OrderedDict(plain=nn.Linear(4, 4), quick=nn.Linear(4, 4), norm=nn.LayerNorm(4)))
    model.quick.__class__ = FewTokenLinear
    with pytest.raises(ValueError, match="this model has plain, quick; or take 'all-linear'"):
        apply_lora(model, LoraConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a whole number above 0, got 0"),
        ({"r": -2}, "got -2"),
        ({"r": 2.5}, "got 2.5"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be a whole number above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, got 1.0"),
        ({"bias": "some"}, "bias must be one of 'none', 'all', 'lora_only', got 'some'"),
        ({"save": "all"}, "save must be one of"),
        ({"init_lora_weights": "pissa_niter"}, "init_lora_weights must be one of"),
        ({"target_modules": "a", "layers_to_transform": [1]}, "layers_to_transform needs a list"),
        ({"r": 0, "lora_dropout": -1}, "r must be.*; lora_dropout must be"),
        ({"lora_alpha": 0}, "lora_alpha must be a finite number above 0, got 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number above 0, got nan"),
        ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\] must be a finite number above 0, got -1"),
        ({"lora_dropout": "x"}, "lora_dropout must be at least 0 and below 1, got 'x'"),
        ({"use_dora": "yes"}, "use_dora must be one of True, False, got 'yes'"),
        ({"fused_blocks": None}, "fused_blocks must be one of True, False, got None"),
        ({"fast_path": "on"}, "fast_path must be one of None, True, False, got 'on'"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names, got 'lm_head'"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern '\(' is no regular expression: missing \)"),
        ({"modules_to_save": [")"]}, r"modules_to_save '\)' is no regular expression: unbalanced parenthesis"),
        (
            {"layers_pattern": "layers[", "layers_to_transform": 1},
            r"layers_pattern 'layers\[' is no regular expression: unterminated",
        ),
        ({"target_modules": "*.q_proj"}, "target_modules .* is no regular expression: nothing to repeat"),
        ({"target_modules": []}, "target_modules is empty; name the layers to adapt, or take 'all-linear'"),
        ({"target_modules": ""}, "target_modules is empty"),
        ({"target_modules": 5}, "target_modules must be a list of names or a text, got 5"),
        ({"target_modules": ["q_proj", 3]}, r"target_modules must be a list of names or a text, got \['q_proj', 3\]"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules must be a list of names or a text"),
        ({"modules_to_save": [1]}, r"modules_to_save must be a list of names, got \[1\]"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be a whole number or a list of them, got '1'"),
        ({"layers_to_transform": [0, "1"]}, r"list of them, got \[0, '1'\]"),
        ({"rank_pattern": [1]}, r"rank_pattern must be a dictionary of names and numbers, got \[1\]"),
        ({"alpha_pattern": {1: 2}}, "alpha_pattern must be a dictionary of names and numbers"),
        ({"use_dora": True, "lora_bias": True}, "use_dora and lora_bias exclude each other: PEFT cannot load"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform, which is not set"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_bases_that_cannot_be_adapted():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="1 cannot be adapted: its weight is int8; expected float64"):
        apply_lora(model, LoraConfig(target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].forward = model[0].forward
    with pytest.raises(ValueError, match="0 has a custom forward, set by another tool"):
        apply_lora(model, LoraConfig(target_modules=["0"]))
    model = nn.Sequential(nn.Embedding(8, 8, max_norm=1.0))
    with pytest.raises(ValueError, match="embedding with max_norm or sparse gradients"):
        apply_lora(model, LoraConfig(target_modules=["0"]))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return self.mlp(self.attention(x, x, x)[0])


@pytest.mark.parametrize("targets", [["out_proj"], ["mlp", "attention.out_proj"], r".*out_proj"])
def test_a_layer_that_is_never_called_is_refused(targets):
    model = Attention()
    with pytest.raises(ValueError, match="out_proj cannot be adapted: it is never called.*exclude_modules"):
        apply_lora(model, LoraConfig(r=2, target_modules=targets))
    assert type(model.mlp) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_a_layer_that_is_never_called_is_left_out_where_all_are_asked_for():
    model = Attention()
    with pytest.warns(UserWarning, match="'all-linear' leaves out attention.out_proj: it is never called"):
        apply_lora(model, LoraConfig(r=2, target_modules="all-linear"))
    assert isinstance(model.mlp, nn.Linear) and hasattr(model.mlp, "lora")
    assert not hasattr(model.attention.out_proj, "lora")


def test_a_layer_that_is_sharded_is_refused_before_anything_is_changed():
    def sharded():
        model = tiny_llama()
        # what a DTensor is known by
        weight = model.model.layers[1].self_attn.q_proj.weight
        weight.placements, weight.to_local = (), None
        return model

    model, settings = sharded(), {"r": 4, "target_modules": ["q_proj"]}
    state = {name: type(module) for name, module in model.named_modules()}
    message = r"layers\.1\.self_attn\.q_proj has a weight that is a DTensor .*call apply_lora first"
    for fast_path in (None, True):
        with pytest.raises(ValueError, match=message):
            apply_lora(model, LoraConfig(**settings, fast_path=fast_path))
    assert {name: type(module) for name, module in model.named_modules()} == state
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_trained_whole_is_not_adapted_inside():
    settings = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["mlp"], fast_path=True)
    model = apply_lora(tiny_llama(), settings)
    assert {name.split(".")[-2] for name, module in model.named_modules() if hasattr(module, "lora")} == {"self_attn"}
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.model.layers[0].mlp.parameters())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize(
    ("rule", "message"), [(["k_prj", "v_proj", "Q"], "'k_prj', 'Q' fits no module"), ("v_proj", "'v_proj' fits no")]
)
def test_exclusions_that_exclude_nothing_are_told(rule, message, targets):
    targets = targets if isinstance(rule, str) or targets == "all-linear" else ["q_proj"]
    with pytest.warns(UserWarning, match=f"exclude_modules {message}") as caught:
        apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=targets, exclude_modules=rule))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_layers_narrower_than_the_rank_are_left_out_where_all_are_asked_for():
    def adapted(**settings):
        model = nn.ModuleDict({"up": nn.Linear(8, 8), "gate": nn.Linear(8, 1), "head": nn.Linear(8, 3)})
        apply_lora(model, LoraConfig(r=4, target_modules="all-linear", **settings))
        return [name for name, module in model.items() if hasattr(module, "lora")]

    with pytest.warns(UserWarning, match="'all-linear' leaves out gate, head: narrower than the rank") as caught:
        assert adapted() == ["up"]
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="leaves out gate: narrower"):
        assert adapted(rank_pattern={"head": 3}) == ["up", "head"]
    assert adapted(exclude_modules=["gate", "head"]) == ["up"]


def test_configurations_of_other_classes_are_refused(tmp_path):
    class Settings(dict):
        __module__ = "peft.tuners.lora.config"

    for settings, name in (({"r": 4}, "builtins.dict"), (Settings(), "peft.tuners.lora.config.Settings")):
        with pytest.raises(TypeError, match=f"expected a leanstep.lora.LoraConfig, got {name}.*takes PEFT's fields"):
            apply_lora(tiny_llama(), settings)
    assert LoraConfig(rank_pattern=None, alpha_pattern=None).rank_pattern == {}
    path = tmp_path / "adapter_config.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="adapter_config.json cannot be understood: expected a JSON object, got list"):
        load_adapter(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match="adapter_config.json is a file; expected a folder"):
        save_adapter(apply_lora(tiny_llama(), LoraConfig(target_modules=["q_proj"])), path)
    assert path.read_text() == "[]"


def test_a_quantised_base_says_what_is_missing():
    class Linear4bit(nn.Linear):
        __module__ = "bitsandbytes.nn.modules"

    model = nn.Sequential(Linear4bit(8, 8))
    model[0].weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="Linear4bit of bitsandbytes, which cannot be imported here"):
            apply_lora(model, LoraConfig(r=2, target_modules=["0"]))


def test_a_model_is_adapted_once():
    model = apply_lora(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters already; merge or remove_lora them first"):
        apply_lora(model, LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match="the model has no adapters"):
        remove_lora(tiny_llama())
    with pytest.raises(ValueError, match="expected a model with adapters that are not merged"):
        set_adapters(tiny_llama(), False)


def test_what_cannot_be_fast_is_an_error_where_that_was_asked_for():
    model = apply_lora(tiny_llama(), LoraConfig(target_modules=["q_proj"], fast_path=True))
    model(tokens())
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
    with pytest.raises(
        RuntimeError, match=r"layers\.1\.self_attn\.q_proj: fast_path=True was asked for, but the base w"
    ):
        model(tokens())


def test_nothing_is_written_of_an_adapter_with_a_nan(tmp_path):
    model = apply_lora(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_A.weight[0] = float("inf")
    with pytest.raises(ValueError, match="lora_A.weight holds NaN or infinity"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="has no adapters; call apply_lora first"):
        save_adapter(tiny_llama(), tmp_path)


def test_parametrized_bases_are_adapted_and_not_merged():
    model = tiny_llama()
    layer = model.model.layers[0].self_attn.q_proj
    torch.nn.utils.parametrizations.weight_norm(layer)
    apply_lora(model, LoraConfig(target_modules=["q_proj"], r=2))
    assert layer.fast_path.on
    model(tokens(), labels=tokens()).loss.backward()
    assert layer.lora_B.weight.grad is not None
    from leanstep.lora import merge

    with pytest.raises(ValueError, match="is made by a parametrization; remove that first"):
        merge(model)
