"""Blocks of sharded tensors are rounded with the bits of the whole tensor."""

import pytest
import torch
from kernel_cases import bits_equal

from leanstep.kernels import StepOptions, lion_step, scaled_step, use_backend
from leanstep.kernels.reference.rounding import element_index
from leanstep.optimizers.common.sharding import Cut, Shard, positions_of, runs_of

# shape of the whole tensor -> the block of a process
BLOCKS = {
    (9, 70): (range(2, 7), range(31, 68)),
    (9, 71): (range(0, 9), range(8, 16)),
    (1, 40): (range(0, 1), range(7, 40)),
    (4, 6, 50): (range(1, 3), range(2, 5), range(4, 49)),
    (4, 6, 10): (range(1, 4), range(0, 6), range(5, 10)),
    (5, 6, 20): (range(0, 5), range(3, 6), range(0, 20)),
    (5, 4, 3, 6): (range(1, 5), range(2, 4), range(0, 3), range(0, 6)),
    (3, 4, 5, 6): (range(1, 3), range(1, 4), range(2, 5), range(0, 6)),
    (3, 4, 7, 6): (range(0, 3), range(0, 4), range(0, 7), range(2, 3)),
    (7, 3): (range(7, 7), range(1, 2)),
}
SHARDS = [Shard(torch.Size(shape), (Cut(0, None),), ranges) for shape, ranges in BLOCKS.items()]
WHOLE = [Shard(torch.Size(shape)) for shape in BLOCKS]


def block(tensor, ranges):
    return tensor[tuple(slice(r.start, r.stop) for r in ranges)].contiguous()


def normal(seed):
    chance = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=chance).bfloat16() for shape in BLOCKS]


def as_matrices(tensors):
    return [t.flatten(1) if t.dim() > 3 else t for t in tensors]


def lion(shards, cut):
    params, grads, momenta = (cut(normal(seed)) for seed in range(3))
    scalars = torch.tensor([1e-3, 0.99, 0.9, 0.1, 0.99, 0.01])
    seeds = torch.arange(len(params)) + 2**31
    options = StepOptions(scalars, "stochastic", seeds=seeds, **positions_of(shards, torch.device("cpu")))
    lion_step(params, grads, momenta, [], options)
    return params


def scaled(shards, cut):
    params, mats = (cut(normal(seed)) for seed in range(2))
    matrices = as_matrices(params), as_matrices(mats)
    rows = [torch.full(m.shape[:-1], 0.5) for m in matrices[1]]
    cols = [torch.full((*m.shape[:-2], m.shape[-1]), 1.25) for m in matrices[1]]
    seeds = torch.arange(len(params)) + 2**31
    positions = positions_of(shards, torch.device("cpu"))
    scaled_step(
        *matrices, rows, cols, [], StepOptions(torch.tensor([0.01, 0.99]), "stochastic", seeds=seeds, **positions)
    )
    return params


def check(step):
    wholes = step(WHOLE, lambda tensors: tensors)
    blocks = step(SHARDS, lambda tensors: [block(t, s.ranges) for t, s in zip(tensors, SHARDS, strict=True)])
    for whole, part, shard in zip(wholes, blocks, SHARDS, strict=True):
        bits_equal(part, block(whole, shard.ranges))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("step", [lion, scaled])
def test_a_block_is_rounded_as_in_the_whole(step, backend):
    with use_backend(backend):
        check(step)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("step", [lion, scaled])
def test_triton_rounds_a_block_as_in_the_whole(step):
    with use_backend("triton"):
        check(step)


def test_the_index_of_every_element():
    """Also of elements beyond 2**32."""
    for shard in SHARDS:
        whole = torch.arange(shard.shape.numel(), dtype=torch.int32).view(shard.shape)
        offsets, runs = positions_of([shard], torch.device("cpu")).values()
        part = block(whole, shard.ranges)
        assert torch.equal(element_index(part, offsets[0], None if runs is None else runs[0]), part)
    large = Shard(torch.Size((2**20, 2**16)), (Cut(1, None),), (range(2**20 - 2, 2**20), range(2**15, 2**15 + 3)))
    offsets, runs = positions_of([large], torch.device("cpu")).values()
    first = (2**20 - 2) * 2**16 + 2**15
    index = element_index(torch.empty(2, 3), offsets[0], runs[0]).to(torch.int64) & 0xFFFFFFFF
    assert index.tolist() == [[(first + row * 2**16 + column) % 2**32 for column in range(3)] for row in range(2)]


def test_blocks_cut_along_too_many_dimensions_have_no_runs():
    ranges = (range(0, 1), range(0, 1), range(0, 1), range(0, 1))
    assert runs_of(Shard(torch.Size((2, 2, 2, 2)), (Cut(0, None),), ranges)) is None
