"""Codes of shards that cut rows are those of the whole tensor; the processes are made up."""

import pytest
import torch

from leanstep.kernels.reference.quantization import dequantize, quantize, scale_shape
from leanstep.optimizers.common import column_shards
from leanstep.optimizers.common.column_shards import cuts_rows, decoded, divides_blocks, encode
from leanstep.optimizers.common.sharding import Cut, Shard


def shards(shape, *blocks):
    """One shard per process: ranges of every dimension, cut along dimension 1 in a group of all processes."""
    return [Shard(torch.Size(shape), (Cut(1, None),), tuple(range(*ends) for ends in block)) for block in blocks]


def selected(tensor, shard):
    return tensor[tuple(slice(r.start, r.stop) for r in shard.ranges)].clone()


def together(rules):
    """Run the rules of all processes; every round takes the maximum over them."""
    while True:
        rounds = [next(rule, None) for rule in rules]
        if all(requests is None for requests in rounds):
            return
        for reductions in zip(*rounds, strict=True):
            assert {reduction.op for reduction in reductions} == {"max"}
            maximum = torch.stack([reduction.tensor for reduction in reductions]).amax(dim=0)
            for reduction in reductions:
                reduction.tensor.copy_(maximum)


CASES = {
    "uneven": shards((5, 300), ((0, 5), (0, 130)), ((0, 5), (130, 260)), ((0, 5), (260, 300))),
    "empty": shards((5, 3), ((0, 5), (0, 2)), ((0, 5), (2, 3)), ((0, 5), (3, 3))),
    "rows too": shards((5, 300), ((3, 5), (0, 150)), ((3, 5), (150, 300))),
    "whole blocks": shards((5, 512), ((0, 5), (0, 256)), ((0, 5), (256, 512))),
    "a stack": shards((3, 10, 50), ((0, 3), (0, 7), (0, 50)), ((0, 3), (7, 10), (0, 50))),
    "inside a stack": shards((3, 10, 50), ((0, 3), (0, 10), (0, 25)), ((0, 3), (0, 10), (25, 50))),
}


@pytest.mark.parametrize("code", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_codes_and_scales_are_those_of_the_whole(name, dtype, code, monkeypatch):
    parts = CASES[name]
    monkeypatch.setattr(column_shards.torch.distributed, "get_world_size", lambda group: len(parts))
    shape, rows = parts[0].shape, parts[0].ranges[0]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0] *= values[0].exp()
    values[-1] = 0.0
    values[1].view(-1)[0] = float("inf")  # its block becomes NaN on every process
    values = values.square() if code == torch.uint8 else values
    codes, scales = quantize(values, 11, dtype=code)
    assert all(cuts_rows(part) for part in parts)
    whole_blocks = not divides_blocks(parts[0])
    assert whole_blocks == (name == "whole blocks")
    states = []
    for part in parts:
        stored = len(part.ranges[1]) // 128 if whole_blocks else scale_shape(shape)[1]
        here = selected(codes, part)
        states.append({"m": torch.full_like(here, 3), "m_scale": torch.zeros(len(rows), stored)})
    together(
        [
            encode([selected(values, part)], [state], "m", [part], [11])
            for part, state in zip(parts, states, strict=True)
        ]
    )
    expected = dequantize(codes, scales, dtype)
    for part, state in zip(parts, states, strict=True):
        assert torch.equal(state["m"], selected(codes, part))
        columns = slice(part.ranges[1].start // 128, part.ranges[1].stop // 128) if whole_blocks else slice(None)
        torch.testing.assert_close(
            state["m_scale"], scales[rows.start : rows.stop, columns], equal_nan=True, rtol=0, atol=0
        )
        values = decoded(state["m"], state["m_scale"], part, dtype)
        torch.testing.assert_close(values, selected(expected, part), equal_nan=True, rtol=0, atol=0)


def test_skipped_rows_keep_their_codes(monkeypatch):
    parts = CASES["inside a stack"]
    monkeypatch.setattr(column_shards.torch.distributed, "get_world_size", lambda group: len(parts))
    states = [{"m": torch.full((3, 10, 25), 5, dtype=torch.int8), "m_scale": torch.ones(3, 4)} for _ in parts]
    skip = [torch.tensor([0, 1, 0], dtype=torch.int32)]
    rules = [encode([torch.zeros(3, 10, 25)], [s], "m", [p], [1], skip) for p, s in zip(parts, states, strict=True)]
    together(rules)
    for state in states:
        assert (state["m"][1] == 5).all() and not state["m"][[0, 2]].any()
        assert state["m_scale"].tolist() == [[0] * 4, [1] * 4, [0] * 4]
