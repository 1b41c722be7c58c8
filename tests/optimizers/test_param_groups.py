"""Every parameter gets a role by module type and name, and is claimed exactly once."""

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from leanstep.optimizers import LANTON, Lion, SinkGD, param_groups
from leanstep.optimizers.param_groups import ROLES, parameter_roles
from leanstep.sparsity import sparsify


def tiny_llama(tied):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 16))
        self.router = nn.Linear(8, 4, bias=False)


class Mixed(nn.Module):
    """One of everything that is routed by type or name."""

    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(32, 8)
        self.wpe = nn.Embedding(16, 8)
        self.patch = nn.Conv2d(3, 8, 4)
        self.experts = Experts()
        self.attn = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.batch_norm = nn.BatchNorm1d(8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.scale = nn.Parameter(torch.ones(()))
        self.classifier = nn.Linear(8, 5)


def test_roles_of_one_of_everything():
    assert parameter_roles(Mixed()) == {
        "scale": "other", "tok.weight": "embedding", "wpe.weight": "position", "patch.weight": "conv",
        "patch.bias": "bias", "experts.gate_up_proj": "expert", "experts.router.weight": "router",
        "attn.in_proj_weight": "hidden", "attn.in_proj_bias": "bias", "attn.out_proj.weight": "hidden",
        "attn.out_proj.bias": "bias", "norm.weight": "norm", "norm.bias": "norm", "batch_norm.weight": "norm",
        "batch_norm.bias": "norm", "lora_A.default.weight": "lora", "classifier.weight": "head",
        "classifier.bias": "bias",
    }  # fmt: skip


def test_a_tied_head_is_an_embedding_and_an_untied_one_a_head():
    tied = {group["name"]: [name for name, _ in group["params"]] for group in param_groups(tiny_llama(tied=True))}
    assert tied["embedding"] == ["model.embed_tokens.weight"] and "head" not in tied
    untied = {group["name"]: [name for name, _ in group["params"]] for group in param_groups(tiny_llama(tied=False))}
    assert untied["embedding"] == ["model.embed_tokens.weight"]
    assert untied["head"] == ["lm_head.weight"]
    assert len(untied["hidden"]) == 14 and len(untied["norm"]) == 5


def test_gpt2():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))
    groups = {group["name"]: len(group["params"]) for group in param_groups(model)}
    assert groups == {"hidden": 4, "embedding": 1, "position": 1, "norm": 6, "bias": 4}


@pytest.mark.parametrize("model", [tiny_llama(True), tiny_llama(False), Mixed()], ids=["tied", "untied", "mixed"])
def test_every_parameter_is_claimed_once_in_the_order_of_the_roles(model):
    groups = param_groups(model)
    claimed = [id(param) for group in groups for _, param in group["params"]]
    assert sorted(claimed) == sorted(id(param) for param in model.parameters())
    order = [ROLES.index(group["name"]) for group in groups]
    assert order == sorted(order)


def test_one_dimensional_convolutions_are_no_stacks_of_matrices():
    """A depthwise convolution of a state-space model has weights (channels, 1, width)."""
    model = nn.Sequential(nn.Conv1d(8, 8, 4, groups=8), nn.Conv1d(8, 6, 3), nn.Conv2d(6, 4, 3))
    flags = {
        name: g.get("flatten", False) for g in param_groups(model) if g["name"] == "conv" for name, _ in g["params"]
    }
    assert flags == {"0.weight": True, "1.weight": True, "2.weight": False}
    optimizer = SinkGD(param_groups(model), lr=1.0, scale=1.0)
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.randn(8, 1, 4)
    optimizer.step()
    columns = (before - model[0].weight.detach()).flatten(1).square().mean(dim=0)
    torch.testing.assert_close(columns, torch.ones(4), rtol=1e-5, atol=0)


def test_frozen_parameters_are_left_out():
    model = Mixed()
    model.tok.weight.requires_grad_(False)
    assert "tok.weight" not in {name for group in param_groups(model) for name, _ in group["params"]}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(model)


def test_settings_and_overrides():
    groups = param_groups(
        tiny_llama(False),
        {"embedding": {"algorithm": "balanced", "momentum": 0.95}},
        overrides=[(r"down_proj", {"lr": 1.0}), (r"layers\.0\.", {"lr": 2.0})],
    )
    by_name = {group["name"]: group for group in groups}
    assert by_name["embedding"]["algorithm"] == "balanced" and by_name["embedding"]["momentum"] == 0.95
    # the first expression that matches takes the parameter, with the settings of its role underneath
    assert [name for name, _ in by_name["down_proj"]["params"]] == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)
    ]
    assert by_name["down_proj"]["algorithm"] == "sinkgd" and by_name["down_proj"]["lr"] == 1.0
    assert {group["lr"] for group in groups if group["name"] == r"layers\.0\."} == {2.0}
    optimizer = SinkGD(groups, lr=0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 1.0, 2.0}


def test_what_cannot_be_meant_is_an_error():
    with pytest.raises(TypeError, match="expected the model"):
        param_groups(Mixed().parameters())
    with pytest.raises(ValueError, match="unknown role 'hiden'"):
        param_groups(Mixed(), {"hiden": {}})
    with pytest.raises(ValueError, match="override 'nothing_like_it' matches no trainable parameter"):
        param_groups(Mixed(), overrides=[("nothing_like_it", {})])
    with pytest.raises(ValueError, match=r"override '\[' is not a regular expression"):
        param_groups(Mixed(), overrides=[("[", {})])
    with pytest.raises(TypeError, match="settings of 'head' must be a mapping such as .*, got 0.001"):
        param_groups(Mixed(), {"head": 1e-3})
    with pytest.raises(TypeError, match=r"pairs of a regular expression and settings, .*, got 'lm_head'"):
        param_groups(Mixed(), overrides=["lm_head", {"lr": 1e-3}])


def test_overrides_may_be_a_mapping():
    pairs, mapping = [("bias", {"lr": 1e-3})], {"bias": {"lr": 1e-3}}
    assert param_groups(Mixed(), overrides=mapping).summary() == param_groups(Mixed(), overrides=pairs).summary()


def test_the_summary_names_groups_counts_and_shares():
    text = str(param_groups(tiny_llama(False)))
    lines = {line.split()[0]: line.split() for line in text.splitlines()}
    assert lines["head"][1:5] == ["adamw", "sign", "1", "2,048"]
    assert lines["hidden"][1:4] == ["sinkgd", "rms", "14"]
    assert text.splitlines()[0].split()[:3] == ["group", "SinkGD", "LANTON"]


def test_optimizers_take_the_groups_with_their_names():
    model = tiny_llama(True)
    for optimizer in (SinkGD(param_groups(model)), Lion(param_groups(model)), torch.optim.AdamW(param_groups(model))):
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_sinkgd_on_bare_parameters_says_once_how_it_routes():
    with pytest.warns(UserWarning, match="15 parameters of two or more dimensions are taken as matrices, 5 others"):
        SinkGD(tiny_llama(True).parameters())


def tiny_gpt2():
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=16, tie_word_embeddings=False)
    )


def shapes_by_group(model):
    """(role, transposed, shape) of every parameter, in no order."""
    return sorted(
        (group["name"], group.get("transposed", False), tuple(param.shape))
        for group in param_groups(model)
        for _, param in group["params"]
    )


def compile_parts(model):
    model.lm_head.compile()
    model.transformer.h[0] = torch.compile(model.transformer.h[0])
    model.lm_head = torch.compile(model.lm_head)
    return torch.compile(model)


def checkpoint_linear_layers(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, (Conv1D, nn.Linear, nn.LayerNorm)))
    return model


PEFT_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing", "ignore:Failed to load", "ignore:Setting boft"
)
WRAPPERS = {
    "sparsify": lambda model: sparsify(model, {"transformer.h.*": "2:4", "lm_head": "2:4"}) and model,
    "weight norm": lambda model: nn.utils.parametrizations.orthogonal(model.lm_head, name="weight") and model,
    "torch.compile": compile_parts,
    "checkpointing": checkpoint_linear_layers,
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_roles_are_those_of_what_is_wrapped(wrapper):
    plain = tiny_gpt2()
    expected = shapes_by_group(plain)
    assert ("head", False, (64, 32)) in expected and ("hidden", True, (32, 128)) in expected
    assert shapes_by_group(WRAPPERS[wrapper](plain)) == expected


def test_a_magnitude_of_weight_norm_is_no_matrix():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
    roles = parameter_roles(nn.Sequential(layer))
    assert roles["0.parametrizations.weight.original0"] == "other"
    assert roles["0.parametrizations.weight.original1"] == "hidden"


@PEFT_WARNINGS
def test_pefts_copies_of_modules_have_the_roles_of_the_modules():
    config = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head", "wpe", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(tiny_gpt2(), config)
    groups = param_groups(model)
    roles = {name: (group["name"], group.get("transposed", False)) for group in groups for name, _ in group["params"]}
    prefix = "base_model.model."
    assert roles.pop(f"{prefix}lm_head.modules_to_save.default.weight") == ("head", False)
    assert roles.pop(f"{prefix}transformer.wpe.modules_to_save.default.weight") == ("position", False)
    for layer in range(2):
        name = f"{prefix}transformer.h.{layer}.mlp.c_fc.modules_to_save.default"
        assert roles.pop(f"{name}.weight") == ("hidden", True)
        assert roles.pop(f"{name}.bias") == ("bias", False)
    assert set(roles.values()) == {("lora", False)}


@PEFT_WARNINGS
@pytest.mark.parametrize(
    ("config", "leaf", "role"),
    [
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "ia3_l", "other"),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "lora_E", "other"),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "lora_A", "lora"),
    ],
    ids=["ia3", "adalora", "adalora factors"],
)
def test_vectors_of_pefts_adapters_are_no_matrices(config, leaf, role):
    model = peft.get_peft_model(tiny_llama(False), config)
    roles = {name: role for name, role in parameter_roles(model).items() if f".{leaf}." in name}
    assert len(roles) == 2 and set(roles.values()) == {role}


class Odd(nn.Module):
    """Parameters that are no matrices of a layer, and heads by names that blocks also have."""

    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(8, 4))
        self.mask_token = nn.Parameter(torch.zeros(2, 8))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.pos_embed = nn.Parameter(torch.zeros(16, 8))
        self.boft_s = nn.ParameterDict({"default": torch.zeros(12, 1)})  # PEFT's; its class sets CC for good
        self.w1 = nn.Parameter(torch.zeros(12, 8))
        self.custom_weight = nn.Parameter(torch.zeros(12, 8))
        self.shared_expert_gate = nn.Linear(8, 1, bias=False)
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList([nn.Linear(8, 8, bias=False)])
        self.glu = nn.ModuleDict({"gate": nn.Linear(8, 16, bias=False), "output": nn.Linear(8, 8, bias=False)})
        self.classifier = nn.ModuleDict({"dense": nn.Linear(8, 8, False), "out_proj": nn.Linear(8, 3, False)})
        self.output = nn.Linear(8, 16, bias=False)


class NormalizedLinear(nn.Linear):
    pass


def test_a_linear_layer_that_is_named_after_a_norm_is_none():
    roles = parameter_roles(nn.Sequential(NormalizedLinear(8, 8), nn.LayerNorm(8)))
    assert roles == {"0.weight": "hidden", "0.bias": "bias", "1.weight": "norm", "1.bias": "norm"}


def test_roles_of_odd_parameters():
    roles = parameter_roles(Odd())
    assert roles == {
        "A_log": "other", "mask_token": "other", "relative_position_bias_table": "position", "pos_embed": "position",
        "boft_s.default": "other", "w1": "other", "custom_weight": "hidden", "shared_expert_gate.weight": "other",
        "gate.weight": "router", "experts.0.weight": "hidden", "glu.gate.weight": "hidden",
        "glu.output.weight": "hidden", "classifier.dense.weight": "hidden", "classifier.out_proj.weight": "head",
        "output.weight": "head",
    }  # fmt: skip
    norms = {name: group["norm"] for group in param_groups(Odd()) for name, _ in group["params"]}
    assert norms["A_log"] == norms["w1"] == "sign", "a matrix that is none has no spectral norm"
    optimizer = LANTON(param_groups(model := Odd()))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_a_router_of_gemma_3n_is_one():
    """It mixes the copies of the hidden states, and has their number of rows."""
    config = transformers.Gemma3nTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=32, vocab_size_per_layer_input=32, hidden_size_per_layer_input=4, laurel_rank=2,
        num_kv_shared_layers=0, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Gemma3nForCausalLM(config)
    routers = {name: role for name, role in parameter_roles(model).items() if "router" in name}
    assert {name.split("altup.")[1]: role for name, role in routers.items()} == {
        "modality_router.weight": "router",
        "router_norm.weight": "norm",
    }


def test_experts_of_dbrx_stacked_in_one_matrix_are_not_taken_as_one():
    config = transformers.DbrxConfig(
        d_model=16, n_heads=2, n_layers=1, max_seq_len=8, vocab_size=32,
        attn_config={"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.DbrxForCausalLM(config)
    roles = {name.split("ffn.")[1]: role for name, role in parameter_roles(model).items() if "ffn" in name}
    assert roles.pop("router.weight", None) or roles.pop("router.layer.weight") == "router"
    assert set(roles.values()) <= {"other", "expert"} and roles


LAYER_COUNTS = {
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers", "depth",
}  # fmt: skip
TASKS = (
    "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "QUESTION_ANSWERING",
    "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "AUDIO_CLASSIFICATION", "SPEECH_SEQ_2_SEQ",
)  # fmt: skip
# output layers that no name tells: last layers of decoders, summaries that other models go on from, plain "fc"
NAMELESS_HEADS = ("decoder.decoder.final_layer", "sequence_summary.summary", ".fc")
LABELS = 13


def few_layers(config):
    """Shorten a configuration and those within it; widths cost nothing on the meta device."""
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            few_layers(value)
        elif key in LAYER_COUNTS and isinstance(value, int):
            setattr(config, key, min(value, 2))


def transformers_models(task):
    """One model of each architecture for a task that default settings can build."""
    mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING")
    for config_class in list(mapping):
        for shorten in (True, False):
            # some need settings that have no default, or packages that are not installed
            try:
                model_class = mapping[config_class]
                config = config_class()
                config.num_labels = LABELS
                if shorten:
                    few_layers(config)
                with torch.device("meta"):
                    model = (model_class[0] if isinstance(model_class, tuple) else model_class)(config)
            except Exception:  # noqa: BLE001, S112
                continue
            yield model
            break


def role_mistakes(model):
    """What is wrong with the roles of a model, by facts that do not come from names."""
    groups = param_groups(model.requires_grad_(True))
    roles = {id(param): group["name"] for group in groups for _, param in group["params"]}
    transposed = {id(param) for group in groups if group.get("transposed") for _, param in group["params"]}
    if sorted(id(p) for g in groups for _, p in g["params"]) != sorted(map(id, model.parameters())):
        yield "not every parameter is claimed once"
    if "expert" in roles.values() and "router" not in roles.values():
        yield "experts without a router"
    try:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        inputs = outputs = None
    tables = {id(m.weight) for m in model.modules() if type(m).__name__.endswith("Embedding") and hasattr(m, "weight")}
    for name, module in model.named_modules():
        for leaf, param in module.named_parameters(recurse=False):
            role, where = roles[id(param)], f"{name}.{leaf} {tuple(param.shape)}"
            if role in ("hidden", "expert") and 1 in param.shape[-2:]:
                yield f"{where} is a vector"
            known = isinstance(module, (nn.Linear, Conv1D, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase))
            if role == "hidden" and not known and "weight" not in leaf:
                yield f"{where} of a {type(module).__name__} is a hidden matrix"
            if isinstance(module, nn.Embedding) and role not in ("embedding", "position"):
                yield f"{where} is no {role}"
            if param.dim() == 2 and (id(param) in transposed) != (isinstance(module, Conv1D) and leaf == "weight"):
                yield f"{where} is transposed, or is not"
            if module is outputs and leaf == "weight" and role != ("embedding" if id(param) in tables else "head"):
                yield f"{where} makes logits and is {role}"
            makes_labels = isinstance(module, nn.Linear) and leaf == "weight" and param.shape[0] == LABELS
            if makes_labels and role != "head" and not f".{name}".endswith(NAMELESS_HEADS):
                yield f"{where} makes labels and is {role}"
    if isinstance(inputs, nn.Embedding) and roles[id(inputs.weight)] != "embedding":
        yield "the input embeddings are none"


@pytest.mark.slow
def test_roles_on_the_architectures_of_transformers():
    """Decoders, encoders, both, mixtures of experts, state-space, vision and speech models, in their default widths."""
    wrong, built = [], set()
    for task in TASKS:
        for model in transformers_models(task):
            built.add(type(model).__name__)
            wrong += [f"{type(model).__name__}: {mistake}" for mistake in role_mistakes(model)]
    assert not wrong, "\n".join(wrong)
    assert len(built) > 400
    assert built >= {
        "GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration", "MambaForCausalLM",
        "JambaForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM", "Qwen2MoeForCausalLM",
        "ViTForImageClassification", "SwinForImageClassification", "BartForQuestionAnswering",
        "RobertaForSequenceClassification", "WhisperForConditionalGeneration",
    }  # fmt: skip
