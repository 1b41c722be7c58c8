"""Checks of gradients that are released inside the backward pass, under DDP, FSDP2 and tensor parallelism."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from distributed_cases import Collectives, assert_same, build, mesh, new_model, refused, shard, tokens
from distributed_world import World, add_case, case
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from leanstep.optimizers import Lion, SinkGD, release_gradients

# parallelism -> (world sizes, optimizers)
KINDS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "ddp": ((2, 3), ("lion_stochastic", "sinkgd_momentum", "adamw")),
    "ddp_views": ((2,), ("lion_int8", "sinkgd_balanced")),
    "fsdp": ((2, 3), ("lion", "lion_cautious", "lion_int8", "sinkgd_momentum", "sinkgd_balanced", "adamw")),
    "hsdp": ((2, 4), ("lion_cautious", "sinkgd")),
    "tensor_parallel": ((2,), ("lion_cautious", "sinkgd", "adamw")),
}


def wrap(kind: str, model: Any, world: World) -> Any:
    """Return the model as it is called, under a kind of parallelism; most buckets of DDP have one parameter."""
    if kind.startswith("ddp"):
        return DistributedDataParallel(model, bucket_cap_mb=1e-4, gradient_as_bucket_view=kind == "ddp_views")
    if kind == "fsdp":
        return shard(model, world.size)
    if kind == "hsdp":  # two processes only replicate
        grid = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("replicate", "shard"))
        for block in model.blocks:
            fully_shard(block, mesh=grid)
        return fully_shard(model, mesh=grid)
    plan = {"blocks.*.up": ColwiseParallel(), "blocks.*.narrow": RowwiseParallel()}
    return parallelize_module(model, mesh(world.size), plan)


def train(model: nn.Module, optimizer: Any, world: World, *, released: bool, steps: int = 3) -> None:
    """Steps on batches of 12 sequences; released gradients are gone after the backward pass."""
    for step in range(steps):
        model(tokens(12, seed=step).chunk(world.size)[world.rank]).backward()
        assert all((p.grad is None) == released for p in model.parameters()), f"step {step}"
        optimizer.step()
        optimizer.zero_grad()


def released_equals_step(kind: str, world: World) -> None:
    """Bit for bit; only sums of SinkGD over shards of three and more processes have another order."""
    for name in KINDS[kind][1]:
        dtype = torch.bfloat16 if name == "lion_stochastic" else torch.float32
        models = [new_model(dtype), new_model(dtype)]
        wrapped = [wrap(kind, model, world) for model in models]
        optimizers = [build(name, model) for model in models]
        handle = release_gradients(wrapped[1], optimizers[1])
        train(wrapped[0], optimizers[0], world, released=False)
        train(wrapped[1], optimizers[1], world, released=True)
        exact = world.size == 2 or kind.startswith("ddp") or name.startswith("lion")
        assert_same(models[1], models[0], 0 if exact else 1e-5, name)
        handle.remove()
        for model, optimizer in zip(wrapped, optimizers, strict=True):
            train(model, optimizer, world, released=False, steps=1)
        assert_same(models[1], models[0], 0 if exact else 1e-5, f"{name} after remove()")
        release_gradients(wrapped[1], optimizers[1])
        train(wrapped[1], optimizers[1], world, released=True, steps=1)


for _kind, (_worlds, _) in KINDS.items():
    add_case(f"released_equals_step_{_kind}", _worlds, functools.partial(released_equals_step, _kind))


@case(2)
def released_gradients_exist_block_by_block(world: World) -> None:
    """FSDP2: the gradients of one block at most, and one all-reduce per iteration and block. DDP: none but buckets."""
    for kind in ("fsdp", "ddp"):
        model = new_model()
        wrapped = wrap(kind, model, world)
        optimizer = build("sinkgd", model)
        owners = {p: part for part in (model, *model.blocks) for p in part.parameters()}
        alive: list[set[nn.Module]] = []

        def watch(_: Any, owners: Any = owners, alive: Any = alive) -> None:
            alive.append({owner for param, owner in owners.items() if param.grad is not None})

        for param in owners:
            param.register_post_accumulate_grad_hook(watch)  # before the one that releases
        release_gradients(wrapped, optimizer)
        for step in range(2):
            with Collectives() as collectives:
                wrapped(tokens(12, seed=step).chunk(2)[world.rank]).backward()
            optimizer.step()
        assert len(alive) == 2 * len(owners)
        assert max(map(len, alive)) == 1 or kind == "ddp", alive
        if kind == "fsdp":
            count = sum(name == "allreduce_" for name, _ in collectives.seen)
            assert count == 3 * 5, f"three blocks, five iterations, but {count} all-reduces"


def accumulate(model: Any, optimizer: Any, world: World, quiet: Callable[[bool], Any]) -> None:
    for step in range(2):
        parts = tokens(12, seed=step).chunk(world.size)[world.rank].chunk(3)
        for i, part in enumerate(parts):
            with quiet(i < 2):
                (model(part) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()


@case(2)
def released_gradients_accumulate_without_communication(world: World) -> None:
    """The last pass has all gradients and releases them: no_sync of DDP, set_requires_gradient_sync of FSDP2."""
    for kind in ("ddp", "ddp_views", "fsdp"):
        models = [new_model(), new_model()]
        wrapped = [wrap(kind, model, world) for model in models]
        optimizers = [build("lion", model) for model in models]
        release_gradients(wrapped[1], optimizers[1])
        for model, optimizer in zip(wrapped, optimizers, strict=True):

            def quiet(on: bool, model: Any = model, kind: str = kind) -> Any:
                if kind == "fsdp":
                    model.set_requires_gradient_sync(not on)
                    return contextlib.nullcontext()
                return model.no_sync() if on else contextlib.nullcontext()

            accumulate(model, optimizer, world, quiet)
        assert_same(models[1], models[0], 0, kind)


@case(2)
def a_block_without_some_gradients_is_released(world: World) -> None:
    """A parameter that the pass does not use holds up neither its block nor the next one."""
    models = []
    for released in (False, True):
        model = new_model()
        for block in model.blocks:
            block.unused = nn.Parameter(torch.ones(4, 4))
        shard(model, world.size)
        optimizer = build("sinkgd", model)
        if released:
            release_gradients(model, optimizer)
        for step in range(2):
            model(tokens(12, seed=step).chunk(2)[world.rank]).backward()
            if released:
                assert all(p.grad is None for name, p in model.named_parameters() if "blocks.1" in name)
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert_same(models[1], models[0], 0)


@case(2)
def two_optimizers_release_the_gradients_of_one_model(world: World) -> None:
    """Each steps its parameters; removing one handle, in either order, leaves the other."""
    for first_removed in (0, 1):
        models = [new_model(), new_model()]
        wrapped = [wrap("ddp", model, world) for model in models]
        pairs = []
        for model in models:
            matrices = [(name, param) for name, param in model.named_parameters() if param.dim() >= 2]
            vectors = [(name, param) for name, param in model.named_parameters() if param.dim() < 2]
            pairs.append((Lion(matrices, lr=0.01), Lion(vectors, lr=0.02)))
        releases = [release_gradients(wrapped[1], optimizer) for optimizer in pairs[1]]
        for released in ({0, 1}, {1 - first_removed}, set()):
            for net, optimizers in zip(wrapped, pairs, strict=True):
                net(tokens(12, seed=len(released)).chunk(2)[world.rank]).backward()
                for i, optimizer in enumerate(optimizers):
                    freed = net is wrapped[1] and i in released
                    assert all((p.grad is None) == freed for g in optimizer.param_groups for p in g["params"])
                    optimizer.step()
                    optimizer.zero_grad()
            releases[first_removed if len(released) == 2 else 1 - first_removed].remove()
        assert_same(models[1], models[0], 0)


@case(2)
def a_second_pass_is_refused_where_gradients_are_released(world: World) -> None:
    for kind in ("fsdp", "ddp"):
        model = new_model()
        wrapped = wrap(kind, model, world)
        release = release_gradients(wrapped, Lion(model.named_parameters(), betas=(0.9, 0.9)))
        advice = {"fsdp": "accumulate by set_requires_gradient_sync", "ddp": r"inside `with model.no_sync"}[kind]
        refused(ValueError, advice, release.accumulate().__enter__)
        batch = tokens(12).chunk(2)[world.rank]
        wrapped(batch).backward()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        loss = wrapped(batch)
        refused(RuntimeError, "a second backward pass reached a parameter", loss.backward)
        for name, value in model.state_dict().items():
            assert torch.equal(*(t.to_local() if isinstance(t, DTensor) else t for t in (value, before[name]))), name


@case(2)
def what_cannot_be_released_is_refused_by_name(world: World) -> None:
    inner = new_model()
    release_gradients(inner, Lion(inner.parameters()))
    outer = DistributedDataParallel(inner)
    refused(RuntimeError, "runs inside a DistributedDataParallel", lambda: outer(tokens(2)))
    assert_same(inner, new_model(), 0)
    for name in ("find_unused_parameters", "static_graph"):
        parallel = DistributedDataParallel(new_model(), **{name: True})
        refused(ValueError, f"without {name}", lambda p=parallel: release_gradients(p, Lion(p.parameters())))
    parallel = DistributedDataParallel(new_model())
    parallel.register_comm_hook(None, lambda state, bucket: torch.futures.Future())
    refused(
        ValueError, "without a communication hook", lambda: release_gradients(parallel, Lion(parallel.parameters()))
    )
    part = nn.Sequential(DistributedDataParallel(nn.Linear(4, 4)), nn.Linear(4, 4))
    refused(ValueError, "wraps a part of the model", lambda: release_gradients(part, Lion(part.parameters())))
    flat = FullyShardedDataParallel(new_model(tie=False), device_id=torch.device("cpu"))
    refused(ValueError, "FSDP1 has flattened", lambda: release_gradients(flat, Lion(flat.parameters())))
    sums = nn.Module()
    sums.weight = nn.Parameter(DTensor.from_local(torch.ones(4, 6), mesh(2), [Partial()], run_check=False))
    optimizer = SinkGD([{"params": [("weight", sums.weight)], "algorithm": "sinkgd"}])
    refused(ValueError, "weight (4, 6) holds partial sums", lambda: release_gradients(sums, optimizer))
