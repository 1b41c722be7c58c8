"""The run folder: its lock and its files.

``config.yaml  command.txt  env.json  status.json  log.jsonl  train.log  checkpoints/  last  best  final/  report.html``

Only the first process writes. On a full disk, log lines wait in memory.
"""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from leanstep._files import write_text

# files of a start that failed before the run began
_TRACES = {".lock", "train.log", "status.json"}
_PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate", "datasets", "tokenizers", "safetensors")


class FolderError(ValueError):
    """The output folder cannot be used: it is not writable, or another run or process uses it."""


def is_held(root: Path) -> bool:
    """Whether a process holds the lock of the run folder ``root``. False on file systems without locks."""
    try:
        with (root / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class _Lines:
    """Appends lines to a text file. Lines that fail on a full disk are written with a later line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def add(self, line: str) -> None:
        self._waiting.append(line + "\n")
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write("".join(self._waiting).encode())
            self._waiting.clear()
        except OSError:
            # remove a partial line
            if self.path.exists() and self.path.stat().st_size > before:
                os.truncate(self.path, before)


class RunFolder:
    """Paths and files of one run. :meth:`claim` locks the folder until :meth:`release`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.final = root / "final"
        self._log = _Lines(root / "log.jsonl")
        self._text = _Lines(root / "train.log")
        self._lock: TextIO | None = None

    def claim(self) -> None:
        """Create and lock the folder. Raises FolderError if it is not writable or locked by another process.

        The lock ends with the process, also after ``kill -9``.
        """
        try:
            if self.root.exists() and not self.root.is_dir():
                raise FolderError(f"out: {self.root} is a file, expected a folder; choose another with out=FOLDER")
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = (self.root / ".lock").open("w")
        except OSError as error:
            raise FolderError(
                f"out: the folder {self.root} cannot be written ({error.strerror}); choose another with out=FOLDER"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise FolderError(
                f"out: another process is training in {self.root}; wait for it, stop it, or choose out=ANOTHER_FOLDER"
            ) from None
        except OSError:
            pass  # some network file systems have no locks

    def release(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def describe(self, config_yaml: str, facts: dict[str, Any]) -> None:
        """Write config.yaml, command.txt and env.json."""
        self.checkpoints.mkdir(exist_ok=True)
        write_text(self.root / "config.yaml", config_yaml)
        write_text(self.root / "command.txt", " ".join([sys.executable, *sys.orig_argv[1:]]) + "\n")
        write_text(self.root / "env.json", json.dumps(facts, indent=2) + "\n")

    def status(self, status: str, **facts: Any) -> None:
        """Write status.json: ``running``, ``done``, ``interrupted`` or ``failed:<reason>``, and ``facts``."""
        content = {"status": status, **facts, "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        try:
            write_text(self.root / "status.json", json.dumps(content, indent=2) + "\n")
        except OSError as error:
            print(f"status.json could not be written: {error}", file=sys.stderr)

    def is_empty(self) -> bool:
        """Whether no run began here: no folder, or only files of a start that failed early."""
        if not self.root.is_dir():
            return True
        return all(entry.name in _TRACES or entry.suffix == ".tmp" for entry in self.root.iterdir())

    def read_status(self) -> dict[str, Any]:
        """Read status.json; empty if it is missing or unreadable."""
        try:
            content = json.loads((self.root / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def log(self, entry: dict[str, Any]) -> None:
        """Append one object to log.jsonl."""
        self._log.add(json.dumps(entry))

    def text(self, line: str) -> None:
        """Append one line to train.log."""
        self._text.add(line)

    def rewind_log(self, step: int) -> None:
        """Remove broken lines from log.jsonl, and those of steps after ``step``, which the run repeats."""
        path = self._log.path
        if not path.exists():
            return
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("step", 0) <= step and entry.get("kind") != "sample":
                lines.append(line + "\n")
        write_text(path, "".join(lines))


def environment(**facts: Any) -> dict[str, Any]:
    """Collect ``facts``, versions, machine, time and git commit."""
    from leanstep._version import __version__

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


def _git_commit() -> str | None:
    """Commit of the working directory, with ``-dirty`` if files differ from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
