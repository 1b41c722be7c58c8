"""LANTON's hidden matrices: nuclear norms of differences and polar factors of momenta, each matrix on one process.

Both need a matrix whole. A matrix that is sharded gets one owner, so that the work is done once and in equal shares;
:mod:`leanstep.optimizers.lanton.exchange` brings it there and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels.matrices.newton_schulz import compute_dtype, flops
from leanstep.optimizers.common.matrices import as_matrices, as_written
from leanstep.optimizers.common.sharding import dtype_of, local
from leanstep.optimizers.lanton import exchange, rule

if TYPE_CHECKING:
    from leanstep.optimizers.lanton.step import LayerStep

# elements of the matrices that are worked on at a time, unless one is larger: bounds the memory of a step
_BATCH_ELEMENTS = 2**24

# settings that must be the same for matrices to be worked on together
_BATCH_SETTINGS = ("foreach", "ns_steps", "ns_coefficients", "ns_dtype", "nuclear")


class MatrixTask(NamedTuple):
    """A matrix, or the stack of matrices that this process holds whole, and the process that works on it."""

    layer_index: int  # of its parameter in the caller's list
    shape: torch.Size  # of the whole matrix or stack, as it is stored
    matrix: int | None = None  # index of a matrix in its stack; None for the parameter as it is held
    first: int = 0  # index of the first matrix within the whole parameter
    dim: int = 0  # the dimension along which it is sharded
    group: Any = None  # the processes that hold the parts; None if this process holds all
    owner: int = 0  # the rank in the group that works on it

    @property
    def mine(self) -> bool:
        """Whether this process works on it."""
        return self.group is None or torch.distributed.get_rank(self.group) == self.owner

    def piece(self, part: Tensor) -> Tensor:
        """This process's part of the matrix, from its part of the parameter."""
        return part if self.matrix is None else part[self.matrix]


def is_stack(group: dict[str, Any], norm: str, dims: int) -> bool:
    """Whether a parameter of so many dimensions is a stack of matrices, with an estimate for each."""
    return norm == "rms" and dims == 3 and not group["flatten"]


def matrix_shape(group: dict[str, Any], shape: torch.Size) -> tuple[int, int]:
    """(out, in) of a stored matrix, stack of matrices or convolution."""
    stack = is_stack(group, "rms", len(shape))
    m, n = (shape[-2], shape[-1]) if stack else (shape[0], math.prod(shape[1:]))
    return (n, m) if group["transposed"] else (m, n)


def scale_of(layer: LayerStep) -> float:
    """The :func:`dual_norm_scale` of a parameter's matrices."""
    return rule.dual_norm_scale("rms", matrix_shape(layer.group, layer.shard.shape), layer.group["scaling"])


# ---- which process works on which matrix


def tasks_of(layers: Sequence[LayerStep]) -> list[MatrixTask]:
    """The matrices of parameters, with their owners.

    Stacks that are sharded along their matrices stay where they are. Other sharded matrices go, most expensive first,
    to the process with the least work so far. That depends on shapes alone, so that all processes agree.

    Raises:
        ValueError: for parameters that are sharded along several dimensions, or in strides.
    """
    tasks: list[MatrixTask] = []
    loads: dict[Any, list[float]] = {}
    for i, layer in enumerate(layers):
        shard, stack = layer.shard, is_stack(layer.group, layer.norm, layer.param.dim())
        if not shard.groups:
            tasks.append(MatrixTask(i, shard.shape))
            continue
        if shard.dim is None:
            raise ValueError(
                "a matrix must be whole or sharded along one dimension over one mesh dimension (fully_shard's way); "
                f"got placements {shard.placements} for shape {tuple(shard.shape)}. Shard it by fully_shard alone, or "
                "put it in a group with norm='sign', whose rule is elementwise."
            )
        group = shard.groups[0]
        world = torch.distributed.get_world_size(group)
        load = loads.setdefault(group, [0.0] * world)
        if stack and shard.dim == 0:
            sizes = exchange.part_sizes(shard.shape[0], world)
            rank = torch.distributed.get_rank(group)
            tasks.append(MatrixTask(i, torch.Size((sizes[rank], *shard.shape[1:])), first=sum(sizes[:rank])))
            for r, size in enumerate(sizes):
                load[r] += _cost(layer, torch.Size((size, *shard.shape[1:])))
        elif stack:
            shape = torch.Size(shard.shape[1:])
            tasks += [MatrixTask(i, shape, k, k, shard.dim - 1, group) for k in range(shard.shape[0])]
        else:
            tasks.append(MatrixTask(i, shard.shape, dim=shard.dim, group=group))
    return _with_owners(tasks, [_cost(layers[t.layer_index], t.shape) for t in tasks], loads) if loads else tasks


def _with_owners(tasks: list[MatrixTask], costs: list[float], loads: dict[Any, list[float]]) -> list[MatrixTask]:
    assigned = list(tasks)
    sharded = [k for k, task in enumerate(tasks) if task.group is not None]
    for k in sorted(sharded, key=lambda k: (-costs[k], k)):
        load = loads[tasks[k].group]
        owner = load.index(min(load))
        load[owner] += costs[k]
        assigned[k] = tasks[k]._replace(owner=owner)
    return assigned


def _cost(layer: LayerStep, shape: torch.Size) -> float:
    count = shape[0] if is_stack(layer.group, "rms", len(shape)) else 1
    return count * flops(matrix_shape(layer.group, shape), layer.group["ns_steps"])


# ---- what is done with them


def nuclear_norms(
    layers: Sequence[LayerStep], difference: Callable[[int], Tensor]
) -> Iterator[tuple[MatrixTask, Tensor]]:
    """Dual norms of the differences that this process works on; ``difference(i)`` is its part of parameter i's."""
    for batch in _whole_matrices(tasks_of(layers), layers, difference):
        group = layers[batch[0][0].layer_index].group
        norms = rule.nuclear_norms([whole for _, whole in batch], group["nuclear"], dtype_of(group["ns_dtype"]))
        counts = [whole.shape[0] if whole.dim() == 3 else 1 for _, whole in batch]
        for (task, _), values in zip(batch, norms.split(counts), strict=True):
            layer = layers[task.layer_index]
            scale = scale_of(layer) * rule.noise_scale(layer.group["noise"], layer.group["half_fraction"])
            yield task, values.double() * scale


def directions(
    layers: Sequence[LayerStep], momentum: Callable[[int], Tensor]
) -> Iterator[list[tuple[MatrixTask, Tensor]]]:
    """Polar factors, a few at a time, this process's part of each, as its weights are written.

    ``momentum(i)`` is this process's part of the tensor whose direction is taken, for parameter i.
    """
    tasks = tasks_of(layers)
    owned: dict[MatrixTask, Tensor] = {}
    for batch in _whole_matrices(tasks, layers, momentum):
        group = layers[batch[0][0].layer_index].group
        polars = rule.polar_factors(
            [whole for _, whole in batch], group["ns_steps"], group["ns_coefficients"], dtype_of(group["ns_dtype"])
        )
        ready = []
        for (task, _), polar in zip(batch, polars, strict=True):
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
    """An empty tensor with the dtype and device of a parameter's polar factor."""
    buffer = local(layer.state["momentum_buffer"])
    return torch.empty(0, dtype=compute_dtype(dtype_of(layer.group["ns_dtype"]), buffer), device=buffer.device)


def _whole_matrices(
    tasks: list[MatrixTask], layers: Sequence[LayerStep], part: Callable[[int], Tensor]
) -> Iterator[list[tuple[MatrixTask, Tensor]]]:
    """The matrices (out, in), or stacks, that this process works on, a few of one kind at a time.

    ``part(i)`` is this process's part for parameter i.
    """
    sharded = [task for task in tasks if task.group is not None]
    arrived: dict[MatrixTask, Tensor | None] = {}
    if sharded:
        parts = {task.layer_index: part(task.layer_index) for task in sharded}
        pieces = [task.piece(parts[task.layer_index]) for task in sharded]
        arrived = dict(zip(sharded, exchange.gather(sharded, pieces), strict=True))
        del parts, pieces
    for alike in _by_kind(tasks, layers):
        one = layers[alike[0].layer_index].group["foreach"] is False
        count = 1 if one else max(1, _BATCH_ELEMENTS // math.prod(alike[0].shape))
        for start in range(0, len(alike), count):
            batch = []
            for task in alike[start : start + count]:
                stored = part(task.layer_index) if task.group is None else arrived.pop(task)
                assert stored is not None
                group = layers[task.layer_index].group
                batch.append((task, as_matrices(stored, group["transposed"], group["flatten"])))
            yield batch


def _by_kind(tasks: list[MatrixTask], layers: Sequence[LayerStep]) -> list[list[MatrixTask]]:
    """The tasks of this process, by settings, device, dtype and shape."""
    sets: dict[Any, list[MatrixTask]] = {}
    for task in tasks:
        if task.mine and math.prod(task.shape) > 0:
            layer = layers[task.layer_index]
            settings = tuple(layer.group[name] for name in _BATCH_SETTINGS)
            shape = (len(task.shape), *matrix_shape(layer.group, task.shape))
            sets.setdefault((settings, layer.param.device, layer.param.dtype, shape), []).append(task)
    return list(sets.values())
