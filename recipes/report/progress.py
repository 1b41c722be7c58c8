"""How far a command is, and its refusal of input, on standard error."""

import sys
import threading
import time
from typing import Any

from leanstep._files import one_line
from leanstep._process import lacks_memory
from leanstep.recipes.report.formatting import format_duration

# what is shown of a phase of progress, and what is counted in it; other names are of points of curves
_PHASES = {
    "start": ("loading torch and transformers", ""),
    "check": ("checking the recipe", "sections"),
    "model": ("reading the model", ""),
    "tokens": ("reading and tokenising the text", ""),
    "evaluation": ("evaluating", "batches"),
    "tasks": ("tasks", "answers"),
    "turns": ("measuring", "turns"),
    "text": ("preparing the calibration data", ""),
    "checkpoint": ("reading the checkpoint", ""),
    "dense model": ("reading the dense model", ""),
    "perplexity": ("perplexity", "batches"),
    "statistics": ("statistics of all matrices", ""),
    "curves": ("curves", "points"),
    "refinement": ("search", "exchanges"),
    "refinement time": ("search", "seconds"),
    "comparison": ("comparison on held-out data", "matrices"),
    "pruning": ("pruning", "blocks"),
    "rounding": ("rounding", "blocks"),
    "reconstruction": ("reconstruction of blocks", "steps"),
    "recovery": ("recovery", "steps"),
    "writing": ("writing", ""),
}
# seconds between lines where there is no terminal
_INTERVAL = 30.0


def refuse_input(error: Exception, text: str | None = None) -> int:
    """Print an error about the input of a command and return exit code 2; a lack of memory is raised again."""
    if lacks_memory(error):
        raise error
    print(f"error: {one_line(text or error)}", file=sys.stderr)
    return 2


class ProgressBar:
    """The phase of a run, what is done of it, and the time left: a bar on a terminal, else a line for a new phase.

    Without a terminal, a phase has another line every 30 seconds, also while nothing is counted.

    Args:
        shown: False shows nothing.
    """

    def __init__(self, *, shown: bool = True) -> None:
        # libraries that print while they work are redirected, and the progress is not
        self._shown, self._stream = shown, sys.stderr
        self._live: Any = None
        self._task: Any = None
        self._thread: threading.Thread | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._phase = self._matrix = ""
        self._done = self._total = self._first = 0
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        self(0, 0, "start")
        if self._shown and not self._stream.isatty():
            self._thread = threading.Thread(target=self._repeat, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Show nothing more; a report that is printed later stays whole."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._live is not None:
            self._live.stop()

    def __call__(self, done: int, total: int, name: str) -> None:
        """Show that ``done`` of ``total`` are done, 0 of 0 where nothing is counted yet; ``name`` is a phase, or the
        matrix of a measured point.
        """
        if not self._shown:
            return
        with self._lock:
            now, phase = time.monotonic(), name if name in _PHASES else "curves"
            self._matrix = "" if name in _PHASES else name
            is_new = phase != self._phase
            # measured points begin again after those of Fisher curves
            if is_new or done < self._done or not self._total:
                # points that an earlier run measured do not count for the rate
                self._phase, self._first, self._began = phase, done, now
            self._done, self._total = done, total
            if self._stream.isatty():
                self._show(is_new)
            elif is_new:
                self._print(now)
            else:
                self._print_if_due(now, ended=0 < total == done)

    def _repeat(self) -> None:
        while not self._ended.wait(_INTERVAL / 10):
            with self._lock:
                self._print_if_due(time.monotonic())

    def _print_if_due(self, now: float, *, ended: bool = False) -> None:
        if now - self._printed > (_INTERVAL / 10 if ended else _INTERVAL):
            self._print(now)

    def _print(self, now: float) -> None:
        self._printed = now
        label, unit = _PHASES[self._phase]
        parts = [f"{label}: {self._done}/{self._total} {unit}" if self._total else label]
        parts += [self._matrix] if self._matrix else []
        if self._first < self._done < self._total:
            left = (now - self._began) / (self._done - self._first) * (self._total - self._done)
            parts.append(f"{format_duration(left)} left")
        elif not self._total and now - self._began >= 1:
            parts.append(f"{format_duration(now - self._began)} so far")
        print(", ".join(parts), file=self._stream, flush=True)

    def _show(self, is_new: bool) -> None:
        label, unit = _PHASES[self._phase]
        count = f"{self._done}/{self._total} {unit}" if self._total else ""
        if self._live is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            text = TextColumn("{task.description}", markup=False), BarColumn(bar_width=30)
            times = TextColumn("{task.fields[count]}"), TimeElapsedColumn(), TimeRemainingColumn()
            self._live = Progress(*text, *times, console=Console(file=self._stream))
            self._live.start()
            self._task = self._live.add_task(label, total=None, count=count)
        elif is_new:
            self._live.reset(self._task, description=label, total=None)
        self._live.update(self._task, completed=self._done, total=self._total or None, count=count)
