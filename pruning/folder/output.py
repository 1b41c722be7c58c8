"""The folder that a run makes: checked before the first change, complete or absent."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from leanstep._files import free_bytes, is_disk_full, remove_leftovers, staged_folder


def check_output(out: str | Path, needed: int = 0) -> Path:
    """Check that a folder can be created, and remove leftovers of a killed process.

    Args:
        out: the folder to create.
        needed: its size in bytes.

    Raises:
        ValueError: if it exists, its parent is not a writable folder, or the disk has too little space.
    """
    out = Path(out).expanduser()
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already, and nothing is overwritten; name another folder, or remove it")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{out} cannot be made: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{out} cannot be made: {parent} is not writable")
    remove_leftovers(out)
    free = free_bytes(parent)
    if needed > free:
        raise ValueError(
            f"{out} takes {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; make room, or name a folder "
            "on another disk"
        )
    return out


def check_apart(out: Path, source: Path) -> None:
    """Raise ValueError if ``out`` is the folder of a checkpoint, in it, or around it, links followed."""
    written, read = out.absolute().parent.resolve() / out.name, source.resolve()
    if written.is_relative_to(read) or read.is_relative_to(written):
        raise ValueError(f"{out} is, contains or lies in the checkpoint {source}; name a folder beside it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Context manager: a temporary folder, renamed to ``out`` on success and removed on any error.

    Raises:
        OSError: if it could not be written; ``out`` does not exist then.
    """
    try:
        with staged_folder(out) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        full = is_disk_full(error)
        if not full and not isinstance(error, OSError):
            raise
        raise OSError(
            getattr(error, "errno", None) or errno.ENOSPC,
            f"{out} could not be written: {'the disk is full' if full else error}. Nothing of it was kept; make room "
            "or name a folder on another disk",
        ) from error
