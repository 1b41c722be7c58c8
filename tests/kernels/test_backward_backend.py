"""The backward pass runs on the backend that was asked for in the forward pass, whichever thread it runs in.

On a GPU autograd runs it in threads of its own, which do not inherit the request; here another thread stands for them.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lora_models import randomise, tiny_llama, tokens

from leanstep.kernels import poly_attention, use_backend
from leanstep.kernels._backend import Choice
from leanstep.lora import LoraConfig, apply_lora
from leanstep.sparsity import sparse_weight


def adapted(**settings):
    """The loss of two adapted linear layers."""
    model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Linear(16, 8))
    apply_lora(model, LoraConfig(r=4, target_modules=["0", "1"], **settings))
    return randomise(model).train()(torch.randn(6, 12, requires_grad=True)).square().sum()


def adapted_block():
    """The loss of a block of gate, up and down projections that are all adapted, which runs as one function."""
    model = tiny_llama(layers=1)
    apply_lora(model, LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"]))
    ids = tokens()
    return randomise(model).train()(input_ids=ids, labels=ids).loss


def attention():
    """The loss of polynomial attention."""
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    return poly_attention(q, k, v, [1.0, 1.0, 0.5], scale=0.5, causal=True, chunk=4)[0].square().sum()


def sparse():
    """The loss of a masked weight with gradients for what is pruned."""
    weight = torch.randn(8, 8, requires_grad=True)
    return sparse_weight(weight, weight.detach() > 0, alpha=0.5, grad_flow="decay").square().sum()


LOSSES = {
    "dropout": lambda: adapted(lora_dropout=0.3),
    "plain dropout": lambda: adapted(lora_dropout=0.3, fast_path=False),
    "dora": lambda: adapted(use_dora=True),
    "block": adapted_block,
    "attention": attention,
    "sparse": sparse,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_backward_runs_on_the_backend_of_forward(loss, monkeypatch):
    with use_backend("reference"):
        value = loss()
    choices = []

    def record(*choice):
        choices.append(Choice(*choice))
        return choices[-1]

    monkeypatch.setattr("leanstep.kernels._backend.Choice", record)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(value.backward).result()
    assert choices and set(choices) == {Choice("reference", "asked for with use_backend")}
