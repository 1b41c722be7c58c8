"""The cache folder: where it is, and how a folder in it is built once and appears whole or not at all."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from leanstep._files import publish_folder

__all__ = ["build_once", "cache_root"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def cache_root(folder: str | Path | None = None) -> Path:
    """Return the cache folder: ``folder`` if given, else ``$LEANSTEP_CACHE``, else ``~/.cache/leanstep``."""
    chosen = folder or os.environ.get("LEANSTEP_CACHE") or Path.home() / ".cache" / "leanstep"
    return Path(chosen).expanduser()


def build_once(target: Path, is_valid: Callable[[Path], bool], build: Callable[[Path], None]) -> Path:
    """Return ``target``, a cache folder that ``is_valid`` accepts, calling ``build(empty_folder)`` if there is none.

    Processes that ask for the same target take turns on a file lock: one builds, the others find it there. The folder
    is written beside its place and renamed, so that a killed process leaves nothing that looks complete; what
    ``is_valid`` refuses (truncated, corrupted) is removed and built again.

    Raises:
        OSError: the folder cannot be written; the message names it and the way to another one.
    """
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if target.is_dir() and is_valid(target):
                return target
            for stale in target.parent.glob(f"{target.name}.tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)
            partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
            partial.mkdir()
            try:
                build(partial)
                publish_folder(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise OSError(
            f"could not write the cache folder {target}: {error}. Free some space, or name another folder with "
            f"data.cache_dir or the environment variable LEANSTEP_CACHE"
        ) from error
    return target
