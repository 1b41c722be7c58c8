"""Read sparse weight files: everything is checked before a weight is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from leanstep._checkpoint.configuration import check_folder
from leanstep._checkpoint.files import TensorFile, check_finite, read_json, shards
from leanstep._files import one_line
from leanstep.sparsity.inference.manifest import KEY, Manifest
from leanstep.sparsity.inference.matrices import Form, check_parts, decompress

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SparseFiles:
    """The sparse weight files of one checkpoint, open for reading; a context manager.

    Headers are checked on opening: the manifest's checksum and version, and that the files hold exactly the tensors of
    the manifests, in their dtypes and shapes. :meth:`check_content` reads all tensors.

    Args:
        read: reads the manifest of a file, where it is of another kind than :func:`export_folder` writes.

    Attributes:
        manifest: of all files together.

    Raises:
        ValueError: for a damaged file, or files that do not belong together; the message names file and tensor.
        FileNotFoundError: if a file is missing.
    """

    def __init__(self, paths: Iterable[Path], read: Callable[[TensorFile], Manifest] | None = None) -> None:
        self.manifest = Manifest()
        self._read = read or (lambda file: Manifest.from_metadata(file.metadata))
        self._files: dict[Path, TensorFile] = {}
        self._owners: dict[str, TensorFile] = {}
        try:
            for path in paths:
                self._open(path)
            where = ", ".join(str(path) for path in self._files)
            try:
                self.manifest.check()
            except ValueError as error:
                raise ValueError(f"{where}: {error}; expected files of one export") from None
            missing = sorted(self.manifest.tensors.keys() - self._owners.keys())
            missing += sorted(set(self.manifest.tied.values()) - self._owners.keys() - self.manifest.matrices.keys())
            if missing:
                raise ValueError(f"{where}: the tensor {one_line(missing[0])} of the manifest is in no file")
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        file = self._files[path] = TensorFile(path, writable=True).__enter__()
        try:
            manifest = self._read(file)
            self.manifest.merge(manifest)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for name in file.names:
            row = manifest.tensors.get(name)
            got = file.dtype(name), file.shape(name)
            if row is None or (row.dtype, row.shape) != got:
                expected = "no such tensor" if row is None else f"{row.dtype} {row.shape}"
                raise ValueError(f"{path}: {one_line(name)} is {got[0]} {got[1]}, the manifest has {expected}")
            if name in self._owners:
                raise ValueError(f"{path}: {one_line(name)} is in another file as well")
            self._owners[name] = file

    def __enter__(self) -> SparseFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.__exit__(None, None, None)

    def check_content(self) -> None:
        """Read every tensor, and check checksums, offsets, masks, scales, and that numbers are finite.

        Allocates masks at most.

        Raises:
            ValueError: the message names file and tensor.
        """
        for name in self.dense_names():
            check_finite([(name, self._tensor(name))], self._owners[name].path)
        for name, form in self.manifest.matrices.items():
            self._checked(name, check_parts, form)
            values = self.manifest.part_name(name, form.parts[0])
            check_finite([(name, self._owners[values].tensor(values))], self._owners[values].path)

    def dense_names(self) -> list[str]:
        """Names of the tensors that are stored as they are."""
        parts = self.manifest.part_names()
        return [name for name in self._owners if name not in parts]

    def stored(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """The dense tensors of a file: weights whose first part it has, other tensors, and names tied to them."""
        first = {self.manifest.part_name(name, form.parts[0]): name for name, form in self.manifest.matrices.items()}
        parts = self.manifest.part_names()
        for stored in self._files[path].names:
            name = first.get(stored, None if stored in parts else stored)  # a name may be empty
            aliases = [alias for alias, target in self.manifest.tied.items() if target == name]
            if name is not None:
                yield name, self.tensor(name)
                yield from ((alias, self.tensor(name).clone()) for alias in aliases)

    def metadata(self, path: Path) -> dict[str, str]:
        """Metadata of one file, as it was before the manifest was added."""
        return {key: text for key, text in self._files[path].metadata.items() if not key.startswith(KEY)}

    def part(self, name: str, part: str) -> Tensor:
        """One part of a weight, as stored."""
        return self._tensor(self.manifest.part_name(name, part))

    def tensor(self, name: str) -> Tensor:
        """One dense tensor or weight, or a tied one."""
        name = self.manifest.tied.get(name, name)
        form = self.manifest.matrices.get(name)
        return self._tensor(name) if form is None else self._checked(name, decompress, form)

    def _checked(self, name: str, read: object, form: Form) -> Tensor:
        try:
            return read(form, {part: self._tensor(self.manifest.part_name(name, part)) for part in form.parts})  # type: ignore[operator]
        except ValueError as error:
            where = self._owners[self.manifest.part_name(name, form.parts[0])].path
            text = str(error)
            raise ValueError(text if str(where) in text else f"{where}: {one_line(name)}: {text}") from None

    def _tensor(self, name: str) -> Tensor:
        file, expected = self._owners[name], self.manifest.tensors[name].crc32
        tensor = file.tensor(name)
        if self.manifest.kind.checksum(tensor) != expected:
            raise ValueError(
                f"{file.path}: the checksum of {one_line(name)} is wrong: it was changed after writing; copy or "
                "download the file again"
            )
        return tensor


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, from its index or the single one. Checks the folder's other files.

    Raises:
        ValueError: for a folder without such files, one with names or links that lead out of it, or a missing file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: expected a Hugging Face folder, with config.json and weights in it")
    check_folder(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} has no {SINGLE} and no {INDEX}: expected safetensors weights; save the model again by "
            "save_pretrained"
        )
    return [folder / name for name in shards(folder / INDEX)]


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint. Raises ValueError where it is missing or damaged."""
    try:
        return read_json(folder / "config.json")
    except FileNotFoundError:
        raise ValueError(f"{folder} is no checkpoint: it has no config.json") from None


def has_manifest(path: Path) -> bool:
    """Whether a safetensors file is a sparse weight file. Raises as :class:`TensorFile`."""
    with TensorFile(path) as file:
        return KEY in file.metadata


def is_sparse_file(path: Path) -> bool:
    """Whether a file, which may be of any kind, can be read and is a sparse weight file."""
    return KEY in metadata_of(path)


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; none of a file that is not one."""
    try:
        with TensorFile(path) as file:
            return file.metadata
    except (ValueError, OSError):
        return {}
