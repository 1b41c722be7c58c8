"""Checks of M-FAC with its window spread over processes, by FSDP2 and by replicas that share it."""

import copy
import functools
import math
import pickle
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import (
    assert_same,
    count_collectives,
    new_model,
    refused,
    set_grad,
    set_grads,
    shard,
    train,
    whole,
)
from distributed_world import World, add_case, case
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from leanstep.optimizers import MFAC

# name -> (settings, dtype, largest difference)
VARIANTS: dict[str, tuple[dict[str, Any], torch.dtype, float]] = {
    "model": ({}, torch.float64, 1e-11),
    "model_fp32": ({"weight_decay": 0.1, "momentum": 0.9}, torch.float32, 1e-5),
    "layer": ({"scope": "layer", "scaling": "count"}, torch.float64, 1e-11),
    "blocks": ({"scope": 7}, torch.float64, 1e-11),
    "wide": ({"scope": 7, "storage": "fp64"}, torch.float32, 1e-5),
    "fp16": ({"storage": "fp16"}, torch.float32, 1e-4),
    "topk": ({"compression": "topk", "density": 0.3, "storage": "fp32"}, torch.float64, 1e-6),
    "trust_region": ({"max_update_norm": 0.7}, torch.float64, 1e-11),
    "sparse": ({"sparse": True, "decay": "coupled", "weight_decay": 0.1}, torch.float64, 1e-11),
    "stochastic": ({"rounding": "stochastic", "storage": "bf16"}, torch.bfloat16, 2**-6),
}  # fmt: skip


def build(name: str, model: nn.Module, **more: Any) -> MFAC:
    settings = {"lr": 0.02, "window": 3, "damping": 0.1, **VARIANTS[name][0], **more}
    return MFAC(model.named_parameters(), **settings)


def with_zeros(model: nn.Module) -> nn.Module:
    """Some weights exactly zero: they belong to no window of the sparse variant."""
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 2:
                param[:, ::3] = 0.0
    return model


def steps(model: nn.Module, optimizer: Any, numbers: range) -> None:
    for number in numbers:
        set_grads(model, number)
        optimizer.step()


def follows_unsharded(name: str, world: World) -> None:
    """The window turns over; parameters, windows and Gram matrices are those of one process."""
    dtype, tolerance = VARIANTS[name][1:]
    plain, sharded = with_zeros(new_model(dtype)), shard(with_zeros(new_model(dtype)), world.size)
    optimizers = [build(name, plain), build(name, sharded)]
    for step in range(5):
        for model, optimizer in zip((plain, sharded), optimizers, strict=True):
            steps(model, optimizer, range(step, step + 1))
        assert_same(sharded, plain, tolerance, f"after step {step + 1}")
    full, part = (o.state_dict()["state"] for o in optimizers)
    assert {i: sorted(s) for i, s in full.items()} == {i: sorted(s) for i, s in part.items()}
    for i, state in full.items():
        for key, value in state.items():
            found = whole(part[i][key])
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4 if dtype == torch.bfloat16 else 1e-6, msg=key)
            if key.startswith("window") and key != "window_scale" and world.size > 1:
                assert isinstance(part[i][key], DTensor)
    assert optimizers[0].diagnostics().keys() == optimizers[1].diagnostics().keys()


for _name in VARIANTS:
    _worlds = (1, 2, 3, 4) if _name in ("model", "blocks", "topk") else (2, 3)
    add_case(f"mfac_{_name}_follows_unsharded", _worlds, functools.partial(follows_unsharded, _name))


def replicas_follow_one_process(name: str, world: World) -> None:
    """Replicated parameters: each process keeps all columns, or a part of them; the steps are the same."""
    dtype, tolerance = VARIANTS[name][1:]
    plain, model = with_zeros(new_model(dtype)), with_zeros(new_model(dtype))
    alone, spread = build(name, plain), build(name, model, shard_window=True)
    for step in range(5):
        steps(plain, alone, range(step, step + 1))
        steps(model, spread, range(step, step + 1))
        assert_same(model, plain, tolerance, f"after step {step + 1}")
    held = torch.tensor(float(sum(p.numel() for p in local_windows(spread))))
    dist.all_reduce(held)
    assert held == sum(p.numel() for p in local_windows(alone))
    if world.size > 1:
        assert max(p.numel() for p in local_windows(spread)) < max(p.numel() for p in local_windows(alone))


def local_windows(optimizer: MFAC) -> list[torch.Tensor]:
    keys = ("window", "window_values")
    found = [state[key] for state in optimizer.state.values() for key in keys if key in state]
    return [t.to_local() if isinstance(t, DTensor) else t for t in found]


for _name in ("model", "model_fp32", "layer", "blocks", "wide", "fp16", "topk", "trust_region", "sparse"):
    # of three processes some have no row of a parameter
    _worlds = (1, 2, 3, 4) if _name == "model" else (2, 3) if _name in ("topk", "wide") else (2,)
    add_case(f"mfac_{_name}_replicas_follow", _worlds, functools.partial(replicas_follow_one_process, _name))


@case(2, 3)
def mfac_sends_a_vector_as_long_as_the_window(world: World) -> None:
    """One all-reduce for all scopes: n + 1 numbers of each and a flag per tensor, in fp64."""
    for name, scopes in (("model", 1), ("topk", 1), ("layer", None)):
        model = shard(new_model(torch.float64), world.size)
        optimizer = build(name, model)
        tensors = len(list(model.parameters()))
        for step in range(4):
            found = count_collectives(optimizer, model, step)
            count = scopes or sum("gram" in s for s in optimizer.state.values())
            live = min(step, 3)
            assert found == [("allreduce_", 8 * (count * (live + 1) + tensors))], (name, step, found)
    model = new_model(torch.float64)
    assert count_collectives(build("model", model), model) == []
    optimizer = build("model", model, shard_window=True)
    names = [name for name, _ in count_collectives(optimizer, model)]
    assert names[0] == "allreduce_" and len(names) == 2 and "allgather" in names[1], names


@case(2, 4)
def mfac_skips_together(world: World) -> None:
    """An entry that is not finite, in one shard: no process takes the row, and all go on alike."""
    for name in ("model", "layer", "topk"):
        dtype, tolerance = VARIANTS[name][1:]
        plain, sharded, replica = new_model(dtype), shard(new_model(dtype), world.size), new_model(dtype)
        models = (plain, sharded, replica)
        optimizers = [build(name, plain), build(name, sharded), build(name, replica, shard_window=True)]
        for step in range(4):
            for model, optimizer in zip(models, optimizers, strict=True):
                set_grads(model, step)
                if step == 1:
                    param = model.get_parameter("blocks.0.up.weight")
                    grad = whole(param.grad).clone()
                    grad[1, 1] = math.nan
                    set_grad(param, grad)
                optimizer.step()
            assert_same(sharded, plain, tolerance, f"{name} after step {step + 1}")
            assert_same(replica, plain, tolerance, f"{name} spread, after step {step + 1}")
        assert [o.nonfinite_count() for o in optimizers] == [1, 1, 1]


@case(2, 3)
def mfac_training_equals_one_process(world: World) -> None:
    """Real gradients: fully sharded, replicated, and replicated with the window spread."""
    for name in ("model", "layer", "trust_region"):
        plain = new_model(torch.float64)
        train(plain, build(name, plain), None)
        sharded = shard(new_model(torch.float64), world.size)
        train(sharded, build(name, sharded), world)
        assert_same(sharded, plain, 1e-8, name)
        for spread in (False, True):
            replica = new_model(torch.float64)
            parallel = nn.parallel.DistributedDataParallel(replica)
            train(parallel, build(name, replica, shard_window=spread), world)
            assert_same(replica, plain, 1e-8, f"{name} {spread}")


@case(4)
def mfac_spreads_over_the_processes_of_a_group(world: World) -> None:
    """Two models, each on two processes: the steps are those of replicas that keep whole windows."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group, other = groups[world.rank // 2], groups[1 - world.rank // 2]
    plain, model = new_model(torch.float64), new_model(torch.float64)
    alone, spread = build("model", plain), build("model", model, shard_window=group)
    for step in range(4):
        for one, optimizer in ((plain, alone), (model, spread)):
            set_grads(one, step + 10 * (world.rank // 2))
            optimizer.step()
    assert_same(model, plain, 1e-11)
    held = torch.tensor(float(sum(p.numel() for p in local_windows(spread))))
    dist.all_reduce(held, group=group)
    assert held == sum(p.numel() for p in local_windows(alone))
    state = copy.deepcopy(spread.state_dict())
    assert state["param_groups"][0]["shard_window"] is True
    spread.load_state_dict(state)
    set_grads(model, 7)
    set_grads(plain, 7)
    spread.step()
    alone.step()
    assert_same(model, plain, 1e-11)
    refused(TypeError, "a process group with this process", lambda: build("model", model, shard_window=other))


@case(2)
def mfac_copies_have_the_process_group(world: World) -> None:
    """Copies made before and after a step spread their windows over the same processes; pickle says why it cannot."""
    group = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
    model = new_model(torch.float64)
    optimizer = build("model", model, shard_window=group)
    pairs = [(model, optimizer), copy.deepcopy((model, optimizer))]
    steps(model, optimizer, range(world.rank + 1))
    pairs.append(copy.deepcopy((model, optimizer)))
    assert copy.copy(optimizer)._process_group is group
    for one, each in pairs:
        assert each._process_group is group
        steps(one, each, range(3, 5))
        assert sum(p.numel() for p in local_windows(each)) == 3 * sum(p.numel() for p in one.parameters())
    assert_same(pairs[2][0], model, 0.0)
    refused(TypeError, "shard_window=GROUP cannot be pickled", lambda: pickle.dumps(optimizer))
    replica = build("model", new_model(torch.float64), shard_window=True)
    assert pickle.loads(pickle.dumps(replica))._process_group is None


@case(2)
def mfac_refuses_what_cannot_be_spread(world: World) -> None:
    from distributed_placements import by_hand
    from torch.distributed.tensor import Shard

    model = shard(new_model(), world.size)
    refused(ValueError, "takes unsharded parameters, got", lambda: step_once(model, compression="lowrank", rank=1))
    model = by_hand(2, Shard(1))
    said = "takes parameters with unsharded rows, got embed.weight (13, 6) with placements (Shard"
    refused(ValueError, said, lambda: step_once(model, compression="topk", density=0.3))
    refused(ValueError, "ranges of elements, got embed.weight", lambda: step_once(model, scope=5))
    refused(ValueError, "excludes shard_window", lambda: MFAC(
        new_model().parameters(), compression="lowrank", shard_window=True
    ))  # fmt: skip
    plain, columns = new_model(torch.float64), by_hand(2, Shard(1), dtype=torch.float64)
    for one in (plain, columns):  # whole rows may be cut anywhere
        steps(one, build("model", one), range(3))
    assert_same(columns, plain, 1e-11)


@case(1, 2, 3)
def mfac_shards_masks_with_their_parameters(world: World) -> None:
    """Masks of whole tensors, given for sharded parameters or made before the parameters are sharded."""
    for given, sparse, first in ((True, False, False), (True, True, False), (False, True, True), (True, True, True)):
        plain, model = (with_zeros(new_model(torch.float64)) for _ in range(2))
        chance = torch.Generator().manual_seed(0)
        masks = [torch.rand(p.shape, generator=chance) > 0.3 for p in plain.parameters()] if given else None
        settings = {"window": 3, "damping": 0.1, "lr": 0.02, "sparse": sparse}
        alone = MFAC([{"params": list(plain.parameters()), "masks": masks}], **settings)
        if first:
            optimizer = MFAC([{"params": list(model.parameters()), "masks": masks}], **settings)
            shard(model, world.size)
            optimizer.param_groups[0]["params"] = list(model.parameters())
        else:
            shard(model, world.size)
            optimizer = MFAC([{"params": list(model.parameters()), "masks": masks}], **settings)
        optimizer.load_state_dict(optimizer.state_dict())
        for step in range(3):
            steps(plain, alone, range(step, step + 1))
            steps(model, optimizer, range(step, step + 1))
            assert_same(model, plain, 1e-11, f"{given} {sparse} {first}")
        states = [optimizer.state[p] for p in model.parameters()]
        assert all(state["mask"] is m for state, m in zip(states, optimizer.param_groups[0]["masks"], strict=True))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(plain, alone, range(3, 4))
        steps(model, optimizer, range(3, 4))
        assert_same(model, plain, 1e-11, f"{given} {sparse} {first}")


def files_of_one_process_and_of_each(name: str, world: World) -> None:
    """The file of process 0 is refused by all, whoever notices; files of every process are taken."""
    dtype = VARIANTS[name][1]
    saved, model = with_zeros(new_model(dtype)), with_zeros(new_model(dtype))
    source = build(name, saved, shard_window=True)
    steps(saved, source, range(4))
    files = [world.folder / f"shards-{name}-{world.size}-{rank}.pt" for rank in range(world.size)]
    torch.save(source.state_dict(), files[world.rank])
    dist.barrier()
    target = build(name, model, shard_window=True)
    of_one, of_each = (torch.load(files[rank], weights_only=True) for rank in (0, world.rank))
    empty = build(name, new_model(dtype), shard_window=True).state_dict()
    for state in (of_one, of_each if world.rank else empty):
        refused(ValueError, "nothing was changed", lambda state=state: target.load_state_dict(state))
        assert not target.state and target._shard_check is None
    model.load_state_dict(saved.state_dict())
    target.load_state_dict(of_each)
    for one, optimizer in ((saved, source), (model, target)):
        steps(one, optimizer, range(4, 6))
    assert_same(model, saved, 0.0)


for _name in ("model", "layer", "blocks", "fp16", "topk", "stochastic"):
    _worlds = (2, 3) if _name in ("model", "blocks") else (2,)
    add_case(f"mfac_{_name}_refuses_files_of_one_process", _worlds, functools.partial(
        files_of_one_process_and_of_each, _name
    ))  # fmt: skip


@case(2)
def mfac_compares_the_norms_of_even_shards(world: World) -> None:
    """Shards of one shape: only their norms tell that they are those of another process."""
    for name in ("model", "layer", "blocks", "fp16", "topk"):
        dtype = VARIANTS[name][1]
        model = nn.Sequential(nn.Linear(8, 6, dtype=dtype), nn.Linear(6, 4, dtype=dtype))
        optimizer = build(name, model, shard_window=True)
        steps(model, optimizer, range(4))
        file = world.folder / f"even-{name}.pt"
        if world.rank == 0:
            torch.save(optimizer.state_dict(), file)
        dist.barrier()
        before = copy.deepcopy(optimizer.state_dict())
        state = torch.load(file, weights_only=True)
        refused(ValueError, "have other norms than its Gram", functools.partial(optimizer.load_state_dict, state))
        assert torch.equal(local_windows(optimizer)[0], window_of(before["state"][0]))
        optimizer.load_state_dict(before)


def window_of(state: dict[str, Any]) -> torch.Tensor:
    return state["window" if "window" in state else "window_values"].to_local()


def step_once(model: nn.Module, **settings: Any) -> None:
    optimizer = MFAC(model.named_parameters(), window=3, **settings)
    set_grads(model, 0)
    optimizer.step()


def checkpoint_moves(name: str, spread: bool, world: World) -> None:
    """Saved on two processes in the middle of the ring; loaded in a world of any size, it goes on the same."""
    dtype, tolerance = VARIANTS[name][1:]
    folder = world.folder / f"mfac-{name}-{spread}"

    def make() -> tuple[nn.Module, MFAC]:
        model = with_zeros(new_model(dtype))
        model = model if spread else shard(model, world.size)
        return model, build(name, model, shard_window=spread)

    if world.size == 2:
        model, optimizer = make()
        steps(model, optimizer, range(4))
        parts = get_state_dict(model, optimizer)
        dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder)
        steps(model, optimizer, range(4, 7))
        result = {n: whole(p.detach()) for n, p in model.named_parameters()}
        if world.rank == 0:
            torch.save(result, folder / "after.pt")
        dist.barrier()
    model, optimizer = make()
    parts = get_state_dict(model, optimizer)
    loaded = {"model": parts[0], "optimizer": parts[1]}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    steps(model, optimizer, range(4, 7))
    expected = torch.load(folder / "after.pt", weights_only=True)
    for param_name, param in model.named_parameters():
        error = (whole(param.detach()).double() - expected[param_name].double()).abs().max().item()
        assert error <= tolerance, f"{param_name} differs by {error:.3g}"


def checkpoint_has_one_form(frozen: bool, world: World) -> None:
    """The Gram matrix is where a new optimizer has it, whichever parameter had the first gradient."""
    first = "embed.weight"

    def make() -> tuple[nn.Module, MFAC]:
        model = new_model(torch.float64)
        model.get_parameter(first).requires_grad_(not frozen)
        model = shard(model, world.size)
        return model, build("model", model)

    model, optimizer = make()
    set_grads(model, 0)
    model.get_parameter(first).grad = None
    optimizer.step()
    model.get_parameter(first).requires_grad_(True)
    steps(model, optimizer, range(1, 3))
    parts = get_state_dict(model, optimizer)
    folder = world.folder / f"mfac-form-{frozen}-{world.size}"
    dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder)
    other = shard(new_model(torch.float64), world.size)
    resumed = build("model", other)
    parts = get_state_dict(other, resumed)
    loaded = {"model": parts[0], "optimizer": parts[1]}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for one, each in ((model, optimizer), (other, resumed)):
        steps(one, each, range(3, 5))
    assert_same(other, model, 0.0)


for _frozen in (False, True):
    add_case(f"mfac_{'frozen' if _frozen else 'unused'}_checkpoint_has_one_form", (2,), functools.partial(
        checkpoint_has_one_form, _frozen
    ))  # fmt: skip


for _name, _spread in (
    ("model", False),
    ("topk", False),
    ("fp16", False),
    ("sparse", False),
    ("model", True),
    ("topk", True),
):
    add_case(
        f"checkpoint_moves_mfac_{_name}{'_spread' if _spread else ''}", (1, 2, 3),
        functools.partial(checkpoint_moves, _name, _spread),
    )  # fmt: skip
