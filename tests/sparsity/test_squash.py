"""Squashing: the same outputs, exact zeros, plain modules under the names they had."""

import copy

import pytest
import torch
from sparse_models import MLP, batch, make_mlp, train
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from leanstep.sparsity import NM, Schedule, is_nm, plain_state_dict, sparsify, squash
from leanstep.sparsity.squash import sparse_state


@pytest.mark.parametrize("method", ["ste", "srste", "fixed", "s-ste", "mdgf-exponential", "sdgf-geometric"])
def test_squash_changes_nothing_but_the_form(method):
    model, dense = make_mlp(), make_mlp()
    types, parameters = [type(module) for module in model], dict(model.named_parameters())
    controller = sparsify(model, MLP, schedule=6 if "gf" in method else None, method=method)
    train(model, controller, steps=6)
    inputs = batch()[0]
    expected = model(inputs)
    assert squash(model) is model
    assert torch.equal(model(inputs), expected)
    assert [type(module) for module in model] == types
    assert list(model.state_dict()) == list(dense.state_dict())
    assert all(value is parameters[name] for name, value in model.named_parameters())
    for layer in controller.layers:
        weight = model[int(layer.name)].weight
        assert is_nm(weight, layer.target)
        zeros = weight[weight == 0]
        assert not torch.signbit(zeros).any(), "exact zeros are +0"
        if method != "s-ste":
            assert len(zeros) == weight.numel() * layer.target.sparsity
    # the bias goes the same way: the dense model with these weights is the same model
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense(inputs), expected)
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


def test_training_on_after_squash_is_stopped_before_it_fills_the_zeros():
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = sparsify(model, MLP).attach(optimizer)
    squash(model)
    weights = copy.deepcopy(model.state_dict())
    model(batch()[0]).sum().backward()
    with pytest.raises(ValueError, match=r"parametrization of 0, 2, 4 is gone .* call detach\(\) first"):
        optimizer.step()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    controller.detach()
    optimizer.step()


def test_an_unfinished_model_is_refused_and_left_as_it_is():
    model = make_mlp()
    controller = sparsify(model, MLP, schedule=Schedule(kind="mdgf-linear", total_steps=8))
    train(model, controller, steps=2)
    state, inputs = copy.deepcopy(model.state_dict()), batch()[0]
    with pytest.raises(
        ValueError, match=r"'0' is on its way to 2:4: after step 2 it has the pattern 2:4 and alpha 0.75"
    ):
        squash(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    expected = model(inputs)
    assert torch.equal(squash(model, unfinished="keep")(inputs), expected)
    with pytest.raises(ValueError, match="Sequential has no sparse weights"):
        squash(model)
    with pytest.raises(ValueError, match="unfinished must be"):
        squash(model, unfinished="maybe")


def test_the_plain_state_dict_is_that_of_the_squashed_model():
    model = make_mlp()
    controller = sparsify(model, MLP)
    train(model, controller, steps=3)
    plain = plain_state_dict(model)
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    rest = sparse_state(model)
    assert not rest.keys() & plain.keys() and rest.keys() <= whole.keys()
    again = make_mlp(5)
    sparsify(again, MLP)
    result = again.load_state_dict(plain | rest, strict=False)
    assert not result.missing_keys
    assert torch.equal(again(batch()[0]), model(batch()[0]))
    squash(model)
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())
    dense = make_mlp()
    assert plain_state_dict(dense).keys() == dense.state_dict().keys()
    with pytest.raises(ValueError, match="it is of another model"):
        plain_state_dict(again, {"a": torch.ones(1)})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def test_tied_weights_are_one_weight_everywhere():
    model = Tied()
    controller = sparsify(model, {"head": NM(2, 4)}, srste_lambda=0.1)
    tokens = torch.arange(12)
    assert len(list(model.parameters())) == 1 and torch.equal(model.embed.weight, model.head.weight)
    assert controller.layers[0].names == ["embed.weight", "head.weight"]
    assert is_nm(model.embed.weight, "2:4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    controller.attach(optimizer)
    for _ in range(3):
        model(tokens).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected, plain = model(tokens), plain_state_dict(model)
    assert plain["embed.weight"] is plain["head.weight"]
    squash(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(tokens), expected)


def test_a_tied_weight_decays_once():
    model = Tied()
    controller = sparsify(model, {"head": NM(2, 4)}, schedule=Schedule(kind="mdgf-linear", total_steps=4))
    controller.layers[0].transform.alpha.fill_(0.5)
    expected = model(torch.arange(12))
    assert torch.equal(squash(model, unfinished="keep")(torch.arange(12)), expected)


def test_two_patterns_for_one_tied_weight_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match="'a' and 'b' are one tied weight, but the rules give them 2:4 and 1:4"):
        sparsify(model, {"a": "2:4", "b": "1:4"})
    assert not hasattr(model["a"], "parametrizations")


class Aliased(nn.Module):
    """One module under two names, as the embeddings of a T5 whose vocabulary was resized."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.out = nn.Linear(8, 4)

    def forward(self, inputs):
        return self.out(self.second(torch.tanh(self.first(inputs))))


def test_a_module_under_two_names_is_squashed_once():
    model, plain = Aliased(), Aliased()
    keys = list(model.state_dict())
    controller = sparsify(model, "2:4")
    assert controller.layers[0].names == ["first.weight", "second.weight"] and len(controller.layers[0].uses) == 1
    expected = model(batch()[0])
    plain.load_state_dict(plain_state_dict(model))
    assert torch.equal(plain(batch()[0]), expected)
    squash(model)
    assert torch.equal(model(batch()[0]), expected) and list(model.state_dict()) == keys
    assert not any(hasattr(module, "parametrizations") for module in model.modules())


def test_what_others_keep_from_ddp_stays_after_squash():
    model = make_mlp()
    model._ddp_params_and_buffers_to_ignore = ["0.bias"]
    sparsify(model, MLP)
    assert "2.parametrizations.weight.0.mask" in model._ddp_params_and_buffers_to_ignore
    squash(model)
    assert model._ddp_params_and_buffers_to_ignore == ["0.bias"]


def test_the_plain_state_dict_sees_through_activation_checkpoints():
    model, dense = nn.Sequential(make_mlp()), nn.Sequential(make_mlp())
    train(model, sparsify(model, {"0.2": "2:4"}), steps=2)
    expected = plain_state_dict(model)
    model[0] = checkpoint_wrapper(model[0])
    plain = plain_state_dict(model)
    assert plain.keys() == dense.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in plain.items())
    assert sparse_state(model).keys() == model.state_dict().keys() - plain.keys()


@pytest.mark.parametrize("method", ["ste", "mdgf-linear", "s-ste"])
def test_a_state_dict_is_converted_by_its_own_masks(method):
    """Not by those of the model, which may be new or have trained on."""
    model, other = make_mlp(), make_mlp()
    schedule = 4 if "gf" in method else None
    train(model, sparsify(model, MLP, schedule=schedule, method=method), steps=4)
    sparsify(other, MLP, schedule=schedule, method=method)
    state = copy.deepcopy(model.state_dict())
    plain, expected = plain_state_dict(other, state), plain_state_dict(model)
    assert plain.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in plain.items())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    wrong = make_mlp()
    sparsify(wrong, "1:4")
    with pytest.raises(ValueError, match="plain_state_dict: '0': the checkpoint was trained towards"):
        plain_state_dict(wrong, state)
