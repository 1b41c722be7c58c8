"""The cache folder of texts, tokenizers and token files, and the packages that reading them needs."""

import errno
import importlib.util
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from leanstep._files import (
    cache_folders,
    is_disk_full,
    one_after_another,
    private_folder,
    remove,
    remove_leftovers,
    staged_folder,
)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def require(module: str, package: str = "'leanstep[recipes]'") -> None:
    """Raise ModuleNotFoundError with what pip must install if ``module`` is missing. Does not import it."""
    if importlib.util.find_spec(module) is None:
        message = f"'{module}' is not installed; it comes with: pip install {package}"
        raise ModuleNotFoundError(message, name=module)


def cache_root(folder: str | Path | None = None) -> Path:
    """Return the cache folder: ``folder`` if given, else ``$LEANSTEP_CACHE``, else the first one that can be written.

    :func:`leanstep._files.cache_folders` lists them.

    Raises:
        OSError: the temporary folder is the only choice, and other users can write to its entry for this user.
    """
    if folder or os.environ.get("LEANSTEP_CACHE"):
        return Path(folder or os.environ["LEANSTEP_CACHE"]).expanduser()
    choices = cache_folders()
    for choice in choices[:-1]:
        with suppress(OSError):
            choice.mkdir(parents=True, exist_ok=True)
            if os.access(choice, os.W_OK | os.X_OK):
                return choice
    return private_folder(choices[-1])


def build_once(target: Path, is_valid: Callable[[Path], bool], build: Callable[[Path], None]) -> Path:
    """Return the cache folder ``target``; build it by ``build(empty_folder)`` unless it exists and ``is_valid``.

    A file lock lets one of several processes build while the others wait; where the file system has no locks, each
    builds, and the first one's folder stays. A staging folder is renamed when it is complete. An invalid folder
    (truncated, corrupted) is replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with one_after_another(target.with_name(f"{target.name}.lock")):
            if target.is_dir() and is_valid(target):
                return target
            remove(target)
            remove_leftovers(target)
            with suppress(FileExistsError), staged_folder(target) as partial:
                build(partial)
    except Exception as error:  # tokenizers raises a bare Exception on a full disk
        if getattr(error, "errno", None) not in _NO_ROOM and not is_disk_full(error):
            raise
        raise OSError(
            f"could not write the cache folder {target}: {error}. Free some space, or name another folder with "
            f"data.cache_dir or the environment variable LEANSTEP_CACHE"
        ) from error
    return target
