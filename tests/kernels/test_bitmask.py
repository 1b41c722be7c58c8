"""Matrices as values and bit masks: exact round trips, rounding to 8 and 4 bits, and damaged parts."""

import pytest
import torch
from kernel_cases import DTYPES, bits_equal, dtype_name

from leanstep.kernels import bitmask_pack, bitmask_quantize, bitmask_unpack, bitmask_validate
from leanstep.kernels.reference.sparse import bitmask as reference


def sparse(rows, columns, sparsity=0.6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return torch.where(torch.rand(rows, columns, generator=generator) < sparsity, 0.0, weight).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("shape", [(37, 70), (3, 32), (5, 1), (1, 31), (0, 9), (4, 1100)], ids=str)
def test_round_trips_are_exact_to_the_bit(shape, dtype, monkeypatch):
    monkeypatch.setattr(reference, "TILE", 100)
    weight = sparse(*shape, dtype=dtype)
    if shape[0] > 3:
        weight[1] = 0
        weight[2] = torch.randn(shape[1]).abs() + 1
        weight[3, 0] = -0.0
        weight[0, -1] = float("nan")
        weight[1, -1] = torch.finfo(dtype).smallest_normal / 4
    values, mask, offsets = bitmask_pack(weight)
    assert values.dtype == dtype and mask.dtype == torch.int32 and offsets.dtype == torch.int64
    assert mask.shape == (shape[0], -(-shape[1] // 32)) and offsets.shape == (shape[0] + 1,)
    bitmask_validate(values, mask, offsets, shape)
    unpacked = bitmask_unpack(values, mask, offsets, shape)
    bits_equal(unpacked, weight)
    assert torch.equal(unpacked.signbit(), weight.signbit())


def test_the_layout_is_the_documented_one():
    weight = torch.zeros(2, 40)
    weight[0, 0], weight[0, 31], weight[0, 33], weight[1, 39] = 1, 2, 3, -0.0
    values, mask, offsets = bitmask_pack(weight)
    assert values.tolist() == [1, 2, 3, 0] and offsets.tolist() == [0, 3, 4]
    assert mask.tolist() == [[1 - 2**31, 2], [0, 128]]


def test_bits_are_counted():
    mask = torch.tensor([[-1, 0], [1, -(2**31)], [0x55555555, 0x7FFFFFFF]], dtype=torch.int32)
    assert reference.row_counts(mask).tolist() == [32, 2, 47]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_codes_are_the_nearest_ones(dtype):
    weight = sparse(9, 50, dtype=dtype)
    weight[4] = 0
    weight[5, :] *= 1e-3
    values, mask, offsets = bitmask_pack(weight)
    codes, scales = bitmask_quantize(values, offsets)
    bitmask_validate(codes, mask, offsets, weight.shape, scales)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32 and scales[4] == 0
    unpacked = bitmask_unpack(codes, mask, offsets, weight.shape, scales, torch.float64)
    errors = (unpacked - weight.double()).abs()
    assert (errors <= scales.double()[:, None] * 0.5001).all()
    for row in (0, 5):  # the largest magnitude of a row has the largest code
        assert codes[offsets[row] : offsets[row + 1]].abs().max() == 127
    assert bitmask_unpack(codes, mask, offsets, weight.shape, scales, dtype).dtype == dtype


@pytest.mark.parametrize("shape", [(9, 50), (7, 64), (5, 200), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_codes_of_4_bits_are_the_nearest_ones(dtype, shape, monkeypatch):
    monkeypatch.setattr(reference, "TILE", 300)
    weight = sparse(*shape, dtype=dtype)
    weight[0, 0], weight[-1, :60] = 0, weight[-1, :60] * 1e-3
    values, mask, offsets = bitmask_pack(weight)
    codes, scales = bitmask_quantize(values, offsets, mask, bits=4)
    bitmask_validate(codes, mask, offsets, weight.shape, scales)
    rows, columns = shape
    assert codes.dtype == torch.uint8 and codes.shape == (-(-len(values) // 2),)
    assert scales.dtype == torch.bfloat16 and scales.shape == (rows, -(-columns // 64))
    unpacked = bitmask_unpack(codes, mask, offsets, weight.shape, scales, torch.float64)
    blocks = torch.nn.functional.pad(weight.double(), (0, -columns % 64)).unflatten(1, (-1, 64))
    # the scale is rounded to 8 bits
    expected = blocks.abs().amax(dim=2) / 7
    assert ((scales.double() - expected).abs() <= expected * 2.0**-8).all()
    wide = scales.double().repeat_interleave(64, dim=1)[:, :columns]
    # half a scale, and that of a largest value of 7 scales by a scale that was rounded down
    assert ((unpacked - weight.double()).abs() <= wide * 0.5001).all()
    nearest = (weight.double() / wide).nan_to_num().round() * wide
    assert ((unpacked - nearest).abs() > 1e-6 * wide).double().mean() <= 0.01
    assert (unpacked[weight == 0] == 0).all()


def test_codes_of_4_bits_have_the_documented_layout():
    weight = torch.tensor([[7.0, 0.0, -7.0, 3.0], [0.0, 0.0, 0.0, -1.0]])
    values, mask, offsets = bitmask_pack(weight)
    codes, scales = bitmask_quantize(values, offsets, mask, bits=4)
    assert scales.tolist() == [[1.0], [0.142578125]]
    assert [code % 16 for code in codes.tolist()] == [7, 3] and [code // 16 for code in codes.tolist()] == [9, 9]


def test_damaged_codes_of_4_bits_are_named():
    values, mask, offsets = bitmask_pack(torch.ones(3, 33))
    codes, scales = bitmask_quantize(values, offsets, mask, bits=4)
    assert len(codes) == 50
    for parts, message in [
        ((codes[:-1], mask, offsets, (3, 33), scales), "offsets from 0 to 98, got 0 to 99"),
        ((torch.cat([codes, codes[:1]]), mask, offsets, (3, 33), scales), "offsets from 0 to 102, got 0 to 99"),
        ((codes | 128, mask, offsets, (3, 33), scales), "a code follows the last of 99"),
        ((codes, mask, offsets, (3, 33), scales.float()), r"torch.bfloat16 scales \[3, 1\] of torch.uint8"),
        ((codes, mask, offsets, (3, 33), scales[:, 0]), r"torch.bfloat16 scales \[3, 1\]"),
        ((codes, mask, offsets, (3, 33), None), "uint8 .*without scales"),
        ((codes, mask, offsets, (3, 33), scales / -1), "row 0 has the scale -0.14"),
    ]:
        with pytest.raises(ValueError, match=message):
            bitmask_unpack(*parts)


def test_quantisation_of_nothing_and_of_tiny_rows():
    codes, scales = bitmask_quantize(torch.empty(0), torch.zeros(4, dtype=torch.int64))
    assert codes.shape == (0,) and scales.tolist() == [0, 0, 0]
    codes, scales = bitmask_quantize(torch.tensor([1e-45, -0.0]), torch.tensor([0, 2]))
    assert torch.isfinite(codes * scales).all()


def damaged(change):
    """Parts of a packed matrix of 6 x 40, after a change of a dictionary of them."""
    values, mask, offsets = bitmask_pack(sparse(6, 40))
    parts = dict(values=values, mask=mask.clone(), offsets=offsets.clone(), shape=(6, 40), scales=None)
    change(parts)
    return parts


def put(name, index, value):
    def change(parts):
        parts[name][index] = value

    return change


def set_to(name, function):
    return lambda parts: parts.update({name: function(parts)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to("values", lambda p: p["values"][:-1]), "expected offsets from 0 to"),
        (put("offsets", 0, 1), "expected offsets from 0 to"),
        (put("offsets", 2, 2**62), "offsets of row 2 fall from"),
        (put("offsets", 3, -(2**62)), "offsets of row 2 fall from"),
        (put("mask", (4, 0), 0), r"row 4 has \d+ values and \d+ bits"),
        (set_to("mask", lambda p: p["mask"][:-1]), r"expected int64 offsets \[6\]"),
        (set_to("mask", lambda p: p["mask"].long()), "expected an int32 mask"),
        (set_to("mask", lambda p: p["mask"][:, :1]), r"expected an int32 mask \[rows, 2\]"),
        (set_to("offsets", lambda p: p["offsets"].int()), "expected int64 offsets"),
        (set_to("values", lambda p: p["values"].to(torch.int8)), "without scales"),
        (set_to("scales", lambda p: torch.ones(6)), "with scales"),
        (set_to("shape", lambda p: (5, 40)), "expected a mask of 5 rows"),
        (set_to("shape", lambda p: (6, 0)), "with columns"),
        (set_to("shape", lambda p: (6,)), "rows, columns"),
    ],
)
def test_damaged_parts_are_named(change, message):
    parts = damaged(change)
    for check in (bitmask_validate, bitmask_unpack):
        with pytest.raises(ValueError, match=message):
            check(**parts)


def test_bits_beyond_the_columns_and_bad_scales_are_named():
    values, mask, offsets = bitmask_pack(torch.ones(2, 33))
    mask[1, 1], mask[1, 0] = 2, -1
    with pytest.raises(ValueError, match="row 1 has bits beyond its 33 columns"):
        bitmask_validate(values, mask, offsets, (2, 33))
    values, mask, offsets = bitmask_pack(torch.ones(2, 33))
    codes, scales = bitmask_quantize(values, offsets)
    for scale in (float("nan"), float("inf"), -1.0):
        scales[1] = scale
        with pytest.raises(ValueError, match="row 1 has the scale"):
            bitmask_validate(codes, mask, offsets, (2, 33), scales)


def test_the_code_that_quantisation_never_writes_is_named():
    """A symmetric code of 8 bits is from -127 to 127; the kernels take no other."""
    values, mask, offsets = bitmask_pack(torch.ones(2, 33))
    codes, scales = bitmask_quantize(values, offsets)
    codes[40] = -128
    with pytest.raises(ValueError, match="value 40 has the code -128, expected -127 to 127"):
        bitmask_validate(codes, mask, offsets, (2, 33), scales)


def test_bad_arguments_are_named():
    values, mask, offsets = bitmask_pack(torch.ones(2, 33))
    for call, message in [
        (lambda: bitmask_pack(torch.ones(2, 3, 4)), "flatten the leading dimensions"),
        (lambda: bitmask_pack(torch.ones(2, 3).int()), "floating matrix"),
        (lambda: bitmask_pack(torch.ones(2, 0)), "floating matrix"),
        (lambda: bitmask_quantize(values.int(), offsets), "floating values"),
        (lambda: bitmask_quantize(values / 0, offsets), "66 of 66 values are not finite"),
        (lambda: bitmask_quantize(values, offsets + 1), "expected offsets from 0"),
        (lambda: bitmask_quantize(values, offsets, mask, bits=3), "expected 4 or 8 bits, got 3"),
        (lambda: bitmask_quantize(values, offsets, bits=4), r"need the int32 mask \[2, words\] .*, got none"),
        (lambda: bitmask_quantize(values, offsets, mask - 1, bits=4), "row 0 has 33 values and"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
