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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from leanstep._checkpoint.files import unique_names
from leanstep._files import one_line, parse_json
from leanstep.sparsity.inference.matrices import DTYPE_NAMES, DTYPES, Form, part_name

Entry = TypeVar("Entry")

VERSION = 1
# entries of a safetensors file's metadata
KEY, CHECKSUM_KEY = "leanstep_sparse", "leanstep_sparse_crc32"


class StoredTensor(NamedTuple):
    """Dtype (as safetensors names it), shape and checksum of one tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    crc32: int


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    if not tensor.numel():
        return 0
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class Kind(NamedTuple):
    """What differs between kinds of files: the sign before the ending of a part's name, and the checksum."""

    separator: str = "_"
    checksum: Callable[[Tensor], int] = checksum


@dataclass
class Manifest:
    """What one file, or all files of a folder, hold."""

    matrices: dict[str, Form] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    kind: Kind = Kind()

    def part_name(self, name: str, part: str) -> str:
        """Name under which a part of a weight is stored."""
        return part_name(name, part, self.kind.separator)

    def add(self, stored: Mapping[str, Tensor]) -> None:
        """Describe tensors on the CPU under the names they are stored by."""
        for name, tensor in stored.items():
            if tensor.dtype not in DTYPE_NAMES:
                raise ValueError(f"{name}: expected a dtype of {', '.join(DTYPES)}, got {tensor.dtype}")
            dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
            self.tensors[name] = StoredTensor(dtype, shape, self.kind.checksum(tensor))

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
        content = parse(text)
        if content.get("version") != VERSION:
            raise ValueError(
                f"it has version {one_line(repr(content.get('version')))} of the format, expected {VERSION}: use the "
                "version of leanstep that wrote it"
            )
        manifest = cls(
            read_section(content, "matrices", Form.from_json),
            read_section(content, "tensors", _stored),
            read_section(content, "tied", read_name),
        )
        manifest.check()
        return manifest

    def merge(self, other: Manifest) -> None:
        """Add the manifest of another file. Raises ValueError where they differ about a name."""
        self.kind = other.kind
        for section in ("matrices", "tensors", "tied"):
            entries: dict[str, Any] = getattr(self, section)
            for name, entry in getattr(other, section).items():
                if entries.setdefault(name, entry) != entry:
                    raise ValueError(f"its manifest differs from that of another file about {one_line(name)}")

    def check(self) -> None:
        """Raise ValueError for a weight that is stored twice, and for parts that are missing or have other shapes."""
        for name, form in self.matrices.items():
            values = self.tensors.get(self.part_name(name, "values"))
            nnz = form.most_values(values.shape[0]) if values is not None and len(values.shape) == 1 else 0
            for part, expected in form.part_shapes(nnz).items():
                row = self.tensors.get(self.part_name(name, part))
                if row is None or row[:2] != expected:
                    got = "none" if row is None else f"{row.dtype} {row.shape}"
                    raise ValueError(
                        f"its manifest is damaged: {one_line(self.part_name(name, part))} should be {expected[0]} "
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
        dense = {name: row for name, row in self.tensors.items() if name not in parts} | self.matrices
        sizes = {name: math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for name, entry in dense.items()}
        return sum(sizes.values()) + sum(sizes.get(name, 0) for name in self.tied.values())

    def part_names(self) -> set[str]:
        """Names of all tensors that are parts of a matrix."""
        return {self.part_name(name, part) for name, form in self.matrices.items() for part in form.parts}


def parse(text: str) -> dict[str, Any]:
    """The JSON object of a header. Raises ValueError for anything else, and for a name that occurs twice."""
    try:
        content = parse_json(text)
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
        return json.loads(text, object_pairs_hook=unique_names)
    except ValueError as error:
        raise ValueError(f"its manifest is damaged: {one_line(error)}") from None


def read_section(content: Mapping[str, Any], key: str, read: Callable[[Any], Entry]) -> dict[str, Entry]:
    """Read every entry of one object of a header. Raises ValueError for an entry that ``read`` refuses."""
    section, entries = content.get(key), dict[str, Entry]()
    if not isinstance(section, dict):
        raise ValueError(f"its manifest is damaged: expected an object {key!r}, got {type(section).__name__}")
    for name, entry in section.items():
        try:
            entries[name] = read(entry)
        except (ValueError, TypeError) as error:
            raise ValueError(f"its manifest is damaged: {one_line(name)}: {one_line(error)}") from None
    return entries


def _stored(entry: Any) -> StoredTensor:
    if not isinstance(entry, list) or len(entry) != 3 or entry[0] not in DTYPES or not isinstance(entry[1], list):
        raise ValueError(f"expected dtype, shape and checksum, got {entry!r}")
    if not all(type(size) is int and size >= 0 for size in (*entry[1], entry[2])):
        raise ValueError(f"expected whole numbers from 0, got {entry!r}")
    return StoredTensor(entry[0], tuple(entry[1]), entry[2])


def read_name(entry: Any) -> str:
    """The name of a weight. Raises ValueError for another type."""
    if not isinstance(entry, str):
        raise ValueError(f"expected the name of a weight, got {entry!r}")
    return entry
