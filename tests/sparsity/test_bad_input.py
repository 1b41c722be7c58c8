"""What cannot be made sparse: a clear error each, and a model that is as it was."""

import copy
from types import SimpleNamespace

import pytest
import torch
from sparse_models import MLP, batch, make_mlp
from torch import nn
from torch.nn.utils import parametrize

from leanstep.sparsity import NM, Schedule, sparsify


class Scaled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Int8Linear(nn.Linear):
    """As quantising packages make them: a Linear whose weight is no floating tensor."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)


CASES = {
    "matches no layer": ({"*.mlp.*": "2:4"}, {}, r"'\*.mlp.\*' .* matches no layer; the names are '0', '2', '4'"),
    "hidden by an earlier rule": ({"*": "2:4", "0": "1:4"}, {}, "earlier rules took '0'"),
    "longer than the row": ({"2": "1:32"}, {}, r"'2' of shape \(16, 16\) has 16 entries .*fewer than a group of 1:32"),
    "no divisor": ({"2": "1:3"}, {}, r"which groups of 3 \(1:3\) do not fill; take a divisor of 16.*pad='zero'"),
    "n above m": ({"2": "5:4"}, {}, "0 <= n <= m"),
    "no pattern": ({"2": 0.5}, {}, "expected an N:M pattern"),
    "no text": ({"2": "2-4"}, {}, "expected 'N:M', such as '2:4'"),
    "dense only": ({"*": NM(4, 4)}, {}, "leave every layer dense"),
    "nothing": ({}, {}, "at least one rule"),
    "unknown method": (MLP, {"method": "magic"}, "method must be one of ste, srste, .*got 'magic'"),
    "needs a schedule": (MLP, {"method": "mdgf-linear"}, "needs to know how long training is"),
    "part of another kind": (
        MLP,
        {"method": "mdgf-linear", "schedule": Schedule(kind="sdgf-stepwise+mdgf-linear", total_steps=9)},
        r"linear', got 'sdgf-stepwise\+mdgf-linear'",
    ),
    "another kind": (MLP, {"method": "mdgf-linear", "schedule": Schedule(total_steps=9)}, "linear', got 'constant'"),
    "no schedule": (MLP, {"schedule": "linear"}, "expected a Schedule, a number of steps or None, got str"),
    "flow": (MLP, {"grad_flow": "up"}, "grad_flow must be 'ste', 'decay' or 'fixed', got 'up'"),
    "lambda": (MLP, {"srste_lambda": -1.0}, "srste_lambda must be >= 0"),
    "score": (MLP, {"score": "size"}, "score must be a function or one of"),
    "mask_every": (MLP, {"mask_every": 0}, "mask_every must be an integer >= 1"),
    "axis": (MLP, {"axis": "both"}, "expected axis in"),
    "s-ste with a term": (MLP, {"method": "s-ste", "srste_lambda": 0.1}, "takes a constant schedule"),
    "s-ste with padding": ({"2": "1:3"}, {"method": "s-ste", "pad": "zero"}, "needs rows that groups fill"),
}  # fmt: skip


@pytest.mark.parametrize(("patterns", "options", "message"), CASES.values(), ids=CASES)
def test_a_clear_error_and_an_unchanged_model(patterns, options, message):
    model = make_mlp()
    before, output = copy.deepcopy(model), model(batch()[0])
    with pytest.raises((ValueError, TypeError), match=message):
        sparsify(model, patterns, **options)
    assert repr(model) == repr(before) and list(model.state_dict()) == list(before.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    assert torch.equal(model(batch()[0]), output)
    # and nothing of the attempt is in the way
    sparsify(model, MLP)


def test_an_error_at_a_late_layer_leaves_the_early_ones_dense():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"layer '2' of shape \(4, 6\)"):
        sparsify(model, NM(2, 4))
    assert not any(parametrize.is_parametrized(module) for module in model)


def test_layers_that_are_parametrized_already():
    model = make_mlp()
    parametrize.register_parametrization(model[2], "weight", Scaled())
    with pytest.raises(ValueError, match=r"layer '2' is parametrized already \(Scaled\(\)\); remove that"):
        sparsify(model, MLP)
    assert not parametrize.is_parametrized(model[0])
    model = make_mlp()
    sparsify(model, {"0": "2:4"})
    with pytest.raises(ValueError, match="layer '0' is parametrized already .*; squash it first to begin again"):
        sparsify(model, MLP)
    # further layers of the same model can be added
    sparsify(model, {"2": "1:4"})


def test_quantised_layers():
    model = nn.Sequential(nn.Linear(8, 8), Int8Linear())
    with pytest.raises(ValueError, match="layer '1' is quantised .Int8Linear with Tensor of torch.int8"):
        sparsify(model, {"*": "2:4"})
    assert not parametrize.is_parametrized(model[0])
    sparsify(model, {"0": "2:4"})


def test_weights_that_are_computed_complex_or_not_there_yet():
    from torch.nn.utils import prune

    for layer, message in (
        (prune.l1_unstructured(nn.Linear(8, 8), "weight", amount=0.5), r"'1': its weight is a Tensor.*prune\.remove"),
        (nn.Linear(8, 8, dtype=torch.complex64), "'1' is complex .torch.complex64.: expected a real"),
        (nn.LazyLinear(8), "'1' has no shape yet .LazyLinear.; run a batch"),
    ):
        model = nn.Sequential(nn.Linear(8, 8), layer)
        with pytest.raises(ValueError, match=message):
            sparsify(model, "2:4")
        assert not parametrize.is_parametrized(model[0])


def test_a_pattern_that_keeps_nothing_is_taken_with_a_warning():
    model = make_mlp()
    with pytest.warns(UserWarning, match=r"patterns 0:M prune every weight of 2 \(0:4\)$"):
        controller = sparsify(model, {"0": "2:4", "2": "0:4"})
    controller.step()
    assert not model[2].weight.any() and model[0].weight.any()


def test_models_without_a_layer_to_prune():
    with pytest.raises(ValueError, match="LayerNorm has no linear or convolution layer"):
        sparsify(nn.LayerNorm(4), NM(2, 4))


def test_a_weight_that_is_sharded_already_is_refused_before_anything_else():
    from torch.distributed.tensor import Shard

    model = make_mlp()
    weight = model[2].weight
    weight.placements = (Shard(0),)
    with pytest.raises(ValueError, match=r"layer '2' is sharded already .*call sparsify first and fully_shard after"):
        sparsify(model, MLP)


@pytest.mark.parametrize("dim", [1, -1])
def test_a_weight_sharded_across_its_groups_is_refused(dim):
    from torch.distributed.tensor import Partial, Replicate, Shard

    from leanstep.sparsity.training.modules import SparseLayer

    weight = SimpleNamespace(placements=(Replicate(), Shard(dim)), shape=(16, 8), dim=lambda: 2)
    layer = SimpleNamespace(name="mlp.up", weight=weight, dim=1, target=NM(2, 4))
    with pytest.raises(
        ValueError, match=r"'mlp.up' of shape \(16, 8\) has its 2:4 groups along dimension 1 and is sharded"
    ):
        SparseLayer.check_sharding(layer)
    weight.placements = (Partial(),)
    with pytest.raises(ValueError, match="across them"):
        SparseLayer.check_sharding(layer)
    weight.placements = (Replicate(), Shard(0))
    SparseLayer.check_sharding(layer)
