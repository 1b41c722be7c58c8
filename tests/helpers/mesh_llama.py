"""A LLaMA in miniature, sharded by torchtitan's plan: tensor parallelism, and FSDP2 or HSDP around it."""

import functools
import math
from typing import Any

import torch
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
        self.layers = nn.ModuleDict({"0": Layer(dim, heads, hidden)})
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x))


@functools.cache
def grid(*sizes: int) -> Any:
    """A mesh of all four processes."""
    names = ("dp_replicate", "dp_shard", "tp")[3 - len(sizes) :]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


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


def train(model: nn.Module, optimizer: Any, sizes: tuple[int, ...] = (1, 1), steps: range = range(3)) -> None:
    """Steps on batches of four sequences, of which a process takes the part of its data-parallel rank."""
    ranks = math.prod(sizes[:-1])
    rank = torch.distributed.get_rank() // sizes[-1] if ranks > 1 else 0
    for step in steps:
        words = torch.randint(0, 13, (4, 4), generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(words).flatten(0, 1), words.roll(1, 1).flatten()).backward()
        optimizer.step()
