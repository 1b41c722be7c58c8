"""Checks of optimizers on matrices that two mesh dimensions shard, as by tensor parallelism inside FSDP2."""

import functools
import math
from typing import Any

import torch
from distributed_cases import OPTIMIZERS, assert_same, build, new_model, refused, set_grads
from distributed_mfac import VARIANTS
from distributed_mfac import build as build_mfac
from distributed_placements import by_hand
from distributed_world import World, add_case, case
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD, param_groups

WORLD = 4


@functools.cache
def grid(*sizes: int) -> Any:
    """A mesh of all four processes."""
    names = ("dp_replicate", "dp_shard", "tp")[3 - len(sizes) :]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


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


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.attention, self.feed_forward = Attention(dim, heads), FeedForward(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """The modules and names of torchtitan's model, without rotary embeddings; 13 tokens divide by no mesh."""

    def __init__(self, dim: int = 8, heads: int = 4, hidden: int = 12, vocabulary: int = 13) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleDict({str(i): Layer(dim, heads, hidden) for i in range(2)})
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x))


def new_llama(dtype: torch.dtype = torch.float64) -> Llama:
    torch.manual_seed(1)
    return Llama().to(dtype)


def tensor_parallel(model: Llama, mesh: Any) -> None:
    """torchtitan's plan: row-wise embedding, norms on parts of the sequence, column- and row-wise layers."""
    parallelize_module(model, mesh, {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    })  # fmt: skip
    gathered = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    for layer in model.layers.values():
        parallelize_module(layer, mesh, {
            "attention_norm": SequenceParallel(),
            "attention": gathered,
            **{f"attention.w{name}": ColwiseParallel() for name in "qkv"},
            "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
            "ffn_norm": SequenceParallel(),
            "feed_forward": gathered,
            "feed_forward.w1": ColwiseParallel(),
            "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
            "feed_forward.w3": ColwiseParallel(),
        })  # fmt: skip


def titan(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Llama:
    """The model with tensor parallelism in the last dimension of the mesh, and FSDP2 (HSDP) over the others."""
    model, mesh = new_llama(dtype), grid(*sizes)
    tensor_parallel(model, mesh["tp"])
    data = mesh[mesh.mesh_dim_names[:-1]]
    for layer in model.layers.values():
        fully_shard(layer, mesh=data)
    return fully_shard(model, mesh=data)


def train(model: Llama, optimizer: Any, sizes: tuple[int, ...] = (1, 1), steps: range = range(3)) -> None:
    """Steps on batches of four sequences, of which a process takes the part of its data-parallel rank."""
    ranks = math.prod(sizes[:-1])
    rank = torch.distributed.get_rank() // sizes[-1] if ranks > 1 else 0
    for step in steps:
        words = torch.randint(0, 13, (4, 4), generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(words).flatten(0, 1), words.roll(1, 1).flatten()).backward()
        optimizer.step()


def llama_follows_one_process(cls: Any, settings: dict[str, Any], world: World) -> None:
    plain = new_llama()
    train(plain, cls(param_groups(plain), **settings))
    assert any(not torch.equal(p, q) for p, q in zip(plain.parameters(), new_llama().parameters(), strict=True))
    for sizes in ((2, 2), (1, 4), (2, 1, 2)):
        sharded = titan(sizes)
        train(sharded, cls(param_groups(sharded), **settings), sizes)
        assert_same(sharded, plain, 1e-9, f"{settings} {sizes}")


LLAMA: dict[str, tuple[Any, dict[str, Any]]] = {
    "sinkgd": (SinkGD, {"lr": 0.05}),
    "sinkgd_options": (SinkGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "row_mask_tau": 0.2, "base_width": 4}),
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
        "fp16": COLUMNS[:1],
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
    """The bits of one process; momenta of 8 bits where the shards are ranges of rows."""
    for sizes, placements in (*ROWS[1:], *COLUMNS[:5]):
        follows_unsharded("lion_stochastic", sizes, placements)
    for sizes, placements in (ROWS[1], *COLUMNS[:2]):
        follows_unsharded("lanton_stochastic", sizes, placements)
        follows_unsharded("sinkgd_stochastic", sizes, placements)
    follows_unsharded("lion_int8", *ROWS[1])
    name = "blocks.0.up.weight (10, 6) with placements"
    refused_unchanged("lion_stochastic", *GAPS[0], f"cut along dimension 0 and two others at most; got {name}")
    refused_unchanged("lion_int8", *COLUMNS[0], f"int8 takes parameters whose shards are ranges of rows, got {name}")
