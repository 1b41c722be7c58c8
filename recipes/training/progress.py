"""What a run shows while it trains: one live line on a terminal, plain lines elsewhere, and how long it will take."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from leanstep.recipes.training.folder import RunFolder

__all__ = ["Clock", "Progress", "flat_scalars", "format_duration", "format_line", "format_rate"]


def format_rate(tokens_per_s: float) -> str:
    """``850 tok/s``, ``12.4k tok/s``, ``1.20M tok/s``."""
    if tokens_per_s >= 1e6:
        return f"{tokens_per_s / 1e6:.2f}M tok/s"
    if tokens_per_s >= 1e3:
        return f"{tokens_per_s / 1e3:.1f}k tok/s"
    return f"{tokens_per_s:.0f} tok/s"


def format_duration(seconds: float) -> str:
    """``0:42``, ``12:40``, ``1:12:40``, ``3d 1:12:40``."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02d}"
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def format_line(entry: dict[str, Any], steps: int, eta: float | None, notes: list[str]) -> str:
    """One log line from a ``train`` entry of log.jsonl; ``notes`` are appended in brackets."""
    parts = [f"step {entry['step']}/{steps}", f"loss {entry['loss']:.4f}", f"lr {entry['lr']:.2e}"]
    if entry.get("grad_norm") is not None:
        parts.append(f"gnorm {entry['grad_norm']:.3f}")
    if entry.get("tokens_per_s"):
        parts.append(format_rate(entry["tokens_per_s"]))
    if entry.get("mfu"):
        parts.append(f"mfu {entry['mfu']:.1%}")
    if entry.get("memory_gib"):
        parts.append(f"mem {entry['memory_gib']:.1f} GiB")
    if entry.get("nonfinite"):
        parts.append(f"nonfinite {entry['nonfinite']}")
    if eta is not None:
        parts.append(f"eta {format_duration(eta)}")
    return "  ".join(parts) + "".join(f"  [{note}]" for note in notes)


class Clock:
    """Time spent training, without evaluation and saving, and what is left of it.

    Rates are over the window since the last log line. The estimate adds the measured cost of the evaluations and saves
    to come to that of the steps.
    """

    def __init__(self, elapsed_s: float = 0.0) -> None:
        self._before = elapsed_s
        self._start = time.perf_counter()
        self._window_start = self._start
        self._window_paused = 0.0
        self._window_tokens = 0
        self._window_steps = 0
        self._pauses: dict[str, list[float]] = {}
        self.step_s: float | None = None
        self.rate_now: float | None = None

    @property
    def here_s(self) -> float:
        """Seconds since this start of the run."""
        return time.perf_counter() - self._start

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run first started, over all its starts, evaluation and saving included."""
        return self._before + time.perf_counter() - self._start

    def stepped(self, tokens: int) -> None:
        """Count one optimizer step over ``tokens`` targets."""
        self._window_tokens += tokens
        self._window_steps += 1

    @contextmanager
    def pause(self, what: str) -> Iterator[Callable[[], float]]:
        """Leave the time inside out of the rates; ``what`` is ``eval`` or ``save``. Yields a stopwatch of the block."""
        begin = time.perf_counter()
        spent = 0.0
        try:
            yield lambda: spent
        finally:
            spent = time.perf_counter() - begin
            self._window_paused += spent
            self._pauses.setdefault(what, []).append(spent)

    def measure(self) -> None:
        """End the window: set :attr:`rate_now`, its tokens per second, and :attr:`step_s`, its seconds per step."""
        now = time.perf_counter()
        spent = now - self._window_start - self._window_paused
        self.rate_now = round(self._window_tokens / spent, 1) if spent > 0 else 0.0
        if self._window_steps:
            self.step_s = spent / self._window_steps
        self._window_start, self._window_paused, self._window_tokens, self._window_steps = now, 0.0, 0, 0

    def eta(self, steps: int, evals: int, saves: int) -> float | None:
        """Seconds that so many steps, evaluations and saves will take; None before the first window ended."""
        if self.step_s is None:
            return None
        return steps * self.step_s + evals * self._mean("eval") + saves * self._mean("save")

    def _mean(self, what: str) -> float:
        spent = self._pauses.get(what, [])
        return sum(spent) / len(spent) if spent else 0.0


class Progress:
    """Prints for the first process and keeps ``train.log``; in the others it does nothing.

    On a terminal, a live bar follows every step and other lines scroll above it. Elsewhere each log line is printed.
    """

    def __init__(self, folder: RunFolder, steps: int, *, active: bool, live: bool | None = None) -> None:
        self._folder, self._steps, self._active = folder, steps, active
        self._bar: Any = None
        self._live = active and (sys.stdout.isatty() if live is None else live)

    def __enter__(self) -> "Progress":
        if self._live:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self._steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str, *, error: bool = False) -> None:
        """Print ``text`` (on stderr if it tells of an ``error``) and append it to train.log."""
        if not self._active:
            return
        for line in text.splitlines() or [""]:
            self._folder.text(line)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr if error else sys.stdout, flush=True)

    def line(self, step: int, text: str, wanted: bool) -> None:
        """Follow a step: a terminal's live line shows each, plain output and train.log those that are ``wanted``."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            if wanted:
                self._folder.text(text)
        elif wanted:
            self.say(text)


def flat_scalars(tree: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Dotted keys and plain values, because some trackers take nothing else; other values become text."""
    flat: dict[str, int | float | str | bool] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flat_scalars(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
