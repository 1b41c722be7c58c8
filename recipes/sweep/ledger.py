"""The ledger of a sweep: JSON lines, appended and flushed to disk one by one, so that a killed sweep resumes."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from leanstep._files import elsewhere, lock_file, one_line, open_regular, parse_json, read_text, sync, write_text
from leanstep.recipes.config.values import leaves, read_document
from leanstep.recipes.sweep.grid import Plan, PlannedRun

# how a run ended
DONE, DIVERGED, FAILED, STOPPED = "done", "diverged", "failed", "stopped"
# of status.json, at the end
NUMBERS = ("val_loss", "bits_per_byte", "best_loss", "best_step", "ema_loss", "step", "steps", "tokens")
_VERSION = 1
_FOLDERS = ("runs", "recipes", "logs")
_LIMIT = 1 << 28  # bytes of a ledger


class LedgerError(ValueError):
    """The folder of the sweep cannot be used; the message says why and what to do."""


class Ledger:
    """``ledger.jsonl`` of a sweep's folder, which it locks until :meth:`close` or the end of the process.

    The first line has the grid and the checksum of every run's recipe. ``start`` and ``end`` lines follow. A last line
    that was cut by a crash is removed.

    Attributes:
        ends: the last ``end`` entry of each run.

    Raises:
        LedgerError: another process uses the folder, it holds something else or another sweep, or a line is damaged.
        OSError: the folder cannot be written.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.folder = plan, plan.folder
        self.path = plan.folder / "ledger.jsonl"
        self.ends: dict[str, dict[str, Any]] = {}
        self.attempts: dict[str, int] = {}
        self._lock = self._claim()
        try:
            entries = self._read()
            if entries:
                self._compare(entries[0])
                self._refuse_changed_recipes()
                for entry in entries[1:]:
                    self._take(entry)
            else:
                self._begin()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)

    def recipe_file(self, run: PlannedRun) -> Path:
        """The resolved recipe of a run."""
        return self.folder / "recipes" / f"{run.name}.yaml"

    def start(self, run: PlannedRun) -> None:
        """Record that a run starts."""
        self._append({"kind": "start", "run": run.name, "attempt": self.attempts.get(run.name, 0) + 1})

    def end(self, run: PlannedRun, facts: dict[str, Any]) -> None:
        """Record how a run ended."""
        self._append({"kind": "end", "run": run.name, **facts})

    def _claim(self) -> int:
        if self.folder.exists() and not self.folder.is_dir():
            raise LedgerError(f"--out {self.folder} is a file, expected a folder; choose another")
        others = [] if not self.folder.is_dir() else [path.name for path in self.folder.iterdir()]
        # a sweep that was killed at its start has these alone
        foreign = [] if "ledger.jsonl" in others else sorted(set(others) - {".lock", *_FOLDERS})
        if foreign:
            raise LedgerError(f"--out {self.folder} holds something else than a sweep ({foreign[0]}); choose another")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = open_regular(self.folder / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            lock_file(lock)
        except BlockingIOError:
            os.close(lock)
            raise LedgerError(
                f"another process sweeps in {self.folder}; wait for it, stop it, or choose another --out"
            ) from None
        if (entry := elsewhere(self.folder, *_FOLDERS)) is not None:
            os.close(lock)
            raise LedgerError(f"{entry}, and a sweep writes only into its own folder; remove it")
        for name in _FOLDERS:
            (self.folder / name).mkdir(exist_ok=True)
        return lock

    def _read(self) -> list[dict[str, Any]]:
        """Read the ledger and cut off a line that a crash left unfinished."""
        try:
            text = read_text(self.path, _LIMIT)
        except FileNotFoundError:
            return []
        except UnicodeDecodeError:
            raise LedgerError(self._damaged(1)) from None
        *lines, torn = text.split("\n")
        if torn:
            with open(open_regular(self.path, os.O_RDWR), "r+b") as file:
                file.truncate(len("".join(f"{line}\n" for line in lines).encode()))
                os.fsync(file.fileno())
        entries = []
        for number, line in enumerate(lines, start=1):
            try:
                entry = parse_json(line)
            except ValueError:
                entry = None
            if not _is_entry(entry, first=number == 1):
                raise LedgerError(self._damaged(number))
            entries.append(entry)
        return entries

    def _damaged(self, line: int) -> str:
        return f"{self.path}:{line} is no line of a sweep's ledger; repair it, or choose another --out"

    def _begin(self) -> None:
        """Write the recipes, and then the line that makes the folder a sweep."""
        for run in self.plan.runs:
            write_text(self.recipe_file(run), run.recipe)
        self._append(self._header())
        sync(self.folder)

    def _header(self) -> dict[str, Any]:
        plan = self.plan
        header = {"kind": "sweep", "version": _VERSION, "recipe": plan.recipe, "fixed": list(plan.fixed)}
        return {**header, "grid": plan.grid, "runs": {run.name: _checksum(run.recipe) for run in plan.runs}}

    def _compare(self, saved: dict[str, Any]) -> None:
        """Raise LedgerError if the sweep in the folder has another grid or another recipe."""
        now = self._header()
        if saved.get("version") != _VERSION:
            raise LedgerError(f"{self.path} is of another version of leanstep; choose another --out")
        before, grid = saved.get("grid"), self.plan.grid
        if before != grid or list(before) != list(grid):
            was = one_line(_words(before) if isinstance(before, dict) else before)[:300]
            raise LedgerError(
                f"{self.folder} holds a sweep of another grid: was {was}, is {_words(grid)} now; choose another --out"
            )
        if saved.get("runs") != now["runs"]:
            raise LedgerError(
                f"{self.folder} holds a sweep of another recipe: {self._first_difference()}; choose another --out"
            )

    def _first_difference(self) -> str:
        """The first key that differs from the saved recipe of a run."""
        for run in self.plan.runs:
            try:
                saved = read_document(read_text(self.recipe_file(run))).value
            except (OSError, UnicodeDecodeError):
                continue
            before, now = dict(leaves(saved)), dict(leaves(read_document(run.recipe).value))
            for key in {**now, **before}:
                if before.get(key) != now.get(key):
                    return f"{'.'.join(key)} was {before.get(key)!r}, is {now.get(key)!r} now"
        return "the recipes differ"

    def _refuse_changed_recipes(self) -> None:
        for run in self.plan.runs:
            path = self.recipe_file(run)
            try:
                is_same = read_text(path) == run.recipe
            except (FileNotFoundError, UnicodeDecodeError):
                is_same = False
            if not is_same:
                raise LedgerError(f"{path} is missing or was changed; choose another --out")

    def _append(self, entry: dict[str, Any]) -> None:
        """Append a line in one write and flush it to disk; a line that fails is removed."""
        line = (json.dumps(entry) + "\n").encode()
        with open(open_regular(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                written = file.write(line)
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
            if written != len(line):
                file.truncate(before)
                raise OSError(f"only {written} of {len(line)} bytes of a line could be written to {self.path}")
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        name = str(entry.get("run"))
        if entry.get("kind") == "start":
            self.attempts[name] = self.attempts.get(name, 0) + 1
        elif entry.get("kind") == "end":
            self.ends[name] = entry


def is_number(value: Any) -> bool:
    """Whether a value of a file is a number of the size that runs write, NaN and infinity included."""
    is_whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
    return is_whole or isinstance(value, float)


def _is_entry(entry: Any, *, first: bool) -> bool:
    if not isinstance(entry, dict) or first != (entry.get("kind") == "sweep"):
        return False
    if first:
        return True
    if entry.get("kind") not in ("start", "end") or not isinstance(entry.get("run"), str):
        return False
    numbers = [entry[name] for name in (*NUMBERS, "seconds", "code") if name in entry]
    is_end = entry.get("status") in (DONE, DIVERGED, FAILED, STOPPED) and all(map(is_number, numbers))
    return entry["kind"] == "start" or (is_end and isinstance(entry.get("reason", ""), str))


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _words(grid: dict[str, Any]) -> str:
    texts = {key: ",".join(map(str, values)) if isinstance(values, list) else values for key, values in grid.items()}
    return " ".join(f"{key}={text}" for key, text in texts.items())
