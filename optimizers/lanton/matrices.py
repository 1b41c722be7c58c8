"""LANTON's hidden matrices: nuclear norms of differences and polar factors of momenta.

Both need unsharded matrices. One of the processes that shard a matrix owns it and does its work; owners balance the
cost.
:mod:`leanstep.optimizers.lanton.exchange` gathers matrices on their owners and scatters the results.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels.matrices.newton_schulz import compute_dtype, flops
from leanstep.kernels.steps.common import constant
from leanstep.optimizers.common import matrices as common
from leanstep.optimizers.common.matrices import as_matrices, as_written, block_sizes, row_dim
from leanstep.optimizers.common.sharding import Cut, Shard, local, local_range
from leanstep.optimizers.lanton import exchange, rule

if TYPE_CHECKING:
    from leanstep.optimizers.lanton.step import LayerStep

# elements per batch of matrices (at least one matrix); bounds the memory of a step
_BATCH_ELEMENTS = 2**24

# settings that all matrices of a batch share
_BATCH_SETTINGS = ("foreach", "ns_coefficients", "nuclear")


class MatrixTask(NamedTuple):
    """A sharded matrix with its owner, or a matrix or stack that needs no gathering."""

    layer_index: int  # index of the parameter in the caller's list
    shape: torch.Size  # of the unsharded matrix, or of this process's part of a stack, as stored
    matrix: int | None = None  # index in this process's part of a stack sharded inside its matrices; None otherwise
    first: int = 0  # index of the first matrix in the parameter's stack
    cuts: tuple[Cut, ...] = ()  # of the matrix, in the order of gathering; empty if it needs none
    owner: tuple[int, ...] = ()  # rank of the owner in the group of each cut

    def is_held(self, level: int) -> bool:
        """Whether this process holds a block of the matrix after ``level`` cuts have been undone by gathering."""
        pairs = zip(self.cuts[:level], self.owner, strict=False)
        return all(torch.distributed.get_rank(cut.group) == rank for cut, rank in pairs)

    @property
    def is_mine(self) -> bool:
        """Whether this process does the work."""
        return self.is_held(len(self.cuts))


def is_stack(group: dict[str, Any], norm: str, dims: int) -> bool:
    """Whether a parameter of ``dims`` dimensions is a stack of matrices, each with its own noise estimate."""
    return norm == "rms" and dims == 3 and not group["flatten"]


def matrix_shape(group: dict[str, Any], shape: torch.Size) -> tuple[int, int]:
    """Return (out, in) of a matrix, stack of matrices or convolution of the stored ``shape``."""
    return common.matrix_shape(common.oriented(Shard(shape), group["transposed"], group["flatten"]))


def block_count(group: dict[str, Any], norm: str, shape: torch.Size) -> int:
    """Return the number of blocks of each matrix of a parameter; 1 without the setting ``blocks``."""
    if norm != "rms" or group["blocks"] is None:
        return 1
    return len(block_sizes(group["blocks"], matrix_shape(group, shape)[0]))


def scales_of(layer: LayerStep) -> list[float]:
    """Return :func:`rule.dual_norm_scale` of each block of a parameter's matrices."""
    (m, n), scaling = matrix_shape(layer.group, layer.shard.shape), layer.group["scaling"]
    sizes = block_sizes(layer.group["blocks"], m)
    return [rule.dual_norm_scale("rms", (rows, n), scaling) for rows in sizes]


def index_of_rows(layer: LayerStep) -> Tensor:
    """Return the index of the block of every row of this process's shard of a parameter's matrices."""
    shard, device = layer.shard, local(layer.param).device
    dim = row_dim(shard.shape, layer.group["transposed"], layer.group["flatten"])
    sizes = block_sizes(layer.group["blocks"], shard.shape[dim])
    index = torch.arange(len(sizes), device=device).repeat_interleave(
        constant(sizes, device, torch.int64), output_size=shard.shape[dim]
    )
    return index.narrow(0, *local_range(shard, dim))


def spread(layer: LayerStep, values: Tensor, dims: int) -> Tensor:
    """Give every row of this process's shard the value of its block.

    Args:
        layer: a parameter with blocks.
        values: one per block: of all matrices of this process, or of one matrix.
        dims: dimensions of the tensor, stored as the parameter is, to which the result broadcasts.
    """
    index = index_of_rows(layer)
    rows = values.view(-1, len(scales_of(layer)))[:, index]
    rows = rows if is_stack(layer.group, "rms", dims) else rows[0]
    return rows.unsqueeze(-2) if layer.group["transposed"] else rows.view(*rows.shape, *[1] * (dims - rows.dim()))


def active_blocks(layer: LayerStep, grad: Tensor) -> Tensor:
    """Return above 0 for every block whose rows on this process have a nonzero entry, matrix by matrix."""
    rows = as_matrices(grad, layer.group["transposed"], layer.group["flatten"]).any(dim=-1)
    rows = rows.view(-1, rows.shape[-1]).to(torch.float32)
    counts = rows.new_zeros(rows.shape[0], len(scales_of(layer)))
    return counts.index_add_(1, index_of_rows(layer), rows).flatten()


def _split(whole: Tensor, group: dict[str, Any]) -> list[Tensor]:
    return list(whole.split(block_sizes(group["blocks"], whole.shape[-2]), dim=-2))


# ---- owners of matrices


def tasks_of(layers: Sequence[LayerStep]) -> list[MatrixTask]:
    """Return the matrices of parameters, with their owners.

    A stack sharded along e needs no gathering. Other sharded matrices are assigned, most expensive first, to the
    process with the least cost so far among those that shard them. Costs depend only on shapes and settings, so all
    processes agree.
    """
    tasks: list[MatrixTask] = []
    loads: dict[tuple[Any, ...], dict[tuple[int, ...], float]] = {}  # groups -> ranks in them -> cost
    for i, layer in enumerate(layers):
        shard = layer.shard
        if not shard.cuts:
            tasks.append(MatrixTask(i, shard.shape))
        elif not is_stack(layer.group, layer.norm, layer.param.dim()):
            tasks.append(MatrixTask(i, shard.shape, cuts=shard.cuts))
        elif inner := tuple(cut._replace(dim=cut.dim - 1) for cut in shard.cuts if cut.dim > 0):
            numbers = enumerate(_ranges(shard)[0])
            tasks += [MatrixTask(i, torch.Size(shard.shape[1:]), k, first, inner) for k, first in numbers]
        else:
            held = _ranges(shard)[0]
            tasks.append(MatrixTask(i, torch.Size((len(held), *shard.shape[1:])), first=held.start))
            load = loads.setdefault(shard.groups, _no_load(shard.groups))
            for ranks in load:
                load[ranks] += _cost(layer, torch.Size(exchange.block_shape(shard.shape, shard.cuts, ranks)))
    costs = {k: _cost(layers[t.layer_index], t.shape) for k, t in enumerate(tasks) if t.cuts}
    for k, cost in sorted(costs.items(), key=lambda item: -item[1]):
        groups = tuple(cut.group for cut in tasks[k].cuts)
        load = loads.setdefault(groups, _no_load(groups))
        owner = min(load, key=lambda ranks: load[ranks])
        load[owner] += cost
        tasks[k] = tasks[k]._replace(owner=owner)
    return tasks


def _ranges(shard: Shard) -> tuple[range, ...]:
    assert shard.ranges is not None  # LANTON refuses other shards before a step
    return shard.ranges


def _no_load(groups: tuple[Any, ...]) -> dict[tuple[int, ...], float]:
    """Return a cost of zero for every combination of ranks in the groups."""
    sizes = [torch.distributed.get_world_size(group) for group in groups]
    return dict.fromkeys(itertools.product(*map(range, sizes)), 0.0)


def _cost(layer: LayerStep, shape: torch.Size) -> float:
    count = shape[0] if is_stack(layer.group, "rms", len(shape)) else 1
    m, n = matrix_shape(layer.group, shape)
    sizes = block_sizes(layer.group["blocks"], m)
    return count * sum(flops((rows, n), rule.POLAR_STEPS) for rows in sizes)


# ---- norms and directions


def nuclear_norms(
    layers: Sequence[LayerStep], difference: Callable[[int], Tensor]
) -> Iterator[tuple[MatrixTask, Tensor]]:
    """Yield dual norms of the differences that this process works on; ``difference(i)`` is its shard.

    The norms of a matrix's blocks are adjacent.
    """
    for batch in _whole_matrices(tasks_of(layers), layers, difference):
        group = layers[batch[0][0].layer_index].group
        split = [_split(whole, layers[task.layer_index].group) for task, whole in batch]
        norms = rule.nuclear_norms([m for ms in split for m in ms], group["nuclear"])
        counts = [sum(m.shape[:-2].numel() for m in ms) for ms in split]
        for (task, _), values in zip(batch, norms.split(counts), strict=True):
            layer = layers[task.layer_index]
            noise_scale = rule.noise_scale(layer.group["noise"], layer.group["half_fraction"])
            scales = [scale * noise_scale for scale in scales_of(layer)]
            if len(scales) == 1:
                yield task, values.double() * scales[0]
            else:
                by_block = values.double().view(len(scales), -1).mT
                yield task, (by_block * constant(scales, values.device, torch.float64)).flatten()


def directions(
    layers: Sequence[LayerStep], momentum: Callable[[int], Tensor]
) -> Iterator[list[tuple[MatrixTask, Tensor]]]:
    """Yield this process's shards of polar factors, in batches, shaped as :func:`as_written` shapes the weights.

    ``momentum(i)`` returns this process's shard of B (with Nesterov the average of B and G) for parameter i.
    """
    tasks = tasks_of(layers)
    owned: dict[MatrixTask, Tensor] = {}
    for batch in _whole_matrices(tasks, layers, momentum):
        group = layers[batch[0][0].layer_index].group
        split = [_split(whole, layers[task.layer_index].group) for task, whole in batch]
        polars = iter(rule.polar_factors([m for ms in split for m in ms], group["ns_coefficients"]))
        ready = []
        for (task, _), blocks in zip(batch, split, strict=True):
            polar = next(polars) if len(blocks) == 1 else torch.cat([next(polars) for _ in blocks], dim=-2)
            stored = polar.mT if layers[task.layer_index].group["transposed"] else polar
            if not task.cuts:
                ready.append((task, stored))
            else:
                owned[task] = stored.reshape(task.shape)
        yield ready
    sharded = [task for task in tasks if task.cuts]
    if sharded:
        like = [_like_polar(layers[task.layer_index]) for task in sharded]
        pieces = exchange.scatter(sharded, [owned.get(task) for task in sharded], like)
        stacks = [
            is_stack(layers[t.layer_index].group, "rms", piece.dim()) for t, piece in zip(sharded, pieces, strict=True)
        ]
        yield [(t, as_written(p, stack)) for t, p, stack in zip(sharded, pieces, stacks, strict=True)]


def _like_polar(layer: LayerStep) -> Tensor:
    buffer = local(layer.state["momentum_buffer"])
    if not buffer.is_floating_point():  # codes, whose values have the dtype of updates
        buffer = buffer.new_empty(0, dtype=torch.promote_types(layer.param.dtype, torch.float32))
    return torch.empty(0, dtype=compute_dtype(None, [buffer]), device=buffer.device)


def _whole_matrices(
    tasks: list[MatrixTask], layers: Sequence[LayerStep], local_shard: Callable[[int], Tensor]
) -> Iterator[list[tuple[MatrixTask, Tensor]]]:
    """Yield the unsharded matrices (out, in), or stacks, that this process works on, in batches of one kind.

    ``local_shard(i)`` returns this process's shard for parameter i.
    """
    sharded = [task for task in tasks if task.cuts]
    received: dict[MatrixTask, Tensor | None] = {}
    if sharded:
        shards = {task.layer_index: local_shard(task.layer_index) for task in sharded}
        pieces = [shards[t.layer_index] if t.matrix is None else shards[t.layer_index][t.matrix] for t in sharded]
        received = dict(zip(sharded, exchange.gather(sharded, pieces), strict=True))
        del shards, pieces
    for same_kind in _by_kind(tasks, layers):
        one = layers[same_kind[0].layer_index].group["foreach"] is False
        count = 1 if one else max(1, _BATCH_ELEMENTS // math.prod(same_kind[0].shape))
        for start in range(0, len(same_kind), count):
            batch = []
            for task in same_kind[start : start + count]:
                stored = received.pop(task) if task.cuts else local_shard(task.layer_index)
                assert stored is not None
                group = layers[task.layer_index].group
                batch.append((task, as_matrices(stored, group["transposed"], group["flatten"])))
            yield batch


def _by_kind(tasks: list[MatrixTask], layers: Sequence[LayerStep]) -> list[list[MatrixTask]]:
    sets: dict[Any, list[MatrixTask]] = {}
    for task in tasks:
        if task.is_mine and math.prod(task.shape) > 0:
            layer = layers[task.layer_index]
            settings = tuple(layer.group[name] for name in _BATCH_SETTINGS)
            shape = (len(task.shape), *matrix_shape(layer.group, task.shape))
            sets.setdefault((settings, layer.param.device, layer.param.dtype, shape), []).append(task)
    return list(sets.values())
