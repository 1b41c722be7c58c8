"""Checks of saving and loading sharded optimizers, by hand and through Accelerate."""

import copy
import functools
import shutil
from typing import Any

import torch
from distributed_cases import (
    OPTIMIZERS,
    Model,
    assert_same,
    build,
    goes_on_elsewhere,
    mesh,
    new_model,
    shard,
    steps,
    train,
    whole,
)
from distributed_world import World, add_case, case
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import Shard, distribute_tensor

from leanstep.optimizers import MFAC, SinkGD, param_groups


@case(2)
def processes_without_a_matrix_of_a_stack_count_its_steps(world: World) -> None:
    """Blocks with stochastic rounding: a checkpoint has one count, perhaps that of such a process."""
    params = []
    for matrices in (1, 2):
        stack = distribute_tensor(torch.randn(matrices, 8, 6, dtype=torch.bfloat16), mesh(world.size), [Shard(0)])
        params.append(nn.Parameter(stack))
    for chosen in (params[:1], params):
        for settings in ({}, {"momentum": 0.9, "momentum_dtype": torch.int8}):
            groups = [{"params": chosen, "algorithm": "sinkgd", "blocks": 4}]
            optimizer = SinkGD(groups, lr=0.1, rounding="stochastic", **settings)
            for _ in range(3):
                for param in chosen:
                    param.grad = torch.ones_like(param)
                optimizer.step()
            assert [float(optimizer.state[param]["step"]) for param in chosen] == [3.0] * len(chosen)


def frozen_vectors(model: Model) -> Model:
    """Only matrices are trained: SinkGD then holds no state at all."""
    for param in model.parameters():
        param.requires_grad_(param.dim() > 1)
    return model


_MFAC: dict[str, dict[str, Any]] = {"mfac": {}, "s-mfac": {"compression": "topk", "momentum": 0.9}}


def make(name: str, world: World) -> tuple[Model, Any]:
    if name in _MFAC:
        model = shard(new_model(), world.size)
        return model, MFAC(param_groups(model), lr=0.01, window=4, damping=0.1, **_MFAC[name])
    if name != "stateless":
        model = shard(new_model(OPTIMIZERS[name][3]), world.size)
        return model, build(name, model)
    model = shard(frozen_vectors(new_model()), world.size)
    matrices = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return model, SinkGD([{"params": matrices, "algorithm": "sinkgd"}], lr=0.05)


def checkpoint_moves(name: str, world: World) -> None:
    """Saved on two processes after two steps; loaded in a world of any size, the next two steps are the same."""
    tolerance = 1e-6 if name == "stateless" else OPTIMIZERS[name][4]
    goes_on_elsewhere(world.folder / f"checkpoint-{name}", lambda: make(name, world), 2, 4, tolerance, world)


# a codec or a rounding stores the same for all optimizers; "momentum" and "balanced" have one kind of state
for _name in (
    "stateless", "sinkgd", "lion", "lion_stochastic", "lion_master", "lion_kahan", "lion_int8", "lion_split",
    "lion_fp8", "adamw_int8", "lanton_int8", "sinkgd_momentum", "sinkgd_muon", "lanton", "lanton_muon",
):  # fmt: skip
    _worlds = (1, 2, 3) if _name in ("sinkgd", "lion_int8", "lanton") else (2, 3)
    add_case(f"checkpoint_moves_{_name}", _worlds, functools.partial(checkpoint_moves, _name))


@case(2)
def full_state_dicts_leave_and_return(world: World) -> None:
    """One whole state dict on process 0, loaded again by broadcasting it; also before the first step."""
    # torch wants a state tensor here: not for an optimizer without any
    for name in ("lion", "lion_int8", "sinkgd_muon", "lanton", *_MFAC):
        for done in (0, 2) if name == "lion" else (2,):
            model, optimizer = make(name, world)
            steps(model, optimizer, range(done))
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            # process 0's own scalars are in it as they are, and would count on
            saved_model, saved = copy.deepcopy(get_state_dict(model, optimizer, options=options))
            steps(model, optimizer, range(done, done + 2))
            other, again = make(name, world)
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(other, saved_model, options=options)
            set_optimizer_state_dict(other, again, saved, options=options)
            steps(other, again, range(done, done + 2))
            for (n, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
                assert (whole(a.detach()) - whole(b.detach())).abs().max() <= 1e-6, (name, done, n)


# ---- Accelerate


def accelerator(kind: str) -> Any:
    """An Accelerator on CPUs. It offers FSDP2 for GPUs only: there the state that it reads is told otherwise."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    if kind == "ddp":
        made = Accelerator(cpu=True)
        assert made.distributed_type == DistributedType.MULTI_CPU
        return made
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    made = Accelerator(cpu=True, fsdp_plugin=plugin)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    made.state.fsdp_plugin = plugin
    return made


class Batches:
    """Model and optimizer under an accelerator, in the shape that ``train`` takes."""

    def __init__(self, made: Any, model: nn.Module, optimizer: Any, clip: float | None = None) -> None:
        self.made, self.model, self.optimizer, self.clip = made, model, optimizer, clip

    def steps(self, world: World, numbers: range) -> None:
        from distributed_cases import tokens

        for number in numbers:
            part = tokens(12, seed=number).chunk(world.size)[world.rank]
            self.made.backward(self.model(part))
            if self.clip is not None:
                self.made.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()


def under_accelerate(kind: str, world: World) -> None:
    """prepare(model, optimizer) steps as by hand, saves, loads into new objects, and goes on the same."""
    for name in ("lion_int8", "sinkgd_balanced", "lanton"):
        made = accelerator(kind)
        model = new_model(torch.float32)
        run = Batches(made, *made.prepare(model, build(name, model)))
        run.steps(world, range(2))
        by_hand = new_model(torch.float32)
        if kind == "ddp":
            optimizer = build(name, by_hand)
            train(nn.parallel.DistributedDataParallel(by_hand), optimizer, world, steps=2)
        else:
            assert all(hasattr(p, "placements") for p in run.model.parameters())
            by_hand = shard(by_hand, world.size)
            train(by_hand, build(name, by_hand), world, steps=2)
        assert_same(made.unwrap_model(run.model), by_hand, 1e-6, name)
        folder = world.folder / f"accelerate-{kind}-{name}"
        made.save_state(str(folder))
        run.steps(world, range(2, 4))

        made = accelerator(kind)
        model = new_model(torch.float32)
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(0.5)
        again = Batches(made, *made.prepare(model, build(name, model)))
        made.load_state(str(folder))
        again.steps(world, range(2, 4))
        for a, b in zip(again.model.parameters(), run.model.parameters(), strict=True):
            assert torch.equal(whole(a.detach()), whole(b.detach())), name
        again.clip = 0.1
        again.steps(world, range(4, 5))
        if world.rank == 0:
            shutil.rmtree(folder)


for _kind in ("ddp", "fsdp2"):
    add_case(f"accelerate_{_kind}", (2,), functools.partial(under_accelerate, _kind))
