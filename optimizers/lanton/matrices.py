"""LANTON's hidden matrices: nuclear norms of differences and polar factors of momenta.

Both need unsharded matrices. One process owns each sharded matrix and does its work; owners balance the cost.
:mod:`leanstep.optimizers.lanton.exchange` gathers matrices on their owners and scatters the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels.matrices.newton_schulz import compute_dtype, flops
from leanstep.kernels.steps.common import constant
from leanstep.optimizers.common import matrices as common
from leanstep.optimizers.common.matrices import as_matrices, as_written, block_sizes, row_dim
from leanstep.optimizers.common.sharding import Shard, chunk_of, dtype_of, local, local_range
from leanstep.optimizers.lanton import exchange, rule

if TYPE_CHECKING:
    from leanstep.optimizers.lanton.step import LayerStep

# elements per batch of matrices (at least one matrix); bounds the memory of a step
_BATCH_ELEMENTS = 2**24

# settings that all matrices of a batch share
_BATCH_SETTINGS = ("foreach", "ns_steps", "ns_coefficients", "ns_dtype", "nuclear")


class MatrixTask(NamedTuple):
    """A sharded matrix with its owner, or a matrix or stack that needs no gathering."""

    layer_index: int  # index of the parameter in the caller's list
    shape: torch.Size  # of the unsharded matrix or stack, as stored
    matrix: int | None = None  # index in a stack sharded inside its matrices; None otherwise
    first: int = 0  # index of the first matrix in the parameter's stack
    dim: int = 0  # the sharded dimension
    group: Any = None  # the processes that shard it; None if it needs no gathering
    owner: int = 0  # rank of the owner in the group


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
    """Split a matrix (m, n), or each matrix of a stack, into its blocks."""
    return list(whole.split(block_sizes(group["blocks"], whole.shape[-2]), dim=-2))


# ---- owners of matrices


def tasks_of(layers: Sequence[LayerStep]) -> list[MatrixTask]:
    """Return the matrices of parameters, with their owners.

    A stack sharded along e needs no gathering. Other sharded matrices are assigned, most expensive first, to the
    process with the least cost so far. Costs depend only on shapes and settings, so all processes agree.

    Raises:
        ValueError: a parameter is sharded along several dimensions, or has strided placements.
    """
    tasks: list[MatrixTask] = []
    loads: dict[Any, list[float]] = {}
    for i, layer in enumerate(layers):
        shard, stack = layer.shard, is_stack(layer.group, layer.norm, layer.param.dim())
        if not shard.groups:
            tasks.append(MatrixTask(i, shard.shape))
            continue
        if len(shard.cuts) > 1 or shard.ranges is None:
            raise ValueError(
                "LANTON takes matrices that are unsharded or sharded along one dimension over one mesh dimension; "
                f"got placements {shard.placements} for shape {tuple(shard.shape)}. Shard it by fully_shard alone, or "
                "put it in a group with norm='sign', whose rule is elementwise."
            )
        ((dim, group),) = shard.cuts
        world = torch.distributed.get_world_size(group)
        load = loads.setdefault(group, [0.0] * world)
        if stack and dim == 0:
            chunks = [chunk_of(shard.shape[0], world, r) for r in range(world)]
            shapes = [torch.Size((size, *shard.shape[1:])) for _, size in chunks]
            rank = torch.distributed.get_rank(group)
            tasks.append(MatrixTask(i, shapes[rank], first=chunks[rank][0]))
            load[:] = [cost + _cost(layer, shape) for cost, shape in zip(load, shapes, strict=True)]
        elif stack:
            shape = torch.Size(shard.shape[1:])
            tasks += [MatrixTask(i, shape, k, k, dim - 1, group) for k in range(shard.shape[0])]
        else:
            tasks.append(MatrixTask(i, shard.shape, dim=dim, group=group))
    costs = {k: _cost(layers[t.layer_index], t.shape) for k, t in enumerate(tasks) if t.group is not None}
    for k, cost in sorted(costs.items(), key=lambda item: -item[1]):
        load = loads[tasks[k].group]
        owner = load.index(min(load))
        load[owner] += cost
        tasks[k] = tasks[k]._replace(owner=owner)
    return tasks


def _cost(layer: LayerStep, shape: torch.Size) -> float:
    count = shape[0] if is_stack(layer.group, "rms", len(shape)) else 1
    m, n = matrix_shape(layer.group, shape)
    sizes = block_sizes(layer.group["blocks"], m)
    return count * sum(flops((rows, n), layer.group["ns_steps"]) for rows in sizes)


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
        norms = rule.nuclear_norms([m for ms in split for m in ms], group["nuclear"], dtype_of(group["ns_dtype"]))
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
        polars = iter(
            rule.polar_factors(
                [m for ms in split for m in ms],
                group["ns_steps"],
                group["ns_coefficients"],
                dtype_of(group["ns_dtype"]),
            )
        )
        ready = []
        for (task, _), blocks in zip(batch, split, strict=True):
            polar = next(polars) if len(blocks) == 1 else torch.cat([next(polars) for _ in blocks], dim=-2)
            stored = polar.mT if layers[task.layer_index].group["transposed"] else polar
            if task.group is None:
                ready.append((task, stored))
            else:
                owned[task] = stored.reshape(task.shape)
        yield ready
    sharded = [task for task in tasks if task.group is not None]
    if sharded:
        like = [_like_polar(layers[task.layer_index]) for task in sharded]
        pieces = exchange.scatter(sharded, [owned.get(task) for task in sharded], like)
        stacks = [
            is_stack(layers[t.layer_index].group, "rms", piece.dim()) for t, piece in zip(sharded, pieces, strict=True)
        ]
        yield [(t, as_written(p, stack)) for t, p, stack in zip(sharded, pieces, stacks, strict=True)]


def _like_polar(layer: LayerStep) -> Tensor:
    """Return an empty tensor with the dtype and device of a parameter's polar factor."""
    buffer = local(layer.state["momentum_buffer"])
    if not buffer.is_floating_point():  # codes, whose values have the dtype of updates
        buffer = buffer.new_empty(0, dtype=torch.promote_types(layer.param.dtype, torch.float32))
    return torch.empty(0, dtype=compute_dtype(dtype_of(layer.group["ns_dtype"]), buffer), device=buffer.device)


def _whole_matrices(
    tasks: list[MatrixTask], layers: Sequence[LayerStep], local_shard: Callable[[int], Tensor]
) -> Iterator[list[tuple[MatrixTask, Tensor]]]:
    """Yield the unsharded matrices (out, in), or stacks, that this process works on, in batches of one kind.

    ``local_shard(i)`` returns this process's shard for parameter i.
    """
    sharded = [task for task in tasks if task.group is not None]
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
                stored = local_shard(task.layer_index) if task.group is None else received.pop(task)
                assert stored is not None
                group = layers[task.layer_index].group
                batch.append((task, as_matrices(stored, group["transposed"], group["flatten"])))
            yield batch


def _by_kind(tasks: list[MatrixTask], layers: Sequence[LayerStep]) -> list[list[MatrixTask]]:
    """Group the tasks of this process by settings, device, dtype and shape."""
    sets: dict[Any, list[MatrixTask]] = {}
    for task in tasks:
        here = task.group is None or torch.distributed.get_rank(task.group) == task.owner
        if here and math.prod(task.shape) > 0:
            layer = layers[task.layer_index]
            settings = tuple(layer.group[name] for name in _BATCH_SETTINGS)
            shape = (len(task.shape), *matrix_shape(layer.group, task.shape))
            sets.setdefault((settings, layer.param.device, layer.param.dtype, shape), []).append(task)
    return list(sets.values())
