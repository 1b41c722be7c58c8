"""Safetensors files of any size: mapped so that the system asks for no memory as large as the file."""

from __future__ import annotations

import functools
import json
import math
import mmap
import threading
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from leanstep._checkpoint.mapped import add_source, map_file

# names of torch's dtypes, some of which older versions lack, by those of safetensors; two numbers of F4 share a byte
_NAMES = {
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


class MappedFile:
    """An open file with the methods of ``safetensors.safe_open``, which checks its header.

    safetensors maps a file for torch in a way that may be written to, and Linux refuses that for a file larger than
    the memory. Nothing but the header is read before a tensor is.

    Args:
        writable: whether the tensors may be written to; the file stays as it is. A write to other ones ends the
            process, and no system refuses them.
        is_source: see :func:`leanstep._checkpoint.mapped.add_source`.

    Raises:
        SafetensorError: for a damaged file, on opening or reading.
        OSError: if there is no such file, or the system refuses to map it.
    """

    def __init__(self, path: Path, *, writable: bool, is_source: bool = False) -> None:
        self._path, self._writable, self._is_source = path, writable, is_source
        self._lock = threading.Lock()  # transformers reads in several threads
        # for torch, safetensors would map the file at once
        self._file = safe_open(path, framework="numpy").__enter__()
        self._mapping: mmap.mmap | None = None

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._file.keys())

    def metadata(self) -> dict[str, str]:
        """The file's metadata."""
        return dict(self._file.metadata() or {})

    def get_slice(self, name: str) -> MappedSlice:
        """A tensor that is read when it is indexed."""
        return MappedSlice(self, name, self._file.get_slice(name))

    def get_tensor(self, name: str) -> Tensor:
        """A tensor in the mapped file."""
        header = self._file.get_slice(name)
        shape, dtype = header.get_shape(), getattr(torch, _NAMES.get(header.get_dtype(), ""), None)
        if dtype is None:
            with safe_open(self._path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
            return tensor
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype, device="cpu")
        with self._lock:
            if self._mapping is None:
                self._mapping = map_file(self._path, writable=self._writable)
                if self._is_source:
                    add_source(self._mapping)
        with nullcontext() if self._writable else warnings.catch_warnings():  # not for threads: filters are global
            if not self._writable:
                warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=tensor_offsets(self._path)[name])
        return flat.reshape(shape)


class MappedSlice:
    """A tensor of a :class:`MappedFile`, with the methods of safetensors' slices."""

    def __init__(self, file: MappedFile, name: str, header: Any) -> None:
        self._file, self._name, self._header = file, name, header

    def get_dtype(self) -> str:
        """Safetensors' name of the dtype."""
        return str(self._header.get_dtype())

    def get_shape(self) -> list[int]:
        """The shape."""
        return list(self._header.get_shape())

    def __getitem__(self, index: Any) -> Tensor:
        return self._file.get_tensor(self._name)[index]


def tensor_offsets(path: Path) -> Mapping[str, int]:
    """Where each tensor of a safetensors file begins, in bytes from the start of the file."""
    status = path.stat()
    return _offsets(path, status.st_size, status.st_mtime_ns, status.st_ino)


# checkpoints are read tensor by tensor, each from a file that is opened for it
@functools.lru_cache(maxsize=64)
def _offsets(path: Path, *_status: int) -> Mapping[str, int]:
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + row["data_offsets"][0] for name, row in header.items() if name != "__metadata__"}
