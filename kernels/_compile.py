"""The ``compiled`` backend's machinery: one graph per variant, whatever the shapes, and flat views to feed it.

A reference function is compiled once per combination of dtypes and flags. Every tensor is handed to it as a flat
``(rows, 64)`` view: the inner 64 is static, so the C++ loop has no tail, and ``rows`` is dynamic, so one graph serves
every size. What does not fill a row, and what cannot be flattened in storage order, runs through the same function
uncompiled. Compiled code is cached on disk by torch.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

LANES = 64

# the number of threads is read when the loop runs, not frozen into the code
_DYNAMIC_THREADS = {"cpp.dynamic_threads": True}
# materialise every intermediate: a sum over a stored result is then taken in the loop that stores it
ONE_LOOP = {"realize_reads_threshold": 0, "realize_opcount_threshold": 0}
# a value rounded to bf16 and widened again is the rounded value, not the one before
EXACT_CASTS = {"emulate_precision_casts": True}

_variants: dict[Hashable, Callable[..., Any]] = {}


def variant(
    function: Callable[..., Any], key: Hashable, flat: Sequence[Tensor | None], options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """``function`` compiled for ``key`` (dtypes and flags), from a table.

    Each variant gets a code object of its own: dynamo limits the graphs of one code object, and a process may well
    use many dtypes and flags. ``flat`` are the views of the coming call: their rows are marked as varying.
    """
    name = (function.__module__, function.__qualname__, key)
    if name not in _variants:
        twin = types.FunctionType(
            function.__code__.replace(co_name=f"{function.__name__}_{len(_variants)}"),
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        twin.__kwdefaults__ = function.__kwdefaults__
        _variants[name] = torch.compile(twin, fullgraph=True, options={**_DYNAMIC_THREADS, **(options or {})})
        for tensor in flat:
            for dim in range(0 if tensor is None else tensor.dim() - 1):
                if tensor is not None and tensor.shape[dim] != 1:
                    torch._dynamo.mark_dynamic(tensor, dim)
    return _variants[name]


def alias(tensor: Tensor, shape: tuple[int, ...], start: int = 0) -> Tensor:
    """A contiguous alias of a tensor's storage in ``shape``, beginning ``start`` elements into it.

    Not a torch view: dynamo would guard on the shape of a view's base and compile again for every new one.
    """
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return fresh.set_(tensor.untyped_storage(), tensor.storage_offset() + start, shape, tuple(strides))


def is_dense(tensor: Tensor) -> bool:
    """True when the elements fill one stretch of memory without holes or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(tensors: Sequence[Tensor | None], *, row_major: bool) -> bool:
    """True when all tensors can be walked in storage order together (and in row-major order, if asked)."""
    present = [t for t in tensors if t is not None]
    if all(t.is_contiguous() for t in present):
        return True
    if row_major:
        return False
    first = present[0]
    return is_dense(first) and all(t.stride() == first.stride() for t in present[1:])


def share_layout(tensors: Sequence[Tensor | None], *, row_major: bool) -> bool:
    """:func:`same_layout`, and all tensors lie in storages of their own, as the compiler assumes of what it writes."""
    present = [t for t in tensors if t is not None]
    if len({t.untyped_storage().data_ptr() for t in present}) < len(present):
        return False
    return same_layout(present, row_major=row_major)


def alike(columns: Sequence[Sequence[Tensor]], chosen: Sequence[bool]) -> list[list[int]]:
    """Positions of the chosen rows of ``columns``, those with the same dtypes together, in order."""
    sets: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i, row in enumerate(zip(*columns, strict=True)):
        if chosen[i]:
            sets.setdefault(tuple(t.dtype for t in row), []).append(i)
    return list(sets.values())
