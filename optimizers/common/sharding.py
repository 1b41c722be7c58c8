"""Shards of parameters, gradients and states, and sums over the processes that hold them.

FSDP2 (``fully_shard``) shards parameters as DTensors, along dimension 0 by default. Elementwise rules need only this
process's shard. SinkGD also needs the column sums of its matrices, or the row sums where columns are sharded.

A rule that needs sums is a generator (:data:`Steps`): it yields the tensors to be reduced, and goes on when they hold
the result. :func:`together` advances many such rules side by side and :func:`run` answers what all of them ask at one
time with one all-reduce, so that a whole model costs as many as its longest rule. Where nothing is sharded nothing is
yielded, the rules run one after the other, and nothing that they return is used: torch.compile would lose it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from leanstep._torch import is_dtensor, join_parts, local_part
from leanstep.kernels.steps.common import constant

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

# classes of tensors that are not distributed and wrap no others
_ORDINARY = (Tensor, torch.nn.Parameter)


class Shard(NamedTuple):
    """Describes the shard of a parameter that this process holds."""

    shape: torch.Size  # of the whole parameter
    dim: int | None = None  # the sharded dimension; None if this process holds all, or if there are several
    offset: int | None = 0  # row-major index of the shard's first element in the whole; None if it is not one range
    groups: tuple[Any, ...] = ()  # sums over these process groups, one after the other, cover the whole
    placements: Any = None  # for messages


class Reduction(NamedTuple):
    """A tensor to be summed (or its maximum taken) over a process group, in place."""

    tensor: Tensor
    group: Any
    op: str = "sum"


# a rule that asks for reductions while it runs, and returns a T
Steps = Generator[list[Reduction], None, T]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor unchanged."""
    return tensor if type(tensor) in _ORDINARY else local_part(tensor)


def shard_of(param: Tensor) -> Shard:
    """Describe this process's part of ``param``.

    Raises:
        ValueError: for a DTensor that holds partial sums.
    """
    if type(param) in _ORDINARY or not is_dtensor(param):
        return Shard(param.shape)
    from torch.distributed.tensor import Shard as ShardPlacement

    sharded_param = cast("DTensor", param)
    mesh, placements = sharded_param.device_mesh, sharded_param.placements
    if any(p.is_partial() for p in placements):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} holds partial sums ({placements}); leanstep optimizers take "
            "parameters that are replicated or sharded: redistribute it first"
        )
    sharded = [i for i, p in enumerate(placements) if not p.is_replicate() and mesh.size(i) > 1]
    if not sharded:
        return Shard(param.shape, placements=placements)
    groups = tuple(mesh.get_group(i) for i in sharded)
    placement = placements[sharded[0]]
    if len(sharded) > 1 or type(placement) is not ShardPlacement:
        return Shard(param.shape, None, None, groups, placements)
    if placement.dim != 0:
        return Shard(param.shape, placement.dim, None, groups, placements)
    rows = param.shape[0]
    chunk = -(-rows // mesh.size(sharded[0]))  # DTensor cuts like torch.chunk
    start = min(mesh.get_local_rank(sharded[0]) * chunk, rows)
    return Shard(param.shape, 0, start * math.prod(param.shape[1:]), groups, placements)


def has_memory(tensor: Tensor) -> bool:
    """Whether the elements of a tensor, or of this process's shard of it, lie in memory that kernels can address.

    Classes made by ``torch.Tensor._make_wrapper_subclass``, as of quantized weights, hold other tensors instead.
    Torch's own stand-ins of tracing and estimation count as having memory.
    """
    if torch.compiler.is_compiling():
        return True
    kind = type(local(tensor))
    return kind in _ORDINARY or kind.__module__.startswith("torch._subclasses.")


def readable(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, which kernels can read: a plain copy for classes without memory."""
    part = local(tensor)
    if has_memory(part):
        return part
    copy = torch.empty(part.shape, dtype=part.dtype, device=part.device)
    copy.copy_(part)  # not returned directly: the class of ``part`` decides what copy_ returns
    return copy


def store(parts: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy shards that were updated back into their tensors, where :func:`readable` had to copy them."""
    for part, tensor in zip(parts, tensors, strict=True):
        held = local(tensor)
        if held is not part and not has_memory(held):
            held.copy_(part)


def plain(tensor: Tensor) -> Tensor:
    """Return a plain tensor with the same elements and placements: a copy for classes without memory."""
    if has_memory(tensor):
        return tensor
    part = readable(tensor)
    return join_parts(part, tensor, tensor.shape) if is_dtensor(tensor) else part


def new_state(param: Tensor, dtype: torch.dtype | str | None = None) -> Tensor:
    """Return zeros like the parameter, sharded like it, in ``dtype`` (a dtype or its name) or the parameter's."""
    return torch.zeros_like(plain(param), dtype=dtype_of(dtype) or param.dtype, memory_format=torch.preserve_format)


def dtype_of(setting: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that a setting of a group names.

    Groups hold names, such as "bfloat16": ``torch.distributed.checkpoint`` gathers numbers, strings and tensors of a
    state (``StateDictOptions(full_state_dict=True)``), and fails on a ``torch.dtype``.
    """
    return getattr(torch, setting) if isinstance(setting, str) else setting


# classes without memory that have been copied to a plain tensor and back
_copyable: set[type] = set()


def check_class(owner: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError for a tensor of a class that can neither be addressed nor copied; nothing has been changed."""
    if type(local(tensor)) in _copyable:
        return
    part = local(tensor).detach()
    try:
        part.clone().copy_(readable(part))
    except Exception as error:
        raise TypeError(
            f"{owner}: {name} is a {type(part).__name__}, which cannot be copied to a plain tensor and back "
            f"({type(error).__name__}: {error}); expected torch.Tensor, Parameter, a DTensor of them, or a class of "
            "tensors with clone and copy_. Nothing was updated. Leave it to another optimizer, or freeze it."
        ) from error
    _copyable.add(type(part))


def placed_like(grad: Tensor, param: Tensor) -> Tensor:
    """Redistribute a gradient as its parameter is, if it is not already. The given gradient is not changed.

    Tensor parallelism leaves other placements: the gradient of a row-wise embedding is replicated, that of a norm
    between sequence-parallel layers is a partial sum. All processes have to call this: it communicates.
    """
    placements = getattr(param, "placements", None)
    if placements is None or getattr(grad, "placements", placements) == placements:
        return grad
    if any(p.is_partial() for p in placements):
        return grad  # shard_of refuses such a parameter
    return cast("DTensor", grad).redistribute(cast("DTensor", param).device_mesh, placements)


def offsets_of(shards: Sequence[Shard], device: torch.device) -> Tensor:
    """Return where each shard starts in its whole tensor, int64 [n], for stochastic rounding.

    Raises:
        ValueError: for a shard that is not one range of the whole.
    """
    for shard in shards:
        if shard.offset is None:
            raise ValueError(
                f"rounding='stochastic' needs parameters that are whole or sharded along dimension 0; got placements "
                f"{shard.placements} for shape {tuple(shard.shape)}. Use rounding='kahan' or 'master'."
            )
    return constant([s.offset or 0 for s in shards], device, torch.int64)


def sum_over_shards(values: Tensor, shards: Sequence[Shard]) -> Steps[None]:
    """Sum ``values`` [n], one number per tensor, over the processes that hold its shards, in place."""
    for level in range(max([len(s.groups) for s in shards])):
        by_group: dict[Any, list[int]] = {}
        for i, shard in enumerate(shards):
            if len(shard.groups) > level:
                by_group.setdefault(shard.groups[level], []).append(i)
        sums = [(indices, values if len(indices) == len(shards) else values[indices]) for indices in by_group.values()]
        yield [Reduction(total, group) for group, (_, total) in zip(by_group, sums, strict=True)]
        for indices, total in sums:
            if total is not values:
                values[indices] = total


def all_reduce_flags(flags: Tensor, shards: Sequence[Shard]) -> Steps[None]:
    """Set a tensor's flag on all processes if one of them has set it for its shard, in place."""
    if not any(s.groups for s in shards):
        return
    total = flags.to(torch.float32)  # in fp32 they travel with other sums
    yield from sum_over_shards(total, shards)
    flags.copy_(total > 0)


def together(rules: Sequence[Steps[T]]) -> Steps[list[T]]:
    """Advance several rules side by side; what they ask for at one time is asked for together."""
    if torch.compiler.is_compiling():  # tracing follows `yield from`, and loses what is returned
        for rule in rules:
            yield from rule
        return []
    results: dict[int, T] = {}
    while len(results) < len(rules):
        asked: list[Reduction] = []
        for i, rule in enumerate(rules):
            if i in results:
                continue
            try:
                asked += next(rule)
            except StopIteration as end:
                results[i] = end.value
        if asked:
            yield asked
    return [results[i] for i in range(len(rules))]


def run(steps: Steps[Any]) -> None:
    """Run a rule to its end, reducing what it asks for."""
    for asked in steps:
        _reduce(asked)


def _reduce(asked: list[Reduction]) -> None:
    """One all-reduce for every (process group, operation, dtype): on the tensor itself, or on a flat copy of many."""
    sets: dict[Any, list[Tensor]] = {}
    for tensor, group, op in asked:
        sets.setdefault((group, op, tensor.dtype, tensor.device), []).append(tensor)
    for (group, op, *_), tensors in sets.items():
        alone = len(tensors) == 1 and tensors[0].is_contiguous()
        flat = tensors[0] if alone else torch.cat([t.reshape(-1) for t in tensors])
        kind = torch.distributed.ReduceOp.MAX if op == "max" else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(flat, op=kind, group=group)
        if not alone:
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view(tensor.shape))
