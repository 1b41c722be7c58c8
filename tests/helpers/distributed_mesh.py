"""Checks of optimizers on matrices that two mesh dimensions shard, as by tensor parallelism inside FSDP2."""

import copy
import functools
from collections import Counter
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from distributed_cases import (
    OPTIMIZERS,
    assert_same,
    build,
    count_collectives,
    new_model,
    refused,
    set_grad,
    set_grads,
    whole,
)
from distributed_mfac import VARIANTS
from distributed_mfac import build as build_mfac
from distributed_placements import by_hand
from distributed_world import World, add_case, case
from mesh_llama import Llama, grid, new_llama, titan, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD, param_groups

WORLD = 4
_LANTON_INT8 = {"momentum_dtype": torch.int8, "noise_dtype": torch.int8}


# ---- given placements

# (mesh, placements of every matrix): rows by both dimensions, in either order, rows and columns, columns by both
ROWS = (
    ((2, 2), (Shard(0), Shard(0))),
    ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    ((1, 4), (Shard(0), Shard(0))),
    ((1, 2, 2), (Replicate(), _StridedShard(0, split_factor=2), Shard(0))),
)
COLUMNS = (
    ((2, 2), (Shard(0), Shard(1))),
    ((2, 2), (Shard(1), Shard(0))),
    ((2, 2), (_StridedShard(1, split_factor=2), Shard(1))),
    ((2, 2), (Replicate(), Shard(1))),
    ((1, 4), (Shard(1), Shard(0))),
    ((2, 1, 2), (Replicate(), Shard(0), Shard(1))),
)
# a stride without the shards that it jumps over, as a redistribution leaves it
GAPS = (((2, 2), (Replicate(), _StridedShard(0, split_factor=3))),)


def follows_unsharded(name: str, sizes: tuple[int, ...], placements: tuple[Any, ...]) -> None:
    *_, dtype, tolerance = OPTIMIZERS[name]
    plain, sharded = new_model(dtype), by_hand(WORLD, *placements, dtype=dtype, on=grid(*sizes))
    for model in (plain, sharded):
        optimizer = build(name, model)
        for step in range(2):
            set_grads(model, step)
            optimizer.step()
    assert_same(sharded, plain, tolerance, f"{name} {sizes} {placements}")


def refused_unchanged(name: str, sizes: tuple[int, ...], placements: tuple[Any, ...], said: str) -> None:
    dtype = OPTIMIZERS[name][3]
    sharded = by_hand(WORLD, *placements, dtype=dtype, on=grid(*sizes))
    set_grads(sharded, 0)
    optimizer = build(name, sharded)
    refused(ValueError, said, optimizer.step)
    assert_same(sharded, new_model(dtype), 0)


@case(WORLD)
def sinkgd_on_meshes(world: World) -> None:
    """Every mode on rows, columns and both; the models have uneven and empty shards."""
    for sizes, placements in (*ROWS, *COLUMNS, *GAPS):
        follows_unsharded("sinkgd", sizes, placements)
    for name in ("sinkgd_post", "sinkgd_balanced", "sinkgd_width", "sinkgd_master", "adamw"):
        follows_unsharded(name, *COLUMNS[0])
    for name in ("sinkgd_momentum", "sinkgd_width", "sinkgd_muon"):
        follows_unsharded(name, *ROWS[1])


# ---- a LLaMA, sharded as torchtitan does it


def llama_follows_one_process(cls: Any, settings: dict[str, Any], world: World) -> None:
    plain = new_llama()
    train(plain, cls(param_groups(plain), **settings))
    assert any(not torch.equal(p, q) for p, q in zip(plain.parameters(), new_llama().parameters(), strict=True))
    for sizes in ((2, 2), (1, 4) if cls is SinkGD else (2, 1, 2)):
        sharded = titan(sizes)
        train(sharded, cls(param_groups(sharded), **settings), sizes)
        assert_same(sharded, plain, 1e-9, f"{settings} {sizes}")


LLAMA: dict[str, tuple[Any, dict[str, Any]]] = {
    "sinkgd": (SinkGD, {"lr": 0.05}),
    "sinkgd_options": (SinkGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "base_width": 4}),
    "lanton": (LANTON, {"lr": 0.02, "alpha": 0.1}),
    "mfac": (MFAC, {"lr": 0.02, "window": 3, "damping": 0.1}),
    "lion": (Lion, {"lr": 1e-3, "cautious": True, "weight_decay": 0.1}),
}
for _name, (_cls, _settings) in LLAMA.items():
    add_case(f"llama_{_name}_follows", (WORLD,), functools.partial(llama_follows_one_process, _cls, _settings))


# ---- LANTON


@case(WORLD)
def lanton_on_meshes(world: World) -> None:
    for sizes, placements in (ROWS[1], *COLUMNS[1:3], COLUMNS[4]):
        follows_unsharded("lanton", sizes, placements)
    refused_unchanged("lanton", *GAPS[0], "got blocks.0.up.weight (10, 6) with placements")


# ---- M-FAC


@case(WORLD)
def mfac_on_meshes(world: World) -> None:
    """Dense rows on any shards; blocks of elements and sparse rows where the shards are ranges of rows."""
    for name, places in {
        "model_fp32": (ROWS[1], *COLUMNS[:3], COLUMNS[4], *GAPS),
        "bf16": COLUMNS[:1],
        "blocks": ROWS[:2],
        "topk": ROWS[:2],
    }.items():
        dtype, tolerance = VARIANTS[name][1:]
        for sizes, placements in places:
            plain, sharded = new_model(dtype), by_hand(WORLD, *placements, dtype=dtype, on=grid(*sizes))
            for model in (plain, sharded):
                optimizer = build_mfac(name, model)
                for step in range(4):
                    set_grads(model, step)
                    optimizer.step()
            assert_same(sharded, plain, tolerance, f"{name} {sizes} {placements}")


# ---- stochastic rounding


@case(WORLD)
def stochastic_rounding_on_meshes(world: World) -> None:
    """The bits of one process."""
    for sizes, placements in (*ROWS[1:], *COLUMNS[:5]):
        follows_unsharded("lion_stochastic", sizes, placements)
    for sizes, placements in (ROWS[1], *COLUMNS[:2]):
        follows_unsharded("lanton_stochastic", sizes, placements)
        follows_unsharded("sinkgd_stochastic", sizes, placements)
    name = "blocks.0.up.weight (10, 6) with placements"
    refused_unchanged("lion_stochastic", *GAPS[0], f"cut along dimension 0 and two others at most; got {name}")


@case(WORLD)
def int8_state_on_meshes(world: World) -> None:
    """Codes, scales and random bits are those of one process; processes share blocks of 128 entries."""
    for i, name in enumerate(("lion_int8", "lion_fp8", "lion_split", "adamw_int8", "sinkgd_int8", "lanton_int8")):
        # of the columns every name has half, and every placement half of the names
        for sizes, placements in (ROWS[1], *COLUMNS[i % 2 :: 2]):
            follows_unsharded(name, sizes, placements)
    name = "blocks.0.up.weight (10, 6) with placements"
    for optimizer, key in (
        ("lion_int8", "exp_avg"),
        ("sinkgd_int8", "momentum_buffer"),
        ("lanton_int8", "momentum_buffer"),
    ):
        said = f"the state '{key}' of 8 bits"
        said += " takes parameters whose shards are blocks, cut along dimension 0 and two others at most; got " + name
        refused_unchanged(optimizer, *GAPS[0], said)


@case(WORLD)
def int8_state_of_whole_blocks(world: World) -> None:
    """Processes with multiples of 128 columns have scales of their own, and Lion and AdamW communicate nothing."""
    for sizes, placements, here in (
        ((1, 4), (Replicate(), Shard(1)), (6, 1)),
        ((2, 2), (Shard(0), Shard(1)), (3, 2)),
        ((2, 2), (_StridedShard(1, split_factor=2), Shard(1)), (6, 1)),
        ((2, 2), (Replicate(), Shard(1)), (6, 2)),
    ):
        for cls, settings, keys in (
            (Lion, {"lr": 0.1}, ("exp_avg",)),
            (SinkGD, {"lr": 0.1, "algorithm": "adamw", "nonfinite": "pass"}, ("exp_avg", "exp_avg_sq")),
        ):
            start = torch.randn(6, 512, generator=torch.Generator().manual_seed(3))
            plain, sharded = nn.Linear(512, 6, bias=False), nn.Linear(512, 6, bias=False)
            plain.weight = nn.Parameter(start.clone())
            sharded.weight = nn.Parameter(distribute_tensor(start, grid(*sizes), placements, src_data_rank=None))
            optimizers = [cls(model.parameters(), momentum_dtype=torch.int8, **settings) for model in (plain, sharded)]
            for step in range(3):
                set_grads(plain, step)
                optimizers[0].step()
                assert count_collectives(optimizers[1], sharded, step) == []
            assert_same(sharded, plain, 0, f"{cls.__name__} {placements}")
            full, part = (o.state[m.weight] for o, m in zip(optimizers, (plain, sharded), strict=True))
            for key in keys:
                assert part[f"{key}_scale"].to_local().shape == here
                for each in (key, f"{key}_scale"):
                    assert torch.equal(whole(part[each]), full[each]), (each, placements)


# ---- communication


@case(WORLD)
def reductions_on_a_mesh(world: World) -> None:
    """SinkGD: one all-reduce per mesh dimension and half-iteration at most, for all matrices; no matrix is sent.

    Matrices of the first kind are cut along their rows by both dimensions, so they need column sums over both. Those of
    the second kind (row-wise layers) need row sums over "tp" and column sums over "dp_shard", and first the largest
    entries of their rows. The flags of AdamW's tensors travel along.
    """
    model = titan((2, 2), torch.float32)
    rows = [p for n, p in model.named_parameters() if n.split(".")[-2] in ("wq", "wk", "wv", "w1", "w3")]
    both = [p for n, p in model.named_parameters() if n.split(".")[-2] in ("wo", "w2")]
    columns_of_rows = 4 * sum(p.shape[1] for p in rows)
    rows_of_both, columns_of_both = (4 * sum(p.to_local().shape[dim] for p in both) for dim in (0, 1))
    flags, flags_over_both = 4 * 5, 4 * 2  # 3 norms, embedding and head; the latter are cut by both dimensions
    over_tp = [rows_of_both, columns_of_rows + rows_of_both + flags_over_both, *[columns_of_rows + rows_of_both] * 4]
    over_dp = [columns_of_rows + flags, *[columns_of_rows + columns_of_both] * 4, columns_of_both]
    collectives = count_collectives(SinkGD(param_groups(model)), model)
    assert sorted(collectives) == sorted(("allreduce_", size) for size in over_tp + over_dp), collectives
    for cls, settings, counts in (
        (Lion, {}, {}),
        (Lion, {"cautious": True}, {"allreduce_": 2}),
        (SinkGD, {"momentum": 0.9}, {"allreduce_": 14}),
        (MFAC, {"window": 2}, {"allreduce_": 2}),
        (LANTON, {}, {"allreduce_": 2, "alltoall_base_": 6}),
    ):
        sent = count_collectives(cls(param_groups(model), **settings), model)
        assert dict(Counter(name for name, _ in sent)) == counts, (cls, settings, sent)


# ---- blocks of rows


@case(WORLD)
def blocks_on_meshes(world: World) -> None:
    """Heads and fused weights: blocks of rows that processes share, hold whole or do not have."""
    for cls, settings, dtype, tolerance in (
        (SinkGD, {"lr": 0.1, "momentum": 0.9, "algorithm": "balanced"}, torch.float64, 1e-9),
        (SinkGD, {"lr": 0.1, "rounding": "stochastic"}, torch.bfloat16, 2**-7),
        (SinkGD, {"lr": 0.1, "momentum": 0.9, "momentum_dtype": torch.int8}, torch.float64, 1e-9),
        (
            LANTON,
            {"lr": 0.1, "norm": "rms", "momentum_dtype": torch.int8, "noise_dtype": torch.int8},
            torch.float64,
            1e-9,
        ),
        (LANTON, {"lr": 0.1, "norm": "rms", "alpha": 0.1, "variance": "rows"}, torch.float64, 1e-9),
    ):
        for shape, transposed, blocks in (((12, 5), False, (2, 7, 3)), ((5, 12), True, 4)):
            for sizes, placements in (ROWS[1], *COLUMNS[:3]):
                options = {"blocks": blocks, "transposed": transposed, **settings}
                start = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
                plain = nn.Parameter(start.clone())
                sharded = nn.Parameter(distribute_tensor(start, grid(*sizes), placements, src_data_rank=None))
                optimizers = [cls([p], **options) for p in (plain, sharded)]
                for step in range(2):
                    grad = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(dtype)
                    if settings.get("algorithm") == "balanced":  # which sets this row to 0
                        (grad.mT if transposed else grad)[1] *= 1e-5
                    for param, optimizer in zip((plain, sharded), optimizers, strict=True):
                        set_grad(param, grad)
                        optimizer.step()
                error = (whole(sharded.detach()).double() - plain.double()).abs().max().item()
                assert error <= tolerance, (cls, options, sizes, placements, error)
    gaps = nn.Parameter(distribute_tensor(torch.ones(12, 5), grid(2, 2), GAPS[0][1], src_data_rank=None))
    gaps.grad = torch.ones_like(gaps)
    refused(ValueError, "blocks need shards without gaps, got w (12, 5)", SinkGD([("w", gaps)], blocks=4).step)


@case(WORLD)
def blocks_of_stacks_round_as_in_one_process(world: World) -> None:
    start = torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(7)).bfloat16()
    for sizes, placements in (((4,), (Shard(0),)), ((2, 2), (Shard(0), Replicate()))):
        plain = nn.Parameter(start.clone())
        sharded = nn.Parameter(distribute_tensor(start, grid(*sizes), placements, src_data_rank=None))
        for step in range(2):
            grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            for param in (plain, sharded):
                set_grad(param, grad)
            if not step:
                optimizers = [SinkGD([p], lr=0.01, blocks=3, rounding="stochastic") for p in (plain, sharded)]
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(whole(sharded.detach()), plain), (sizes, placements)


# ---- refusals


@case(WORLD)
def gradients_on_other_meshes_are_refused(world: World) -> None:
    whole_param, placements = torch.ones(4, 6), (Shard(0), Shard(1))
    for cls, settings in ((Lion, {}), (SinkGD, {"algorithm": "sinkgd"}), (LANTON, {}), (MFAC, {"window": 2})):
        param = nn.Parameter(distribute_tensor(whole_param, grid(2, 2), placements, src_data_rank=None))
        optimizer = cls([("w", param)], **settings)
        param.grad = distribute_tensor(whole_param, grid(1, 4), placements, src_data_rank=None)
        refused(ValueError, "w (4, 6) is on DeviceMesh", optimizer.step)
        param.grad = None
        param.grad = whole_param.clone()
        refused(ValueError, "but its gradient is a plain tensor; expected both on one mesh", optimizer.step)
        assert torch.equal(whole(param.detach()), whole_param) and not any(optimizer.state.values())


# ---- experts


class Experts(nn.Module):
    """A stack of expert matrices, and a matrix that all processes share."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(4, 6, 5))
        self.router = nn.Linear(5, 4, bias=False)


def new_experts(dtype: torch.dtype) -> Experts:
    torch.manual_seed(1)
    return Experts().to(dtype)


@case(WORLD)
def experts_with_fsdp(world: World) -> None:
    """Expert parallelism over one mesh dimension, FSDP2 over the other, along the experts or inside them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    for name in ("sinkgd_post", "lanton", "lion_stochastic"):
        *_, dtype, tolerance = OPTIMIZERS[name]
        for dim, sums in ((0, 0), (1, 5)):
            plain, sharded = new_experts(dtype), new_experts(dtype)
            sharded.stack = nn.Parameter(distribute_tensor(sharded.stack.detach(), mesh["ep"], [Shard(0)]))
            fully_shard(sharded.router, mesh=mesh["dp"])
            fully_shard(
                sharded, mesh=mesh["dp"], shard_placement_fn=lambda p, dim=dim: Shard(dim if p.dim() > 2 else 0)
            )
            assert len(sharded.stack.placements) == 2 and not any(p.is_replicate() for p in sharded.stack.placements)
            for model in (plain, sharded):
                cls, settings, *_ = OPTIMIZERS[name]
                optimizer = cls(model.parameters(), **settings)
                for step in range(2):
                    set_grads(model, step)
                    optimizer.step()
            assert_same(sharded, plain, tolerance, f"{name} {dim}")
            if name == "sinkgd_post":
                optimizer = SinkGD([sharded.stack], algorithm="sinkgd")
                assert len(count_collectives(optimizer, sharded)) == sums


# ---- checkpoints


def checkpoint_returns(
    cls: Any, settings: dict[str, Any], dtype: torch.dtype, sizes: tuple[int, ...], world: World
) -> None:
    """Saved on a 2 x 2 mesh after two steps; on another mesh, or with FSDP2 alone, the next two steps are the same."""
    folder = world.folder / f"mesh-{cls.__name__}-{'momentum_dtype' in settings}"

    def make(sizes: tuple[int, ...]) -> tuple[Llama, Any]:
        model = titan(sizes, dtype)
        return model, cls(param_groups(model), **settings)

    model, optimizer = make((2, 2))
    train(model, optimizer, (2, 2), range(2))
    parts = get_state_dict(model, optimizer)
    dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder)
    train(model, optimizer, (2, 2), range(2, 4))
    other, again = make(sizes)
    with torch.no_grad():
        for param in other.parameters():
            param.fill_(0.5)
    parts = get_state_dict(other, again)
    loaded = {"model": parts[0], "optimizer": parts[1]}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(other, again, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(other, again, sizes, range(2, 4))
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        error = (whole(p.detach()).double() - whole(q.detach()).double()).abs().max().item()
        assert error <= (2**-6 if dtype == torch.bfloat16 else 1e-9), f"{sizes} {name}: differs by {error:.3g}"


for _cls, _settings, _dtype, _sizes in (
    (SinkGD, {"lr": 0.05, "momentum": 0.9}, torch.float64, (1, 4)),
    (LANTON, {"lr": 0.02, "alpha": 0.1}, torch.float64, (4, 1)),
    (MFAC, {"lr": 0.02, "window": 3, "damping": 0.1}, torch.float64, (1, 4)),
    (Lion, {"lr": 1e-3, "rounding": "stochastic"}, torch.bfloat16, (4, 1)),
    (Lion, {"lr": 1e-3, "momentum_dtype": torch.int8}, torch.float64, (1, 4)),
    (SinkGD, {"lr": 0.05, "momentum": 0.9, "momentum_dtype": torch.int8}, torch.float64, (4, 1)),
    (LANTON, {"lr": 0.02, "alpha": 0.1, **_LANTON_INT8}, torch.float64, (1, 4)),
):
    _int8 = "_int8" if "momentum_dtype" in _settings else ""
    add_case(
        f"mesh_checkpoint_returns_{_cls.__name__.lower()}{_int8}", (WORLD,),
        functools.partial(checkpoint_returns, _cls, _settings, _dtype, _sizes),
    )  # fmt: skip


# ---- transformers


@case(WORLD)
def transformers_plan_follows_one_process(world: World) -> None:
    """tp_plan="auto", alone and inside transformers' own FSDP2."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    folder = world.folder / "transformers-llama"
    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4, vocab_size=16,
        max_position_embeddings=8, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    start = LlamaForCausalLM(config).double()
    if world.rank == 0:
        start.save_pretrained(folder)
    torch.distributed.barrier()

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, words: Tensor) -> Tensor:
            return self.model(input_ids=words, use_cache=False).logits

    for cls, settings in (LLAMA["sinkgd_options"], LLAMA["lanton"]):
        plain = Logits(copy.deepcopy(start))
        train(plain, cls(param_groups(plain), **settings))
        for tp, fsdp in ((4, 1), (2, 2)):
            distributed = DistributedConfig(tp_plan="auto", tp_size=tp, fsdp_size=fsdp)
            sharded = Logits(
                AutoModelForCausalLM.from_pretrained(folder, distributed_config=distributed, dtype=torch.float64)
            )
            assert any(hasattr(p, "placements") for p in sharded.parameters())
            train(sharded, cls(param_groups(sharded), **settings), (fsdp, tp))
            assert_same(sharded, plain, 1e-9, f"{settings} tp {tp} fsdp {fsdp}")
