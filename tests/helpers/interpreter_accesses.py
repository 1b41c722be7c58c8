"""Check every access of kernels in Triton's interpreter: inside the tensors, and no two programs in one place.

A launch may access the tensors of its arguments, and tensors whose address a table among its arguments holds. It fails
with `AccessError` after the first access elsewhere, and at its end if two programs stored to one byte, or one program
read what another stored. Atomics may share a place with atomics. So may stores to an argument named `flags`, of one
value by all programs.
"""

from collections import defaultdict

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

SHARED = ("flags",)


class AccessError(AssertionError):
    """A kernel accessed memory that is not its own, or raced with itself."""


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of the first byte of a tensor and of the first one behind it."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = _data_ptr(tensor)
    return first, first + (steps + 1) * tensor.itemsize if tensor.numel() else first


_data_ptr = torch.Tensor.data_ptr
# the storage and the longest tensor that were last seen at an address: what a table that holds the address means
_seen: dict[int, tuple[StorageWeakRef, tuple[int, int]]] = {}


def forget_the_dead() -> None:
    """Drop what was seen of memory that was freed since: another tensor may lie there, around the same address."""
    for address in [address for address, (owner, _) in _seen.items() if owner.expired()]:
        del _seen[address]


def behind(value: int) -> tuple[int, int] | None:
    """The range that a table means by a value: a tensor, or the rest of the last one that the value lies in."""
    if value in _seen:
        return _seen[value][1]
    # sizes and counts are small
    inside = (end for _, (first, end) in reversed(_seen.values()) if first < value < end)
    return next(((value, end) for end in inside), None) if value > 2**32 else None


launches: dict[str, int] = defaultdict(int)
_current: "Accesses | None" = None


class Accesses:
    """All accesses of one launch."""

    def __init__(self, name: str, arguments: dict[str, object]) -> None:
        self.name, self.program = name, 0
        tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
        ranges = [extent(tensor) for tensor in tensors.values()]
        forget_the_dead()
        for tensor in tensors.values():
            if tensor.dtype == torch.int64 and tensor.numel():
                ranges += [found for value in set(tensor.flatten().tolist()) if (found := behind(value))]
        self.ranges = np.array(sorted(set(ranges))).reshape(-1, 2)
        self.shared = [extent(tensors[key]) for key in SHARED if key in tensors]
        # the bytes and the program of each access, by kind
        self.bytes = defaultdict(list)
        self.values: dict[int, object] = {}

    def add(self, kind: str, pointers, mask, value=None) -> None:
        """Note one access of a block; raise AccessError where a byte lies in no tensor."""
        size = max(pointers.get_element_ty().primitive_bitwidth, 8) // 8
        chosen = np.broadcast_to(mask, pointers.data.shape)
        addresses = np.atleast_1d(pointers.data)[np.atleast_1d(chosen)].astype(np.int64).reshape(-1)
        # the range with the largest end among those that begin before: ranges may hold others
        last = np.searchsorted(self.ranges[:, 0], addresses, side="right")
        ends = np.concatenate(([0], np.maximum.accumulate(self.ranges[:, 1])))[last]
        if (outside := addresses[addresses + size > ends]).size:
            raise AccessError(f"{self.name}, program {self.program}: {kind} of {size} bytes outside at {outside[:3]}")
        if kind == "store" and any(first <= address < end for first, end in self.shared for address in addresses):
            stored = np.broadcast_to(value, chosen.shape)[chosen].reshape(-1).tolist()
            for address, number in zip(addresses.tolist(), stored, strict=True):
                if self.values.setdefault(address, number) != number:
                    raise AccessError(f"{self.name}: programs store {self.values[address]} and {number} at {address}")
            return
        self.bytes[kind].append((np.unique(addresses[:, None] + np.arange(size)), self.program))

    def finish(self) -> None:
        """Raise AccessError if programs met in one place."""
        stores, loads, atomics = (self._owners(kind) for kind in ("store", "load", "atomic"))
        for first, second in (("store", "store"), ("store", "load"), ("store", "atomic"), ("atomic", "load")):
            owners = {"store": stores, "load": loads, "atomic": atomics}
            (a, program_a), (b, program_b) = owners[first], owners[second]
            # a byte of the first kind belongs to one program, or is the fault itself
            at = np.searchsorted(a, b)
            same = at < a.size
            same[same] = a[at[same]] == b[same]
            met = same.copy()
            met[same] = program_a[at[same]] != program_b[same]
            if met.any():
                i = int(np.flatnonzero(met)[0])
                raise AccessError(
                    f"{self.name}: {first} by program {program_a[at[i]]} and {second} by program {program_b[i]} "
                    f"at {b[i]}"
                )

    def _owners(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        parts = self.bytes[kind]
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        places = np.concatenate([part for part, _ in parts])
        programs = np.concatenate([np.full(part.size, program) for part, program in parts])
        order = np.lexsort((programs, places))
        return places[order], programs[order]


def watch() -> None:
    """Check all launches of this process from here on; without effect where Triton has no interpreter."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    place, call = builder.set_grid_idx, executor.__call__

    def seen(tensor):
        (first, end), owner = extent(tensor), StorageWeakRef(tensor.untyped_storage())
        # in the order of the last time
        before, longest = _seen.pop(first, (owner, (first, end)))
        _seen[first] = owner, (first, max(end, longest[1]) if before == owner else end)
        return first

    def checked_load(self, pointers, mask, *rest):
        _current.add("load", pointers, mask.data)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        _current.add("store", pointers, mask.data, value.data)
        return store(self, pointers, value, mask, *rest)

    def checked_atomic(self, operation, pointers, value, mask, *rest):
        _current.add("atomic", pointers, mask.data)
        return atomic(self, operation, pointers, value, mask, *rest)

    def checked_place(self, x, y, z):
        _current.program = (z * self.grid_dim[1] + y) * self.grid_dim[0] + x
        return place(self, x, y, z)

    def checked_call(self, *arguments, **named):
        global _current
        _current = Accesses(self.fn.__name__, dict(zip(self.arg_names, arguments, strict=False)) | named)
        launches[self.fn.__name__] += 1
        call(self, *arguments, **named)
        _current.finish()

    torch.Tensor.data_ptr = seen
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw, builder.set_grid_idx = checked_atomic, checked_place
    executor.__call__ = checked_call
