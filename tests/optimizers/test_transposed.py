"""Weights stored (in, out), as transformers' Conv1D stores GPT-2's, are normalised as (out, in)."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from leanstep.optimizers import SinkGD, param_groups

VARIANTS = {
    "plain": {},
    "one iteration": {"num_iters": 1},
    "momentum": {"momentum": 0.9},
    "momentum after": {"momentum": 0.9, "momentum_order": "post"},
    "spectral": {"spectral": "muon"},
    "width": {"base_width": 32},
    "rows masked": {"row_mask_tau": 0.8},
    "balanced": {"algorithm": "balanced", "momentum": 0.9},
    "definition": {"foreach": False},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_the_step_of_the_transposed_matrix(options):
    weight = torch.randn(48, 96)
    straight, stored = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.t().contiguous())
    first = SinkGD([straight], lr=0.1, **options)
    second = SinkGD([stored], lr=0.1, transposed=True, **options)
    for step in range(3):
        grad = torch.randn(48, 96)
        if step == 1:
            grad[3, 4] = float("nan")
        straight.grad, stored.grad = grad.clone(), grad.t().contiguous()
        first.step()
        second.step()
    torch.testing.assert_close(stored.t(), straight, rtol=1e-5, atol=1e-6)
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


def test_stacks_cannot_be_transposed():
    with pytest.raises(ValueError, match="takes matrices, got .* of 3 dimensions"):
        SinkGD([torch.nn.Parameter(torch.zeros(2, 3, 4))], transposed=True)
