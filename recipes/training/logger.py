"""Log a run: the line on a terminal, log.jsonl, trackers, status.json, and reports at the end."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from leanstep._files import write_text
from leanstep._memory import peak_process_memory
from leanstep.recipes.check.costs import FORMULA, peak_flops
from leanstep.recipes.config.loader import dump
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.config.values import recorded
from leanstep.recipes.report.formatting import flat_scalars, format_line, format_live
from leanstep.recipes.report.trackers import Trackers
from leanstep.recipes.training.build import describe_world, device_name, trackers_of
from leanstep.recipes.training.checkpoint import TrainState
from leanstep.recipes.training.folder import RunFolder, environment
from leanstep.recipes.training.parts import Part
from leanstep.recipes.training.step import StepResult
from leanstep.recipes.training.validation import EvalResult


class Clock:
    """Measures training time without evaluation and saving, and estimates the time left.

    Rates are over the window since the last log line. The estimate includes future evaluations and saves at their
    measured cost.
    """

    def __init__(self, elapsed_s: float = 0.0) -> None:
        self._before = elapsed_s
        self._start = time.perf_counter()
        self._window_start = self._start
        self._window_paused = 0.0
        self._window_tokens = 0
        self._window_steps = 0
        self._pauses: dict[str, list[float]] = {}
        self.steps_here = 0
        self.step_s: float | None = None
        self.rate_now: float | None = None

    @property
    def here_s(self) -> float:
        """Seconds since this start of the run."""
        return time.perf_counter() - self._start

    @property
    def elapsed_s(self) -> float:
        """Seconds of all starts of the run, evaluation and saving included."""
        return self._before + time.perf_counter() - self._start

    def stepped(self, tokens: int) -> None:
        """Count one optimizer step over ``tokens`` targets."""
        self._window_tokens += tokens
        self._window_steps += 1
        self.steps_here += 1

    @contextmanager
    def pause(self, activity: str) -> Iterator[Callable[[], float]]:
        """Exclude the block from the rates; ``activity`` is ``eval`` or ``save``. Yields a function for its seconds."""
        begin = time.perf_counter()
        spent = 0.0
        try:
            yield lambda: spent
        finally:
            spent = time.perf_counter() - begin
            self._window_paused += spent
            self._pauses.setdefault(activity, []).append(spent)

    def measure(self) -> None:
        """End the window: set :attr:`rate_now` (tokens per second) and :attr:`step_s` (seconds per step)."""
        now = time.perf_counter()
        spent = now - self._window_start - self._window_paused
        self.rate_now = round(self._window_tokens / spent, 1) if spent > 0 else 0.0
        if self._window_steps:
            self.step_s = spent / self._window_steps
        self._window_start, self._window_paused, self._window_tokens, self._window_steps = now, 0.0, 0, 0

    def eta(self, steps: int, evals: int, saves: int) -> float | None:
        """Seconds for so many steps, evaluations and saves; None before the end of the first window."""
        if self.step_s is None:
            return None
        mean = {activity: sum(spent) / len(spent) for activity, spent in self._pauses.items()}
        return steps * self.step_s + evals * mean.get("eval", 0.0) + saves * mean.get("save", 0.0)


class Progress:
    """Prints lines and appends them to ``train.log``, in the first process only.

    On a terminal (``live``) a bar shows every step, and other lines scroll above it. Elsewhere each log line is
    printed.
    """

    def __init__(self, folder: RunFolder, steps: int, *, active: bool, live: bool | None = None) -> None:
        self._folder, self._steps, self._active = folder, steps, active
        self._bar: Any = None
        self.live = active and (sys.stdout is not None and sys.stdout.isatty() if live is None else live)

    def __enter__(self) -> "Progress":
        if self.live:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self._steps)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.stop()
            self._bar = None

    def say(self, text: str, *, error: bool = False) -> None:
        """Print ``text`` (an ``error`` on stderr) and append it to train.log."""
        if not self._active:
            return
        for line in text.splitlines() or [""]:
            self._folder.text(line)
        # a closed terminal, a broken pipe or a full disk ends no run: train.log has the line
        with contextlib.suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr if error else sys.stdout, flush=True)

    def busy(self, text: str, *, plain: bool = False) -> None:
        """Show beside the bar what is being done. Plain output has a line when it is done; if ``plain``, now, too."""
        if self._bar is None and plain:
            self.say(text)
        elif self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.update(self._task, description=text)

    def line(self, step: int, text: str, is_logged: bool, live: str | None = None) -> None:
        """Show a step: ``live`` beside the bar always, ``text`` in plain output and train.log only if ``is_logged``."""
        if not self._active:
            return
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.update(self._task, completed=step, description=text if live is None else live)
            if is_logged:
                self._folder.text(text)
        elif is_logged:
            self.say(text)


class RunLogger:
    """Logs a run: log.jsonl, trackers, status.json and reports.

    Only the first process writes. Every process calls it, since ``diagnostics()`` may be a collective call.

    An optimizer may have two methods:

    * ``diagnostics()``: a flat dict of numbers, read at log steps. ``log.jsonl`` has them as ``optimizer``, trackers as
      ``optimizer/KEY``. In the report, the keys ``A/x`` and ``A/y`` are lines of one chart A.
    * ``noise_report()``: a list of dicts, read at the end, written to ``optimizer_report.json`` and shown as a table.

    The ``source`` of a part of training has ``diagnostics()``, too, logged as the part's ``name``.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, folder: RunFolder, progress: Progress) -> None:
        self.config, self.accelerator, self.folder, self.progress = config, accelerator, folder, progress
        self.main, self.say = accelerator.is_main_process, progress.say
        self.trackers = Trackers(accelerator, progress.say) if trackers_of(config) else None
        self.clock = Clock()
        self.flops_per_token = 0
        self.tflops: float | None = None
        peak = peak_flops(device_name(accelerator.device), config.precision)
        self._peak = None if peak is None else peak * accelerator.num_processes

    def begin(self, state: TrainState, resumed_from: Path | None, parameters: int, flops_per_token: int) -> None:
        """Write the files that describe the run, start the trackers and the clock."""
        config, accelerator = self.config, self.accelerator
        self.clock, self.flops_per_token = Clock(state.elapsed_s), flops_per_token
        if self.main:
            self.folder.rewind_log(-1 if resumed_from is None else state.step)
            facts = environment(
                seed=config.seed,
                world_size=accelerator.num_processes,
                world=describe_world(accelerator),
                device=device_name(accelerator.device),
                parameters=parameters,
                flops_per_token=flops_per_token,
                flops_formula=FORMULA,
                resumed_from=None if resumed_from is None else str(resumed_from),
            )
            self.folder.describe(dump(config), facts)
        self.status("running", state)
        if self.trackers:
            project, settings = config.log.project, flat_scalars(recorded(config))
            self.trackers.open(project, config.name, settings, self.folder.root, is_new=resumed_from is None)

    def end(self) -> None:
        """Close the trackers and the group of processes."""
        if self.trackers:
            self.trackers.close()
        self.accelerator.end_training()

    def step(
        self, state: TrainState, result: StepResult, rate: float, sources: Mapping[str, Any], note: str | None = None
    ) -> None:
        """Show the step; write log.jsonl, train.log and trackers if :meth:`is_logged`.

        ``sources``: name in the log -> object with ``diagnostics()``, or None.
        """
        config, is_logged = self.config, self.is_logged(state.step)
        diagnostics = {name: _diagnostics(source) for name, source in sources.items()} if is_logged else {}
        reported = {name: values for name, values in diagnostics.items() if values}
        if not self.main:
            return
        first_here = self.clock.steps_here == 1
        # the first step may compile kernels: the second one tells how long the others take
        if is_logged or self.clock.steps_here <= 2:
            self._measure()
        entry: dict[str, Any] = {
            "step": state.step,
            "kind": "train",
            "loss": result.loss,
            "lr": rate,
            "grad_norm": result.norm,
            "tokens_per_s": self.clock.rate_now,
            "tokens": state.tokens,
            "elapsed_s": round(self.clock.elapsed_s, 3),
            "nonfinite": state.nonfinite + (_skipped_updates(sources["optimizer"]) if is_logged else 0),
            "tflops": self.tflops,
        }
        if config.stop.on_spike is not None:
            entry["spikes"] = state.spikes.skipped + state.spikes.rollbacks
        if self._peak is not None and self.tflops is not None:
            entry["mfu"] = round(1e12 * self.tflops / self._peak, 4)
        if self.accelerator.device.type == "cuda":
            entry["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        elif self.accelerator.device.type == "cpu" and (peak := peak_process_memory()) is not None:
            entry["process_gib"] = round(peak / 2**30, 3)
        if is_logged:
            self.folder.log({**entry, **reported})
            numbers: dict[str, Any] = {key: value for key, value in entry.items() if key not in ("step", "kind")}
            numbers |= {f"{name}/{key}": value for name, values in reported.items() for key, value in values.items()}
            self._track(numbers, state.step)
        facts = entry, config.steps, None if first_here else self._eta(state.step), [note] if note else []
        self.progress.line(state.step, format_line(*facts), is_logged or first_here, live=format_live(*facts))

    def is_logged(self, step: int) -> bool:
        """Whether a step has a line in log.jsonl: the first, the last, and every ``log.every``."""
        return step == 1 or step % self.config.log.every == 0 or step == self.config.steps

    def evaluation(self, state: TrainState, result: EvalResult, averaged: EvalResult | None = None) -> None:
        """Log and show the result of a validation; ``averaged``: that of the averaged weights."""
        numbers = dataclasses.asdict(result)
        if averaged is not None:
            numbers |= {f"ema_{key}": value for key, value in dataclasses.asdict(averaged).items() if key != "tokens"}
        if self.main:
            self.folder.log({"step": state.step, "kind": "eval", **numbers})
            self._track({f"val_{key}": value for key, value in numbers.items()}, state.step)
            per_byte = "" if result.bits_per_byte is None else f"  bits/byte {result.bits_per_byte:.4f}"
            self.say(
                f"step {state.step}/{self.config.steps}  validation loss {result.loss:.4f}  perplexity "
                f"{result.perplexity:.2f}{per_byte}  ({result.tokens:,} targets)"
            )
            if averaged is not None:
                self.say(f"    averaged weights: loss {averaged.loss:.4f}  perplexity {averaged.perplexity:.2f}")
        self.status("running", state)

    def status(self, status: str, state: TrainState, *, any_process: bool = False) -> None:
        """Write status.json from the first process; with ``any_process`` also from another one that fails."""
        spikes, shown = state.spikes, ("skipped", "rollbacks", "steps")
        if self.main or any_process:
            self.folder.status(
                status,
                step=state.step,
                steps=self.config.steps,
                val_loss=state.val_loss,
                best_loss=state.best_loss,
                best_step=state.best_step,
                tokens=state.tokens,
                tflops=self.tflops,
                **({} if state.bits_per_byte is None else {"bits_per_byte": state.bits_per_byte}),
                **({} if state.ema_loss is None else {"ema_loss": state.ema_loss}),
                **({"spikes": {name: getattr(spikes, name) for name in shown}} if spikes.steps else {}),
            )

    def reports(self, optimizer: Any, parts: Iterable[Part]) -> None:
        """Write the final reports of optimizer and parts, as far as the run has them. Every process calls it.

        ``optimizer_report.json``: the optimizer's ``noise_report()``.
        """
        ask = getattr(optimizer, "noise_report", None)
        if callable(ask) and (rows := ask()):
            self._write_report("optimizer_report.json", rows)
        for part in parts:
            for name, content in part.report():
                self._write_report(name, content)

    def _write_report(self, name: str, content: Any) -> None:
        if not self.main:
            return
        try:
            text = json.dumps(content, indent=1, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
            write_text(self.folder.root / name, text + "\n")
        except OSError as error:
            self.say(f"WARNING: {name} could not be written: {error}")

    def _track(self, numbers: Mapping[str, Any], step: int) -> None:
        if self.trackers:
            self.trackers.log(numbers, step)

    def _measure(self) -> None:
        """End the clock's window and compute the model's operations per second, over all processes."""
        self.clock.measure()
        if self.clock.step_s:
            # every position costs operations, target or not
            done = self.flops_per_token * self.config.batch.tokens_per_step
            self.tflops = float(f"{done / self.clock.step_s / 1e12:.4g}")

    def _eta(self, step: int) -> float | None:
        left = self.config.steps - step
        intervals = self.config.eval.every, self.config.checkpoint.every
        return self.clock.eta(left, *(left // every if every else 1 for every in intervals))


def _diagnostics(optimizer: Any) -> dict[str, float]:
    read = getattr(optimizer, "diagnostics", None)
    return {str(key): float(value) for key, value in read().items()} if callable(read) else {}


def _skipped_updates(optimizer: Any) -> int:
    """Number of tensors that the optimizer skipped for a non-finite gradient (Lion, SinkGD)."""
    count = getattr(optimizer, "nonfinite_count", None)
    return 0 if count is None else int(count())
