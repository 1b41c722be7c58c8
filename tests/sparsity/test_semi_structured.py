"""2:4 layers for the sparse units of GPUs: which can be, why the others cannot, and the packed bits."""

import pytest
import torch
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from leanstep.sparsity import nm_mask, sparsify, to_semi_structured
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
    with pytest.raises(ValueError, match="backend must be one of auto, cusparselt, cutlass, got 'tensorrt'"):
        to_semi_structured(nn.Linear(4, 4), backend="tensorrt")
    if not torch.backends.cusparselt.is_available():
        with pytest.raises(ValueError, match="without cuSPARSELt"):
            to_semi_structured(nn.Linear(4, 4), backend="cusparselt")


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
    [
        ("1100", 0b0100),
        ("1010", 0b1000),
        ("0110", 0b1001),
        ("1001", 0b1100),
        ("0101", 0b1101),
        ("0011", 0b1110),
    ],
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
