"""Weights stored (in, out), as transformers' Conv1D and some fused experts are, are normalised as (out, in)."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from leanstep.kernels import sinkhorn
from leanstep.optimizers import SinkGD, param_groups

# the note on how bare parameters are routed has tests of its own
pytestmark = pytest.mark.filterwarnings("ignore:SinkGD. .* taken as matrices")

VARIANTS = {
    "plain": {},
    "one iteration": {"num_iters": 1},
    "momentum": {"momentum": 0.9},
    "momentum after": {"momentum": 0.9, "momentum_order": "post"},
    "spectral": {"spectral": "muon"},
    "width": {"base_width": 32},
    "balanced": {"algorithm": "balanced", "momentum": 0.9},
    "definition": {"foreach": False},
}


STACKED = {name: options for name, options in VARIANTS.items() if name != "balanced"}  # which takes no stacks


@pytest.mark.parametrize(
    ("shape", "options"),
    [((48, 96), options) for options in VARIANTS.values()] + [((3, 12, 20), options) for options in STACKED.values()],
    ids=[*VARIANTS, *(f"{name}, stacked" for name in STACKED)],
)
def test_equals_the_step_of_the_transposed_matrix(shape, options):
    weight = torch.randn(shape)
    straight, stored = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.mT.contiguous())
    first = SinkGD([straight], lr=0.1, **options)
    second = SinkGD([stored], lr=0.1, transposed=True, **options)
    for step in range(3):
        grad = torch.randn(shape)
        grad[..., 5, :] *= 1e-4  # a row that "balanced" sets to 0
        if step == 1:
            grad[..., 3, 4] = float("nan")
        straight.grad, stored.grad = grad.clone(), grad.mT.contiguous()
        first.step()
        second.step()
    torch.testing.assert_close(stored.mT, straight, rtol=1e-5, atol=1e-6)
    assert first.nonfinite_count() == second.nonfinite_count() == 1


def test_the_orientation_matters():
    """One iteration of G and of its transpose differ: the test above can fail."""
    weight, grad = torch.randn(48, 96), torch.randn(48, 96)
    straight, stored = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.t().contiguous())
    straight.grad, stored.grad = grad.clone(), grad.t().contiguous()
    SinkGD([straight], lr=0.1, num_iters=1).step()
    SinkGD([stored], lr=0.1, num_iters=1).step()
    assert not torch.allclose(stored.t(), straight, rtol=1e-4, atol=1e-5)


def test_gpt2_matrices_are_routed_so():
    groups = param_groups(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16)))
    hidden = [group for group in groups if group["name"] == "hidden"]
    assert [group.get("transposed") for group in hidden] == [True]
    assert {name.split(".")[-2] for name, _ in hidden[0]["params"]} == {"c_attn", "c_proj", "c_fc"}
    SinkGD(groups)


def tiny(config, **settings):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 1, "vocab_size": 32}
    return config(**{**sizes, **names, "head_dim": 8, **settings})


MIXTURES = {
    "gpt-oss": (lambda: GptOssForCausalLM(tiny(GptOssConfig)), True),
    "llama 4": (lambda: Llama4ForCausalLM(tiny(Llama4TextConfig, intermediate_size_mlp=40)), True),
    "mixtral": (lambda: MixtralForCausalLM(tiny(MixtralConfig)), False),
    "qwen 3": (lambda: Qwen3MoeForCausalLM(tiny(Qwen3MoeConfig, moe_intermediate_size=24, num_experts=4)), False),
}


@pytest.mark.parametrize(("build", "transposed"), MIXTURES.values(), ids=MIXTURES.keys())
def test_fused_experts_are_taken_as_their_module_stores_them(build, transposed):
    """(e, in, out) or (e, out, in): the sizes of the first product tell, and the second's are the other way round."""
    model = build()
    groups = param_groups(model)
    experts = [group for group in groups if group["name"] == "expert"]
    assert [group.get("transposed", False) for group in experts] == [transposed]
    params = {name.split(".")[-1]: param for name, param in experts[0]["params"]}
    assert params.keys() == {"gate_up_proj", "down_proj"}
    as_out_in = {name: param.mT.shape[1:] if transposed else param.shape[1:] for name, param in params.items()}
    assert as_out_in == {"gate_up_proj": (48, 16), "down_proj": (16, 24)}

    optimizer = SinkGD(groups, lr=0.1, scale=1.0)
    before = {name: param.detach().clone() for name, param in params.items()}
    tokens = torch.randint(32, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    for name, param in params.items():
        moved = (before[name] - param.detach()).mT if transposed else before[name] - param.detach()
        used = moved.flatten(1).any(dim=1)
        assert used.any()
        gradient = param.grad.mT if transposed else param.grad
        scales = sinkhorn([gradient], 5)
        expected = 0.1 * scales.rows[0].unsqueeze(-1) * gradient * scales.cols[0].unsqueeze(-2)
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_the_bias_of_every_expert_is_a_bias():
    model = GptOssForCausalLM(tiny(GptOssConfig))
    biases = {name for group in param_groups(model) if group["name"] == "bias" for name, _ in group["params"]}
    assert "model.layers.0.mlp.experts.gate_up_proj_bias" in biases
    assert model.get_parameter("model.layers.0.mlp.experts.gate_up_proj_bias").dim() == 2


def test_tensors_of_more_dimensions_cannot_be_transposed():
    with pytest.raises(ValueError, match="takes matrices, got .* of 4 dimensions"):
        SinkGD([torch.nn.Parameter(torch.zeros(2, 3, 4, 5))], transposed=True)
