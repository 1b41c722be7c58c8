"""2:4 layers for the sparse units of GPUs: which can be, why the others cannot, and the packed bits."""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from leanstep.sparsity import nm_mask, semi_structured, sparsify, to_semi_structured
from leanstep.sparsity.semi_structured import obstacle

AMPERE = {"device": "cuda", "capability": (8, 0)}


def two_four(rows, columns, dtype=torch.float16):
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data.mul_(nm_mask(layer.weight, "2:4"))
    return layer.to(dtype)


def test_a_layer_that_fits_has_no_obstacle():
    for backend in ("cutlass", "cusparselt"):
        for dtype in (torch.float16, torch.bfloat16):
            assert obstacle(two_four(64, 128, dtype), backend, **AMPERE) == ""


@pytest.mark.parametrize(
    ("layer", "options", "reason"),
    [
        (two_four(64, 128, torch.float32), {}, "fp32 is 1:2 sparse in hardware"),
        (two_four(64, 128, torch.float64), {}, "multiplies fp16 and bf16 here, its weight is float64"),
        (two_four(48, 128), {}, "cutlass takes multiples of 32 x 64, its weight is 48 x 128"),
        (two_four(64, 96), {}, "its weight is 64 x 96"),
        (nn.Linear(128, 64).half(), {}, r"not 2:4: 2,048 of 2,048 groups have more than two nonzeros"),
        (two_four(64, 128), {"capability": (7, 5)}, "compute capability 7.5, sparse units come with 8.0"),
        (two_four(64, 128), {"device": "cpu"}, "on cpu, and sparse units are on NVIDIA GPUs"),
        (nn.Conv2d(64, 64, 1).half(), {}, "Conv2d does not multiply"),
    ],
)
def test_every_other_layer_has_a_reason(layer, options, reason):
    assert reason in obstacle(layer, "cutlass", **(AMPERE | options))


def test_a_model_on_a_cpu_is_reported_layer_by_layer_and_left_alone():
    model = nn.Sequential(two_four(64, 128), nn.ReLU(), nn.Linear(64, 8), nn.Conv2d(4, 4, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = to_semi_structured(model, backend="cutlass")
    assert [(row.layer, row.converted) for row in report] == [("0", False), ("2", False), ("3", False)]
    assert all(row.reason for row in report)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_in_training_is_told_to_be_squashed_first():
    model = nn.Sequential(nn.Linear(128, 64)).half()
    sparsify(model, "2:4")
    (row,) = to_semi_structured(model, backend="cutlass")
    assert row.reason == "its weight is parametrized; squash the model first"


def test_backends_that_are_not_there():
    with pytest.raises(ValueError, match="one of auto, cusparselt, cutlass, torchao-float8, got 'tensorrt'"):
        to_semi_structured(nn.Linear(4, 4), backend="tensorrt")
    if not torch.backends.cusparselt.is_available():
        with pytest.raises(ValueError, match="without cuSPARSELt"):
            to_semi_structured(nn.Linear(4, 4), backend="cusparselt")


@pytest.mark.parametrize(
    ("layer", "options", "reason"),
    [
        (two_four(64, 128, torch.bfloat16), {}, ""),
        (two_four(64, 128), {"capability": (8, 9)}, "compute capability 8.9, sparse units for float8 come with 9.0"),
        (two_four(40, 128), {}, "torchao-float8 takes multiples of 16 x 16, its weight is 40 x 128"),
        (nn.Linear(128, 64).half(), {}, "not 2:4: 2,048 of 2,048 groups"),
    ],
)
def test_float8_has_obstacles_of_its_own(layer, options, reason):
    got = obstacle(layer, "torchao-float8", **({"device": "cuda", "capability": (9, 0)} | options))
    assert reason in got and bool(got) == bool(reason)


def without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)


def test_float8_without_torchao_is_refused(monkeypatch):
    without_torchao(monkeypatch)
    with pytest.raises(ValueError, match="takes torchao with 2:4 float8 tensors, as in 0.18"):
        to_semi_structured(nn.Linear(4, 4), backend="torchao-float8")


class Packed(torch.Tensor):
    """Stands for a tensor of torchao."""


@pytest.fixture
def pretended(monkeypatch):
    """A package of torchao's names, and a device for the weights; ``calls`` has the weights to quantise."""
    calls, outcomes = [], {}

    def quantize(module, config):
        calls.append((module.weight.detach().clone(), config))
        outcome = outcomes.get(module.out_features)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Packed), requires_grad=False)

    quantization, workflows = ModuleType("torchao.quantization"), ModuleType("workflows")
    quantization.quantize_, quantization.PerRow = quantize, lambda: "rows"
    quantization.Float8DynamicActivationFloat8WeightConfig = dict
    workflows.Float8PackingFormat = SimpleNamespace(SPARSE_2D_DATA_2D_METADATA="2:4")
    names = {"torchao": ModuleType("torchao"), "torchao.quantization": quantization}
    names |= {"torchao.quantization.quantize_": ModuleType("q"), "torchao.quantization.quantize_.workflows": workflows}
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(semi_structured, "obstacle", partial(obstacle, device="cuda", capability=(9, 0)))
    return calls, outcomes


def test_float8_layers_go_to_torchao_one_by_one_and_failures_change_nothing(pretended):
    calls, outcomes = pretended
    outcomes |= {80: RuntimeError("no kernel\nfor it"), 96: "as it is"}
    layers = [two_four(64, 128), nn.Linear(64, 64).half(), two_four(80, 64), two_four(96, 80)]
    model = nn.Sequential(*layers)
    before = [layer.weight for layer in layers]
    assert any((weight.signbit() & (weight == 0)).any() for weight in before)
    report = to_semi_structured(model, backend="torchao-float8")
    assert [row.reason.partition(":")[0] for row in report] == [
        "", "it is not 2", "torchao refused", "torchao left it as it is",
    ]  # fmt: skip
    assert "no kernel" in report[2].reason and "\n" not in report[2].reason
    assert len(calls) == 3 and all(config == {"granularity": "rows", "packing_format": "2:4"} for _, config in calls)
    assert not any((weight.signbit() & (weight == 0)).any() for weight, _ in calls)
    assert torch.equal(calls[0][0], before[0])
    assert [layer.weight is weight for layer, weight in zip(layers, before, strict=True)] == [False, True, True, True]


def test_torchao_takes_our_settings():
    pytest.importorskip("torchao")
    _, config = semi_structured._torchao()
    assert config.packing_format.value == "sparse_2d_data_2d_metadata" and config.weight_dtype == torch.float8_e4m3fn


def test_packing_keeps_what_is_two_four_and_drops_half_of_what_is_not():
    weight = two_four(32, 64).weight.detach()
    back = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert torch.equal(back, weight)
    # the reason why every weight is looked at before it is packed
    full = torch.ones(32, 64, dtype=torch.float16)
    packed = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(full))
    assert int((packed != 0).sum()) == full.numel() // 2
    layer = nn.Linear(64, 32, bias=False).half()
    layer.weight.data.fill_(1)
    assert "512 of 512 groups" in obstacle(layer, "cutlass", **AMPERE)


@pytest.mark.parametrize(
    ("pattern", "nibble"),
    [("1100", 0b0100), ("1010", 0b1000), ("0110", 0b1001), ("1001", 0b1100), ("0101", 0b1101), ("0011", 0b1110)],
)
def test_metadata_of_a_group_is_the_places_of_the_two(pattern, nibble):
    row = torch.tensor([float(c) for c in pattern], dtype=torch.float16)
    _, metadata = sparse_semi_structured_from_dense_cutlass(row.repeat(32, 16))
    assert {int(word) & 0xF for word in metadata.flatten().tolist()} == {nibble}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_on_a_device_are_those_of_the_dense_weight(dtype):
    layer = two_four(128, 256, dtype).cuda()
    x = torch.randn(64, 256, dtype=dtype, device="cuda")
    want = layer(x)
    (row,) = to_semi_structured(layer)
    assert row.converted, row.reason
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_float8_products_on_a_device_are_near_those_of_the_dense_weight():
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("float8 sparse units come with compute capability 9.0")
    layer = two_four(128, 256, torch.bfloat16).cuda()
    x = torch.randn(64, 256, dtype=torch.bfloat16, device="cuda")
    want = layer(x)
    (row,) = to_semi_structured(layer, backend="torchao-float8")
    assert row.converted, row.reason
    with torch.no_grad():
        # two roundings to three bits of fraction
        assert (layer(x) - want).norm() < 0.1 * want.norm()
