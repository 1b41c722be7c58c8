"""Sparse weights of which each process holds some rows (FSDP2): masks are made from the part and shared whole.

A forward pass needs the whole mask, because FSDP2 gathers the whole weight for it; making it there would score weights
that a mixed-precision policy has rounded, and make it anew in every pass. So each process makes the mask of its rows
after a step, from the full-precision weights, and the parts are exchanged: 1 byte per weight and step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from leanstep.sparsity.modules import SparseLayer


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which this process may hold a part only."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; all of an ordinary one."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; a call to all processes where it is sharded."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def check(layer: SparseLayer) -> None:
    """Raise ValueError where a layer's weight is cut across its groups, or kept as partial sums."""
    weight = layer.weight
    if not is_sharded(weight):
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
    """This process's parts of a layer's gradient, weight and mask; the gradient is the one to write into."""
    weight = layer.weight
    assert weight.grad is not None
    return local(weight.grad), local(weight.detach()), local_mask(layer)


def local_mask(layer: SparseLayer) -> Tensor:
    """This process's part of the mask."""
    weight = layer.weight
    if not is_sharded(weight):
        return layer.transform.mask
    if layer.transform.local_mask is None:
        layer.transform.local_mask = _cut(layer.transform.mask, cast("DTensor", weight))
    return layer.transform.local_mask


def mask_part(layer: SparseLayer) -> Tensor:
    """The tensor to write this process's part of a new mask into."""
    check(layer)
    return local_mask(layer)


def share_mask(layer: SparseLayer, part: Tensor) -> None:
    """Put together the parts of a new mask. A call to all processes where the weight is sharded."""
    weight = layer.weight
    if not is_sharded(weight):
        return
    from torch.distributed.tensor import DTensor

    mask, sharded = layer.transform.mask, cast("DTensor", weight)
    # not every backend exchanges booleans
    whole = DTensor.from_local(
        part.view(torch.uint8), sharded.device_mesh, sharded.placements, run_check=False,
        shape=mask.shape, stride=mask.stride(),
    ).full_tensor()  # fmt: skip
    mask.copy_(whole.view(torch.bool))


def total(value: Tensor, weight: Tensor) -> Tensor:
    """The sum over all parts of a weight of a number known for this process's part."""
    if not is_sharded(weight):
        return value
    from torch.distributed.tensor import DTensor, Partial

    sharded = cast("DTensor", weight)
    placements = [Partial() if placement.is_shard() else placement for placement in sharded.placements]
    return DTensor.from_local(value, sharded.device_mesh, placements, run_check=False).full_tensor()


def _cut(mask: Tensor, weight: DTensor) -> Tensor:
    """This process's part of a whole mask, cut as the weight is."""
    from torch.distributed.tensor import distribute_tensor

    # every process has the whole: nothing is sent
    cut = distribute_tensor(mask.view(torch.uint8), weight.device_mesh, weight.placements, src_data_rank=None)
    return cut.to_local().view(torch.bool).clone()
