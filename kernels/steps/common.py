"""Shared by the steps: options, the tensor of a rule's scalars, and the check for non-finite gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import TYPES, call, group_by_dtypes, is_dense


class StepOptions(NamedTuple):
    """Options of a step. Each step reads the fields that its rule has.

    Attributes:
        scalars: 1-D tensor of the rule's numbers on the device, in :func:`compute_dtype`; see :func:`pack`.
        rounding: how the new value is rounded to the parameter's dtype: "nearest", "stochastic", "kahan", "master" or
            "split"; see :mod:`leanstep.kernels.reference.rounding`.
        cautious_scale: [number of tensors], in the dtype of ``scalars``. Entries whose update agrees in sign with the
            gradient are scaled by it; the others do not move (Liang et al., arXiv 2411.16085). None: off.
        decay_where_aligned: decay only entries with update * value >= 0 (Chen et al., arXiv 2510.12402).
        maximize: ascend instead of descend.
        skip_nonfinite: do not update entries (Lion) or whole matrices with a non-finite gradient.
        seeds: int64 [number of tensors] of unsigned 32-bit values, for "stochastic".
        offsets: int64 [number of tensors]: index of each tensor's first element in its whole tensor, if it is a shard.
        runs: int64 [number of tensors, 4], for shards whose elements are no range: (elements of a run, distance of two
            runs, runs of a slab, distance of two slabs) in the whole tensor. Element i is number i % elements of run
            i // elements. None: every tensor is one run.
    """

    scalars: Tensor
    rounding: str = "nearest"
    cautious_scale: Tensor | None = None
    decay_where_aligned: bool = False
    maximize: bool = False
    skip_nonfinite: bool = True
    seeds: Tensor | None = None
    offsets: Tensor | None = None
    runs: Tensor | None = None

    def of(self, selection: int | list[int]) -> StepOptions:
        """Return the options of the tensors at these indices; for one index, the fields per tensor are 0-d."""
        scale, seeds, offsets, runs = (
            None if t is None else t[selection] for t in (self.cautious_scale, self.seeds, self.offsets, self.runs)
        )
        return self._replace(cautious_scale=scale, seeds=seeds, offsets=offsets, runs=runs)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which parameters of ``dtype`` are updated: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def decay_factor(lr: float | Tensor, weight_decay: float) -> float | Tensor:
    """Return 1 - lr * weight_decay in double precision; :func:`pack` rounds it."""
    if isinstance(lr, Tensor):
        return 1.0 - lr.to(torch.float64) * weight_decay
    return 1.0 - lr * weight_decay


def pack(values: list[float | Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pack a rule's numbers, Python numbers or one-element tensors, into one 1-D tensor.

    Kernels read the tensor from memory, so a changed learning rate compiles nothing. The host reads no number from a
    GPU, so it never waits. Python numbers are rounded once, from double precision.
    """
    if torch.compiler.is_compiling():
        wide = [torch.as_tensor(v, dtype=torch.float64, device=device).reshape(()) for v in values]
        return torch.stack(wide).to(dtype)
    numbers: list[float] = []
    on_device: dict[int, Tensor] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor) and value.device == device and device.type != "cpu":
            on_device[index] = value
            numbers.append(0.0)
        else:
            numbers.append(float(value))
    packed = constant(numbers, device, dtype)
    if on_device:
        packed = packed.clone()
        for index, value in on_device.items():
            packed[index : index + 1].copy_(value.reshape(1))
    return packed


# tensors that a captured CUDA graph reads, on the device and in pinned memory, which must outlive the cache
_captured: list[Tensor] = []


class _NotCachedError(Exception):
    """Raised while a graph is captured, for numbers that no earlier step had. The cache keeps no exception."""


def constant(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a 1-D tensor of Python numbers from a small cache. Do not write to it.

    Numbers of an earlier step are not sent to a GPU again, so the step can be captured. A captured graph itself sends
    new ones, at every replay.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        # the cache must not give a tensor made under a dispatch mode (fake tensors, tracing) to a real step
        return torch.tensor(tuple(values), dtype=dtype, device=device)
    try:
        tensors = [_constant(tuple(values), device, dtype)]
    except _NotCachedError:
        tensors = _upload(tuple(values), device, dtype)
    if _is_capturing(device):
        _captured.extend(tensors)
    return tensors[0]


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if _is_capturing(device):  # the tensor is empty until the graph runs, so eager steps must not get it
        raise _NotCachedError
    return _upload(values, device, dtype)[0]


def _upload(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return a tensor of numbers on the device, and the one in the host's memory that it is copied from."""
    host = torch.tensor(values, dtype=dtype, device="cpu")
    if device.type != "cuda":
        return [host.to(device), host]
    host = host.pin_memory()  # from pageable memory the host would wait
    return [host.to(device, non_blocking=True), host]


@torch.no_grad()
def nonfinite_flags(tensors: list[Tensor]) -> Tensor:
    """Return int32 [len(tensors)]: 1 where a tensor has an infinite or NaN entry.

    Args:
        tensors: floating tensors of one device, any shape and strides.

    Raises:
        BackendError: the requested backend cannot run here.

    Notes:
        Reads every tensor once. Does not wait for the device.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.int32, device="cpu")
    if torch.compiler.is_compiling():
        return _nonfinite(tensors)
    if choose("nonfinite_flags", tensors[0].device, *dict.fromkeys([t.dtype for t in tensors])).backend != "cpp":
        return _nonfinite(tensors)
    flags = torch.zeros(len(tensors), dtype=torch.int32, device="cpu")
    dense = [is_dense(t) for t in tensors]
    for indices in group_by_dtypes([tensors], dense):
        group, group_flags = [tensors[i] for i in indices], flags.new_zeros(len(indices))
        macros, sizes = {"TENSOR": TYPES[group[0].dtype]}, [t.numel() for t in group]
        call("steps/nonfinite_flags", "nonfinite_flags", macros, len(group), group, sizes, group_flags)
        flags[indices] = group_flags
    strided = [i for i, walkable in enumerate(dense) if not walkable]
    if strided:
        flags[strided] = _nonfinite([tensors[i] for i in strided])
    return flags


def _nonfinite(tensors: list[Tensor]) -> Tensor:
    return (~torch.isfinite(largest_entries(tensors))).to(torch.int32)


def largest_entries(tensors: list[Tensor]) -> Tensor:
    """Return the largest absolute value of each tensor, in a few launches: NaN if an entry is, 0 without entries."""
    # the norm raises for a tensor without entries
    return torch.stack(torch._foreach_norm([t if t.numel() else t.new_zeros(1) for t in tensors], float("inf")))
