"""The run folder: its lock and its files.

``config.yaml  command.txt  env.json  status.json  log.jsonl  train.log  checkpoints/  last  best  final/``
``final-ema/  report.html``

Only the first process writes. On a full disk, log lines wait in memory.
"""

import fcntl
import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from leanstep._files import (
    cache_folders,
    elsewhere,
    lock_file,
    open_regular,
    parse_json,
    read_text,
    remove,
    replacing,
    write_text,
)

# files of a start that failed before the run began
_TRACES = {".lock", "train.log", "status.json"}
# links that a run makes, and exchanges as a whole
_LINKS = ("last", "best")
_PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate", "datasets", "tokenizers", "safetensors")


class FolderError(ValueError):
    """The output folder cannot be used: it is not writable, or another run or process uses it."""


def is_held(root: Path) -> bool:
    """Whether a process holds the lock of the run folder ``root``. False on file systems without locks."""
    try:
        lock = open_regular(root / ".lock")
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
    return False


def holder_of(root: Path) -> str:
    """`` (process 123)``: who holds the lock of the run folder ``root``; "" where Linux does not say it."""
    try:
        status, lines = (root / ".lock").stat(), Path("/proc/locks").read_text().splitlines()
    except OSError:
        return ""
    lock_id = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    # 1: FLOCK ADVISORY WRITE 123 fe:00:456 0 EOF
    holders = [fields[4] for fields in map(str.split, lines) if fields[1] == "FLOCK" and lock_id in fields]
    return f" (process {holders[0]})" if holders and int(holders[0]) > 0 else ""


class _Lines:
    """Appends lines to a text file. Lines that fail on a full disk are written with a later line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def add(self, line: str) -> None:
        self._waiting.append(line + "\n")
        try:
            descriptor = open_regular(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        except OSError:
            return
        with open(descriptor, "ab", buffering=0) as file:
            before = os.fstat(descriptor).st_size
            content = memoryview("".join(self._waiting).encode(errors="backslashreplace"))
            try:
                while content:
                    content = content[file.write(content) :]
                self._waiting.clear()
            except OSError:
                # remove a partial line
                file.truncate(before)


class RunFolder:
    """Paths and files of one run. :meth:`claim` locks the folder until :meth:`release`.

    ``hidden``: texts that its logs must not show -> their replacements.
    """

    def __init__(self, root: Path, hidden: Mapping[str, str] | None = None) -> None:
        self.root = root
        self._hidden = dict(hidden or {})
        self.checkpoints = root / "checkpoints"
        self.final, self.final_ema = root / "final", root / "final-ema"
        self._log = _Lines(root / "log.jsonl")
        self._text = _Lines(root / "train.log")
        self._lock: int | None = None
        self._is_new = False  # whether this process made the folder, and no other can have its lock

    def claim(self) -> bool:
        """Create and lock the folder, and remove the temporary files of a killed run.

        The lock ends with the process, also after ``kill -9``.

        Returns:
            False where the file system has no locks: another process may train in the folder, so nothing was removed.

        Raises:
            FolderError: the folder is not writable, locked by another process, or has a symbolic link, pipe or device
                in it.
        """
        try:
            if self.root.exists() and not self.root.is_dir():
                raise FolderError(f"out: {self.root} is a file, expected a folder; choose another with out=FOLDER")
            is_new = not self.root.exists()
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = open_regular(self.root / ".lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise FolderError(
                f"out: the folder {self.root} cannot be written ({_reason(error)}); choose another with out=FOLDER"
            ) from None
        try:
            is_locked = lock_file(self._lock)
            self._is_new = is_new and is_locked
        except BlockingIOError:
            holder = holder_of(self.root)
            self.release()
            raise FolderError(
                f"out: another process is training in {self.root}{holder}; wait for it, stop it, or choose "
                "out=ANOTHER_FOLDER"
            ) from None
        if is_locked:
            # temporary files and links of a killed run
            for path in self.root.glob(".*.tmp"):
                remove(path)
        self._refuse_links()
        return is_locked

    def _refuse_links(self) -> None:
        """Raise FolderError for a link or pipe that the run, or a tracker, could write through."""
        if (entry := elsewhere(self.root, "checkpoints", links=_LINKS)) is not None:
            raise FolderError(
                f"out: {entry}, and a run writes only into its own folder; remove it, or choose out=ANOTHER_FOLDER"
            )

    def release(self) -> None:
        """Give up the lock, and remove a folder that this process made and in which no run began."""
        if self._lock is not None:
            with suppress(OSError):
                if self._is_new and {entry.name for entry in self.root.iterdir()} <= {".lock", "train.log"}:
                    remove(self.root)
            os.close(self._lock)
            self._lock = None

    def describe(self, config_yaml: str, facts: dict[str, Any]) -> None:
        """Write config.yaml, command.txt and env.json."""
        # first: without it, the next start takes the folder for one that holds no run
        write_text(self.root / "config.yaml", config_yaml)
        self.checkpoints.mkdir(exist_ok=True)
        write_text(self.root / "command.txt", " ".join([sys.executable, *sys.orig_argv[1:]]) + "\n")
        write_text(self.root / "env.json", self._public(json.dumps(facts, indent=2)) + "\n")

    def status(self, status: str, **facts: Any) -> None:
        """Write status.json: ``running``, ``done``, ``interrupted`` or ``failed:<reason>``, and ``facts``."""
        content = {"status": status, **facts, "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        try:
            write_text(self.root / "status.json", json.dumps(content, indent=2) + "\n")
        except OSError as error:
            print(f"status.json could not be written: {error}", file=sys.stderr)

    def is_empty(self, cache_dir: str | None = None) -> bool:
        """Whether no run began here: no folder, or only files of a start that failed early, and caches."""
        if not self.root.is_dir():
            return True
        root = self.root.resolve()
        caches = [path.resolve() for path in (*cache_folders(), *([Path(cache_dir).expanduser()] if cache_dir else []))]
        traces = {path.relative_to(root).parts[0] for path in caches if root in path.parents} | _TRACES
        return all(entry.name in traces or entry.suffix == ".tmp" for entry in self.root.iterdir())

    def read_status(self) -> dict[str, Any]:
        """Read status.json; empty if it is missing or unreadable."""
        try:
            content = parse_json(read_text(self.root / "status.json"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def log(self, entry: dict[str, Any]) -> None:
        """Append one object to log.jsonl."""
        self._log.add(json.dumps(entry))

    def text(self, line: str) -> None:
        """Append one line to train.log."""
        self._text.add(self._public(line))

    def _public(self, text: str) -> str:
        for value, reference in self._hidden.items():
            text = text.replace(value, reference)
        return text

    def rewind_log(self, step: int) -> None:
        """Remove broken lines from log.jsonl, and those of steps after ``step``, which the run repeats."""
        path = self._log.path
        if not path.exists():
            return
        with (
            open(open_regular(path), encoding="utf-8", errors="replace") as lines,
            replacing(path) as partial,
            partial.open("w", encoding="utf-8") as rest,
        ):
            for line in lines:
                try:
                    entry = parse_json(line)
                except ValueError:
                    continue
                logged = entry.get("step", 0) if isinstance(entry, dict) else None
                if isinstance(logged, (int, float)) and logged <= step and entry.get("kind") != "sample":
                    rest.write(line.rstrip("\n") + "\n")


def environment(**facts: Any) -> dict[str, Any]:
    """Collect ``facts``, versions, machine, time and git commit."""
    from leanstep import __version__

    versions: dict[str, str] = {"leanstep": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        **facts,
        "versions": versions,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "git_commit": _git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _reason(error: OSError) -> str:
    name = Path(error.filename or "").name
    return f"{name}: {error.strerror}" if name == ".lock" else str(error.strerror)


def _git_commit() -> str | None:
    """Commit of the working directory's repository, read from its files; None where it cannot be read.

    Runs no git, which would run commands that the repository's configuration names.
    """
    try:
        here = Path.cwd()
        for folder in (here, *here.parents):
            if os.path.lexists(folder / ".git"):
                return _head(folder / ".git")
    except (OSError, ValueError):
        pass
    return None


def _head(git: Path) -> str | None:
    """The commit that ``HEAD`` names. ``git`` is a repository's ``.git`` folder, or the file of a worktree."""
    if not git.is_dir():
        git = git.parent / _git_line(git).removeprefix("gitdir: ")
    head = _git_line(git / "HEAD")
    if not head.startswith("ref: "):
        return _commit(head)
    name = head.removeprefix("ref: ")
    if not re.fullmatch(r"refs(/[\w+@=,-][\w.+@=,-]*)+", name):
        return None
    shared = git / _git_line(git / "commondir") if (git / "commondir").exists() else git
    for folder in (git, shared):
        if (folder / name).is_file():
            return _commit(_git_line(folder / name))
    packed = (line.partition(" ") for line in read_text(shared / "packed-refs").splitlines())
    return next((_commit(commit) for commit, _, ref in packed if ref == name), None)


def _git_line(path: Path) -> str:
    return read_text(path, 4096).strip()


def _commit(text: str) -> str | None:
    return text if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) else None
