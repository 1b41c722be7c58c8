"""Checks of N:M sparse models that run on every process of a world (see distributed_world.py)."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from distributed_world import World, case
from sparse_models import MLP, batch, make_mlp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from leanstep.sparsity import NM, Schedule, is_nm, plain_state_dict, sparsify, squash

# 16 rows do not fill three processes evenly
WORLDS = (2, 3)


@functools.cache
def mesh(size: int) -> Any:
    return init_device_mesh("cpu", (size,))


def shard(model: nn.Module, size: int, **options: Any) -> nn.Module:
    """Every layer by itself, and the rest."""
    for module in model:
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh(size), **options)
    return fully_shard(model, mesh=mesh(size), **options)


def everyone_has(tensor: torch.Tensor, size: int) -> None:
    """Every process has the same."""
    found = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(found, tensor.contiguous())
    assert all(torch.equal(other, tensor) for other in found)


def part(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's rows of the batch, as many for each."""
    inputs, targets = batch()
    rows = len(inputs) // world.size * world.size
    return inputs[:rows][world.rank :: world.size], targets[:rows][world.rank :: world.size]


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[torch.Tensor, ...], count: int) -> None:
    inputs, targets = data
    for _ in range(count):
        (net(inputs) - targets).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def alone(world: World, count: int, **options: Any) -> tuple[nn.Module, Any]:
    """The same training in one process, on all rows."""
    model = make_mlp()
    controller = sparsify(model, MLP, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    controller.attach(optimizer)
    inputs, targets = batch()
    rows = len(inputs) // world.size * world.size
    steps(model, optimizer, (inputs[:rows], targets[:rows]), count)
    return model, controller


OPTIONS: dict[str, Any] = {
    "schedule": Schedule(kind="mdgf-linear", total_steps=6, finetune=0.5), "srste_lambda": 0.02, "measure_every": 1
}  # fmt: skip


@case(*WORLDS)
def replicas_have_the_same_masks_and_send_none(world: World) -> None:
    # other weights to begin with: DDP takes those of process 0
    model = make_mlp(seed=world.rank)
    controller = sparsify(model, MLP, **OPTIONS)
    net = DistributedDataParallel(model)
    assert {name.partition(".")[0] for name, _ in model.named_buffers()} == {"0", "2", "4"}
    assert net.modules_buffers == [], "what DDP sends before a forward pass"
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    controller.attach(optimizer)
    steps(net, optimizer, part(world), 4)
    _, its_controller = alone(world, 4, **OPTIONS)
    for layer, other in zip(controller.layers, its_controller.layers, strict=True):
        everyone_has(layer.transform.mask.view(torch.uint8), world.size)
        everyone_has(layer.weight.detach(), world.size)
        torch.testing.assert_close(layer.weight, other.weight, rtol=1e-4, atol=1e-6)
        assert torch.equal(layer.transform.mask, other.transform.mask)


@case(2)
def masks_follow_weights_that_ddp_replaces_after_attach(world: World) -> None:
    # "fixed" never computes them again; "gradient" would score the second time by what attach had not
    for options in ({"method": "fixed"}, {"method": "fixed", "score": "gradient"}):
        model = make_mlp(seed=world.rank)
        controller = sparsify(model, MLP, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        controller.attach(optimizer)
        net = DistributedDataParallel(model)
        steps(net, optimizer, part(world), 2)
        _, its_controller = alone(world, 0, **options)
        for layer, other in zip(controller.layers, its_controller.layers, strict=True):
            everyone_has(layer.weight.detach(), world.size)
            assert torch.equal(layer.transform.mask, other.transform.mask)


@case(*WORLDS)
def sharded_rows_train_as_one_process_does(world: World) -> None:
    model = make_mlp()
    controller = sparsify(model, MLP, **OPTIONS)
    shard(model, world.size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    controller.attach(optimizer)
    steps(model, optimizer, part(world), 4)
    _, its_controller = alone(world, 4, **OPTIONS)
    for layer, other in zip(controller.layers, its_controller.layers, strict=True):
        torch.testing.assert_close(layer.weight.full_tensor(), other.weight, rtol=1e-4, atol=1e-6)
        everyone_has(layer.transform.mask.view(torch.uint8), world.size)
        assert torch.equal(layer.transform.mask, other.transform.mask)
        assert is_nm(layer.transform.mask.float(), layer.target)
    for row, other in zip(controller.statistics(), its_controller.statistics(), strict=True):
        for key in ("sparsity", "kept_magnitude", "flip_rate", "gradient_noise"):
            # rows may differ in the last bits of a sum over processes
            assert abs(row[key] - other[key]) < 1e-4, (row, other)


@case(2)
def masks_are_made_from_full_precision_and_not_from_what_is_gathered(world: World) -> None:
    model = make_mlp()
    with torch.no_grad():
        # equal in bf16, where the later one would be kept
        model[0].weight[0, :4] = torch.tensor([1.0000001, 1.0, 0.5, 3.0])
    controller = sparsify(model, MLP)
    shard(model, world.size, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller.attach(optimizer)
    inputs, targets = part(world)
    for _ in range(2):
        (model(inputs).float() - targets).square().mean().backward()
        optimizer.step()
    assert controller.layers[0].transform.mask[0, :4].tolist() == [True, False, False, True]


@case(*WORLDS)
def sharded_models_resume_exactly_and_export_plain_weights(world: World) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = make_mlp()
        controller = sparsify(model, MLP, score="gradient", mask_every=2)
        shard(model, world.size)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        return model, optimizer, controller.attach(optimizer)

    model, optimizer, controller = fresh()
    steps(model, optimizer, part(world), 3)
    saved = {key: value.clone() for key, value in get_model_state_dict(model).items()}
    steps(model, optimizer, part(world), 3)

    again, other, resumed = fresh()
    set_model_state_dict(again, saved)
    assert resumed.step_count == 3
    steps(again, other, part(world), 3)
    for left, right in zip(controller.layers, resumed.layers, strict=True):
        assert torch.equal(left.transform.mask, right.transform.mask)
        assert torch.equal(left.weight.to_local(), right.weight.to_local())

    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    plain = plain_state_dict(model, gathered)
    dense = make_mlp()
    dense.load_state_dict(plain)
    assert is_nm(dense[2].weight, "1:4")
    inputs, _ = batch()
    torch.testing.assert_close(dense(inputs), model(inputs))
    for call, message in (
        (lambda: squash(model), "is sharded, and FSDP would lose its weight"),
        (lambda: plain_state_dict(model), "is sharded; give the gathered state dict"),
    ):
        try:
            call()
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no error about: {message}")


@case(2)
def a_model_sharded_across_its_groups_is_refused(world: World) -> None:
    model = make_mlp()
    controller = sparsify(model, {"2": NM(1, 4)})
    shard(model, world.size, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[2].parametrizations.weight.original.to_local().clone()
    try:
        controller.attach(optimizer)
    except ValueError as error:
        assert "'2' of shape (16, 16) has its 1:4 groups along dimension 1 and is sharded as S(1)" in str(error), error
    else:
        raise AssertionError("it was attached")
    assert torch.equal(model[2].parametrizations.weight.original.to_local(), before)
    # groups along the other axis are whole
    other = make_mlp()
    attached = sparsify(other, {"2": NM(1, 4)}, axis="out")
    shard(other, world.size, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    attached.attach(optimizer)
    steps(other, optimizer, part(world), 2)
    assert is_nm(attached.layers[0].transform.mask.float().T, "1:4")


class Experts(nn.Module):
    """Three experts in one tensor, each (4, 8), of which every process has some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up_proj = nn.Parameter(torch.randn(3, 4, 8) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([nn.functional.linear(x, self.up_proj[index]) for index in range(3)]).sum(0)


@case(*WORLDS)
def sharded_experts_equal_one_process(world: World) -> None:
    def trained(sharded: bool) -> Any:
        net = nn.Sequential(Experts())
        controller = sparsify(net, "2:4", **OPTIONS)
        assert [(layer.name, layer.dim) for layer in controller.layers] == [("0.up_proj", 2)]
        if sharded:
            shard(net, world.size)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
        controller.attach(optimizer)
        inputs, targets = batch()
        rows = len(inputs) // world.size * world.size
        steps(net, optimizer, part(world) if sharded else (inputs[:rows], targets[:rows]), 6)
        return controller

    (layer,), (its_layer,) = trained(True).layers, trained(False).layers
    everyone_has(layer.transform.mask.view(torch.uint8), world.size)
    assert torch.equal(layer.transform.mask, its_layer.transform.mask)
    torch.testing.assert_close(layer.weight.full_tensor(), its_layer.weight, rtol=1e-4, atol=1e-6)
