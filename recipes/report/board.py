"""The board: all runs below a folder on one page, which follows them while it is served, or is one file."""

import base64
import html
import json
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from leanstep._files import open_regular, read_bytes, write_text
from leanstep._pages.page import render
from leanstep.recipes.report.report import differences
from leanstep.recipes.report.runlog import LOG_LIMIT, Run, flat, number, read_files, read_log
from leanstep.recipes.report.runs import facts_of, run_folders
from leanstep.recipes.training.folder import is_held

PAGE_TYPE = "text/html; charset=utf-8"
_REPORT = {"report.html", "sparsity.json"}  # of prune and compress
_MOST_LINES = 2000  # of one log, evenly spaced
_MOST_NUMBERS = 2_000_000  # of all curves together
_MOST_REPORTS, _LARGEST_FILE = 50, 1 << 22
_MOST_EMBEDDED = 1 << 24  # bytes of reports in one file
_NO_SETTINGS = ("description", "expect.")
# what plotly's file has in texts and a page may not have
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_TITLE = re.compile(r"<title>(.*?)</title>", re.DOTALL)


class Board:
    """Runs and reports below a folder. Each call of :meth:`content` reads what changed since the last one.

    Raises:
        ValueError: ``root`` is not a folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._followed: dict[Path, _Followed] = {}
        self._lock = threading.Lock()  # browsers ask at once
        self.content()

    def content(self) -> dict[str, Any]:
        """What the page shows, as JSON takes it: ``runs``, ``settings`` that differ, ``reports`` and ``problems``.

        A run has the facts of ``leanstep runs`` and ``curves``: for "train" and "eval" the ``step``, ``tokens`` and
        ``hours`` of its lines and their ``values`` by key, of at most 2,000 lines. The last line of a log is read when
        it is complete. Raises ValueError if the folder is gone.
        """
        with self._lock:
            runs = [run for folder in run_folders(self.root) if (run := self._read(folder)) is not None]
            most = self._most_lines(runs)
            facts = [facts_of(run, self.root) for run in runs]
            curves = [self._followed[run.folder].curves(most) for run in runs]
        settings = differences([flat(run.config) for run in runs])
        settings = [row for row in settings if not row[0].startswith(_NO_SETTINGS)]
        reported = [f"{fact['name']}: {text}" for fact, run in zip(facts, runs, strict=True) for text in run.problems]
        for fact, run, curve in zip(facts, runs, curves, strict=True):
            del fact["settings"], fact["age_s"]  # the page computes the age from "updated"
            # status.json is older than the log while a run is running
            fact["step"] = max([fact["step"] or 0, *curve["train"]["step"][-1:]])
            page = run.folder / "report.html"
            fact.update(recipe=run.name, curves=curve, report=self._name(page) if page.is_file() else None)
        return {
            "base": "files",
            "runs": facts,
            "settings": settings,
            "reports": list(self._reports()),
            "problems": list(dict.fromkeys(reported))[:20],
        }

    def file(self, name: str) -> bytes:
        """A page below the folder. Raises OSError or ValueError for any other path, through links, too."""
        path = (self.root / name).resolve()
        if path.suffix != ".html" or not path.is_relative_to(self.root.resolve()):
            raise FileNotFoundError(name)
        return read_bytes(path, _LARGEST_FILE)

    def _read(self, folder: Path) -> Run | None:
        followed = self._followed.setdefault(folder, _Followed(folder))
        with suppress(OSError, ValueError):  # a folder may vanish meanwhile
            return followed.read()
        return None

    def _most_lines(self, runs: Sequence[Run]) -> int:
        keys = sum(len(_numbers(rows[-1])) for run in runs for rows in (run.train, run.evals) if rows)
        return min(_MOST_LINES, max(10, _MOST_NUMBERS // max(1, keys)))

    def _reports(self) -> Iterator[dict[str, Any]]:
        """Pages of prune and compress."""
        found = 0
        for folder, names, files in os.walk(self.root):
            names[:] = sorted(name for name in names if not name.startswith("."))  # of a command that is writing
            if found < _MOST_REPORTS and set(files) >= _REPORT:
                found += 1
                name = self._name(Path(folder, "report.html"))
                with suppress(OSError, ValueError):
                    title = _TITLE.search(self.file(name).decode("utf-8", "replace"))
                    yield {"file": name, "title": html.unescape(title[1]) if title else name}

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.root)


class _Followed:
    """A run whose files are read as far as they changed, its log from where the last call ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._described, self._marks = Run(folder, ""), [(0, 0, 0)]
        self._logged, self._log, self._size = Run(folder, ""), (0, 0), 0
        self._drawn: tuple[tuple[int, ...], dict[str, Any]] = (), {}

    def read(self) -> Run:
        """Return the run. Raises OSError or ValueError where it is none any more."""
        facts = [os.lstat(self.folder / name) for name in ("config.yaml", "status.json")]
        marks = [(fact.st_ino, fact.st_mtime_ns, fact.st_size) for fact in facts]
        if marks != self._marks:
            self._described, self._marks = read_files(self.folder), marks
        problems = list(self._described.problems)
        try:
            self._read_log()
        except FileNotFoundError:
            pass  # the run starts
        except OSError as error:
            problems.append(f"log.jsonl cannot be read: {error.strerror}")
        return replace(
            self._described,
            held=is_held(self.folder),
            train=self._logged.train,
            evals=self._logged.evals,
            problems=[*problems, *self._logged.problems],
        )

    def _read_log(self) -> None:
        with open(open_regular(self.folder / "log.jsonl"), "rb") as file:
            facts = os.fstat(file.fileno())
            log = facts.st_dev, facts.st_ino
            if log != self._log or facts.st_size < self._size:  # a resumed run writes it anew
                self._logged, self._log, self._size = Run(self.folder, ""), log, 0
            file.seek(self._size)
            added = file.read(LOG_LIMIT)
        whole = added[: added.rfind(b"\n") + 1]
        self._size += len(whole)
        read_log(self._logged, whole.decode("utf-8", "replace"))

    def curves(self, most_lines: int) -> dict[str, Any]:
        """The columns of training lines and validations."""
        key = (*self._log, self._size, most_lines)
        if self._drawn[0] != key:
            self._drawn = key, _curves(self._logged, most_lines)
        return self._drawn[1]


def _curves(run: Run, most_lines: int) -> dict[str, Any]:
    steps = [row["step"] for row in run.train]
    tokens, seconds = (np.array(run.column(key), dtype=float) for key in ("tokens", "elapsed_s"))
    columns = {}
    for kind, rows, prefix in (("train", run.train, ""), ("eval", run.evals, "val_")):
        shown = rows[:: -(-len(rows) // most_lines)] if len(rows) > most_lines else rows
        at = [row["step"] for row in shown]
        values: dict[str, list[float | None]] = {}
        for index, row in enumerate(shown):
            for key, value in _numbers(row).items():
                values.setdefault(f"{prefix}{key}", [None] * len(shown))[index] = value
        # the costs of a validation are those of its step, linear between two training lines
        costs = {name: _between(at, steps, cost) for name, cost in (("tokens", tokens), ("hours", seconds / 3600))}
        columns[kind] = {"step": at, **costs, "values": values}
    return columns


def _numbers(row: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of a line of the log, those of a section as ``SECTION/KEY``; None where they are not finite."""
    pairs = [
        (f"{name}/{key}" if key else name, value)
        for name, section in row.items()
        if name not in ("step", "tokens", "elapsed_s")
        for key, value in (section.items() if isinstance(section, dict) else [("", section)])
    ]
    return {name: _short(known) for name, value in pairs if (known := number(value)) is not None}


def _between(at: list[int], steps: list[int], costs: np.ndarray) -> list[float | None]:
    return [_short(cost) for cost in np.interp(at, steps, costs, np.nan, np.nan)] if steps else [None] * len(at)


def _short(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def page(root: Path, content: dict[str, Any] | None) -> str:
    """The page as text: of ``content``, or, without one, a page that asks its server again and again."""
    from plotly.offline import get_plotlyjs

    return render(
        Path(__file__).with_name("templates") / "board.html",
        title=f"Runs in {root}",
        nonce=secrets.token_urlsafe(16),
        plotly=_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", get_plotlyjs()),
        # no text in it may end the script
        content=json.dumps(content, allow_nan=False).replace("<", "\\u003c"),
    )


def write_board(root: Path, out: Path) -> Path:
    """Write the board as one file, with the reports in it; return its path.

    Raises:
        ValueError: ``root`` is not a folder, or holds no run and no report.
        OSError: ``out`` cannot be written.
    """
    board = Board(root)
    content = board.content()
    if not content["runs"] and not content["reports"]:
        raise ValueError(f"no run and no report below {root}; expected a folder that holds runs, such as runs/")
    files, room = {}, _MOST_EMBEDDED
    for report in content["reports"]:
        with suppress(OSError):  # of one that is too large, or vanished, the page has the address
            embedded = board.file(report["file"])
            room -= len(embedded)
            if room > 0:
                files[report["file"]] = f"data:{PAGE_TYPE};base64,{base64.b64encode(embedded).decode()}"
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(
            f"{out} is a folder" if out.is_dir() else f"the folder {out.parent} of {out.name} does not exist"
        )
    base = quote(os.path.relpath(root, out.parent))
    write_text(out, page(root, {**content, "base": base, "files": files, "written": time.strftime("%Y-%m-%d %H:%M")}))
    return out
