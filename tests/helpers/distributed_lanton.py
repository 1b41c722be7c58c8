"""Checks of sharded LANTON: what it sends, who works, other ways to shard, and the halves of a batch."""

import contextlib
import math
from typing import Any

import torch
from distributed_cases import (
    OPTIMIZERS,
    assert_same,
    build,
    count_collectives,
    mesh,
    new_model,
    refused,
    set_grad,
    set_grads,
    shard,
    tokens,
    whole,
)
from distributed_placements import by_hand
from distributed_world import World, case
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from leanstep.optimizers import LANTON, param_groups

_HIDDEN = ("conv.weight", "up.weight", "narrow.weight", "back.weight")


@case(2, 3)
def lanton_sends_every_matrix_once_each_way(world: World) -> None:
    """Differences and momenta to the owners, directions back; one all-reduce of four numbers for each matrix."""
    model = shard(new_model(torch.float64), world.size)
    cut = sum(p.numel() for n, p in model.named_parameters() if n.endswith(_HIDDEN))
    single = sum(1 if p.dim() != 3 else p.shape[0] for p in model.parameters())
    told = ("allreduce_", 8 * 4 * single)
    for name, kinds in {
        "lanton": (3, 3, 3, 3),
        "lanton_muon": (2, 3, 2, 3),  # measures every second step
        "lanton_base": (2, 2, 2, 2),
    }.items():
        optimizer = build(name, model)
        for step, exchanges in enumerate(kinds):
            collectives = count_collectives(optimizer, model, step)
            assert [op for op, _ in collectives].count("alltoall_base_") == exchanges, (
                f"{name}, step {step}: {collectives}"
            )
            others = [s for s in collectives if s[0] != "alltoall_base_"]
            assert others == [told], f"{name}, step {step}: {others}"
            sent = torch.tensor([size for op, size in collectives if op == "alltoall_base_"])
            torch.distributed.all_reduce(sent)
            # what goes out is counted where it leaves and where it arrives; stacks of experts stay where they are
            assert sent.tolist() == [2 * 8 * cut] * exchanges, f"{name}, step {step}: {sent.tolist()} for {cut}"


@case(2, 4)
def lanton_spreads_the_work(world: World) -> None:
    """No process has more to do than its share and one matrix more; all agree who owns what."""
    from leanstep.kernels.matrices.newton_schulz import flops
    from leanstep.optimizers.lanton.matrices import tasks_of

    shapes = [(30, 20)] * 9 + [(8, 40)] * 4 + [(64, 32)]
    params = [nn.Parameter(distribute_tensor(torch.zeros(s), mesh(world.size), [Shard(0)])) for s in shapes]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = LANTON(params, norm="rms")
    tasks = tasks_of(optimizer._layer_steps(optimizer.param_groups[0], 0, 0))
    costs = [flops(s) for s in shapes]
    loads = [sum(c for c, t in zip(costs, tasks, strict=True) if t.owner == (r,)) for r in range(world.size)]
    assert max(loads) <= sum(costs) / world.size + max(costs)
    if world.size == 2:
        assert max(loads) < 1.1 * min(loads)
    owners = torch.tensor([t.owner for t in tasks])
    mine = owners.clone()
    torch.distributed.broadcast(owners, 0)
    assert torch.equal(mine, owners)


@case(2, 3)
def lanton_follows_unsharded_on_columns(world: World) -> None:
    """Shard(1): matrices by columns, convolutions by input channels, stacks by rows of their matrices."""
    for name in ("lanton", "lanton_muon", "lanton_foreach_off", "lanton_stochastic"):
        *_, dtype, tolerance = OPTIMIZERS[name]
        plain, sharded = new_model(dtype), by_hand(world.size, Shard(1), dtype=dtype)
        optimizers = [build(name, plain), build(name, sharded)]
        for step in range(3):
            for model, optimizer in zip((plain, sharded), optimizers, strict=True):
                set_grads(model, step)
                optimizer.step()
            assert_same(sharded, plain, tolerance, f"{name} after step {step + 1}")


@case(2)
def lanton_on_stacks_convolutions_and_transposed_matrices(world: World) -> None:
    for shape, cuts, settings in (
        ((3, 4, 5), (0, 1, 2), {}), ((1, 4, 5), (0, 1), {}), ((3, 4, 5), (0, 1, 2), {"transposed": True}),
        ((6, 4, 3), (0, 1, 2), {"flatten": True}), ((5, 4, 3, 2), (0, 1, 2, 3), {}),
        ((7, 5), (0, 1), {"transposed": True, "variance": "rows"}),
        ((5, 7), (0, 1), {"variance": "rows"}), ((3, 4, 5), (0, 1, 2), {"variance": "rows"}),
        ((3, 4, 5), (1, 2), {"transposed": True, "variance": "rows"}),
        ((5, 4, 3, 2), (0, 1, 2), {"variance": "rows"}),
        ((7, 5), (0, 1), {"transposed": True}),
        ((12, 5), (0, 1), {"blocks": (2, 7, 3)}), ((5, 12), (0, 1), {"blocks": 4, "transposed": True}),
        ((3, 8, 5), (0, 1, 2), {"blocks": 4}),
        ((3, 8, 5), (0, 1), {"blocks": 4, "variance": "rows"}),
    ):  # fmt: skip
        for dim in cuts:
            plain = nn.Parameter(torch.randn(shape, dtype=torch.float64))
            sharded = nn.Parameter(distribute_tensor(plain.detach(), mesh(world.size), [Shard(dim)]))
            optimizers = [LANTON([p], lr=0.1, norm="rms", alpha=0.1, **settings) for p in (plain, sharded)]
            for step in range(2):
                grad = torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
                for param, optimizer in zip((plain, sharded), optimizers, strict=True):
                    set_grad(param, grad)
                    optimizer.step()
            assert (whole(sharded.detach()) - plain).abs().max() < 1e-9, (shape, dim, settings)
            reports = [[row["H"] for row in o.noise_report()] for o in optimizers]
            assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(*reports, strict=True)), (shape, dim)


@case(4)
def lanton_on_two_mesh_dimensions(world: World) -> None:
    """Replicated and sharded, and sharded twice: as the unsharded run."""
    for placements in ((Replicate(), Shard(0)), (Shard(0), Shard(1)), (Shard(0), Shard(0))):
        on = init_device_mesh("cpu", (2, 2))
        plain, sharded = new_model(torch.float64), by_hand(4, *placements, dtype=torch.float64, on=on)
        for name in ("lanton", "lanton_muon", "lanton_base"):
            optimizers = [build(name, plain), build(name, sharded)]
            for step in range(3):
                for model, optimizer in zip((plain, sharded), optimizers, strict=True):
                    set_grads(model, step)
                    optimizer.step()
            assert_same(sharded, plain, 1e-9, f"{name} {placements}")
            reports = [[row["H"] for row in o.noise_report()] for o in optimizers]
            assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(*reports, strict=True)), (name, placements)


@case(2, 3)
def lanton_estimates_are_the_same_everywhere(world: World) -> None:
    model = shard(new_model(), world.size)
    optimizer = build("lanton", model)
    for step in range(3):
        set_grads(model, step)
        optimizer.step()
    mine = torch.tensor([[row["H"], row["factor"]] for row in optimizer.noise_report()], dtype=torch.float64)
    first = mine.clone()
    torch.distributed.broadcast(first, 0)
    assert torch.equal(mine, first)
    assert {row["name"] for row in optimizer.noise_report() if "[" in row["name"]} >= {"blocks.0.experts[2]"}


# ---- halves of a batch


def halves(model: nn.Module, **settings: Any) -> LANTON:
    return LANTON(param_groups(model), lr=0.02, alpha=0.01, noise="halves", nuclear="svd", **settings)


def accumulate(model: nn.Module, optimizer: LANTON, world: World | None, steps: int, averaged: bool | None) -> None:
    """Steps of four passes over a batch of 24, of which a process of ``world`` takes its part of each pass."""
    for step in range(steps):
        for i, chunk in enumerate(tokens(24, seed=step).chunk(4)):
            part = chunk if world is None else chunk.chunk(world.size)[world.rank]
            waits = averaged is False and i < 3
            with model.no_sync() if waits else contextlib.nullcontext():
                (model(part) / 4).backward()
            if i == 1:
                optimizer.mark_half(averaged=averaged)
        optimizer.step()
        optimizer.zero_grad()


@case(2, 3)
def lanton_halves_equal_one_process(world: World) -> None:
    """The same estimates under FSDP2, and under DDP inside and outside of no_sync()."""
    plain = new_model(torch.float64)
    alone = halves(plain)
    accumulate(plain, alone, None, 3, True)
    expected = {row["name"]: row["H"] for row in alone.noise_report()}
    for kind, averaged in (("fsdp", None), ("ddp", False), ("ddp", True)):
        model: Any = new_model(torch.float64)
        if kind == "fsdp":
            optimizer = halves(shard(model, world.size))
            accumulate(model, optimizer, world, 3, averaged)
        else:
            optimizer = halves(model)
            parallel = nn.parallel.DistributedDataParallel(model)
            accumulate(parallel, optimizer, world, 3, averaged)
        assert_same(model, plain, 1e-6, f"{kind} {averaged}")
        for row in optimizer.noise_report():
            assert math.isclose(row["H"], expected[row["name"]], rel_tol=1e-6), (kind, averaged, row)
        assert not any("half_grad" in state for state in optimizer.state.values())


@case(2)
def lanton_halves_must_be_told_whether_they_are_averaged(world: World) -> None:
    model = new_model()
    optimizer = halves(model)
    set_grads(model, 0)
    refused(ValueError, "averaged=False inside", optimizer.mark_half)


class Branches(nn.Module):
    """A layer that all use, and others of one shape of which a pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4, bias=False)
        self.others = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor, other: int) -> torch.Tensor:
        return self.others[other](self.first(x)).square().sum()


@case(2)
def lanton_halves_of_parameters_that_a_process_does_not_use(world: World) -> None:
    """Inside no_sync() each has gradients of its own: those of the others count as zeros, unless nobody has any."""
    model = Branches()
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = LANTON([{"params": list(model.named_parameters()), "norm": "rms"}], noise="halves", lr=0.01)
    with parallel.no_sync():
        parallel(torch.ones(2, 4), world.rank).backward()
    expected = {}
    for name, param in model.named_parameters():
        gradient = torch.zeros_like(param) if param.grad is None else param.grad.clone()
        torch.distributed.all_reduce(gradient)
        expected[name] = gradient / world.size
    optimizer.mark_half(averaged=False)
    for name, param in model.named_parameters():
        half = optimizer.state[param].get("half_grad")
        if name == "others.2.weight":
            assert half is None
        else:
            assert half is not None and expected[name].any(), name
            torch.testing.assert_close(half, expected[name])
