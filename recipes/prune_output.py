"""What ``leanstep prune`` prints: the summary of a result, the table of an estimate; and the progress of commands."""

import math
import os
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from leanstep._files import format_bytes, one_line
from leanstep._process import lacks_memory
from leanstep.recipes.check.machine import processor_name
from leanstep.recipes.training.formatting import format_duration

if TYPE_CHECKING:
    from leanstep.pruning import Estimate, PruneResult, RecoveryResult

# what is shown of a phase of progress, and what is counted in it; other names are of points of curves
_PHASES = {
    "start": ("loading torch and transformers", ""),
    "check": ("checking the recipe", "sections"),
    "model": ("reading the model", ""),
    "tokens": ("reading and tokenising the text", ""),
    "evaluation": ("evaluating", "batches"),
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
    "recovery": ("recovery", "steps"),
    "writing": ("writing", ""),
}
# seconds between lines where there is no terminal
_INTERVAL = 30.0

OUT_OF_MEMORY = (
    "out of memory; take fewer or shorter sequences (--samples, --curve-samples, --seq-len), a smaller --batch-size or "
    "--activations disk. --dry-run states the memory"
)


def estimate_lines(estimate: "Estimate") -> list[str]:
    """A table of an estimate."""
    free = "" if estimate.free_memory is None else f", {format_bytes(estimate.free_memory)} free"
    lines = [
        f"{estimate.parameters:,} parameters, {estimate.pruned:,} of them in {estimate.matrices:,} matrices to prune",
        *([f"  {estimate.left_dense}"] if estimate.left_dense else []),
        f"memory {format_bytes(estimate.processes * sum(estimate.memory.values()))}{free}",
        *([f"  in each of {estimate.processes} processes"] if estimate.processes > 1 else []),
        *(f"  {use:<28}{format_bytes(size):>12}" for use, size in estimate.memory.items()),
        f"disk {format_bytes(sum(estimate.disk.values()))}, {format_bytes(estimate.free_disk)} free",
        *(f"  {use:<28}{format_bytes(size):>12}" for use, size in estimate.disk.items()),
    ]
    if estimate.recovery:
        lines.append(f"memory of recovery {format_bytes(sum(estimate.recovery.values()))}, after pruning")
        lines += [f"  {use:<28}{format_bytes(size):>12}" for use, size in estimate.recovery.items()]
        lines.append(
            "  it learns the dense model's outputs"
            if estimate.distills
            else "  it learns the data's next tokens"
            + (": the dense model does not fit" if "dense model" in estimate.recovery else "")
        )
    if estimate.device_memory:
        free = "" if estimate.free_device is None else f", {format_bytes(estimate.free_device)} free"
        lines.append(f"memory of the device {format_bytes(sum(estimate.device_memory.values()))}{free}")
        lines += [f"  {use:<28}{format_bytes(size):>12}" for use, size in estimate.device_memory.items()]
        lines.append("time is not estimated: the rates of that device are not known")
    else:
        total = format_duration(sum(estimate.seconds.values()))
        machine = f"{processor_name()}, {os.cpu_count()} processors"
        lines.append(f"time about {total}: an estimate, at the rates of this machine ({machine}) as loaded now")
        lines += [f"  {use:<28}{format_duration(duration):>12}" for use, duration in estimate.seconds.items()]
    if estimate.reads:
        lines.append(f"the model does not fit into the free memory: {format_bytes(estimate.reads)} are read from disk")
    return lines + [f"not in the estimate: {what}" for what in estimate.not_counted]


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
        self._shown = shown
        self._live: Any = None
        self._task: Any = None
        self._thread: threading.Thread | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._phase = self._matrix = ""
        self._done = self._total = self._first = 0
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        self(0, 0, "start")
        if self._shown and not sys.stderr.isatty():
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
            if sys.stderr.isatty():
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
        print(", ".join(parts), file=sys.stderr, flush=True)

    def _show(self, is_new: bool) -> None:
        label, unit = _PHASES[self._phase]
        count = f"{self._done}/{self._total} {unit}" if self._total else ""
        if self._live is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            text = TextColumn("{task.description}", markup=False), BarColumn(bar_width=30)
            times = TextColumn("{task.fields[count]}"), TimeElapsedColumn(), TimeRemainingColumn()
            self._live = Progress(*text, *times, console=Console(stderr=True))
            self._live.start()
            self._task = self._live.add_task(label, total=None, count=count)
        elif is_new:
            self._live.reset(self._task, description=label, total=None)
        self._live.update(self._task, completed=self._done, total=self._total or None, count=count)


def _spent(budget: dict[str, Any]) -> str:
    from leanstep.pruning.allocate.budgets import UNITS

    before, after, dense = budget["before"], budget["after"], budget["dense"]
    removed, requested = 1 - after / dense, 1 - budget["target"] / dense
    return (
        f"{after:.6g} {UNITS[budget['kind']]} after, {before:.6g} before: {removed:.4f} of {dense:.6g} removed, "
        f"{requested:.4f} asked for"
    )


def recovery_lines(recovery: "RecoveryResult") -> list[str]:
    """Lines about the training after pruning."""
    names = {"kl": "KL from the dense model", "cross_entropy": "cross-entropy"}
    lines = [f"recovery       {recovery.settings.steps} steps, {'applied' if recovery.applied else 'not applied'}"]
    if recovery.before is not None and recovery.after is not None:
        change = f"{recovery.before.mean:.4g} pruned, {recovery.after.mean:.4g} trained"
        lines[0] += f"; held out, {names[recovery.metric]}: {change}"
    if recovery.perplexity is not None:
        lines.append(f"perplexity     {recovery.perplexity:.2f} recovered")
    return lines + [f"note           {note}" for note in recovery.notes]


def shown(value: Any) -> str:
    """The value of an option as it is typed."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "left out"
    return "left out" if value is None else str(value)


def summary_of(result: "PruneResult", layers: list[dict[str, Any]], out: str) -> str:
    """Lines about a result that was written to the folder ``out``, with the rows ``layers`` in its report."""
    from leanstep.pruning.result import sparsity_of

    lines = [f"sparsity       {sparsity_of(layers):.4f} of {sum(row['numel'] for row in layers):,} weights"]
    by_curves = "" if result.curve_score in (None, result.score) else f" (curves: {result.curve_score})"
    settings = f"score {result.score}{by_curves}, pattern {result.pattern}, inputs {result.inputs}"
    lines.append(f"allocation     {result.allocation.method}, {settings}")
    if result.budget["kind"] != "params":
        lines.append(f"budget         {_spent(result.budget)}")
    sources = Counter(curve.source for curve in result.curves.values())
    if set(sources) - {"measured"}:
        lines.append("curves         " + ", ".join(f"{number} {source}" for source, number in sources.items()))
    if result.allocation.predicted is not None:
        lines.append(f"predicted      {result.allocation.predicted:.4g} ({result.metric}, sum of the curves)")
    if result.refinement:
        search = result.refinement
        first, last = ("-" if cost is None else f"{cost:.4g}" for cost in (search["start"], search["points"][-1][2]))
        lines.append(
            f"refined        {search['accepted']} of {search['evaluations']} exchanges, ended: {search['ended']}; "
            f"{result.metric} on the judging data {first} before, {last} after, pruned anew"
        )
    for one in result.compared:
        error = "" if one.joint_stderr != one.joint_stderr else f" +- {one.joint_stderr:.2g}"
        summed = "" if math.isnan(one.summed) else f"; single matrices sum to {one.summed:.4g}"
        joint = f"{result.metric} {one.joint:.4g}{error} with all matrices pruned"
        lines.append(f"held out       {one.method}: {joint}{summed}")
    changes = {one.method: one.joint for one in result.compared}
    written, uniform = changes.get(result.allocation.method, math.nan), changes.get("uniform", math.nan)
    if result.allocation.method != "uniform" and written < uniform < math.inf:
        share = 1 - written / uniform
        lines.append(f"written        {result.allocation.method}, {share:.0%} below uniform sparsity on held-out data")
    if result.perplexity:
        before, after = result.perplexity["before"], result.perplexity["after"]
        lines.append(f"perplexity     {before:.2f} before, {after:.2f} after ({result.perplexity['tokens']:,} targets)")
    if result.recovery is not None:
        lines += recovery_lines(result.recovery)
    lines += [f"note           {note}" for note in result.notes]
    lines.append("File size and speed are those of the dense model: zeros alone make neither PyTorch nor vLLM faster.")
    lines.append(f"To store and run it without the zeros: leanstep export {out} --format sparse --out {out}-sparse")
    lines.append(f"model, sparsity.json and report.html: {out}")
    return "\n".join(lines)
