"""Write files and folders atomically and flush them to disk. Imports no torch."""

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STAGED = ".writing-"
REPLACED = ".replaced-"


def cache_folders() -> list[Path]:
    """Return the folders for leanstep's caches, best first, whether or not they exist.

    They are ``$LEANSTEP_CACHE``, ``leanstep`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, and ``leanstep-UID`` in the
    temporary folder. A user may have no home: ``docker run --user`` with a uid that has no entry in /etc/passwd.
    """
    folders = []
    if os.environ.get("LEANSTEP_CACHE"):
        folders.append(Path(os.path.expanduser(os.environ["LEANSTEP_CACHE"])).absolute())
    user_cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(user_cache):  # which the XDG specification says to ignore
        user_cache = os.path.expanduser("~/.cache")  # without a home it stays as it is
    if os.path.isabs(user_cache):
        folders.append(Path(user_cache) / "leanstep")
    temporary = "/tmp"
    with suppress(FileNotFoundError):  # raised if none can be written to
        temporary = tempfile.gettempdir()
    return [*folders, Path(temporary) / f"leanstep-{os.geteuid()}"]


def private_folder(folder: Path) -> Path:
    """Make a folder to which no other user can write, and return its path without symbolic links.

    Root and the owner of ``/`` are trusted. Parents may also be writable by all if they are sticky, as /tmp. Each
    parent is checked before its entries, so nobody can exchange what has been checked.

    Raises:
        OSError: the folder cannot be made.
        PermissionError: another user owns the folder or a parent, or can write to it.
    """
    folder = Path(os.path.realpath(folder))
    user, root_owner = os.geteuid(), os.lstat(folder.anchor).st_uid
    for path in (*reversed(folder.parents), folder):
        try:
            facts = os.lstat(path)
        except FileNotFoundError:
            path.mkdir(mode=0o755, exist_ok=True)
            facts = os.lstat(path)
        # in a user namespace that does not map root, root's folders seem to belong to another user
        owners = (user, 0) if path == folder else (user, 0, root_owner)
        shared = facts.st_mode & 0o022 and (path == folder or not facts.st_mode & stat.S_ISVTX)
        if not stat.S_ISDIR(facts.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "expected a folder", str(path))
        if facts.st_uid not in owners:
            raise PermissionError(
                errno.EPERM, f"expected a folder of uid {user}, it belongs to {facts.st_uid}", str(path)
            )
        if shared:
            mode = stat.S_IMODE(facts.st_mode)
            raise PermissionError(errno.EPERM, f"others may write to it (mode {mode:o}; chmod go-w)", str(path))
    return folder


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file name beside ``path`` to write to; afterwards that file replaces ``path`` in one step.

    Readers see the old content or the new. When the block raises, ``path`` stays as it was and the new file is removed.
    """
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}.tmp")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the content of ``path`` by ``text`` (UTF-8) in one step."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; afterwards it is renamed to ``target``, which must not exist.

    When the block raises, the folder is removed. :func:`remove_leftovers` removes the folders of killed processes.

    Raises:
        FileExistsError: another process made ``target`` in the meantime.
    """
    target = target.absolute()
    staged = target.with_name(f".{target.name}{STAGED}{os.getpid()}")
    try:
        staged.mkdir()
        yield staged
        if target.exists():
            raise FileExistsError(errno.EEXIST, "it was made by another process in the meantime", str(target))
        publish_folder(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def publish_folder(staged: Path, target: Path) -> None:
    """Flush ``staged`` with all its files to disk and rename it to ``target``, replacing an older folder there.

    A process killed between the two renames of a replacement leaves the old folder as ``.replaced-NAME``.
    """
    for path in (*staged.rglob("*"), staged):
        sync(path)
    replaced = target.with_name(f"{REPLACED}{target.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        # no system call replaces a nonempty folder
        os.replace(target, replaced)
    os.replace(staged, target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Remove half-written folders of :func:`staged_folder` whose process has ended."""
    for path in target.absolute().parent.glob(f".{target.name}{STAGED}*"):
        process = path.name.rpartition("-")[2]
        if process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, for another user
        return True
    return True


def free_bytes(path: Path) -> int:
    """Free bytes for this user on the disk of ``path``."""
    return shutil.disk_usage(path).free


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's quota on it, is full. Not every writer raises OSError."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return any(sign in text for sign in ("No space left", "os error 28", "StorageFull")) or "quota" in text.lower()


def format_bytes(size: float) -> str:
    """``12.3 KiB``, ``12.3 MiB``, ``12.3 GiB``."""
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} GiB"


def one_line(text: object) -> str:
    """A message in one printable line: spaces for line breaks, escapes for control characters and lone surrogates."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in words)
