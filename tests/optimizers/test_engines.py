"""Parameters that a sharding engine replaced after the optimizer was built, as DeepSpeed's ZeRO does."""

import importlib

import pytest
import torch

from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD, param_groups

pytestmark = pytest.mark.filterwarnings("ignore:(SinkGD|LANTON). .* taken as")

GROUPS = {
    "SinkGD, bare": lambda model: SinkGD(model.parameters()),
    "SinkGD": lambda model: SinkGD(param_groups(model)),
    "SinkGD, balanced": lambda model: SinkGD(param_groups(model, embeddings="balanced")),
    "LANTON": lambda model: LANTON(param_groups(model)),
    "MFAC": lambda model: MFAC(param_groups(model), window=2),
}


def new_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4))


def flatten(optimizer):
    """Put one vector in place of each group's parameters; return the vectors, each with a gradient."""
    vectors = []
    for group in optimizer.param_groups:
        vector = torch.cat([p.detach().reshape(-1) for p in group["params"]])
        vectors.append(vector.requires_grad_())
        vectors[-1].grad = torch.ones_like(vector)
        group["params"] = [vectors[-1]]
    return vectors


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("one", [False, True])
def test_flat_parameters_are_refused_at_the_first_step(name, one):
    """Also where a group has one parameter: then only its dimensions tell."""
    model = new_model()
    optimizer = GROUPS[name](model[1:2] if one else model)
    vectors = flatten(optimizer)
    before = [v.detach().clone() for v in vectors]
    with pytest.raises(ValueError, match="when the optimizer was built, and has 1 now.*flattens parameters.*FSDP2"):
        optimizer.step()
    changed = [i for i, (a, b) in enumerate(zip(vectors, before, strict=True)) if not torch.equal(a, b)]
    assert not changed


def test_elementwise_rules_take_flat_parameters():
    for build in (Lion, lambda params: SinkGD([{"params": list(params), "algorithm": "adamw"}])):
        model, twin = new_model(), new_model()
        whole, flat = build(model.parameters()), build(twin.parameters())
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        (vector,) = flatten(flat)
        whole.step()
        flat.step()
        torch.testing.assert_close(vector, torch.cat([p.reshape(-1) for p in model.parameters()]), rtol=0, atol=0)


def test_parameters_of_the_same_dimensions_may_be_swapped():
    """As Accelerate does when it shards by FSDP2."""
    model, twin = new_model(), new_model()
    optimizer = SinkGD(param_groups(model))
    swapped = dict(zip(model.parameters(), twin.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [swapped[p] for p in group["params"]]
    for param in twin.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not torch.equal(twin[1].weight, model[1].weight)


def test_an_imported_engine_is_no_process_group():
    """Libraries import torch's ZeRO-1 without using it."""
    importlib.import_module("torch.distributed.optim.zero_redundancy_optimizer")
    assert not torch.distributed.is_initialized()
    model = new_model()
    LANTON(param_groups(model))
