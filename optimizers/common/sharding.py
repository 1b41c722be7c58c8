"""Shards of parameters, gradients and states, and reductions over the processes that hold them.

FSDP2 (``fully_shard``) shards parameters as DTensors, along dimension 0 by default. Elementwise rules need only the
shard of this process. SinkGD also needs column sums of its matrices, or row sums if columns are sharded.

An update is a generator (:data:`Reducer`). It yields the tensors to reduce, and continues when they hold the result.
:func:`together` advances many generators in lockstep. :func:`run` merges their requests of one round into one
all-reduce. A model therefore needs as many all-reduces as the generator with the most rounds. Unsharded parameters
yield nothing. torch.compile traces only this case, and loses the return values of generators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from leanstep._torch import is_dtensor, join_parts, local_part
from leanstep.kernels.steps.common import compute_dtype, constant

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

# tensor classes that are neither distributed nor wrap other tensors
_ORDINARY = (Tensor, torch.nn.Parameter)


class Cut(NamedTuple):
    """A mesh dimension that shards a parameter."""

    dim: int  # the sharded dimension of the parameter
    group: Any  # the processes along the mesh dimension


class Shard(NamedTuple):
    """Metadata of this process's shard of a parameter."""

    shape: torch.Size  # of the unsharded parameter
    cuts: tuple[Cut, ...] = ()  # undone in this order, they give the unsharded parameter; empty if it is unsharded
    ranges: tuple[range, ...] | None = None  # indices of a sharded parameter that this process holds; None: no block
    placements: Any = None  # for error messages

    @property
    def groups(self) -> tuple[Any, ...]:
        """Process groups: sums over all of them in turn are sums over the whole parameter."""
        return tuple(cut.group for cut in self.cuts)


class Reduction(NamedTuple):
    """A request for an in-place all-reduce ("sum" or "max") over a process group."""

    tensor: Tensor
    group: Any
    op: str = "sum"


# a generator that yields requests for reductions, continues when they are done, and returns a T
Reducer = Generator[list[Reduction], None, T]


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, and any other tensor unchanged."""
    return tensor if type(tensor) in _ORDINARY else local_part(tensor)


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return :func:`local` of every tensor."""
    return [tensor if type(tensor) in _ORDINARY else local_part(tensor) for tensor in tensors]


def facts_of(param: Tensor, grad: Tensor, state: dict[str, Any]) -> list[Any] | None:
    """Return all that the answers of :class:`Prepared` depend on, beside the group; None if they may change otherwise.

    Addresses and strides are not among them: no answer has a view or an address.
    """
    if type(param) not in _ORDINARY or type(grad) not in _ORDINARY or param.is_neg() or grad.is_neg():
        return None  # kernels need a copy of these, which is made at every step
    facts = [param.shape, param.dtype, param.device, grad.shape, grad.dtype, grad.device, grad.layout]
    for key, value in state.items():
        if type(value) not in _ORDINARY:
            return None
        facts += [key, value.shape, value.dtype, value.device]
    return facts


def shard_of(param: Tensor, name: Callable[[], str] | None = None) -> Shard:
    """Return the metadata of this process's shard of ``param``.

    Raises:
        ValueError: for a DTensor with partial placements; the message has the parameter's ``name()``.
    """
    if type(param) in _ORDINARY or not is_dtensor(param):
        return Shard(param.shape)
    sharded_param = cast("DTensor", param)
    mesh, placements = sharded_param.device_mesh, sharded_param.placements
    if any(p.is_partial() for p in placements):
        raise ValueError(
            f"{name() if name else f'a parameter of shape {tuple(param.shape)}'} holds partial sums ({placements}); "
            "leanstep optimizers take parameters that are replicated or sharded: redistribute it first. Nothing was "
            "changed."
        )
    order = _gathering_order(placements, [i for i in range(mesh.ndim) if mesh.size(i) > 1])
    cuts = tuple(Cut(cast("Any", placements[i]).dim, mesh.get_group(i)) for i in order)
    ranges = [range(n) for n in param.shape]
    for i in reversed(order):
        dim = cast("Any", placements[i]).dim
        start, length = chunk_of(len(ranges[dim]), mesh.size(i), mesh.get_local_rank(i))
        ranges[dim] = ranges[dim][start : start + length]
    is_block = tuple(map(len, ranges)) == tuple(local(param).shape) and _strides_are_undone(mesh, placements)
    return Shard(param.shape, cuts, tuple(ranges) if is_block else None, placements)


def _gathering_order(placements: Sequence[Any], mesh_dims: Sequence[int]) -> list[int]:
    """Return the mesh dimensions that shard a tensor, in the order in which concatenation gives the unsharded tensor.

    Mesh dimensions shard from left to right, but one with a ``_StridedShard`` after those on its right: fully_shard
    divides what tensor parallelism has sharded.
    """
    order = [i for i in mesh_dims if not placements[i].is_replicate()]
    for dim in {placements[i].dim for i in order}:
        positions = [k for k, i in enumerate(order) if placements[i].dim == dim]
        along_dim = [order[k] for k in positions]
        strided = [i for i in along_dim if hasattr(placements[i], "split_factor")]
        undone = strided + [i for i in reversed(along_dim) if i not in strided]
        for k, i in zip(positions, undone, strict=True):
            order[k] = i
    return order


def _strides_are_undone(mesh: Any, placements: Sequence[Any]) -> bool:
    """Whether the strides of every ``_StridedShard`` are the shards of mesh dimensions on its right.

    Otherwise (after a redistribution) a shard is several ranges of a dimension, with gaps.
    """
    for i, placement in enumerate(placements):
        right = [j for j in range(i + 1, mesh.ndim) if not placements[j].is_replicate()]
        shards = math.prod([mesh.size(j) for j in right if placements[j].dim == getattr(placement, "dim", None)])
        if mesh.size(i) > 1 and getattr(placement, "split_factor", shards) != shards:
            return False
    return True


def first_index(shard: Shard) -> int | None:
    """Return the row-major index of a shard's first element; None if its elements are no range of these indices."""
    if not shard.cuts:
        return 0
    whole_rows = [len(indices) == n for indices, n in zip((shard.ranges or ())[1:], shard.shape[1:], strict=False)]
    if shard.ranges is None or not all(whole_rows):
        return None
    return shard.ranges[0].start * math.prod(shard.shape[1:])


def chunk_of(length: int, processes: int, rank: int) -> tuple[int, int]:
    """Return (start, length) of a process's rows, split like torch.chunk and DTensor."""
    chunk = -(-length // processes)
    start = min(rank * chunk, length)
    return start, min(chunk, length - start)


def local_range(shard: Shard, dim: int) -> tuple[int, int]:
    """Return (start, length) of this process's indices along a dimension of a parameter."""
    if not shard.cuts:
        return 0, shard.shape[dim]
    assert shard.ranges is not None
    return shard.ranges[dim].start, len(shard.ranges[dim])


def has_memory(tensor: Tensor) -> bool:
    """Whether kernels can address the elements of a tensor (of the local shard of a DTensor).

    They cannot for wrapper subclasses (``torch.Tensor._make_wrapper_subclass``), such as quantized weights, and for
    tensors with torch's negative bit, whose memory has the other sign: autograd makes such gradients of the imaginary
    parts of conjugates. Fake and functional tensors of torch's tracing count as addressable.
    """
    if torch.compiler.is_compiling():
        return True
    shard = local(tensor)
    kind = type(shard)
    return (kind in _ORDINARY and not shard.is_neg()) or kind.__module__.startswith("torch._subclasses.")


def readable(tensor: Tensor) -> Tensor:
    """Return the local shard of a tensor; a plain copy if kernels cannot address it."""
    shard = local(tensor)
    if has_memory(shard):
        return shard
    copy = torch.empty(shard.shape, dtype=shard.dtype, device=shard.device)
    copy.copy_(shard)  # may return another class than that of ``copy``
    return copy


def readables(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return :func:`readable` of every tensor."""
    if torch.compiler.is_compiling():
        return locals_of(tensors)
    return [t if type(t) in _ORDINARY and not t.is_neg() else readable(t) for t in tensors]


def store(shards: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy updated shards back into their tensors where :func:`readable` made copies."""
    for shard, tensor in zip(shards, tensors, strict=True):
        if shard is not tensor and shard is not (target := local(tensor)) and not has_memory(target):
            target.copy_(shard)


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor that kernels can address, with the same elements and placements; a copy if need be."""
    if has_memory(tensor):
        return tensor
    shard = readable(tensor)
    return join_parts(shard, tensor, tensor.shape) if is_dtensor(tensor) else shard


def new_state(param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return zeros with a parameter's shape and placements; ``dtype`` defaults to its own."""
    return torch.zeros_like(plain(param), dtype=dtype or param.dtype, memory_format=torch.preserve_format)


def new_vectors(param: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Return zeros of ``shape``: [n], one vector per matrix, or [e, n] for a stack of e matrices.

    Vectors are replicated, but mesh dimensions that shard a stack along e shard its vectors, too.
    """
    weight, shard = local(param), shard_of(param)
    here = (weight.shape[0], shape[1]) if len(shape) == 2 else shape
    vectors = torch.zeros(here, device=weight.device, dtype=dtype or compute_dtype(param.dtype))
    if len(shape) == 1 or all(cut.dim != 0 for cut in shard.cuts):
        return vectors
    from torch.distributed.tensor import Replicate

    placements = [p if getattr(p, "dim", None) == 0 else Replicate() for p in shard.placements]
    return join_parts(vectors, param, shape, placements)


def dtype_of(setting: torch.dtype | str | None) -> torch.dtype | None:
    """Convert a dtype's name, such as "bfloat16", to the dtype.

    Groups store names, because ``torch.distributed.checkpoint`` cannot gather a ``torch.dtype``
    (``StateDictOptions(full_state_dict=True)``).
    """
    if setting == "fp8":
        return torch.float8_e4m3fn
    return getattr(torch, setting) if isinstance(setting, str) else setting


# wrapper classes that check_class has accepted
_copyable: set[type] = set()


def check_class(owner: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError if a tensor's class cannot be copied to a plain tensor and back."""
    if type(local(tensor)) in _copyable:
        return
    shard = local(tensor).detach()
    try:
        shard.clone().copy_(readable(shard))
    except Exception as error:
        raise TypeError(
            f"{owner}: {name} is a {type(shard).__name__}, which cannot be copied to a plain tensor and back "
            f"({type(error).__name__}: {error}); expected torch.Tensor, Parameter, a DTensor of them, or a class of "
            "tensors with clone and copy_. Nothing was updated. Leave it to another optimizer, or freeze it."
        ) from error
    _copyable.add(type(shard))


def placed_like(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient with its parameter's placements. The given gradient is not changed.

    Tensor parallelism leaves other placements: a row-wise embedding has a replicated gradient, and a norm between
    sequence-parallel layers a partial one. Communicates, so all processes must call it.
    """
    placements = getattr(param, "placements", None)
    if placements is None or getattr(grad, "placements", placements) == placements:
        return grad
    if any(p.is_partial() for p in placements):
        return grad  # shard_of refuses such a parameter
    return cast("DTensor", grad).redistribute(cast("DTensor", param).device_mesh, placements)


def runs_of(shard: Shard) -> tuple[int, ...] | None:
    """Return where the elements of a shard are in the parameter; None if four numbers do not say it.

    See ``runs`` of :class:`leanstep.kernels.StepOptions`. They suffice for blocks that are smaller than the parameter
    along dimension 0 and up to two others. The length and the count of runs are below 2**31, as kernels expect.
    """
    if not shard.cuts:
        return math.prod(shard.shape) or 1, 0, 1, 0
    if shard.ranges is None:
        return None
    sizes, shape = [len(indices) for indices in shard.ranges], shard.shape
    inner = [dim for dim in range(1, len(shape)) if sizes[dim] < shape[dim]]
    if not math.prod(sizes) or not inner:
        return math.prod(sizes) or 1, 0, 1, 0
    first, last = inner[0], inner[-1]
    length, distance, count = math.prod(sizes[last:]), math.prod(shape[last:]), math.prod(sizes[first:last])
    if len(inner) == 1:
        count = math.prod(sizes[:last])
    if len(inner) > 2 or max(length, count) >= 2**31:
        return None
    return length, distance, count, math.prod(shape[first:])


def check_indices(setting: str, name: str, shard: Shard, *, instead: str) -> None:
    """Raise ValueError if ``setting`` needs the index of every element, and :func:`runs_of` does not have it.

    ``instead``: what the user may take in its place.
    """
    if runs_of(shard) is None:
        raise ValueError(
            f"{setting} takes parameters whose shards are blocks, cut along dimension 0 and two others at most; got "
            f"{name} with placements {shard.placements}; nothing was changed. Redistribute the parameter, or use "
            f"{instead}."
        )


def positions_of(shards: Sequence[Shard], device: torch.device) -> dict[str, Any]:
    """Return ``offsets`` and ``runs`` of :class:`leanstep.kernels.StepOptions`, for stochastic rounding.

    The shards are those that :func:`check_indices` accepts. ``runs`` is None if all are ranges of rows.
    """
    runs, offsets = None, [_offset(shard) if shard.cuts else 0 for shard in shards]
    if any([shard.cuts and first_index(shard) is None for shard in shards]):
        numbers = [number for shard in shards for number in runs_of(shard) or ()]
        runs = constant(numbers, device, torch.int64).view(-1, 4)
    return {"offsets": constant(offsets, device, torch.int64), "runs": runs}


def _offset(shard: Shard) -> int:
    """Return the row-major index of a block's first element."""
    indices = [(r.start, math.prod(shard.shape[dim + 1 :])) for dim, r in enumerate(shard.ranges or ())]
    return sum(start * stride for start, stride in indices)


def sum_over_shards(values: Tensor, shards: Sequence[Shard]) -> Reducer[None]:
    """Sum ``values`` [n, ...], one entry per tensor, over the processes that shard the tensor; in place."""
    for level in range(max([len(s.cuts) for s in shards])):
        by_group: dict[Any, list[int]] = {}
        for i, shard in enumerate(shards):
            if len(shard.cuts) > level:
                by_group.setdefault(shard.cuts[level].group, []).append(i)
        sums = [(indices, values if len(indices) == len(shards) else values[indices]) for indices in by_group.values()]
        yield [Reduction(total, group) for group, (_, total) in zip(by_group, sums, strict=True)]
        for indices, total in sums:
            if total is not values:
                values[indices] = total


def all_reduce_flags(flags: Tensor, shards: Sequence[Shard]) -> Reducer[None]:
    """Set a tensor's flag on all processes if any process has set it for its shard; in place."""
    if not any(s.groups for s in shards):
        return
    total = flags.to(torch.float32)  # fp32, to share an all-reduce with other sums
    yield from sum_over_shards(total, shards)
    flags.copy_(total > 0)


def together(rules: Sequence[Reducer[T]]) -> Reducer[list[T]]:
    """Advance several generators in lockstep, and yield their requests of each round as one list."""
    if torch.compiler.is_compiling():  # tracing supports `yield from`, but loses return values
        for rule in rules:
            yield from rule
        return []
    results: dict[int, T] = {}
    while len(results) < len(rules):
        requests: list[Reduction] = []
        for i, rule in enumerate(rules):
            if i in results:
                continue
            try:
                requests += next(rule)
            except StopIteration as end:
                results[i] = end.value
        if requests:
            yield requests
    return [results[i] for i in range(len(rules))]


def run(steps: Reducer[Any]) -> None:
    """Run a generator to its end, and perform the reductions that it requests."""
    for requests in steps:
        _reduce(requests)


def _reduce(requests: list[Reduction]) -> None:
    """Perform one all-reduce per (process group, operation, dtype, device), on a flat copy of several tensors."""
    sets: dict[Any, list[Tensor]] = {}
    for tensor, group, op in requests:
        sets.setdefault((group, op, tensor.dtype, tensor.device), []).append(tensor)
    for (group, op, *_), tensors in sets.items():
        alone = len(tensors) == 1 and tensors[0].is_contiguous()
        flat = tensors[0] if alone else torch.cat([t.reshape(-1) for t in tensors])
        kind = torch.distributed.ReduceOp.MAX if op == "max" else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(flat, op=kind, group=group)
        if not alone:
            for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(total.view(tensor.shape))
