"""Checks of M-FAC with its window spread over processes by FSDP2."""

import copy
import functools
import math
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from distributed_cases import (
    assert_same,
    count_collectives,
    goes_on_elsewhere,
    new_model,
    refused,
    set_grad,
    set_grads,
    shard,
    steps,
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
    "bf16": ({"storage": "bf16"}, torch.float32, 1e-3),
    "topk": ({"compression": "topk", "density": 0.3, "storage": "fp32"}, torch.float64, 1e-6),
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
            if key.startswith("window") and world.size > 1:
                assert isinstance(part[i][key], DTensor)
    assert optimizers[0].diagnostics().keys() == optimizers[1].diagnostics().keys()


for _name in VARIANTS:
    _worlds = (1, 2, 3) if _name in ("model", "blocks", "topk") else (3,)
    add_case(f"mfac_{_name}_follows_unsharded", _worlds, functools.partial(follows_unsharded, _name))


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


@case(2, 4)
def mfac_skips_together(world: World) -> None:
    """An entry that is not finite, in one shard: no process takes the row, and all go on alike."""
    for name in ("model", "layer", "topk"):
        dtype, tolerance = VARIANTS[name][1:]
        models = plain, sharded = new_model(dtype), shard(new_model(dtype), world.size)
        optimizers = [build(name, plain), build(name, sharded)]
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
        assert [o.nonfinite_count() for o in optimizers] == [1, 1]


@case(2, 3)
def mfac_training_equals_one_process(world: World) -> None:
    """Real gradients: fully sharded, and replicated."""
    for name in ("model", "layer"):
        plain = new_model(torch.float64)
        train(plain, build(name, plain), None)
        sharded = shard(new_model(torch.float64), world.size)
        train(sharded, build(name, sharded), world)
        assert_same(sharded, plain, 1e-8, name)
        replica = new_model(torch.float64)
        parallel = nn.parallel.DistributedDataParallel(replica)
        train(parallel, build(name, replica), world)
        assert_same(replica, plain, 1e-8, name)


@case(2)
def mfac_refuses_what_cannot_be_spread(world: World) -> None:
    from distributed_placements import by_hand
    from torch.distributed.tensor import Shard

    model = by_hand(2, Shard(1))
    said = "takes parameters with unsharded rows, got embed.weight (13, 6) with placements (Shard"
    refused(ValueError, said, lambda: step_once(model, compression="topk", density=0.3))
    refused(ValueError, "ranges of elements, got embed.weight", lambda: step_once(model, scope=5))
    plain, columns = new_model(torch.float64), by_hand(2, Shard(1), dtype=torch.float64)
    for one in (plain, columns):  # whole rows may be cut anywhere
        steps(one, build("model", one), range(3))
    assert_same(columns, plain, 1e-11)


@case(1, 2, 3)
def mfac_shards_masks_with_their_parameters(world: World) -> None:
    """Masks made of sharded parameters, or before the parameters are sharded."""
    for first in (False, True):
        plain, model = (with_zeros(new_model(torch.float64)) for _ in range(2))
        settings = {"window": 3, "damping": 0.1, "lr": 0.02, "sparse": True}
        alone = MFAC(list(plain.parameters()), **settings)
        if first:
            optimizer = MFAC(list(model.parameters()), **settings)
            shard(model, world.size)
            optimizer.param_groups[0]["params"] = list(model.parameters())
        else:
            shard(model, world.size)
            optimizer = MFAC(list(model.parameters()), **settings)
        optimizer.load_state_dict(optimizer.state_dict())
        for step in range(3):
            steps(plain, alone, range(step, step + 1))
            steps(model, optimizer, range(step, step + 1))
            assert_same(model, plain, 1e-11, f"{first}")
        states = [optimizer.state[p] for p in model.parameters()]
        assert all(state["mask"] is m for state, m in zip(states, optimizer.param_groups[0]["masks"], strict=True))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(plain, alone, range(3, 4))
        steps(model, optimizer, range(3, 4))
        assert_same(model, plain, 1e-11, f"{first}")


def step_once(model: nn.Module, **settings: Any) -> None:
    optimizer = MFAC(model.named_parameters(), window=3, **settings)
    set_grads(model, 0)
    optimizer.step()


def checkpoint_moves(name: str, world: World) -> None:
    """Saved on two processes in the middle of the ring; loaded in a world of any size, it goes on the same."""
    dtype, tolerance = VARIANTS[name][1:]

    def make() -> tuple[nn.Module, MFAC]:
        model = shard(with_zeros(new_model(dtype)), world.size)
        return model, build(name, model)

    goes_on_elsewhere(world.folder / f"mfac-{name}", make, 4, 7, tolerance, world)


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


for _name in ("model", "topk", "bf16", "sparse"):
    add_case(
        f"checkpoint_moves_mfac_{_name}",
        (1, 2, 3) if _name == "model" else (2, 3),
        functools.partial(checkpoint_moves, _name),
    )
