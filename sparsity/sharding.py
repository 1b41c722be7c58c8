"""Masks of sharded weights (FSDP2): each process computes the mask of its shard, and all processes gather the whole.

A forward pass needs the whole mask, because FSDP2 gathers the whole weight for it. Computing the mask there would score
rounded weights under a mixed-precision policy, and would repeat in every pass. So after a step, each process computes
the mask of its rows from the full-precision weights and gathers the shards: 1 byte per weight and step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from leanstep._torch import is_dtensor, join_parts, local_part, place_like, whole_tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from leanstep.sparsity.modules import SparseLayer


def check(layer: SparseLayer) -> None:
    """Raise ValueError if a layer's weight is sharded across its groups, or holds partial sums."""
    weight = layer.weight
    if not is_dtensor(weight):
        return
    for placement in cast("DTensor", weight).placements:
        across = placement.is_shard(layer.dim) or placement.is_shard(layer.dim - weight.dim())
        if across or placement.is_partial() or not (placement.is_shard() or placement.is_replicate()):
            raise ValueError(
                f"layer {layer.name!r} of shape {tuple(weight.shape)} has its {layer.target} groups along dimension "
                f"{layer.dim} and is sharded as {placement}, across them; shard it along another dimension "
                "(fully_shard's shard_placement_fn), or let groups lie along the other axis"
            )


def local_parts(layer: SparseLayer) -> tuple[Tensor, Tensor, Tensor]:
    """This process's shards of a layer's gradient, weight and mask. Writes to the shard change the gradient."""
    weight = layer.weight
    assert weight.grad is not None
    return local_part(weight.grad), local_part(weight.detach()), local_mask(layer)


def local_mask(layer: SparseLayer) -> Tensor:
    """This process's shard of the mask."""
    weight = layer.weight
    if not is_dtensor(weight):
        return layer.transform.mask
    if layer.transform.local_mask is None:
        shard = local_part(place_like(layer.transform.mask.view(torch.uint8), weight))
        layer.transform.local_mask = shard.view(torch.bool).clone()
    return layer.transform.local_mask


def gather_mask(layer: SparseLayer, shard: Tensor) -> None:
    """Gather the whole mask from all processes' shards. Collective if the weight is sharded."""
    if is_dtensor(layer.weight):
        mask = layer.transform.mask
        # not every backend exchanges booleans
        mask.copy_(whole_tensor(join_parts(shard.view(torch.uint8), layer.weight, mask.shape)).view(torch.bool))


def total(value: Tensor, weight: Tensor) -> Tensor:
    """Sum a number over all shards of a weight; ``value`` is that of this process's shard."""
    if not is_dtensor(weight):
        return value
    from torch.distributed.tensor import Partial

    placements = [Partial() if p.is_shard() else p for p in cast("DTensor", weight).placements]
    return whole_tensor(join_parts(value, weight, placements=placements))
