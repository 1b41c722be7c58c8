"""An output folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["check_output", "new_folder"]

_WRITING = ".writing-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_output(out: str | Path, needed: int = 0) -> Path:
    """Refuse a folder that cannot be written, before anything is computed; remove what a killed process left there.

    Args:
        out: the folder to be; it must not exist.
        needed: bytes that it will take.

    Raises:
        ValueError: it exists, there is no folder to put it in, or it will not fit on the disk.
    """
    out = Path(out).expanduser()
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already, and nothing is overwritten; name another folder, or remove it")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{out} cannot be made: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{out} cannot be made: {parent} is not writable")
    _remove_leftovers(out)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(
            f"{out} takes {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; make room, or name a "
            "folder on another disk"
        )
    return out


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder to be filled, which takes its name ``out`` when all of it is on disk; on any error it is removed.

    Raises:
        OSError: it could not be written, with what to do; ``out`` is not there then.
    """
    staged = out.absolute().with_name(f".{out.name}{_WRITING}{os.getpid()}")
    try:
        staged.mkdir()
        yield staged
        for path in sorted(staged.rglob("*"), reverse=True):
            _sync(path)
        _sync(staged)
        if out.exists():
            raise FileExistsError(errno.EEXIST, "it was made by somebody else in the meantime", str(out))
        os.rename(staged, out)
        _sync(out.absolute().parent)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in _FULL or "No space left" in str(error) or "StorageFull" in str(error)
        if not full and not isinstance(error, OSError):
            raise
        why = "the disk is full" if full else str(error)
        raise OSError(
            getattr(error, "errno", None) or errno.ENOSPC,
            f"{out} could not be written: {why}. Nothing of it was kept; make room or name a folder on another disk",
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove half-written folders of processes that are no more."""
    for path in out.absolute().parent.glob(f".{out.name}{_WRITING}*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and not _is_running(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
