"""Rules for checkpoint folders: reading those that somebody else wrote (names, links, JSON, weights), making new ones.

Every reader of such a folder goes through this module. Nothing in a folder is run, and nothing outside it is read or
written. What cannot be read becomes a ValueError of one line that names the file.
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from leanstep._checkpoint.safetensors import MappedFile
from leanstep._files import free_bytes, is_disk_full, one_line, output_folder, remove_leftovers, staged_folder

TEMPLATES = "additional_chat_templates"
# endings of files with weights, in any format
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
# what libraries raise for damaged files; a ValueError of our own passes as it is
_DAMAGE = (SafetensorError, OSError, RuntimeError, LookupError, AttributeError, TypeError, UnicodeError, OverflowError)
_LONGEST_NAME = 255  # bytes of a file's name, of all common file systems
_CHUNK = 2**22  # elements of one comparison with infinity


def reason(error: BaseException) -> str:
    """The first line of an error's message, without the advice of libraries to run what a file holds.

    A first line that ends in a colon goes on with the second.
    """
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = f"{first} {rest[0]}" if rest and first.endswith(":") else first
    if isinstance(error, KeyError):  # whose text is the key alone
        line = f"it has no entry {line}"
    if "weights_only" in str(error) or "Weights only" in line:
        return "it is damaged, or holds more than tensors, and nothing in it is run"
    if "mmap can only be used with files saved with" in line:
        return "it is neither a safetensors file nor one that torch.save has written since torch 1.6"
    return one_line(line)


def plain_name(name: object, where: object) -> str:
    """Check that a name found in a file of a checkpoint is one of a file beside it.

    Raises:
        ValueError: for another type, a path, ``.``, ``..``, or a name that is unprintable or longer than 255 bytes.
    """
    fine = isinstance(name, str) and name not in ("", ".", "..") and name.isprintable()
    fine = fine and len(str(name).encode()) <= _LONGEST_NAME
    if not fine or any(sign in str(name) for sign in ("/", "\\", ":")):
        shown = f"{str(name)[:80]!r}..." if len(str(name)) > 80 else repr(name)
        raise ValueError(f"{where} names the file {shown}: expected a plain name, of a file in the same folder")
    return str(name)


def checked_file(path: Path) -> Path:
    """Check that a file of a checkpoint is an ordinary one, which is there, inside its folder; returns it.

    Links are followed inside the folder, and from a snapshot of the hub's cache to the blobs of the same model.

    Raises:
        ValueError: for a link that leads elsewhere, or a pipe, device or socket, which is not opened.
        FileNotFoundError: if there is no such file.
    """
    try:
        if path.is_symlink():
            _check_link(path)
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:  # links in a circle; a folder without permission
        raise ValueError(f"{path} cannot be opened: {one_line(error)}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is no ordinary file but {_kind(mode)}; it is not opened")
    return path


def _check_link(path: Path) -> None:
    target, folder = path.resolve(), path.parent.resolve()
    snapshot = folder
    while snapshot.parent.name != "snapshots" and snapshot != snapshot.parent:
        snapshot = snapshot.parent
    model = snapshot.parent.parent
    from_hub = model.name.startswith("models--") and target.parent == model / "blobs"
    if not from_hub and not target.is_relative_to(folder):
        raise ValueError(
            f"{path} is a link to {target}, outside of the checkpoint: expected a file in the folder; copy it there"
        )


def _kind(mode: int) -> str:
    kinds = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((name for name, test in kinds.items() if test(mode)), "a device")


def files_in(folder: Path) -> list[Path]:
    """The checked files of a folder, sorted. Folders in it, and links to folders, are left out.

    Raises:
        ValueError: as :func:`checked_file`.
    """
    files = []
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir():
            with suppress(FileNotFoundError):  # a link of the hub's cache whose blob was removed
                files.append(checked_file(entry))
    return files


def copy_other_files(folder: Path, target: Path, without: Collection[str] = ()) -> None:
    """Copy the files of a checkpoint folder that are not weights, hidden or named in ``without``.

    Also chat templates, and the folders of sentence-transformers' further modules, such as ``1_Pooling``.

    Raises:
        ValueError: as :func:`checked_file`.
    """
    for path in files_in(folder):
        if not (path.name.startswith(".") or path.name.endswith(_WEIGHTS) or path.name in without):
            shutil.copyfile(path, target / path.name)
    for name in (TEMPLATES, *_module_folders(folder)):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            (target / name).mkdir()
            for path in files_in(folder / name):
                shutil.copyfile(path, target / name / path.name)


def _module_folders(folder: Path) -> list[str]:
    """Names of the folders in ``modules.json`` of sentence-transformers, in it; of any other content none."""
    try:
        modules = json.loads(checked_file(folder / "modules.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    paths = [entry.get("path") for entry in modules if isinstance(entry, dict)] if isinstance(modules, list) else []
    names = {path for path in paths if isinstance(path, str) and path[:1] not in ("", ".") and Path(path).name == path}
    return sorted(names - {TEMPLATES})


def check_output(out: str | Path, needed: int = 0) -> Path:
    """Check that a folder can be created, and remove leftovers of a killed process.

    Args:
        out: the folder to create.
        needed: its size in bytes.

    Raises:
        ValueError: if it has no name, or exists, its parent is not a writable folder, or the disk has too little space.
    """
    out = check_new(out)
    remove_leftovers(out)
    check_space(out, needed)
    return out


def check_new(out: str | Path) -> Path:
    """Check that a folder can be created, and change nothing. Raises ValueError as :func:`check_output`."""
    out = output_folder(out)
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already, and nothing is overwritten; name another folder, or remove it")
    parent = out.absolute().parent
    if not parent.is_dir():
        there = "is not a folder; name another" if parent.exists() else "does not exist; make it, or name another"
        raise ValueError(f"{out} cannot be made: {parent} {there}")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{out} cannot be made: {parent} is not writable")
    return out


def check_space(out: Path, needed: int) -> None:
    """Raise ValueError if the disk of a folder to write has less than ``needed`` bytes."""
    free = free_bytes(out.absolute().parent)
    if needed > free:
        raise ValueError(
            f"{out} takes {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; make room, or name a folder "
            "on another disk"
        )


def check_apart(out: Path, source: Path) -> None:
    """Raise ValueError if ``out`` is the folder of a checkpoint, in it, or around it, links followed."""
    written, read = out.absolute().parent.resolve() / out.name, source.resolve()
    if written.is_relative_to(read) or read.is_relative_to(written):
        raise ValueError(f"{out} is, contains or lies in the checkpoint {source}; name a folder beside it")


@contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Context manager: a temporary folder, renamed to ``out`` on success and removed on any error.

    Args:
        out: the folder to create.
        replace: take the place of an ``out`` that exists.

    Raises:
        OSError: if it could not be written; ``out`` does not exist then, or is what it was.
    """
    try:
        with staged_folder(out, replace=replace) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        full = is_disk_full(error)
        if not full and not isinstance(error, OSError):
            raise
        state = "Nothing of it was kept; make room or name a folder on another disk"
        if replace:
            state = "It is what it was; make room"
        raise OSError(
            getattr(error, "errno", None) or errno.ENOSPC,
            f"{out} could not be written: {'the disk is full' if full else error}. {state}",
        ) from error


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """Read an object from a JSON file of a checkpoint.

    Args:
        unique: refuse a name that occurs twice in an object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for anything else that is no JSON object; the message names the file.
    """
    try:
        text = checked_file(path).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=unique_names if unique else None)
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be understood: expected a JSON object, got {type(content).__name__}")
    return content


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads(object_pairs_hook=)``: refuse a name that occurs twice, of which json takes the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the name {twice!r} twice")
    return content


def index_files(index: Path) -> dict[str, str]:
    """Read an index; returns the file of each tensor.

    Raises:
        ValueError: for a file name that is no plain name of a weight file, a tensor listed twice, or no ``weight_map``.
    """
    weight_map = read_json(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    for file in weight_map.values():
        if not plain_name(file, index).endswith((".safetensors", ".bin")):
            raise ValueError(f"{index} names the file {file!r}: expected *.safetensors or *.bin")
    return weight_map


def shards(index: Path) -> dict[str, list[str]]:
    """Read an index; returns the names of the tensors in each file. Raises as :func:`index_files`, and for no file."""
    names: dict[str, list[str]] = {}
    for name, file in sorted(index_files(index).items(), key=lambda item: item[1]):
        names.setdefault(file, []).append(name)
    missing = [file for file in names if not (index.parent / file).is_file()]
    if missing:
        raise ValueError(
            f"{index.parent} is incomplete: of the {len(names)} shards in {index.name}, {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; copy or download again"
        )
    return names


class TensorFile:
    """A checked safetensors file, open for reading; a context manager.

    Attributes:
        names: of its tensors.
        metadata: the file's.

    Args:
        path: the file, which may be larger than the memory.
        writable: whether its tensors may be written to; the file stays as it is. Writing to others ends the process.

    Raises:
        ValueError: for a damaged file, on opening or reading; with ``writable``, for one that the system does not map.
        FileNotFoundError: if there is no such file.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        self.path = checked_file(path)
        with self._reading():
            self._file = MappedFile(path, writable=writable)
            self.names = tuple(self._file.keys())
            self.metadata = self._file.metadata()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def tensor(self, name: str) -> Tensor:
        """One tensor, memory-mapped."""
        with self._reading():
            return self._file.get_tensor(name)

    def dtype(self, name: str) -> str:
        """Safetensors' name of a tensor's dtype, such as ``F32``."""
        with self._reading():
            return self._file.get_slice(name).get_dtype()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        with self._reading():
            return tuple(self._file.get_slice(name).get_shape())

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            size = f"{self.path.stat().st_size:,} bytes"
            if "Cannot allocate memory" in str(error):
                raise ValueError(
                    f"{self.path}: the system maps no file of {size}, more than its memory: "
                    "save the model in smaller files (save_pretrained with max_shard_size='5GB'), or allow "
                    "it (sysctl vm.overcommit_memory=1)"
                ) from None
            raise ValueError(
                f"{self.path} is damaged: its {size} are no whole safetensors file "
                f"({reason(error)}). A full disk or an interrupted copy cuts files short; copy or download it again"
            ) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises ValueError and FileNotFoundError as :class:`TensorFile`."""
    with TensorFile(path, writable=True) as file:
        return {name: file.tensor(name) for name in file.names}


def load_pickled(path: Path) -> Any:
    """Content of a file of ``torch.save``: tensors and containers only, memory-mapped; no code in it runs.

    Raises:
        ValueError: for a damaged file, or one that holds anything else: also tensors that are sparse, quantised or
            without values, and those with more entries than the file has bytes for.
    """
    try:
        content = torch.load(checked_file(path), map_location="cpu", weights_only=True, mmap=True)
        _check_plain(content, path)
        return content
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many types for a damaged file
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be read as tensors: {reason(error)}") from None


def _check_plain(content: Any, path: Path) -> None:
    size = path.stat().st_size
    for tensor in torch.utils._pytree.tree_leaves(content):
        if isinstance(tensor, Tensor):
            if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
                kind = "quantised" if tensor.is_quantized else "without values" if tensor.is_meta else "sparse"
                raise ValueError(f"{path} holds a tensor that is {kind}: expected plain ones")
            if tensor.nbytes > size:
                raise ValueError(f"{path} holds a tensor of {tensor.nbytes:,} bytes, and has {size:,} itself")


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: object) -> None:
    """Read floating-point tensors once and refuse NaN and infinity.

    Raises:
        ValueError: the message names the first such tensor and counts the others.
    """
    # a process that gets its weights from another one has them without values
    stored = ((name, tensor) for name, tensor in tensors if tensor.is_floating_point() and not tensor.is_meta)
    broken = [name for name, tensor in stored if not _is_finite(tensor, f"{where}: {one_line(name)}")]
    if broken:
        more = f", and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise ValueError(f"{where}: {one_line(broken[0])} holds NaN or infinity{more}; expected finite weights")


def _is_finite(tensor: Tensor, where: str) -> bool:
    try:
        return all(bool(chunk.isfinite().all()) for chunk in tensor.detach().flatten().split(_CHUNK))
    except NotImplementedError:
        raise ValueError(f"{where} is {tensor.dtype}, which torch cannot compare with infinity") from None
