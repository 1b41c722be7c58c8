"""Checks of sharded optimizers that run on every process of a world (see distributed_world.py)."""

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_world import World, add_case, case
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from leanstep._torch import place_like
from leanstep.optimizers import LANTON, Lion, NonFiniteGradientError, SinkGD, param_groups

WORLDS = (2, 1, 3, 4)  # 2 first: what it saves, the others load


class Block(nn.Module):
    """A norm, matrices with rows that do not divide, a matrix with two rows, three experts, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 10)
        self.narrow = nn.Linear(10, 2)
        self.back = nn.Linear(2, 6, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 7, 6) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.norm(x)))
        mixed = torch.einsum("bti,eoi->bto", x, self.experts).tanh().mean(dim=-1, keepdim=True)
        return x + self.back(self.narrow(hidden)) + mixed


class Model(nn.Module):
    """Embedding tied to the head, a convolution over (token, feature), two blocks; next-token loss."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.conv = nn.Conv2d(2, 5, 3, padding="same")
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(6, 13, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.conv(torch.stack([x, x.square()], dim=1)).mean(dim=1)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.lm_head(x).flatten(0, 1).float(), tokens.roll(1, 1).flatten())


def tokens(batch: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 11, (batch, 5), generator=torch.Generator().manual_seed(seed))


def new_model(dtype: torch.dtype = torch.float32, tie: bool = True) -> Model:
    torch.manual_seed(1)
    return Model(tie).to(dtype)


@functools.cache
def mesh(size: int) -> Any:
    return init_device_mesh("cpu", (size,))


def shard(model: Model, size: int, **options: Any) -> Model:
    """fully_shard every block and the root; the two uses of a tied weight stay one parameter of the root."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh(size), **options)
    fully_shard(model, mesh=mesh(size), **options)
    return model


def whole(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor.full_tensor()
    # gloo does not move fp8
    codes = DTensor.from_local(
        tensor.to_local().view(torch.uint8), tensor.device_mesh, tensor.placements,
        shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip
    return codes.full_tensor().view(tensor.dtype)


def set_grads(model: nn.Module, step: int) -> None:
    """The same made-up gradients for any world: a function of the parameter's name and the step."""
    for name, param in model.named_parameters():
        seed = int(hashlib.sha256(f"{name} {step}".encode()).hexdigest()[:8], 16)
        grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
        if param.dim() == 2:
            grad *= torch.logspace(-3, 1, param.shape[0]).unsqueeze(1)
        if name == "embed.weight":
            grad[5:8] = 0.0
        set_grad(param, grad.to(param.dtype))


def set_grad(param: nn.Parameter, grad: Tensor) -> None:
    param.grad = place_like(grad, param)


def steps(model: nn.Module, optimizer: Any, numbers: range) -> None:
    for number in numbers:
        set_grads(model, number)
        optimizer.step()


def goes_on_elsewhere(
    folder: Path, make: Callable[[], tuple[nn.Module, Any]], moved: int, end: int, tolerance: float, world: World
) -> None:
    """Saved on two processes after ``moved`` steps; loaded in a world of any size, it goes on the same."""
    if world.size == 2:
        model, optimizer = make()
        steps(model, optimizer, range(moved))
        parts = get_state_dict(model, optimizer)
        dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder)
        steps(model, optimizer, range(moved, end))
        result = {name: whole(p.detach()) for name, p in model.named_parameters()}
        if world.rank == 0:
            torch.save(result, folder / "after.pt")
        dist.barrier()
    model, optimizer = make()
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.5)
    parts = get_state_dict(model, optimizer)
    loaded = {"model": parts[0], "optimizer": parts[1]}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    steps(model, optimizer, range(moved, end))
    expected = torch.load(folder / "after.pt", weights_only=True)
    for name, param in model.named_parameters():
        full = whole(param.detach())
        error = (full.double() - expected[name].double()).abs().max().item()
        same = torch.equal(full, expected[name]) if tolerance == 0 else error <= tolerance
        assert same, f"{name} differs by {error:.3g}"


def assert_same(sharded: nn.Module, plain: nn.Module, tolerance: float, note: str = "") -> None:
    """Full parameters of both agree: bit for bit with tolerance 0, else relative to the largest entry."""
    for (name, a), (_, b) in zip(sharded.named_parameters(), plain.named_parameters(), strict=True):
        full, b = whole(a.detach()), whole(b.detach())
        error = (full.double() - b.double()).abs().max().item()
        limit = tolerance * max(1.0, b.abs().max().item())
        assert torch.equal(full, b) if tolerance == 0 else error <= limit, f"{name} {note}: differs by {error:.3g}"


# ---- steps with the same gradients, sharded and not

_LANTON = {"lr": 0.02, "alpha": 0.1, "weight_decay": 0.1}
_BALANCED = {role: {"algorithm": "balanced", "momentum": 0.9} for role in ("embedding", "head")}

# name -> (class, settings, group settings by role, dtype, largest difference). LANTON's are in fp64, as Newton-Schulz
# magnifies the rounding of products where a matrix is nearly singular, which gradients are here
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], torch.dtype, float]] = {
    "lion": (Lion, {"lr": 1e-2, "weight_decay": 0.1}, {}, torch.float32, 0),
    "lion_cautious": (Lion, {"lr": 1e-2, "cautious": True, "weight_decay": 0.1}, {}, torch.float32, 0),
    "lion_stochastic": (Lion, {"lr": 1e-3, "rounding": "stochastic"}, {}, torch.bfloat16, 0),
    "lion_kahan": (Lion, {"lr": 1e-3, "rounding": "kahan"}, {}, torch.bfloat16, 0),
    "lion_master": (Lion, {"lr": 1e-3, "rounding": "master"}, {}, torch.bfloat16, 0),
    "lion_split": (
        Lion, {"lr": 1e-3, "rounding": "split", "momentum_dtype": torch.int8}, {}, torch.bfloat16, 0,
    ),
    "lion_int8": (
        Lion, {"lr": 1e-2, "cautious": True, "weight_decay": 0.1, "momentum_dtype": torch.int8}, {}, torch.float32, 0,
    ),
    "lion_fp8": (Lion, {"lr": 1e-2, "cautious": True, "momentum_dtype": "fp8"}, {}, torch.float32, 0),
    "sinkgd": (SinkGD, {"lr": 0.05, "scale": 0.2, "weight_decay": 0.1}, {}, torch.float32, 1e-6),
    "sinkgd_foreach_off": (SinkGD, {"lr": 0.05, "scale": 0.2, "foreach": False}, {}, torch.float32, 1e-6),
    "sinkgd_momentum": (SinkGD, {"lr": 0.05, "scale": 0.2, "momentum": 0.9, "nesterov": True}, {}, torch.float32, 1e-6),
    "sinkgd_post": (
        SinkGD, {"lr": 0.05, "scale": 0.2, "momentum": 0.9, "momentum_order": "post"}, {}, torch.float32, 1e-6,
    ),
    "sinkgd_balanced": (SinkGD, {"lr": 0.05, "scale": 0.2}, _BALANCED, torch.float32, 1e-6),
    "sinkgd_unit": (SinkGD, {"lr": 0.05, "spectral": "unit"}, {}, torch.float32, 1e-6),
    "sinkgd_muon": (SinkGD, {"lr": 0.05, "spectral": "muon", "momentum": 0.9}, {}, torch.float32, 1e-6),
    "sinkgd_width": (SinkGD, {"lr": 0.05, "base_width": 8}, {}, torch.float32, 1e-6),
    "sinkgd_master": (SinkGD, {"lr": 0.05, "rounding": "master"}, {}, torch.bfloat16, 2**-7),
    "sinkgd_stochastic": (SinkGD, {"lr": 0.05, "rounding": "stochastic"}, {}, torch.bfloat16, 2**-7),
    "sinkgd_int8": (
        SinkGD, {"lr": 0.05, "momentum": 0.9, "momentum_dtype": torch.int8}, {}, torch.float32, 1e-6,
    ),
    "adamw_int8": (
        SinkGD, {"lr": 1e-2, "algorithm": "adamw", "momentum_dtype": torch.int8, "rounding": "split"}, {},
        torch.bfloat16, 0,
    ),
    "adamw": (SinkGD, {"lr": 1e-2, "algorithm": "adamw"}, {}, torch.float32, 1e-6),
    "lanton": (LANTON, _LANTON, {}, torch.float64, 1e-9),
    "lanton_muon": (
        LANTON,
        {**_LANTON, "scaling": "muon", "nesterov": True, "alpha": "auto", "noise_every": 2},
        {}, torch.float64, 1e-9,
    ),
    "lanton_base": (LANTON, {**_LANTON, "noise_adaptive": False}, {}, torch.float64, 1e-9),
    "lanton_foreach_off": (LANTON, {**_LANTON, "foreach": False, "nuclear": "svd"}, {}, torch.float64, 1e-9),
    "lanton_int8": (
        LANTON, {**_LANTON, "momentum_dtype": torch.int8, "noise_dtype": torch.int8}, {}, torch.float64, 1e-9,
    ),
    "lanton_stochastic": (LANTON, {**_LANTON, "rounding": "stochastic"}, {}, torch.bfloat16, 2**-6),
    "lanton_master": (LANTON, {**_LANTON, "rounding": "master"}, {}, torch.bfloat16, 2**-7),
}  # fmt: skip


def build(name: str, model: nn.Module, **more: Any) -> Any:
    cls, settings, by_role, *_ = OPTIMIZERS[name]
    if settings.get("algorithm") == "adamw":
        return cls(model.parameters(), **settings, **more)
    return cls(param_groups(model, by_role), **{**settings, **more})


def follows_unsharded(name: str, world: World) -> None:
    *_, dtype, tolerance = OPTIMIZERS[name]
    plain, sharded = new_model(dtype), shard(new_model(dtype), world.size)
    optimizers = [build(name, plain), build(name, sharded)]
    for step in range(3):
        for model, optimizer in zip((plain, sharded), optimizers, strict=True):
            set_grads(model, step)
            optimizer.step()
        assert_same(sharded, plain, tolerance, f"after step {step + 1}")
    assert any(not torch.equal(p, q) for p, q in zip(plain.parameters(), new_model(dtype).parameters(), strict=True))
    full, part = (o.state_dict()["state"] for o in optimizers)
    assert {i: sorted(s) for i, s in full.items()} == {i: sorted(s) for i, s in part.items()}
    for i, state in full.items():
        for key, value in state.items():
            mine = whole(part[i][key])
            if value.dtype == torch.float8_e4m3fn:
                assert torch.equal(mine.view(torch.uint8), value.view(torch.uint8)), key
                continue
            # iterations in fp32, on processors without bf16 products, amplify another order of additions
            atol = 1e-4 if name == "lanton_master" and key == "master_param" else 1e-6
            torch.testing.assert_close(mine, value, rtol=1e-3 if key == "power_vector" else 1e-5, atol=atol, msg=key)


_EVERYWHERE = (
    "lion", "lion_cautious", "lion_stochastic", "lion_int8", "sinkgd", "sinkgd_momentum", "sinkgd_balanced",
    "sinkgd_muon", "lanton", "lanton_muon",
)  # fmt: skip
# two processes share every dimension evenly, and three do not: some have fewer rows, and one has none of two rows
for _name in OPTIMIZERS:
    _worlds = (1, 2, 3) if _name in _EVERYWHERE else (3,)
    add_case(f"{_name}_follows_unsharded", _worlds, functools.partial(follows_unsharded, _name))


def skips_together(name: str, world: World) -> None:
    """A gradient entry is not finite in one shard, held by one process: all skip as one process would."""
    *_, dtype, tolerance = OPTIMIZERS[name]
    for bad in (math.nan, math.inf):
        plain, sharded = new_model(dtype), shard(new_model(dtype), world.size)
        optimizers = [build(name, plain), build(name, sharded)]
        for step in range(3):
            for model, optimizer in zip((plain, sharded), optimizers, strict=True):
                set_grads(model, step)
                if step == 1:
                    for poisoned in ("blocks.0.up.weight", "blocks.1.experts", "blocks.1.norm.bias", "conv.weight"):
                        param = model.get_parameter(poisoned)
                        grad = whole(param.grad).clone()
                        grad[1].view(-1)[1 if grad.dim() > 1 else 0] = bad
                        set_grad(param, grad)
                optimizer.step()
            assert_same(sharded, plain, tolerance, f"after step {step + 1} with {bad}")
        for p in sharded.parameters():
            assert torch.isfinite(whole(p.detach())).all()
        mine = torch.tensor(float(optimizers[1].nonfinite_count()))
        dist.all_reduce(mine)
        assert mine >= optimizers[0].nonfinite_count() >= 4


for _name in (
    "lion", "lion_cautious", "sinkgd", "sinkgd_momentum", "sinkgd_post", "sinkgd_balanced", "sinkgd_muon", "lanton",
    "lanton_base",
):  # fmt: skip
    _worlds = (3,) if _name in ("lion", "sinkgd", "lanton") else (2,)
    add_case(f"{_name}_skips_together", _worlds, functools.partial(skips_together, _name))


@case(2, 3)
def all_processes_raise_on_a_nonfinite_gradient(world: World) -> None:
    sharded = shard(new_model(), world.size)
    optimizer = build("sinkgd", sharded, nonfinite="raise")
    set_grads(sharded, 0)
    sharded.get_parameter("blocks.0.up.weight").grad.to_local()[:1] = math.nan if world.rank == 0 else 0.0
    try:
        optimizer.step()
    except NonFiniteGradientError as error:
        assert "blocks.0.up.weight (10, 6)" in str(error)
    else:
        raise AssertionError("this process went on alone")
    assert_same(sharded, new_model(), 0)


def refused(kind: type[Exception], said: str, function: Any) -> None:
    try:
        function()
    except kind as error:
        assert said in str(error), str(error)
    else:
        raise AssertionError(f"expected {kind.__name__} about {said!r}")


class Collectives(torch.utils._python_dispatch.TorchDispatchMode):
    """Records every collective inside the block: (name, bytes of its tensors)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            leaves = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            self.seen.append((func._opname, sum(t.numel() * t.element_size() for t in leaves)))
        return func(*args, **(kwargs or {}))


def count_collectives(optimizer: torch.optim.Optimizer, model: nn.Module, step: int = 0) -> list[tuple[str, int]]:
    set_grads(model, step)
    with Collectives() as collectives:
        optimizer.step()
    return collectives.seen


# ---- real training


def train(model: nn.Module, optimizer: Any, world: World | None, *, micro: int = 1, steps: int = 4) -> None:
    """Steps on batches of 12 sequences, of which a process of ``world`` takes its part, in ``micro`` passes."""
    for step in range(steps):
        batch = tokens(12, seed=step)
        part = batch if world is None else batch.chunk(world.size)[world.rank]
        for chunk in part.chunk(micro):
            (model(chunk) / micro).backward()
        optimizer.step()
        optimizer.zero_grad()


_TRAINED = ("lion", "lion_cautious", "sinkgd", "sinkgd_momentum", "sinkgd_balanced", "sinkgd_muon", "adamw", "lanton")


@case(2, 3)
def fully_sharded_training_equals_one_process(world: World) -> None:
    for name in _TRAINED if world.size == 2 else ("lion", "sinkgd", "sinkgd_balanced", "lanton"):
        plain, sharded = new_model(torch.float64), shard(new_model(torch.float64), world.size)
        train(plain, build(name, plain), None)
        train(sharded, build(name, sharded), world)
        assert_same(sharded, plain, 1e-6, name)


@case(2)
def data_parallel_training_equals_one_process(world: World) -> None:
    for name in ("lion", "sinkgd", "sinkgd_balanced", "lanton"):
        for view in (False, True) if name in ("lion", "sinkgd") else (True,):
            plain, replica = new_model(torch.float64), new_model(torch.float64)
            train(plain, build(name, plain), None)
            parallel = nn.parallel.DistributedDataParallel(replica, gradient_as_bucket_view=view)
            train(parallel, build(name, replica), world)
            assert_same(replica, plain, 1e-6, name)
            found = count_collectives(build(name, replica), replica)
            assert found == [], f"{name}: replicated parameters need no communication, but {found}"


@case(1, 2)
def accumulated_gradients_equal_one_batch(world: World) -> None:
    for name in ("lion", "sinkgd", "sinkgd_momentum", "sinkgd_balanced"):
        plain, sharded = new_model(torch.float64), shard(new_model(torch.float64), world.size)
        train(plain, build(name, plain), None)
        train(sharded, build(name, sharded), world, micro=3)
        assert_same(sharded, plain, 1e-6, name)


@case(2)
def clipped_and_mixed_precision(world: World) -> None:
    """clip_grad_norm_ on sharded gradients, and bf16 compute with fp32 parameters."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    losses = {}
    for name in ("lion", "sinkgd"):
        sharded = shard(new_model(), world.size, mp_policy=policy)
        optimizer = build(name, sharded)
        losses[name] = []
        for _ in range(8):
            loss = sharded(tokens(12).chunk(2)[world.rank])
            loss.backward()
            norm = nn.utils.clip_grad_norm_(sharded.parameters(), 0.5)
            assert torch.isfinite(whole(norm))
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
        assert losses[name][-1] < losses[name][0], losses
    whole_run = {}
    for clip in (None, 1e-3):  # SinkGD's matrices do not see the clipping
        sharded = shard(new_model(torch.float64), world.size)
        optimizer = build("sinkgd", sharded)
        sharded(tokens(12).chunk(2)[world.rank]).backward()
        if clip:
            nn.utils.clip_grad_norm_(sharded.parameters(), clip)
        optimizer.step()
        whole_run[clip] = {n: whole(p.detach()) for n, p in sharded.named_parameters() if "up.weight" in n}
    for name, value in whole_run[None].items():
        assert (value - whole_run[1e-3][name]).abs().max() < 1e-9, name
