"""Tensors in memory-mapped files, and a bound on the part of them that is resident."""

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

# bytes of mapped tensors that stay resident; one layer of a large model
RESIDENT = 2**30
_DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)


class ResidentSet:
    """Keeps the resident bytes of shared file mappings near a limit: releases the tensors that were used longest ago.

    A released tensor keeps its values, written ones too: its pages stay in the page cache or go to the file, and the
    next access maps them again.

    Args:
        limit: bytes. The two tensors used last may exceed it: one is copied to the other.
    """

    def __init__(self, limit: int = RESIDENT) -> None:
        self.limit = limit
        self._sizes: OrderedDict[int, int] = OrderedDict()
        self._total = 0

    def touch(self, tensor: Tensor) -> None:
        """Note that a tensor in a shared mapping is about to be read or written."""
        address = tensor.data_ptr()
        self._total += tensor.nbytes - self._sizes.pop(address, 0)
        self._sizes[address] = tensor.nbytes
        while self._total > self.limit and len(self._sizes) > 2:
            oldest, size = self._sizes.popitem(last=False)
            self._total -= size
            release_pages(oldest, size)

    def release(self, tensor: Tensor) -> None:
        """Release the pages of a tensor in a shared mapping."""
        self._total -= self._sizes.pop(tensor.data_ptr(), 0)
        release_pages(tensor.data_ptr(), tensor.nbytes)


def release_pages(address: int, size: int) -> None:
    """Unmap the whole pages of a range of a file mapping; nothing happens where the system has no madvise.

    Of a private mapping, never for pages that were written, and never for other memory: the values would be lost.
    """
    page = mmap.PAGESIZE
    start, stop = -(-address // page) * page, (address + size) // page * page
    if _DONT_NEED is not None and stop > start:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(_DONT_NEED))


# address -> mapping of a file that a model is being loaded from
_SOURCES: dict[int, mmap.mmap] = {}


def add_source(mapping: mmap.mmap) -> None:
    """Note a private mapping to which nothing is written before :func:`forget_sources`.

    What :class:`CopiesInFiles` copies from it leaves the memory: a written page would lose what was written.
    """
    _SOURCES[np.frombuffer(mapping, np.uint8).ctypes.data] = mapping


def forget_sources() -> None:
    """End :func:`add_source` for all mappings."""
    _SOURCES.clear()


def _release_read(tensor: Tensor) -> None:
    """Release the pages of a tensor that was read, where they are those of a file."""
    address = tensor.data_ptr()
    sources = list(_SOURCES.items())  # threads of transformers map more files meanwhile
    of_source = any(start <= address < start + len(mapping) for start, mapping in sources)
    if is_mapped(tensor) or of_source:
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        release_pages(address, span * tensor.element_size())


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


# Linux's flag, which Python names since 3.13: no memory is set aside for pages that may be written
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0)


def map_file(path: Path, *, writable: bool) -> mmap.mmap:
    """Map a file, of which writes change nothing.

    Args:
        path: the file; not empty.
        writable: whether the mapping may be written to. Written pages take memory. Linux takes a file larger than the
            memory, unless it is strict (``vm.overcommit_memory=2``). It takes one that is not written to in any case.

    Raises:
        OSError: if the system refuses.
    """
    with path.open("rb") as file:
        if not writable:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not sys.platform.startswith("linux"):
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=access)


def mapped_storage(path: Path, *, shared: bool = True) -> torch.UntypedStorage:
    """Map a file. Writes to a shared mapping change the file, those to another one do not."""
    if not shared:
        return torch.frombuffer(map_file(path, writable=True), dtype=torch.uint8).untyped_storage()
    storage = torch.UntypedStorage.from_file(str(path), True, path.stat().st_size)
    assert isinstance(storage, torch.UntypedStorage)
    return storage


def mapped_view(storage: torch.UntypedStorage, offset: int, like: Tensor) -> Tensor:
    """The tensor at a byte offset, contiguous, with dtype and shape of ``like``."""
    empty = torch.empty(0, dtype=like.dtype)
    return empty.set_(storage, offset // like.element_size(), like.shape)  # type: ignore[call-overload]


class FileTensor:
    """A tensor in a file without a name, which is removed with it.

    Attributes:
        view: mapped, on the CPU.
        device: of the tensor that was stored.
    """

    def __init__(self, view: Tensor, device: torch.device, resident: ResidentSet) -> None:
        self.view, self.device, self._resident = view, device, resident

    def clone(self) -> Tensor:
        """A copy in memory, on its device."""
        self._resident.touch(self.view)
        return self.view.to(self.device, copy=True)

    def open(self) -> Tensor:
        """The tensor to read: mapped on the CPU, a copy on another device."""
        self._resident.touch(self.view)
        return self.view.to(self.device)

    def add(self, tensor: Tensor) -> None:
        """Add a tensor to it."""
        self._resident.touch(self.view)
        self.view.add_(tensor.to(self.view.device))

    def __del__(self) -> None:
        self._resident.release(self.view)


class Scratch:
    """Keeps tensors in files, in place of memory.

    Args:
        folder: on the disk to use. No file stays in it, whatever ends the process.
        resident: bounds what stays in memory.
    """

    def __init__(self, folder: Path, resident: ResidentSet | None = None) -> None:
        self.folder, self.resident = folder, resident or ResidentSet()

    @classmethod
    def of(cls, folder: "str | Path | Scratch | None") -> "Scratch | None":
        """One in a folder, or as it is given; None: none."""
        return folder if folder is None or isinstance(folder, Scratch) else cls(Path(folder))

    def store(self, tree: Any) -> Any:
        """The tree with a :class:`FileTensor` for every tensor."""
        return tree_map(lambda leaf: self._store(leaf) if isinstance(leaf, Tensor) and leaf.numel() else leaf, tree)

    @staticmethod
    def open(tree: Any) -> Any:
        """The tree with the tensors again."""
        return tree_map(lambda leaf: leaf.open() if isinstance(leaf, FileTensor) else leaf, tree)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A tensor of the dtype and shape, contiguous, mapped from a file that is removed with it."""
        descriptor, name = tempfile.mkstemp(prefix=".leanstep-scratch-", dir=self.folder)
        try:
            # real blocks: a write to a mapped hole of a full disk would kill the process
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, tensor.nbytes)
            else:
                os.truncate(descriptor, tensor.nbytes)
            return mapped_view(mapped_storage(Path(name)), 0, tensor)
        finally:
            os.close(descriptor)
            os.unlink(name)

    def _store(self, tensor: Tensor) -> FileTensor:
        view = self.empty_like(tensor)
        self.resident.touch(view)
        return FileTensor(view.copy_(tensor), tensor.device, self.resident)


_COPIES = (torch.stack, torch.cat, Tensor.contiguous, Tensor.clone, torch.clone)


class CopiesInFiles(TorchFunctionMode):
    """Context manager: large copies of tensors on the CPU are kept in files, one of them in memory at a time.

    For code of others that joins or splits weights: results of ``stack``, ``cat``, ``clone`` and ``contiguous``. What
    is copied leaves the memory, too, where it is in a shared mapping or one of :func:`add_source`.

    Args:
        scratch: where the files are.
        least: bytes from which a copy is large.
    """

    def __init__(self, scratch: Scratch, least: int = 2**20) -> None:
        super().__init__()
        self._scratch, self._least = scratch, least

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func not in _COPIES or output.device.type != "cpu" or output.nbytes < self._least:
            return output
        if isinstance(args[0], Tensor) and args[0].data_ptr() == output.data_ptr():  # contiguous as it was
            return output
        copy = self._scratch.empty_like(output).copy_(output)
        for tensor in (copy, *(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))):
            _release_read(tensor)
        return copy


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor is in a shared file mapping."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


class MappedParameters:
    """Parameters of a model that live in files, mapped shared: what is written to them is in the files.

    Forward passes touch the parameters of each module that they call, and :func:`touched` those that are read besides.

    Attributes:
        names: of the mapped parameters.

    Args:
        model: on the CPU.
        resident: bounds what stays in memory.
    """

    def __init__(self, model: nn.Module, resident: ResidentSet) -> None:
        self.model, self.resident = model, resident
        self._places: dict[str, tuple[Path, int]] = {}
        self._handles: list[Any] = []
        self.names: set[str] = set()

    def map(self, places: dict[str, tuple[Path, int]]) -> None:
        """Replace the data of parameters by the mapped bytes of (file, byte offset), which hold the same values.

        Other parameters that are in shared mappings already stay there, and are bounded too.
        """
        self._places = places
        self._remap(shared=True)
        parameters = {name: one for name, one in self.model.named_parameters() if is_mapped(one)}
        self.names = set(parameters)
        for parameter in parameters.values():
            _RESIDENT_SETS[parameter] = self.resident
        if sum(parameter.nbytes for parameter in parameters.values()) <= self.resident.limit:
            return
        mapped = {id(parameter) for parameter in parameters.values()}
        for module in self.model.modules():
            if any(id(parameter) in mapped for parameter in module.parameters(recurse=False)):
                self._handles.append(module.register_forward_pre_hook(_touch_parameters))

    def detach(self) -> None:
        """Map the files anew so that writes to the parameters stay in memory and the files are what they are now."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._remap(shared=False)
        for name in self.names:
            _RESIDENT_SETS.pop(self.model.get_parameter(name), None)

    def _remap(self, *, shared: bool) -> None:
        storages = {path: mapped_storage(path, shared=shared) for path in {path for path, _ in self._places.values()}}
        for name, (path, offset) in self._places.items():
            parameter = self.model.get_parameter(name)
            parameter.data = mapped_view(storages[path], offset, parameter.data)


# of mapped parameters
_RESIDENT_SETS: Any = WeakTensorKeyDictionary()
# parameter -> function that is called before it is read or written
_LISTENERS: Any = WeakTensorKeyDictionary()


def touched(parameter: Tensor) -> Tensor:
    """The parameter, about to be read or written: noted as in use, and told to who listens."""
    listener = _LISTENERS.get(parameter)
    if listener is not None:
        listener(parameter)
    return note_use(parameter)


def note_use(parameter: Tensor) -> Tensor:
    """The parameter, noted as in use if it is one of :class:`MappedParameters`."""
    resident = _RESIDENT_SETS.get(parameter)
    # while its block runs on a device, its data is a copy there
    if resident is not None and is_mapped(parameter):
        resident.touch(parameter)
    return parameter


def listen(parameter: Tensor, listener: Callable[[Tensor], None]) -> None:
    """Call a function with a parameter whenever it is :func:`touched`."""
    _LISTENERS[parameter] = listener


def unlisten(parameter: Tensor) -> None:
    """End :func:`listen`."""
    _LISTENERS.pop(parameter, None)


def _touch_parameters(module: nn.Module, _: Any) -> None:
    for parameter in module.parameters(recurse=False):
        note_use(parameter)


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and values, in the order of the tensors. One of them is in memory at a time."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        touched(tensor)
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
