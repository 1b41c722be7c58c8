"""Which part of a parameter this process holds, and whom to ask for sums over the rest.

FSDP2 (``fully_shard``) cuts parameters along dimension 0 into DTensors. Elementwise rules need only their own part;
SinkGD needs the column sums of its matrices from the other parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Shard(NamedTuple):
    """A process's part of a parameter."""

    rows_total: int  # size of dimension 0 of the whole parameter
    offset: int  # index of the part's first element in the whole parameter, row-major
    process_group: Any  # whose parts make up the whole; None when this process holds all of it


def shard_of(param: Tensor) -> Shard:
    """Describe this process's part of ``param``.

    Raises:
        ValueError: for a DTensor sharded along another dimension than 0, or along more than one mesh dimension.
    """
    rows = param.shape[0] if param.dim() else 1
    if not hasattr(param, "placements"):
        return Shard(rows, 0, None)
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as ShardPlacement

    sharded = [i for i, p in enumerate(param.placements) if not isinstance(p, Replicate)]
    if not sharded:
        return Shard(rows, 0, None)
    placement = param.placements[sharded[0]]
    if len(sharded) > 1 or type(placement) is not ShardPlacement or placement.dim != 0:
        raise ValueError(
            f"leanstep optimizers take parameters that are replicated, or sharded along dimension 0 over one mesh "
            f"dimension (fully_shard's default); got placements {param.placements} for shape {tuple(param.shape)}"
        )
    group = cast("DTensor", param).device_mesh.get_group(sharded[0])
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    chunk = -(-rows // size)  # DTensor cuts like torch.chunk
    start = min(rank * chunk, rows)
    return Shard(rows, start * (param.numel() // max(rows, 1)), group if size > 1 else None)


def all_reduce_sum(tensor: Tensor, group: Any) -> None:
    """Sum a tensor over the processes of a group, in place."""
    torch.distributed.all_reduce(tensor, group=group)
