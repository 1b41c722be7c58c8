"""Which columns of a window a process holds: those of its part of each parameter.

The window of a parameter of shape ``(...)`` has shape ``(m, ...)``. Where the parameter is a DTensor, so is the
window, cut along the same dimension (one further on); where replicas of a plain parameter share a window, each process
holds the window of a part of it. Windows are then saved, loaded on another number of processes and copied like
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from leanstep.optimizers.common.sharding import Shard, local, shard_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Columns(NamedTuple):
    """A process's columns of one parameter's window.

    Attributes:
        shape: of this process's part of the parameter.
        groups: process groups; sums over them, one after the other, cover the parameter.
        offset: row-major index of the part's first element in the parameter; None when the part is not one range.
        cut: (dimension, start, length) of the part of a replicated parameter that is this process's; None otherwise.
    """

    shape: tuple[int, ...]
    groups: tuple[Any, ...] = ()
    offset: int | None = 0
    cut: tuple[int, int, int] | None = None

    def part(self, tensor: Tensor) -> Tensor:
        """This process's part of a gradient (or parameter), a plain tensor."""
        held = local(tensor)
        return held if self.cut is None else held.narrow(*self.cut)


def columns_of(param: Tensor, *, spread: bool) -> Columns:
    """Describe the columns held here; ``spread``: replicas of a plain parameter share its window out among them.

    Scalars are not shared out.
    """
    shard: Shard = shard_of(param)
    if hasattr(param, "placements"):
        return Columns(tuple(local(param).shape), shard.groups, shard.offset)
    if not spread or param.dim() == 0:
        return Columns(tuple(param.shape))
    group = torch.distributed.group.WORLD
    assert group is not None
    start, length = part_of(param.shape[0], torch.distributed.get_world_size(), torch.distributed.get_rank())
    offset = start * math.prod(param.shape[1:])
    return Columns((length, *param.shape[1:]), (group,), offset, (0, start, length))


def part_of(rows: int, processes: int, rank: int) -> tuple[int, int]:
    """(start, length) of a process's rows, in torch.chunk's way, which is DTensor's."""
    chunk = -(-rows // processes)
    start = min(rank * chunk, rows)
    return start, min(chunk, rows - start)


def new_columns(
    param: Tensor, columns: Columns, tail: Sequence[int], dtype: torch.dtype, *, window: int | None
) -> Tensor:
    """Zeros ``(window, *tail)``, or ``tail`` without a window, spread over the processes as the parameter is.

    Args:
        tail: sizes of the whole, whose first dimensions are the parameter's first, including every one that is cut.
    """
    lead = () if window is None else (window,)
    device = local(param).device
    if not hasattr(param, "placements"):
        if columns.cut is None:
            return torch.zeros((*lead, *tail), dtype=dtype, device=device)
        from torch.distributed.tensor import Shard as ShardPlacement

        mesh, placements = _world_mesh(device.type), [ShardPlacement(len(lead))]
    else:
        sharded = cast("DTensor", param)
        mesh, placements = sharded.device_mesh, [_moved(p, len(lead)) for p in sharded.placements]
    whole = tuple(param.shape)
    here = [columns.shape[i] if i < len(whole) and columns.shape[i] != whole[i] else n for i, n in enumerate(tail)]
    from torch.distributed.tensor import DTensor as DTensorClass

    shape = torch.Size((*lead, *tail))
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    zeros = torch.zeros((*lead, *here), dtype=dtype, device=device)
    return DTensorClass.from_local(zeros, mesh, placements, run_check=False, shape=shape, stride=tuple(strides))


def _moved(placement: Any, by: int) -> Any:
    """A placement of a parameter's dimension, for a tensor with ``by`` more dimensions in front."""
    if placement.is_replicate():
        return placement
    if hasattr(placement, "split_factor"):
        return type(placement)(placement.dim + by, split_factor=placement.split_factor)
    return type(placement)(placement.dim + by)


def _world_mesh(device_type: str) -> Any:
    """All processes in one row. Reuses their process group."""
    from torch.distributed.device_mesh import DeviceMesh

    group = torch.distributed.group.WORLD
    assert group is not None
    return DeviceMesh.from_group(group, device_type)


def gather(updates: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Whole updates of replicated parameters, from the parts that the processes computed: one all-gather.

    Args:
        updates: this process's parts, of one dtype and device, cut as :func:`columns_of` says.
        params: the parameters, whole here.
    """
    processes = torch.distributed.get_world_size()
    lengths = [[part_of(p.shape[0], processes, rank)[1] for p in params] for rank in range(processes)]
    sizes = [[n * math.prod(p.shape[1:]) for n, p in zip(row, params, strict=True)] for row in lengths]
    longest = max(map(sum, sizes))
    mine = updates[0].new_zeros(longest)
    flat = torch.cat([u.reshape(-1) for u in updates])
    mine[: flat.numel()] = flat
    gathered = mine.new_empty(processes, longest)
    torch.distributed.all_gather_into_tensor(gathered.view(-1), mine)
    pieces = [row[: sum(size)].split(size) for row, size in zip(gathered, sizes, strict=True)]
    return [torch.cat([piece[i] for piece in pieces]).view(p.shape) for i, p in enumerate(params)]
