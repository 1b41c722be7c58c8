"""The cache of compiled kernels: loads only undamaged libraries that no other user could have written.

A library is followed by the SHA-256 digest of its name and bytes. The loader ignores bytes after the end of a library,
so that one rename replaces library and digest together.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from leanstep._files import cache_folders, is_disk_full, open_regular, private_folder, remove, replacing

# a build takes seconds; an older temporary file was left by a killed one
_STALE_SECONDS = 3600

# folders whose refusal has been told
_announced: set[Path] = set()


class KernelCacheError(OSError):
    """No folder can hold the compiled kernels; the message says why and what to do."""


def load_or_build(name: str, build: Callable[[Path], None]) -> ctypes.CDLL:
    """Load the library ``name`` from the first cache folder that works; let ``build(path)`` write it if need be.

    Several processes may build the same library at once. Warns once if a folder cannot be used.

    Raises:
        KernelCacheError: no folder works.
    """
    refusals: dict[Path, str] = {}
    for choice in cache_folders():
        try:
            folder = private_folder(choice / "cpp")
            library = _load(folder / name)
            if library is None:
                _write(folder / name, build)
                library = _load(folder / name)
            assert library is not None
        except Exception as error:
            if not isinstance(error, OSError) and not is_disk_full(error):
                raise
            refusals[choice] = _reason(choice, error)
            continue
        if refusals.keys() - _announced:
            _announced.update(refusals)
            reasons = "; ".join(refusals.values())
            warnings.warn(f"compiled kernels go to {folder}: {reasons}. {_ADVICE}", stacklevel=2)
        return library
    raise KernelCacheError(f"no folder can hold the compiled kernels: {'; '.join(refusals.values())}. {_ADVICE}")


def folder_in_use() -> str:
    """Return the first cache folder that can be written to, and why those before it cannot, in words."""
    refusals: list[str] = []
    for choice in cache_folders():
        try:
            folder = private_folder(choice / "cpp")
            _check_writable(folder)
            return "; ".join([str(folder), *refusals])
        except OSError as error:
            refusals.append(_reason(choice, error))
    return f"none: {'; '.join(refusals)}. {_ADVICE}"


_ADVICE = (
    "Set LEANSTEP_CACHE to a folder on a disk with free space that belongs to you, with parents to which only you and "
    "root can write."
)


def _reason(choice: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{choice}: disk full" if is_disk_full(error) else str(error)


def _load(path: Path) -> ctypes.CDLL | None:
    """Load a library of a private folder; None if it is missing, damaged, or writable by another user."""
    try:
        descriptor = open_regular(path)
    except OSError as error:
        # missing, a symbolic link, a pipe or a device
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EINVAL):
            return None
        raise
    with open(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if facts.st_mode & 0o022 or facts.st_uid not in (os.geteuid(), 0):
            return None
        content = file.read()
    digest_size = hashlib.sha256().digest_size
    if content[-digest_size:] != _digest(path.name, content[:-digest_size]):
        return None
    # by path: nobody else can rename files in a private folder, and debuggers show the name
    return ctypes.CDLL(str(path))


def _write(path: Path, build: Callable[[Path], None]) -> None:
    """Build a library, append its digest, and flush it to disk before it takes its name."""
    _check_writable(path.parent)
    _remove_leftovers(path.parent)
    with replacing(path) as partial:
        build(partial)
        # the linker obeys the umask, which may let a group write
        partial.chmod(0o644)
        digest = _digest(path.name, partial.read_bytes())
        with partial.open("ab") as file:
            file.write(digest)


def _digest(name: str, library: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + library).digest()


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable")


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed builds, also those of versions that named them ``tmpNAME.so``."""
    for path in (*folder.glob(".*.tmp"), *folder.glob("tmp*.so")):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            if path.lstat().st_mtime < time.time() - _STALE_SECONDS:
                remove(path)
