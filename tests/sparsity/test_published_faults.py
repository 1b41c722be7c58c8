"""Mistakes of published N:M training code, each shown beside what happens here.

The code of Bambhaniya et al. (arXiv 2402.04744) leaves out the bias of a sparse layer, ends 3:8 at 4:8, evaluates a
reloaded checkpoint dense, loses its pattern when it resumes, and gives all layers the pattern of the last one.
"""

import math

import pytest
import torch
from sparse_models import batch, make_mlp, train
from torch import nn
from torch.nn.functional import linear

from leanstep.sparsity import NM, Schedule, is_nm, sparsify, squash


def test_the_bias_of_a_sparse_layer_is_added_trained_and_kept():
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.bias.fill_(3.0)
    controller = sparsify(layer, {"weight": "2:4"}, srste_lambda=1e-3)
    inputs = torch.randn(5, 8)
    weight = controller.layers[0].uses[0][0].weight
    assert torch.equal(layer(inputs), linear(inputs, weight, layer.bias))
    assert not torch.allclose(layer(inputs), linear(inputs, weight)), "without the bias"
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    controller.attach(optimizer)
    layer(inputs).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((4,), 5.0))
    optimizer.step()
    expected = layer(inputs)
    assert torch.equal(squash(layer)(inputs), expected) and (layer.bias == 2.5).all()


def test_three_of_eight_is_reached_and_not_passed_over_for_four():
    model, steps = make_mlp(), 12
    controller = sparsify(model, {"2": NM(3, 8)}, schedule=steps, method="sdgf-stepwise")
    seen = []
    for _ in range(steps + 1):
        seen.append(str(controller.layers[0].transform.pattern))
        train(model, controller, steps=1)
    assert list(dict.fromkeys(seen)) == ["7:8", "4:8", "3:8"] and controller.finished
    assert is_nm(model[2].weight, "3:8") and not is_nm(model[2].weight, "2:8")
    # as published: floor(log2(M / N)) + 1 frames, the last of which keeps floor(M / 2^i)
    frames = math.floor(math.log2(8 / 3)) + 1
    assert ["7:8", *(f"{8 // 2**i}:8" for i in range(1, frames))][-1] == "4:8"


@pytest.mark.parametrize("method", ["mdgf-exponential", "mdgf-linear", "sdgf-stepwise", "srste"])
def test_a_reloaded_checkpoint_evaluates_sparse_as_before_without_being_told_the_step(method):
    inputs = batch()[0]
    model = make_mlp()
    controller = sparsify(model, {"2": "1:8"}, schedule=8 if "gf" in method else None, method=method)
    train(model, controller, steps=9)
    expected = model.eval()(inputs)
    again = make_mlp(7)
    sparsify(again, {"2": "1:8"}, schedule=8 if "gf" in method else None, method=method)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(inputs), expected)
    assert is_nm(again[2].weight, "1:8")
    # as published: the counter of steps begins at 0 again, where the factor of pruned weights is exp(0) = 1
    dense = make_mlp()
    dense.load_state_dict({name: getattr(model[int(name[0])], name[2:]) for name in dense.state_dict()})
    dense[2].weight.data.copy_(controller.layers[0].weight.detach())
    assert not torch.allclose(dense(inputs), expected)


def test_resuming_in_the_middle_of_a_frame_goes_on_in_that_frame():
    def fresh():
        model = make_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, sparsify(model, {"2": "1:8"}, schedule=40, method="sdgf-stepwise").attach(optimizer)

    model, optimizer, controller = fresh()
    # frames of 1:8 over 40 steps begin at 0, 10, 20 and 30
    train(model, controller, steps=25, optimizer=optimizer)
    again, other, resumed = fresh()
    assert str(resumed.layers[0].transform.pattern) == "7:8"
    again.load_state_dict(model.state_dict())
    assert str(resumed.layers[0].transform.pattern) == "2:8"
    train(again, resumed, steps=1, optimizer=other)
    assert str(resumed.layers[0].transform.pattern) == "2:8" and is_nm(again[2].weight, "2:8")
    # as published: the pattern changes where a boundary is met exactly, which a run from step 25 meets at 30 only
    starts = {0: "7:8", 10: "4:8", 20: "2:8", 30: "1:8"}
    assert [starts[step] for step in range(25, 30) if step in starts] == []


def test_the_decay_begins_where_the_dense_phase_ends():
    schedule = Schedule(kind="mdgf-exponential", total_steps=1000, dense=0.2, decay=1e-2)
    model = make_mlp()
    controller = sparsify(model, {"2": "1:8"}, schedule=schedule)
    assert schedule.at(199, NM(1, 8)).alpha == 1.0 == schedule.at(200, NM(1, 8)).alpha
    assert schedule.at(300, NM(1, 8)).alpha == pytest.approx(math.exp(-1))
    assert controller.stage().phase == "dense"
    # as published: the offset is steps * fraction / 100, two steps here
    assert math.exp(-1e-2 * (200 - 1000 * 0.2 / 100)) < 0.14


def test_layers_keep_their_own_patterns():
    model = nn.ModuleDict(
        {name: nn.Linear(16, 16) for name in ("q_proj", "k_proj", "v_proj")} | {"mlp": nn.Linear(16, 16)}
    )
    sparsify(model, {"mlp": "1:8", "?_proj": "1:4"})
    assert is_nm(model["mlp"].weight, "1:8")
    for name in ("q_proj", "k_proj", "v_proj"):
        assert is_nm(model[name].weight, "1:4") and not is_nm(model[name].weight, "1:8")
