"""Mixtures of experts, classifiers, models of images: what "all-linear" leaves out, and what PEFT reads otherwise."""

import peft
import pytest
import torch
from architectures import CAUSAL, make
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from pruned_models import VOCABULARY

from leanstep.lora import LoraConfig, accelerate_peft, apply_lora, load_adapter, save_adapter
from leanstep.lora.apply import adapted_layers
from leanstep.lora.peft.experts import names_read_as_experts

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4", "deepseek_v3", "qwen3_next", "jamba"]


def tokens():
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MIXTURES)
def test_the_names_that_peft_replaces(name):
    model = make(name)
    ends = {n.rpartition(".")[2] for n, _ in model.named_modules()} | {"w1", "w2", "w3", "gate_proj", "up_proj"}
    ends -= {"", *map(str, range(8))}
    config = peft.LoraConfig(target_modules=sorted(ends))
    convert_peft_config_for_transformers(config, model, None)
    replaced = ends - set(config.target_modules)
    assert replaced == names_read_as_experts(model) & ends


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.filterwarnings("ignore:apply_lora. 'all-linear' leaves out.*(narrower|returns a tuple|skip the adapter)")
def test_fused_experts_without_adapters_are_told(name):
    model = make(name)
    message = r"'all-linear' leaves out model.layers.*experts.* of the weights\): name fused experts in target_param"
    with pytest.warns(UserWarning, match=message) as caught:
        apply_lora(model, LoraConfig(r=2, target_modules="all-linear"))
    (told,) = [str(w.message) for w in caught if "fused experts" in str(w.message)]
    assert ("; PEFT adapts them" in told) == bool(names_read_as_experts(make(name)))
    assert all(w.filename == __file__ for w in caught)


def trained(name, config):
    """A model with adapters whose factors are all random."""
    model = apply_lora(make(name).eval(), config)
    draws = torch.Generator().manual_seed(0)
    for parameter in (p for key, p in model.named_parameters() if ".lora_" in key):
        torch.nn.init.normal_(parameter, std=0.1, generator=draws)
    return model


RENAMED = {
    "all linear": {"target_modules": "all-linear"},
    "these alone": {"target_modules": ["down_proj"]},
    "an expression": {"target_modules": r".*(up_proj|o_proj)"},
    "patterns": {
        "target_modules": ["down_proj", "o_proj"], "rank_pattern": {"down_proj": 1},
        "alpha_pattern": {r"layers\.0\.[a-z_.]*down_proj": 3.0, "o_proj": 5.0},
    },
    "filters": {"target_modules": ["down_proj", "o_proj"], "layers_to_transform": [1], "exclude_modules": ["lm_head"]},
    "beside experts": {"target_modules": ["down_proj"], "target_parameters": ["experts.down_proj"]},
    "pissa": {"target_modules": ["down_proj"], "init_lora_weights": "pissa"},
}  # fmt: skip


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next", "qwen2_moe"])
@pytest.mark.parametrize("case", RENAMED)
# PEFT looks for the keys of patterns among modules, and follows them for parameters all the same
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:apply_lora. 'all-linear' leaves out", "ignore:Converting a tensor:UserWarning")
def test_peft_reads_layers_that_it_would_take_for_experts(name, case, tmp_path):
    model = trained(name, LoraConfig(**({"r": 2, "init_lora_weights": False} | RENAMED[case])))
    logits = model(tokens()).logits
    assert (logits - make(name).eval()(tokens()).logits).abs().max() > 0.01
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(name).eval(), tmp_path)
    torch.testing.assert_close(theirs(tokens()).logits, logits, rtol=1e-4, atol=1e-5)
    ours = load_adapter(make(name).eval(), tmp_path)
    torch.testing.assert_close(ours(tokens()).logits, logits, rtol=1e-4, atol=1e-5)
    assert [n for n, _ in adapted_layers(ours)] == [n for n, _ in adapted_layers(model)]
    load_adapter(ours, tmp_path)
    # and PEFT's own file of it loads
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(make(name).eval(), tmp_path / "theirs")
    torch.testing.assert_close(again(tokens()).logits, logits, rtol=1e-4, atol=1e-5)


def test_dropout_that_peft_cannot_read_is_told(tmp_path):
    config = LoraConfig(r=2, target_modules=["down_proj"], lora_dropout=0.25)
    model = trained("deepseek_v3", config)
    with pytest.warns(UserWarning, match=r"writes lora_dropout 0 instead of 0.25, since PEFT adapts model.*down_proj"):
        save_adapter(model, tmp_path)
    logits = model(tokens()).logits
    theirs = peft.PeftModel.from_pretrained(make("deepseek_v3").eval(), tmp_path)
    torch.testing.assert_close(theirs(tokens()).logits, logits, rtol=1e-4, atol=1e-5)
    ours = load_adapter(make("deepseek_v3").eval(), tmp_path, lora_dropout=0.25)
    assert torch.equal(ours(tokens()).logits, logits)
    assert {layer.lora.dropout for _, layer in adapted_layers(ours)} == {0.25}


def test_adapters_that_peft_takes_by_no_other_name_are_told(tmp_path):
    model = trained("deepseek_v3", LoraConfig(r=2, target_modules=["down_proj", "o_proj"], use_dora=True))
    with pytest.warns(UserWarning, match=r"PEFT reads the adapters of .*mlp.* as those of experts.* use_dora is set"):
        save_adapter(model, tmp_path)
    ours = load_adapter(make("deepseek_v3").eval(), tmp_path)
    assert torch.equal(ours(tokens()).logits, model(tokens()).logits)


def test_models_without_experts_are_saved_without_a_line(tmp_path):
    for name in ("llama", "gpt_oss"):
        assert name in CAUSAL and not names_read_as_experts(make(name))
        save_adapter(apply_lora(make(name), LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / name)


def test_adapters_of_tokens_are_fast_where_peft_loads_them(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2], init_lora_weights=False)
    saved = peft.get_peft_model(make("llama"), config)
    torch.nn.init.normal_(saved.get_input_embeddings().token_adapter.trainable_tokens_delta["default"])
    saved.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    ids = tokens().clamp(max=3)

    def gradients():
        model.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted, wanted_gradients = gradients()
    paths = accelerate_peft(model).fast_path()
    assert len(paths) == 2 and all(path.on for path in paths.values())
    logits, ours = gradients()
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    assert ours.keys() == wanted_gradients.keys() and any("trainable_tokens" in name for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_pefts_all_linear_of_a_mixture_loads(name, tmp_path):
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(make(name), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(make(name), tmp_path).eval()
    torch.testing.assert_close(ours(tokens()).logits, theirs(tokens()).logits, rtol=1e-4, atol=1e-5)


# routers have 4 rows and a gate of shared experts has one: PEFT gives them the rank of all others
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("r", [8, 40])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen2"])
def test_adapters_of_a_rank_above_the_smaller_side_load(name, r, tmp_path):
    config = peft.LoraConfig(r=r, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.PeftModel(make(name), config)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = theirs.eval()(tokens()).logits
    wanted.square().mean().backward()
    ours = load_adapter(make(name), tmp_path / "theirs").eval()
    assert (wanted - make(name).eval()(tokens()).logits).abs().max() > 0.01
    logits = ours(tokens()).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    logits.square().mean().backward()
    norms = [sum(p.grad.square().sum() for p in m.parameters() if p.grad is not None) for m in (ours, theirs)]
    torch.testing.assert_close(*norms, rtol=1e-4, atol=0.0)
    save_adapter(ours, tmp_path / "ours")
    again = load_adapter(make(name), tmp_path / "ours").eval()
    assert torch.equal(again(tokens()).logits, logits)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_classifier_that_is_not_trained_whole_is_told(name, recwarn):
    with pytest.warns(UserWarning, match=r"classifier keeps its weights under an adapter; .*task_type='SEQ_CLS' or"):
        apply_lora(make(name), LoraConfig(r=2, target_modules="all-linear"))
    for settings in ({"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier"]}):
        model = apply_lora(make(name), LoraConfig(r=2, target_modules="all-linear", **settings))
        assert model.classifier.weight.requires_grad
    assert not list(recwarn)


@pytest.mark.parametrize("name", ["clip_pair", "convnext", "swin"])
def test_adapters_load_where_a_model_embeds_no_tokens(name, tmp_path):
    settings = {"r": 2, "target_modules": "all-linear", "modules_to_save": ["classifier"], "init_lora_weights": False}
    if name == "clip_pair":
        del settings["modules_to_save"]
    model = apply_lora(make(name), LoraConfig(**settings))
    save_adapter(model, tmp_path)
    loaded = load_adapter(make(name), tmp_path)
    ours = dict(model.named_parameters())
    assert all(torch.equal(value, ours[key]) for key, value in loaded.named_parameters())


@pytest.mark.parametrize(
    ("name", "left_out"),
    [("mamba", {"x_proj", "dt_proj", "out_proj"}), ("mamba2", {"out_proj"}), ("jamba", {"dt_proj"})],
)
def test_layers_whose_weight_a_mixer_reads_itself_are_left_out(name, left_out):
    model = make(name).train()
    with pytest.warns(UserWarning) as caught:
        apply_lora(model, LoraConfig(r=1, target_modules="all-linear", init_lora_weights=False))
    told = [str(w.message) for w in caught if "would skip the adapter" in str(w.message)]
    assert {text.split(": ")[1].rpartition(".")[2] for text in told} == left_out
    model(tokens()).logits.square().sum().backward()
    assert all(layer.lora_A.weight.grad is not None for _, layer in adapted_layers(model))
