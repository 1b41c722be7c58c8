"""LANTON's hidden matrices: nuclear norms of differences and polar factors of momenta.

Both need unsharded matrices. One of the processes that shard a matrix owns it and does its work; owners balance the
cost.
:mod:`leanstep.optimizers.lanton.exchange` gathers matrices on their owners and scatters the results.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.matrices.newton_schulz import compute_dtype, flops
from leanstep.kernels.steps.common import constant
from leanstep.optimizers.common.matrices import as_matrices, as_written, row_dim
from leanstep.optimizers.common.sharding import local, local_range
from leanstep.optimizers.lanton import exchange, rule
from leanstep.optimizers.lanton.exchange import MatrixTask
from leanstep.optimizers.lanton.layers import LayerStep

# elements per batch of matrices (at least one matrix); bounds the memory of a step. On a device a batch is one of the
# products' batches (newton_schulz_batched): more elements save the host a few operations, and take memory.
_BATCH_ELEMENTS, _DEVICE_ELEMENTS = 2**24, 2**25


def index_of_rows(layer: LayerStep) -> Tensor:
    """Return the index of the block of every row of this process's shard of a parameter's matrices."""
    shard, device, rows = layer.shard, layer.weight.device, layer.form.block_rows
    dim = row_dim(shard.shape, layer.group["transposed"], layer.group["flatten"])
    index = torch.arange(len(rows), device=device).repeat_interleave(
        constant(rows, device, torch.int64), output_size=shard.shape[dim]
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
    rows = values.view(-1, len(layer.form.block_rows))[:, index]
    rows = rows if layer.form.stacked and dims == 3 else rows[0]
    return rows.unsqueeze(-2) if layer.group["transposed"] else rows.view(*rows.shape, *[1] * (dims - rows.dim()))


def active_blocks(layer: LayerStep) -> Tensor:
    """Return above 0 for every block whose rows on this process have a nonzero entry, matrix by matrix."""
    rows = as_matrices(layer.grad, layer.group["transposed"], layer.group["flatten"]).any(dim=-1)
    rows = rows.view(-1, rows.shape[-1]).to(torch.float32)
    counts = rows.new_zeros(rows.shape[0], len(layer.form.block_rows))
    return counts.index_add_(1, index_of_rows(layer), rows).flatten()


def _blocks(batch: Sequence[tuple[MatrixTask, Tensor]], layers: Sequence[LayerStep]) -> list[Tensor]:
    """Return the blocks of every matrix or stack in turn."""
    return [part for task, whole in batch for part in whole.split(layers[task.layer_index].form.block_rows, dim=-2)]


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
        held = shard.ranges[0] if shard.ranges else range(0)  # LANTON refuses shards without ranges before a step
        if not shard.cuts:
            tasks.append(MatrixTask(i, shard.shape))
        elif not layer.form.stacked:
            tasks.append(MatrixTask(i, shard.shape, cuts=shard.cuts))
        elif inner := tuple(cut._replace(dim=cut.dim - 1) for cut in shard.cuts if cut.dim > 0):
            tasks += [MatrixTask(i, torch.Size(shard.shape[1:]), k, first, inner) for k, first in enumerate(held)]
        else:
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


def _no_load(groups: tuple[Any, ...]) -> dict[tuple[int, ...], float]:
    """Return a cost of zero for every combination of ranks in the groups."""
    sizes = [torch.distributed.get_world_size(group) for group in groups]
    return dict.fromkeys(itertools.product(*map(range, sizes)), 0.0)


def _cost(layer: LayerStep, shape: torch.Size) -> float:
    count = shape[0] if layer.form.stacked and len(shape) == 3 else 1
    return count * sum(flops((rows, layer.form.shape[1]), rule.POLAR_STEPS) for rows in layer.form.block_rows)


# ---- norms and directions


def nuclear_norms(
    layers: Sequence[LayerStep], differences: Callable[[list[LayerStep]], list[Tensor]], duals: Tensor
) -> None:
    """Write dual norms of the differences that this process works on into ``duals``, one per row of the step's table.

    ``differences(layers)`` returns this process's shards.
    """
    norms: list[Tensor] = []
    rows: list[int] = []  # of duals
    scales: list[float] = []
    for batch in _whole_matrices(tasks_of(layers), layers, differences):
        group = layers[batch[0][0].layer_index].group
        norms.append(rule.nuclear_norms(_blocks(batch, layers), group["nuclear"]).to(duals))
        for task, whole in batch:
            layer = layers[task.layer_index]
            blocks = len(layer.form.scales)
            first, count = layer.rows.start + task.first * blocks, whole.shape[:-2].numel()
            for k, scale in enumerate(layer.form.scales):
                rows += range(first + k, first + k + count * blocks, blocks)
                scales += [scale * layer.noise_scale] * count
    if norms:
        index, factors = constant(rows, duals.device, torch.int64), constant(scales, duals.device, duals.dtype)
        duals[index] = torch.cat(norms) * factors


def directions(
    layers: Sequence[LayerStep], momenta: Callable[[list[LayerStep]], list[Tensor]]
) -> Iterator[list[tuple[MatrixTask, Tensor]]]:
    """Yield this process's shards of polar factors, in batches, shaped as :func:`as_written` shapes the weights.

    ``momenta(layers)`` returns this process's shards of B (with Nesterov of the average of B and G).
    """
    tasks = tasks_of(layers)
    owned: dict[MatrixTask, Tensor] = {}
    for batch in _whole_matrices(tasks, layers, momenta):
        group = layers[batch[0][0].layer_index].group
        polars = iter(rule.polar_factors(_blocks(batch, layers), group["ns_coefficients"]))
        ready = []
        for task, _ in batch:
            layer = layers[task.layer_index]
            parts = list(itertools.islice(polars, len(layer.form.block_rows)))
            polar = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
            stored = polar.mT if layer.group["transposed"] else polar
            if not task.cuts:
                ready.append((task, stored))
            else:
                owned[task] = stored.reshape(task.shape)
        yield ready
    sharded = [task for task in tasks if task.cuts]
    if sharded:
        like = [_like_polar(layers[task.layer_index]) for task in sharded]
        pieces = exchange.scatter(sharded, [owned.get(task) for task in sharded], like)
        stacks = [layers[t.layer_index].form.stacked and p.dim() == 3 for t, p in zip(sharded, pieces, strict=True)]
        yield [(t, as_written(p, stack)) for t, p, stack in zip(sharded, pieces, stacks, strict=True)]


def _like_polar(layer: LayerStep) -> Tensor:
    buffer = local(layer.state["momentum_buffer"])
    if not buffer.is_floating_point():  # codes, whose values have the dtype of updates
        buffer = buffer.new_empty(0, dtype=torch.promote_types(layer.param.dtype, torch.float32))
    return torch.empty(0, dtype=compute_dtype(None, [buffer]), device=buffer.device)


def _whole_matrices(
    tasks: list[MatrixTask], layers: Sequence[LayerStep], shards: Callable[[list[LayerStep]], list[Tensor]]
) -> Iterator[list[tuple[MatrixTask, Tensor]]]:
    """Yield the unsharded matrices (out, in), or stacks, that this process works on, in batches of one kind.

    ``shards(layers)`` returns this process's shards.
    """
    received: dict[MatrixTask, Tensor | None] = {}
    if sharded := [task for task in tasks if task.cuts]:
        indices = list(dict.fromkeys([task.layer_index for task in sharded]))
        parts = dict(zip(indices, shards([layers[i] for i in indices]), strict=True))
        pieces = [parts[t.layer_index] if t.matrix is None else parts[t.layer_index][t.matrix] for t in sharded]
        received = dict(zip(sharded, exchange.gather(sharded, pieces), strict=True))
        del parts, pieces
    for same_kind in _by_kind(tasks, layers):
        layer = layers[same_kind[0].layer_index]
        elements = _BATCH_ELEMENTS if layer.param.device.type == "cpu" else _DEVICE_ELEMENTS
        count = max(1, (layer.group["foreach"] is not False) * elements // math.prod(same_kind[0].shape))
        for start in range(0, len(same_kind), count):
            tasks = same_kind[start : start + count]
            held = iter(shards([layers[task.layer_index] for task in tasks if not task.cuts]))
            batch = []
            for task in tasks:
                stored = received.pop(task) if task.cuts else next(held)
                assert stored is not None
                group = layers[task.layer_index].group
                batch.append((task, as_matrices(stored, group["transposed"], group["flatten"])))
            yield batch


def _by_kind(tasks: list[MatrixTask], layers: Sequence[LayerStep]) -> list[list[MatrixTask]]:
    sets: dict[Any, list[MatrixTask]] = {}
    for task in tasks:
        if math.prod(task.shape) > 0 and (not task.cuts or task.is_held(len(task.cuts))):
            layer = layers[task.layer_index]
            settings = (layer.group["foreach"], layer.group["ns_coefficients"], layer.group["nuclear"])
            kind = (settings, layer.param.device, layer.param.dtype, len(task.shape), layer.form.shape)
            sets.setdefault(kind, []).append(task)
    return list(sets.values())
