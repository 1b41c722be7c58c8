"""The manifest of a sparse weight file: JSON in the header of the safetensors file, with a checksum of its own.

* ``version``: 1.
* ``matrices``: weight -> its stored form (:class:`~leanstep.sparsity.inference.matrices.Form`).
* ``tensors``: every tensor of the file -> dtype, shape, and the CRC-32 (zlib) of its bytes.
* ``tied``: weights that are not stored -> the stored weight they equal.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep._checkpoint import unique_names
from leanstep._files import one_line, parse_json
from leanstep.sparsity.inference.matrices import DTYPE_NAMES, DTYPES, Form, part_name

VERSION = 1
# entries of a safetensors file's metadata
KEY, CHECKSUM_KEY = "leanstep_sparse", "leanstep_sparse_crc32"


class StoredTensor(NamedTuple):
    """Dtype (as safetensors names it), shape and CRC-32 of one tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    crc32: int

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        """Describe a tensor on the CPU. Raises ValueError for a dtype that the format lacks."""
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"expected a dtype of {', '.join(DTYPES)}, got {tensor.dtype}")
        return cls(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), checksum(tensor))


@dataclass
class Manifest:
    """What one file, or all files of a folder, hold."""

    matrices: dict[str, Form] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    def add(self, stored: Mapping[str, Tensor]) -> None:
        """Describe tensors under the names they are stored by."""
        for name, tensor in stored.items():
            try:
                self.tensors[name] = StoredTensor.of(tensor)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def to_metadata(self) -> dict[str, str]:
        """Entries of the safetensors file's metadata."""
        content = {
            "version": VERSION,
            "matrices": {name: form.to_json() for name, form in self.matrices.items()},
            "tensors": {name: [row.dtype, list(row.shape), row.crc32] for name, row in self.tensors.items()},
            "tied": self.tied,
        }
        text = json.dumps(content, separators=(",", ":"))
        return {KEY: text, CHECKSUM_KEY: str(zlib.crc32(text.encode()))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Manifest:
        """Read and check the entries of :meth:`to_metadata`.

        Raises:
            ValueError: for a wrong checksum, another version, or anything else that :meth:`to_metadata` does not write.
        """
        text = metadata.get(KEY)
        if text is None:
            raise ValueError(f"it has no manifest ({KEY}); `leanstep export --format sparse` writes one")
        if metadata.get(CHECKSUM_KEY) != str(zlib.crc32(text.encode())):
            raise ValueError("its manifest is damaged: the checksum is wrong; copy or download the file again")
        content = _parsed(text)
        if content.get("version") != VERSION:
            raise ValueError(
                f"it has version {one_line(repr(content.get('version')))} of the format, expected {VERSION}: use the "
                "version of leanstep that wrote it"
            )
        sections: list[Any] = [content.get(key) for key in ("matrices", "tensors", "tied")]
        if not all(isinstance(section, dict) for section in sections):
            raise ValueError("its manifest is damaged: expected objects 'matrices', 'tensors' and 'tied'")
        matrices, tensors, tied = sections
        manifest = cls(
            {name: _read(name, Form.from_json, entry) for name, entry in matrices.items()},
            {name: _read(name, _stored, entry) for name, entry in tensors.items()},
            {name: _read(name, _name, target) for name, target in tied.items()},
        )
        manifest.check()
        return manifest

    def merge(self, other: Manifest) -> None:
        """Add the manifest of another file. Raises ValueError where they differ about a name."""
        pairs: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
            (self.matrices, other.matrices),
            (self.tensors, other.tensors),
            (self.tied, other.tied),
        )
        for entries, others in pairs:
            for name, entry in others.items():
                if entries.setdefault(name, entry) != entry:
                    raise ValueError(f"its manifest differs from that of another file about {one_line(name)}")

    def check(self) -> None:
        """Raise ValueError for a weight that is stored twice, and for parts that are missing or have other shapes."""
        for name, form in self.matrices.items():
            values = self.tensors.get(part_name(name, "values"))
            nnz = form.most_values(values.shape[0]) if values is not None and len(values.shape) == 1 else 0
            for part, expected in form.part_shapes(nnz).items():
                row = self.tensors.get(part_name(name, part))
                if row is None or row[:2] != expected:
                    got = "none" if row is None else f"{row.dtype} {row.shape}"
                    raise ValueError(
                        f"its manifest is damaged: {one_line(part_name(name, part))} should be {expected[0]} "
                        f"{expected[1]}, got {got}"
                    )
        twice = sorted(
            (self.matrices.keys() | self.tied.keys()) & self.tensors.keys() | self.matrices.keys() & self.tied.keys()
        )
        if twice:
            raise ValueError(f"its manifest is damaged: {one_line(twice[0])} is stored twice")

    def dense_bytes(self) -> int:
        """Bytes of all tensors when every weight is dense, tied ones included."""
        parts = self.part_names()
        sizes = {name: _bytes(row.dtype, row.shape) for name, row in self.tensors.items() if name not in parts}
        sizes |= {name: _bytes(form.dtype, form.shape) for name, form in self.matrices.items()}
        return sum(sizes.values()) + sum(sizes.get(name, 0) for name in self.tied.values())

    def part_names(self) -> set[str]:
        """Names of all tensors that are parts of a matrix."""
        return {part_name(name, part) for name, form in self.matrices.items() for part in form.parts}


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    if not tensor.numel():
        return 0
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _parsed(text: str) -> dict[str, Any]:
    try:
        content = parse_json(text)
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
        return json.loads(text, object_pairs_hook=unique_names)
    except ValueError as error:
        raise ValueError(f"its manifest is damaged: {one_line(error)}") from None


def _read(name: str, read: Any, entry: Any) -> Any:
    try:
        return read(entry)
    except (ValueError, TypeError) as error:
        raise ValueError(f"its manifest is damaged: {one_line(name)}: {one_line(error)}") from None


def _stored(entry: Any) -> StoredTensor:
    if not isinstance(entry, list) or len(entry) != 3 or entry[0] not in DTYPES or not isinstance(entry[1], list):
        raise ValueError(f"expected dtype, shape and checksum, got {entry!r}")
    if not all(type(size) is int and size >= 0 for size in (*entry[1], entry[2])):
        raise ValueError(f"expected whole numbers from 0, got {entry!r}")
    return StoredTensor(entry[0], tuple(entry[1]), entry[2])


def _name(entry: Any) -> str:
    if not isinstance(entry, str):
        raise ValueError(f"expected the name of a weight, got {entry!r}")
    return entry
