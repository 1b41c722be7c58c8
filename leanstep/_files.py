"""Read regular files, write files and folders atomically, and flush them to disk. Imports no torch.

Folders may come from elsewhere: nothing here writes through a symbolic link or waits for a pipe.
"""

import errno
import fcntl
import glob
import grp
import json
import os
import platform
import pwd
import secrets
import shutil
import stat
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

STAGED = ".writing-"
REPLACED = ".replaced-"
# bytes that read_text reads at most: far more than any configuration or report
READ_LIMIT = 1 << 26
DEPTH_LIMIT = 64
_PIECE = 1 << 20


def lock_file(descriptor: int) -> bool:
    """Lock an open file for this process alone, until it is closed or the process ends, also by ``kill -9``.

    Returns:
        False where the file system has no locks, as some of a network.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def open_locked(path: Path) -> int:
    """Open a regular file for reading, created where it is missing, and lock it; returns its descriptor.

    Another process that holds the lock may remove the file: then this one opens the next of that name.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    while True:
        descriptor = open_regular(path, os.O_RDONLY | os.O_CREAT)
        try:
            lock_file(descriptor)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def exclusive_lock(target: Path) -> Iterator[None]:
    """Context manager: no other process writes ``target`` meanwhile, by a lock on ``.TARGET.lock`` beside it.

    The lock ends with the process, also by ``kill -9``, which leaves an empty file that locks nothing.

    Raises:
        ValueError: another process writes it.
    """
    file = target.absolute().with_name(f".{target.name}.lock")
    if not os.access(file.parent, os.W_OK):  # nobody can write there
        yield
        return
    try:
        descriptor = open_locked(file)
    except BlockingIOError:
        raise ValueError(f"another run writes {target}: wait for it, stop it, or name another folder") from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def one_after_another(file: Path) -> Iterator[None]:
    """Context manager: wait until no other process is inside with the same lock file, which stays.

    Where the file system has no locks, as some of a network, nobody waits.
    """
    descriptor = open_regular(file, os.O_RDONLY | os.O_CREAT)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def open_regular(path: Path, flags: int = os.O_RDONLY, *, follow: bool = False) -> int:
    """Open a regular file and return its descriptor. ``follow`` allows a symbolic link as the last name.

    Never waits for the writer of a pipe.

    Raises:
        OSError: ``path`` cannot be opened, or is a link, folder, pipe or device.
    """
    no_link = 0 if follow else os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | no_link | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(path):
            raise OSError(errno.ELOOP, "is a symbolic link, expected a regular file", str(path)) from None
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "is not a regular file", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return descriptor


def elsewhere(folder: Path, *inner: str, links: Collection[str] = ()) -> str | None:
    """Find an entry through which whoever writes into a folder would write elsewhere: a link, pipe or device.

    Args:
        folder: need not exist.
        inner: names of folders in it that are written into.
        links: names in ``folder`` that may be links. Temporary files may, too: nobody foresees the next one's name.

    Returns:
        ``PATH is a symbolic link``, for example; None if there are only files and folders.
    """
    for place in (folder, *(folder / name for name in inner)):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.is_symlink():
                is_temporary = path.name.startswith(".") and path.suffix == ".tmp"
                if not is_temporary and (place != folder or path.name not in links):
                    return f"{path} is a symbolic link"
            elif path.exists() and not path.is_file() and not path.is_dir():
                return f"{path} is no regular file"
    return None


def read_bytes(path: Path, limit: int = READ_LIMIT, *, follow: bool = False) -> bytes:
    """Read a regular file (:func:`open_regular`). Raises OSError if it has more than ``limit`` bytes."""
    pieces, size = [], 0
    with open(open_regular(path, follow=follow), "rb") as file:
        # a single read of the limit would set that much memory aside, for a file of any size
        while size <= limit and (piece := file.read(_PIECE)):
            pieces.append(piece)
            size += len(piece)
    if size > limit:
        raise OSError(errno.EFBIG, f"has more than {format_bytes(limit)}", str(path))
    return b"".join(pieces)


def read_text(path: Path, limit: int = READ_LIMIT, *, follow: bool = False, errors: str = "strict") -> str:
    """Read a regular file (:func:`read_bytes`) as UTF-8 with any line ends. Raises UnicodeDecodeError by ``errors``."""
    text = read_bytes(path, limit, follow=follow).decode("utf-8", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError, also where values are nested more than :data:`DEPTH_LIMIT` deep."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    level, depth = [content], 0
    while level:
        level = [item for value in level if isinstance(value, (dict, list)) for item in _items(value)]
        depth += 1
        if depth > DEPTH_LIMIT:
            raise ValueError(f"its values are nested more than {DEPTH_LIMIT} deep")
    return content


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def is_folder_name(name: str) -> bool:
    """Whether a name can only be a folder, existing or not: names on the hub have at most one slash."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


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

    Root and the owner of ``/`` are trusted. Parents may also be writable by all if they are sticky, as /tmp. The
    user's private group may write, as under the umask 002 of many distributions. Each
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
        shared = _others_may_write(facts, user) and (path == folder or not facts.st_mode & stat.S_ISVTX)
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


def _others_may_write(facts: os.stat_result, user: int) -> bool:
    """Whether the mode lets another user write; the private group of a user has no other member."""
    if facts.st_mode & 0o002:
        return True
    if not facts.st_mode & 0o020:
        return False
    try:
        group, account = grp.getgrgid(facts.st_gid), pwd.getpwuid(user)
    except KeyError:
        return True
    private = account.pw_gid == group.gr_gid and account.pw_name == group.gr_name
    return not (private and set(group.gr_mem) <= {account.pw_name})


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty file to write to; afterwards that file replaces ``path`` in one step.

    Readers see the old content or the new. When the block raises, ``path`` stays as it was and the new file is removed.
    The file has the mode of new files (the umask), also where the writer replaces it by a private one. It is alone in a
    hidden folder beside ``path``, where writers may put temporary files of their own. The next call for ``path``
    removes the folders of killed processes.

    Raises:
        OSError: the file cannot be written, or ``path`` is a folder, device or pipe.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EISDIR if path.is_dir() else errno.EINVAL, "is not a regular file", str(path))
    with partial_folder(path) as folder:
        partial = folder / path.name
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        yield partial
        os.chmod(partial, mode)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder of this process, hidden beside ``path``, to make ``path`` in; it is removed afterwards.

    The next call for ``path`` removes the folders of killed processes.
    """
    remove_partials(path)
    folder = path.with_name(f".{path.stem}.{_new_writer()}{path.suffix}.tmp")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        remove(folder)


def remove_partials(path: Path) -> None:
    """Remove what :func:`partial_folder` left beside ``path`` of processes that have ended on this machine."""
    start, end = f".{path.stem}.", f"{path.suffix}.tmp"
    try:
        names = [name for name in os.listdir(path.parent) if name.startswith(start) and name.endswith(end)]
    except OSError:
        return
    for name in names:
        if _has_ended(name.removeprefix(start).removesuffix(end)):
            with suppress(OSError):
                remove(path.with_name(name))


def _new_writer() -> str:
    """A part of a name that no other writer has: chance, the processes of this one, and its number among them."""
    return f"{secrets.token_hex(4)}-{_process_space()}-{os.getpid()}"


def _has_ended(writer: str) -> bool:
    """Whether a :func:`_new_writer` was of a process of this machine that has ended."""
    parts = writer.split("-")
    return len(parts) == 3 and parts[1] == _process_space() and parts[2].isdigit() and not _is_running(int(parts[2]))


@cache
def _process_space() -> str:
    """A name for the processes among which a process number is unique: machine, start of it, and PID namespace.

    A folder on a network disk has partial files of other machines, whose processes may run.
    """
    facts = [platform.node()]
    with suppress(OSError):
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return f"{zlib.crc32(repr(facts).encode()):08x}"


def write_text(path: Path, text: str) -> None:
    """Replace the content of ``path`` by ``text`` (UTF-8) in one step. Escapes lone surrogates."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; afterwards it is renamed to ``target``, which must not exist without ``replace``.

    When the block raises, the folder is removed. :func:`remove_leftovers` removes the folders of killed processes.

    Raises:
        FileExistsError: another process made ``target`` in the meantime.
    """
    target = target.absolute()
    staged = target.with_name(f".{target.name}{STAGED}{_new_writer()}")
    staged.mkdir()
    try:
        yield staged
        if target.exists() and not replace:
            raise FileExistsError(errno.EEXIST, "it was made by another process in the meantime", str(target))
        publish_folder(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def publish_folder(staged: Path, target: Path) -> None:
    """Flush ``staged`` with all its files to disk and rename it to ``target``, replacing an older folder there.

    The files get the mode of new files: writers that rename private temporary files leave 0600. A process killed
    between the two renames of a replacement leaves the old folder as ``.replaced-NAME``.
    """
    mode = stat.S_IMODE(staged.stat().st_mode) & 0o666
    for path in (*staged.rglob("*"), staged):
        if path.is_symlink():
            continue
        if path.is_file():
            path.chmod(mode)
        sync(path)
    replaced = target.with_name(f"{REPLACED}{target.name}")
    remove(replaced)
    try:
        if os.path.lexists(target):
            # no system call replaces a nonempty folder
            os.replace(target, replaced)
        os.replace(staged, target)
    except BaseException:  # Ctrl-C included
        restore_replaced(target)
        raise
    sync(target.parent)
    remove(replaced)


def output_folder(out: str | Path) -> Path:
    """The path of a folder to create, with a leading ``~`` expanded. Raises ValueError for a path without a name."""
    try:
        path = Path(out).expanduser()
    except RuntimeError as error:  # a user without a home
        raise ValueError(f"{str(out)!r} names no folder: {error}") from None
    if path.name in ("", ".."):
        raise ValueError(f"expected the name of a folder to create, got {str(out)!r}")
    return path


def restore_replaced(target: Path) -> None:
    """Finish what a process killed inside :func:`publish_folder` left: restore the old folder, or remove it."""
    replaced = target.absolute().with_name(f"{REPLACED}{target.name}")
    if not replaced.is_dir() or replaced.is_symlink():
        return
    if os.path.lexists(target):
        remove(replaced)
    else:
        os.replace(replaced, target)


def restore_alone(target: Path) -> None:
    """:func:`restore_replaced`, if no other process writes ``target``. Raises ValueError as :func:`exclusive_lock`."""
    with exclusive_lock(target):
        restore_replaced(target)


def remove(path: Path) -> None:
    """Remove a folder and all in it as far as possible, or anything else: never the target of a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:  # rmtree would wait for the writer of a pipe
        path.unlink(missing_ok=True)


def remove_leftovers(target: Path) -> None:
    """Remove half-written folders of :func:`staged_folder` in processes that have ended on this machine."""
    start = f".{target.name}{STAGED}"
    for path in target.absolute().parent.glob(f"{glob.escape(start)}*"):
        if _has_ended(path.name.removeprefix(start)):
            remove(path)


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
    text = str(error)
    signs = any(sign in text for sign in ("No space left", "os error 28", "StorageFull"))
    return signs or getattr(error, "errno", None) == errno.ENOSPC or is_quota_used_up(error)


def is_quota_used_up(error: BaseException) -> bool:
    """Whether an error says that the user's quota on the disk is used up."""
    number = getattr(error, "errno", None)
    # the text of an OSError also holds a path
    return "quota" in str(error).lower() if number is None else number == errno.EDQUOT


def format_bytes(size: float) -> str:
    """``12.3 KiB``, ``12.3 MiB``, ``12.3 GiB``."""
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} GiB"


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align rows of equal length as columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def one_line(text: object) -> str:
    """A message in one printable line: spaces for line breaks, escapes for control characters and lone surrogates."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in words)


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file of a folder that has one, and neither a config.json nor other weights; else None."""
    files = list(folder.glob("*.gguf")) if folder.is_dir() and not (folder / "config.json").exists() else []
    return files[0] if len(files) == 1 else None


RUN_WITHOUT_MODEL = " is a run that has no model yet: it writes one with each checkpoint, and at its end"
GGUF_ONLY = (
    " has weights in GGUF only, which are quantised: expected a Hugging Face folder. Prune the model that they were "
    "made from, and convert the result"
)


def local_folder(source: str | Path) -> Path | None:
    """The folder ``source``; None for a name on the hub. Raises ValueError for what is neither."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.exists():
        raise ValueError(f"{path}{GGUF_ONLY}")
    if path.exists():
        raise ValueError(
            f"{path} is a file: expected a Hugging Face folder, with config.json and model.safetensors in it"
        )
    if is_folder_name(text := str(source)) or "/" not in text:
        raise ValueError(
            f"{path} does not exist: expected a Hugging Face folder, or a name on the hub such as 'org/model'"
        )
    return None


def find_model_folder(path: str | Path) -> Path:
    """Return the Hugging Face folder at ``path``: itself, ``final/`` of a run, or ``hf/`` of a checkpoint.

    A folder with a GGUF file in place of weights, as ``leanstep compress`` writes it, is one, too. Raises ValueError if
    there is none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"'{path}' is {'a file' if folder.exists() else 'not there'}; expected a Hugging Face folder")
    if gguf_file(folder) is not None:
        return folder
    for candidate in (folder, folder / "final", folder / "last" / "hf", folder / "hf"):
        if not (candidate / "config.json").is_file():
            continue
        if any(candidate.glob("*.safetensors")) or any(candidate.glob("*.bin")):
            return candidate
        raise ValueError(f"'{candidate}' has a config.json but no weights (model.safetensors)")
    if (folder / "status.json").is_file():
        raise ValueError(f"{folder}{RUN_WITHOUT_MODEL}")
    raise ValueError(
        f"'{path}' is no Hugging Face model: expected config.json and model.safetensors in it, or in its final/ "
        f"(a run) or hf/ (a checkpoint)"
    )


def model_name(source: str | Path) -> str:
    """The name of a model for people: the last part of its path, of a model in a run the run's."""
    path = Path(source).absolute()
    return next(one.name for one in (path, *path.parents) if one.name not in ("final", "adapter", "hf", "last"))
