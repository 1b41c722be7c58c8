"""Every parameter gets a role by module type and name, and is claimed exactly once."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from leanstep.optimizers import Lion, SinkGD, param_groups
from leanstep.optimizers.param_groups import ROLES, parameter_roles


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
        "scale": "other",
        "tok.weight": "embedding",
        "wpe.weight": "position",
        "patch.weight": "conv",
        "patch.bias": "bias",
        "experts.gate_up_proj": "expert",
        "experts.router.weight": "hidden",
        "attn.in_proj_weight": "hidden",
        "attn.in_proj_bias": "bias",
        "attn.out_proj.weight": "hidden",
        "attn.out_proj.bias": "bias",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "batch_norm.weight": "norm",
        "batch_norm.bias": "norm",
        "lora_A.default.weight": "lora",
        "classifier.weight": "head",
        "classifier.bias": "bias",
    }


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
    assert lines["head"][1:4] == ["adamw", "1", "2,048"]
    assert lines["hidden"][1:3] == ["sinkgd", "14"]
    assert text.splitlines()[0].split()[:2] == ["group", "algorithm"]


def test_optimizers_take_the_groups_with_their_names():
    model = tiny_llama(True)
    for optimizer in (SinkGD(param_groups(model)), Lion(param_groups(model)), torch.optim.AdamW(param_groups(model))):
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_sinkgd_on_bare_parameters_says_once_how_it_routes():
    with pytest.warns(UserWarning, match="15 parameters of two or more dimensions are taken as matrices, 5 others"):
        SinkGD(tiny_llama(True).parameters())
