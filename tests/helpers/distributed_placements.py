"""Checks of what sharded optimizers send, and of the other ways to spread a model."""

import math
from typing import Any

import torch
from distributed_cases import (
    OPTIMIZERS,
    Model,
    assert_same,
    build,
    count_collectives,
    mesh,
    new_model,
    refused,
    set_grad,
    set_grads,
    shard,
    whole,
)
from distributed_world import World, case
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from wrapped_tensor import WrappedTensor

from leanstep.optimizers import LANTON, MFAC, Lion, NonFiniteGradientError, SinkGD, param_groups, release_gradients

# ---- communication


def columns(params: list[nn.Parameter]) -> int:
    return sum(math.prod(p.shape[1:]) for p in params)


@case(2, 3)
def sinkgd_reduces_once_an_iteration(world: World) -> None:
    """Column sums of the whole model, in one all-reduce per iteration; the AdamW flags ride in the first."""
    for dtype in (torch.float32, torch.bfloat16):
        model = shard(new_model(dtype), world.size)
        groups = param_groups(model, overrides=[("narrow", {"lr": 0.1}), ("blocks.1.up", {"num_iters": 3})])
        optimizer = SinkGD(groups, num_iters=5)
        taken = [g for g in optimizer.param_groups if g["algorithm"] == "sinkgd"]
        cut = [columns([p for p in g["params"] if p.dim() != 3]) for g in taken]
        short = [columns([p for p in g["params"] if p.dim() != 3]) for g in taken if g["num_iters"] == 3]
        assert len([c for c in cut if c]) >= 4 and sum(short) > 0
        flags = sum(len(g["params"]) for g in optimizer.param_groups if g["algorithm"] == "adamw")
        all_columns = 4 * sum(cut)
        expected = [all_columns + 4 * flags] + [all_columns] * 2 + [all_columns - 4 * sum(short)] * 2
        for step in range(2):
            assert count_collectives(optimizer, model, step) == [("allreduce_", size) for size in expected]


@case(2)
def every_optimizer_reduces_as_documented(world: World) -> None:
    """Number of all-reduces of a first and of a later step; nothing else, and nothing as large as a matrix."""
    documented = {
        "lion": (0, 0),
        "lion_stochastic": (0, 0),
        "lion_cautious": (1, 1),
        "lion_int8": (1, 1),
        "adamw": (1, 1),
        "sinkgd": (5, 5),
        "sinkgd_momentum": (6, 6),
        "sinkgd_width": (5, 5),
        "sinkgd_balanced": (7, 7),
        "sinkgd_unit": (25, 7),
    }
    for name, counts in documented.items():
        model = shard(new_model(OPTIMIZERS[name][3]), world.size)
        optimizer = build(name, model)
        found = [count_collectives(optimizer, model, step) for step in range(2)]
        assert tuple(len(f) for f in found) == counts, f"{name}: {found}"
        assert {op for f in found for op, _ in f} <= {"allreduce_"}, f"{name}: {found}"


# ---- other ways to shard


def by_hand(size: int, *placements: Any, dtype: torch.dtype = torch.float32, on: Any = None) -> Model:
    """A model whose parameters of two and more dimensions are distributed with these placements, the rest copied."""
    model = new_model(dtype)
    on = on or mesh(size)
    for name, param in list(model.named_parameters()):
        chosen = placements if param.dim() > 1 else [Replicate()] * len(placements)
        owner, _, leaf = name.rpartition(".")
        new = nn.Parameter(distribute_tensor(param.detach(), on, chosen, src_data_rank=None))
        setattr(model.get_submodule(owner), leaf, new)
    model.lm_head.weight = model.embed.weight
    return model


@case(2, 3)
def columns_may_be_sharded(world: World) -> None:
    """Shard(1), uneven and empty: matrices by columns, stacks by rows, convolutions by input channels."""
    for name in (
        "lion_int8", "lion_split", "adamw_int8", "sinkgd_int8", "lanton_int8",
        "sinkgd", "sinkgd_momentum", "sinkgd_post", "sinkgd_balanced", "sinkgd_width", "lion", "lion_cautious", "adamw",
    ):  # fmt: skip
        *_, dtype, tolerance = OPTIMIZERS[name]
        plain, sharded = new_model(dtype), by_hand(world.size, Shard(1), dtype=dtype)
        optimizers = [build(name, plain), build(name, sharded)]
        for step in range(3):
            for model, optimizer in zip((plain, sharded), optimizers, strict=True):
                set_grads(model, step)
                optimizer.step()
            assert_same(sharded, plain, tolerance, f"{name} after step {step + 1}")
    optimizer = build("sinkgd", sharded)
    found = count_collectives(optimizer, sharded)
    # the rows' largest entries, then row sums; the stack's column sums set out one earlier
    assert len(found) == 2 + optimizer.defaults["num_iters"], found


@case(2)
def columns_of_stacks_may_be_sharded(world: World) -> None:
    plain = nn.Parameter(torch.randn(3, 4, 5))
    sharded = nn.Parameter(distribute_tensor(plain.detach(), mesh(world.size), [Shard(2)]))
    for step in range(2):
        for param in (plain, sharded):
            torch.manual_seed(step)
            set_grad(param, torch.randn(3, 4, 5))
            SinkGD([{"params": [param], "algorithm": "sinkgd"}], lr=0.1, scale=1.0).step()
    assert (whole(sharded.detach()) - plain).abs().max() < 1e-6


@case(4)
def two_mesh_dimensions(world: World) -> None:
    """Replicated and sharded (HSDP) follows the unsharded run; sharded twice does so, too."""
    grid = init_device_mesh("cpu", (2, 2))
    for name, placements in (
        ("lion_cautious", (Replicate(), Shard(0))), ("sinkgd", (Replicate(), Shard(0))),
        ("lion_stochastic", (Replicate(), Shard(0))), ("sinkgd_balanced", (Replicate(), Shard(0))),
        ("lion", (Shard(0), Shard(1))), ("lion_cautious", (Shard(0), Shard(1))), ("lion_kahan", (Shard(0), Shard(0))),
        ("adamw", (Shard(0), Shard(1))), ("lion_int8", (Replicate(), Shard(0))),
        ("lion_stochastic", (Shard(0), Shard(1))), ("lion_int8", (Shard(0), Shard(0))),
        ("lion_int8", (Shard(0), Shard(1))), ("adamw_int8", (Shard(1), Shard(0))),
    ):  # fmt: skip
        *_, dtype, tolerance = OPTIMIZERS[name]
        plain, sharded = new_model(dtype), by_hand(4, *placements, dtype=dtype, on=grid)
        optimizers = [build(name, plain), build(name, sharded)]
        for step in range(2):
            for model, optimizer in zip((plain, sharded), optimizers, strict=True):
                set_grads(model, step)
                optimizer.step()
            assert_same(sharded, plain, tolerance, f"{name} {placements}")


@case(2)
def what_cannot_be_normalised_is_refused(world: World) -> None:
    param = nn.Parameter(DTensor.from_local(torch.ones(4, 6), mesh(2), [Partial()], run_check=False))
    param.grad = torch.ones_like(param)
    groups = [{"params": [("w", param)], "algorithm": "sinkgd"}]
    refused(ValueError, "w (4, 6) holds partial sums", SinkGD(groups).step)
    assert torch.equal(param.to_local(), torch.ones(4, 6))
    sharded = by_hand(2, Shard(1))
    set_grads(sharded, 0)
    optimizer = build("sinkgd_unit", sharded)
    said = "spectral='unit' takes matrices with unsharded columns, got blocks.0.up.weight (10, 6) with"
    refused(ValueError, said, optimizer.step)
    assert_same(sharded, new_model(), 0)
    refused(ValueError, said, lambda: release_gradients(sharded, optimizer))


# ---- gradients that are placed otherwise than their parameters


# as tensor parallelism leaves them: (parameter, gradient)
OTHERWISE = (
    (Shard(0), Replicate()), (Replicate(), Partial()), (Shard(0), Partial()), (Replicate(), Shard(0)),
    (Shard(1), Shard(0)),
)  # fmt: skip
RULES: tuple[tuple[Any, dict[str, Any]], ...] = (
    (Lion, {"lr": 1e-2, "weight_decay": 0.1}),
    (Lion, {"lr": 1e-2, "cautious": True}),
    (SinkGD, {"lr": 0.1, "scale": 1.0}),
    (SinkGD, {"lr": 0.1, "scale": 1.0, "momentum": 0.9}),
    (SinkGD, {"lr": 1e-2, "algorithm": "adamw"}),
    (LANTON, {"lr": 1e-2}),
    (LANTON, {"lr": 1e-2, "noise": "halves"}),
    (MFAC, {"lr": 1e-2, "window": 3, "damping": 0.1}),
)


def placed(grad: torch.Tensor, param: nn.Parameter, placement: Any, world: World) -> DTensor:
    """The gradient with a placement of its own; as a partial sum, processes hold unlike parts of it."""
    if placement.is_partial():
        part = grad * (world.rank + 1) / (world.size * (world.size + 1) / 2)
        return DTensor.from_local(part, param.device_mesh, [placement], run_check=False)
    return distribute_tensor(grad, param.device_mesh, [placement])


@case(2, 3)
def gradients_may_be_placed_otherwise(world: World) -> None:
    """Every rule follows the whole run, and leaves ``p.grad`` as it is."""
    shapes = ((7, 6), (5, 4), (6,))
    for of_param, of_grad in OTHERWISE:
        for cls, settings in RULES:
            note = f"{cls.__name__} {settings}: {of_param}, gradient {of_grad}"
            torch.manual_seed(0)
            plain = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
            sharded = []
            for p in plain:
                kept = of_param if p.dim() > 1 or of_param != Shard(1) else Replicate()
                sharded.append(nn.Parameter(distribute_tensor(p.detach(), mesh(world.size), [kept])))
            optimizers = [cls(params, **settings) for params in (plain, sharded)]
            for step in range(4):
                chance = torch.Generator().manual_seed(step)
                for factor in (0.5, 1.0) if settings.get("noise") == "halves" else (1.0,):
                    for p, q in zip(plain, sharded, strict=True):
                        p.grad = torch.randn(p.shape, generator=chance, dtype=torch.float64) * factor
                        q.grad = placed(p.grad, q, of_grad, world)
                    if factor < 1:
                        optimizers[0].mark_half(averaged=True)
                        optimizers[1].mark_half(averaged=True)
                before = [q.grad for q in sharded]
                for optimizer in optimizers:
                    optimizer.step()
                assert all(
                    q.grad is grad and grad.placements == (of_grad,) for q, grad in zip(sharded, before, strict=True)
                )
            for p, q in zip(plain, sharded, strict=True):
                error = (whole(q.detach()) - p).abs().max().item()
                assert error < 1e-8, f"{note}: differs by {error:.3g}"


@case(2)
def all_processes_raise_on_a_part_of_a_gradient(world: World) -> None:
    """A partial sum that is not finite on one process is not finite on all."""
    param = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh(2), [Replicate()]))
    part = torch.full((4, 3), math.nan if world.rank else 1.0)
    param.grad = DTensor.from_local(part, mesh(2), [Partial()], run_check=False)
    optimizer = Lion([param], nonfinite="raise")
    refused(NonFiniteGradientError, "non-finite gradient", optimizer.step)


@case(2)
def tensor_parallel_training_equals_one_process(world: World) -> None:
    """A row-wise embedding, a norm on parts of the sequence, column-wise and row-wise layers, by torch's own plan."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    def new() -> nn.Sequential:
        torch.manual_seed(1)
        layers = nn.Sequential(nn.Embedding(14, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 14))
        return layers.to(torch.float64)

    plan = {
        "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "1": SequenceParallel(),
        "2": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "4": RowwiseParallel(),
    }
    for cls, settings in RULES:
        if settings.get("noise") == "halves":
            continue
        plain, parallel = new(), new()
        parallelize_module(parallel, mesh(2), plan)
        parallelize_module(parallel[2], mesh(2), ColwiseParallel())
        optimizers = [cls(m.parameters(), **settings) for m in (plain, parallel)]
        otherwise = set()
        for step in range(3):
            for model, optimizer in zip((plain, parallel), optimizers, strict=True):
                optimizer.zero_grad()
                words = torch.randint(0, 14, (3, 4), generator=torch.Generator().manual_seed(step))
                nn.functional.cross_entropy(model(words).flatten(0, 1), words.roll(1, 1).flatten()).backward()
                otherwise |= {
                    n for n, p in model.named_parameters()
                    if isinstance(p, DTensor) and p.grad.placements != p.placements
                }  # fmt: skip
                optimizer.step()
        assert len(otherwise) >= 2, otherwise
        assert_same(parallel, plain, 1e-7, f"{cls.__name__} {settings}")


@case(2)
def parts_may_be_of_a_class_without_memory(world: World) -> None:
    """FSDP2 over quantized weights: the part that a process holds is of a class of its own."""
    for cls, settings in RULES:
        if settings.get("noise") == "halves":
            continue
        torch.manual_seed(0)
        plain = [nn.Parameter(distribute_tensor(torch.randn(shape), mesh(2), [Shard(0)])) for shape in ((7, 6), (6,))]
        wrapped = []
        for p in plain:
            part = WrappedTensor(p.detach().to_local().clone())
            whole_of_parts = DTensor.from_local(
                part, mesh(2), [Shard(0)], run_check=False, shape=p.shape, stride=p.stride()
            )
            wrapped.append(nn.Parameter(whole_of_parts))
        optimizers = [cls(params, **settings) for params in (plain, wrapped)]
        for step in range(3):
            chance = torch.Generator().manual_seed(step)
            for p, w in zip(plain, wrapped, strict=True):
                set_grad(p, torch.randn(p.shape, generator=chance))
                w.grad = p.grad
            for optimizer in optimizers:
                optimizer.step()
        for p, w in zip(plain, wrapped, strict=True):
            part = w.detach().to_local()
            assert isinstance(part, WrappedTensor), type(part)
            assert torch.equal(part.inner, p.detach().to_local()), f"{cls.__name__} {settings}"
            for value in optimizers[1].state[w].values():
                assert not isinstance(value, DTensor) or type(value.to_local()) is torch.Tensor


# ---- larger matrices


@case(2)
def large_matrices(world: World) -> None:
    """Shards large enough for whole vectors and blocks, in rows that do not divide, agree with whole matrices."""
    for name, shape in (
        ("lion", (301, 192)),
        ("lion_stochastic", (301, 192)),
        ("lion_int8", (301, 392)),
        ("sinkgd", (301, 192)),
    ):
        cls, settings, _, dtype, tolerance = OPTIMIZERS[name]
        whole_param = nn.Parameter(torch.randn(shape).to(dtype))
        part = nn.Parameter(distribute_tensor(whole_param.detach(), mesh(world.size), [Shard(0)]))
        optimizers = [cls([p], **settings) for p in (whole_param, part)]
        for step in range(2):
            grad = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            for param, optimizer in zip((whole_param, part), optimizers, strict=True):
                set_grad(param, grad)
                optimizer.step()
        difference = (whole(part.detach()).double() - whole_param.detach().double()).abs().max().item()
        assert difference <= tolerance * 4, (name, difference)


@case(2)
def matrices_stored_transposed(world: World) -> None:
    """GPT-2's Conv1D weights (in, out): sharded along dimension 0 they are cut by columns of the (out, in) matrix.

    Stacks of experts (e, in, out) are cut between matrices, or by columns.
    """
    places = (((7, 5), 0), ((3, 7, 5), 0), ((3, 7, 5), 1), ((3, 7, 5), 2))
    follow_whole_matrices(world, {"transposed": True}, places)


@case(2)
def one_dimensional_convolutions(world: World) -> None:
    """(out, in, width) is one matrix (out, in * width): sharded along dimension 0 cut by rows, else by columns."""
    follow_whole_matrices(world, {"flatten": True}, (((7, 5, 3), 0), ((7, 5, 3), 1), ((7, 5, 3), 2)))


@case(2)
def blocks_of_matrices(world: World) -> None:
    """Blocks that a process has in part, or not at all; stacks of them, and matrices stored (in, out)."""
    follow_whole_matrices(world, {"blocks": (2, 7, 3)}, (((12, 5), 0), ((12, 5), 1)))
    follow_whole_matrices(world, {"blocks": 4}, (((3, 8, 5), 0), ((1, 8, 5), 0), ((3, 8, 5), 1), ((3, 8, 5), 2)))
    follow_whole_matrices(world, {"blocks": 4, "transposed": True}, (((5, 12), 0), ((5, 12), 1), ((3, 5, 8), 2)))


@case(4)
def blocks_on_two_mesh_dimensions(world: World) -> None:
    """Rows over one mesh dimension and columns over the other; rows over both."""
    grid = init_device_mesh("cpu", (2, 2))
    for placements in ([Shard(0), Shard(1)], [Shard(0), Shard(0)]):
        plain = nn.Parameter(torch.randn(13, 6))
        sharded = nn.Parameter(distribute_tensor(plain.detach(), grid, placements))
        groups = [[{"params": [p], "algorithm": "balanced", "blocks": (2, 7, 4)}] for p in (plain, sharded)]
        optimizers = [SinkGD(group, lr=0.1, scale=1.0, momentum=0.9) for group in groups]
        for step in range(2):
            grad = torch.randn(13, 6, generator=torch.Generator().manual_seed(step))
            grad[::4] *= 1e-5  # rows that "balanced" sets to 0
            for param, optimizer in zip((plain, sharded), optimizers, strict=True):
                set_grad(param, grad)
                optimizer.step()
        assert (whole(sharded.detach()) - plain).abs().max() < 1e-6, placements


def follow_whole_matrices(world: World, options: dict[str, Any], places: tuple[Any, ...]) -> None:
    variants = ({}, {"momentum": 0.9}, {"momentum": 0.9, "momentum_order": "post"})
    for shape, dim in places:
        for settings in variants:
            plain = nn.Parameter(torch.randn(shape))
            sharded = nn.Parameter(distribute_tensor(plain.detach(), mesh(world.size), [Shard(dim)]))
            optimizers = [SinkGD([p], lr=0.1, scale=1.0, **options, **settings) for p in (plain, sharded)]
            for step in range(3):
                grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
                for param, optimizer in zip((plain, sharded), optimizers, strict=True):
                    set_grad(param, grad)
                    optimizer.step()
            assert (whole(sharded.detach()) - plain).abs().max() < 1e-6, (shape, dim, settings)
