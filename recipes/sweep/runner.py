"""Run a grid: each run is a ``leanstep train`` process of its own, and a few of them run at once."""

import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanstep._files import one_line, open_regular, read_text
from leanstep._process import PARENT_VARIABLE, StopFlag
from leanstep.recipes.report.runlog import duration
from leanstep.recipes.sweep.grid import Plan, PlannedRun
from leanstep.recipes.sweep.ledger import DIVERGED, DONE, FAILED, NUMBERS, STOPPED, Ledger, is_number
from leanstep.recipes.training.folder import RunFolder, is_held

_POLL_S = 0.1
# reasons in status.json that another start would meet again
_DIVERGENCES = {"failed:nan", "failed:loss_above", "failed:spike"}


@dataclass
class _Active:
    """A running process, its run, and the slot it has."""

    process: subprocess.Popen
    run: PlannedRun
    slot: int
    began: float = field(default_factory=time.monotonic)


class Runner:
    """Starts the unfinished runs of a plan, ``jobs`` at a time, and records their ends in the ledger.

    A run is finished when it is done or has diverged. Every other run starts again in the next sweep of the folder,
    from its newest checkpoint. The processes end when this one is killed: they get SIGTERM and save.
    """

    def __init__(self, plan: Plan, ledger: Ledger, *, jobs: int, processes: int, say: Callable[[str], object]) -> None:
        self.plan, self.ledger, self.jobs, self.processes, self.say = plan, ledger, jobs, processes, say
        self.active: list[_Active] = []
        self.waiting: deque[PlannedRun] = deque()
        self.announced: set[str] = set()

    def go(self) -> int:
        """Run all that is unfinished. Returns the signal that ended the sweep, or 0."""
        self.waiting.extend(run for run in self.plan.runs if not is_finished(self.ledger.ends.get(run.name)))
        with StopFlag(leaving=lambda: self._forward(signal.SIGINT)) as stop:
            is_forwarded = False
            while self.active or (self.waiting and not stop.received):
                if stop.received and not is_forwarded:
                    self.say(f"{signal.Signals(stop.received).name}: the runs save and stop")
                    self._forward(stop.received)
                    is_forwarded = True
                if not stop.received:
                    self._fill()
                self._collect()
                time.sleep(_POLL_S)
            return stop.received

    def _fill(self) -> None:
        for _ in range(len(self.waiting)):
            if len(self.active) >= self.jobs:
                return
            run = self.waiting.popleft()
            folder = self._folder(run)
            if is_held(folder):
                # by a process of a sweep that was killed, which saves
                if run.name not in self.announced:
                    self.say(f"{run}: an earlier process still trains in {folder}; waiting for its end")
                    self.announced.add(run.name)
                self.waiting.append(run)
            elif is_finished(facts := outcome(folder)):
                # the sweep was killed between the end of the run and the line in the ledger
                self._record(run, facts)
            else:
                self._start(run)

    def _start(self, run: PlannedRun) -> None:
        slot = next(number for number in range(self.jobs) if number not in {active.slot for active in self.active})
        command = [sys.executable, "-P", "-m", "leanstep", "train", str(self.ledger.recipe_file(run))]
        if self.processes > 1:
            command += ["--nproc", str(self.processes)]
        self.ledger.start(run)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with open(open_regular(self._console(run), flags), "ab") as console:
            # in a process group of its own: Ctrl-C reaches it once, from here
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=run_environment(slot, self.jobs, self.processes),
                process_group=0,
            )
        self.active.append(_Active(process, run, slot))
        self.say(f"{self._place(run)} {run}: started")

    def _collect(self) -> None:
        for active in list(self.active):
            code = active.process.poll()
            if code is not None:
                self.active.remove(active)
                facts = outcome(self._folder(active.run), code)
                if facts["status"] == FAILED:
                    facts["reason"] = _reason(code, self._console(active.run))
                self._record(active.run, {**facts, "seconds": round(time.monotonic() - active.began, 1)})

    def _record(self, run: PlannedRun, facts: dict[str, Any]) -> None:
        self.ledger.end(run, facts)
        self.say(f"{self._place(run)} {run}: {describe(facts)}")

    def _forward(self, number: int) -> None:
        for active in self.active:
            with suppress(ProcessLookupError):
                active.process.send_signal(number)

    def _folder(self, run: PlannedRun) -> Path:
        return self.plan.folder / "runs" / run.name

    def _console(self, run: PlannedRun) -> Path:
        return self.plan.folder / "logs" / f"{run.name}.txt"

    def _place(self, run: PlannedRun) -> str:
        return f"[{self.plan.runs.index(run) + 1}/{len(self.plan.runs)}]"


def is_finished(entry: dict[str, Any] | None) -> bool:
    """Whether an end entry says that the run needs no other start."""
    return entry is not None and entry.get("status") in (DONE, DIVERGED)


def outcome(folder: Path, code: int | None = None) -> dict[str, Any]:
    """How the run in ``folder`` ended, for the ledger: by its status.json, and by its exit code if it is known.

    ``done`` needs a finite validation loss, or none at all; a run that ended with one that is not finite has diverged.
    """
    status = RunFolder(folder).read_status()
    word = status.get("status")
    facts: dict[str, Any] = {key: status[key] for key in NUMBERS if is_number(status.get(key))}
    if code is not None:
        facts["code"] = code
    if word == "done" and code in (0, None):
        loss = facts.get("val_loss")
        is_sound = loss is None or math.isfinite(loss)
        return {"status": DONE if is_sound else DIVERGED, **facts}
    if word in _DIVERGENCES:
        return {"status": DIVERGED, **facts, "reason": str(word).partition(":")[2]}
    return {"status": STOPPED if code in (130, 143) else FAILED, **facts}


def describe(facts: dict[str, Any]) -> str:
    """One line on how a run ended."""
    spent = f" ({duration(facts['seconds'])})" if "seconds" in facts else ""
    if facts["status"] == DONE:
        loss = facts.get("val_loss")
        return ("done, no validation" if loss is None else f"validation loss {loss:.4f}") + spent
    step = f" at step {facts['step']}" if "step" in facts else ""
    reason = f": {facts['reason']}" if facts.get("reason") else ""
    return f"{facts['status']}{step}{reason}{spent}"


def run_environment(slot: int, jobs: int, processes: int) -> dict[str, str]:
    """The environment of a run: a share of the processors, and a GPU for each of its processes if there are enough.

    Settings of the user (``OMP_NUM_THREADS``) stay.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1", PARENT_VARIABLE: str(os.getpid())}
    if jobs == 1:
        return environment
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // (jobs * processes))))
    devices = visible_gpus()
    if len(devices) >= processes:
        first = slot * processes
        of_run = [devices[number % len(devices)] for number in range(first, first + processes)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(of_run)
    return environment


def visible_gpus() -> list[str]:
    """The names of the GPUs that runs may use: those of CUDA_VISIBLE_DEVICES, or the numbers of all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _reason(code: int, console: Path) -> str:
    if code < 0:
        names = {int(one): one.name for one in signal.Signals}
        return f"killed by {names.get(-code, f'signal {-code}')}"  # the real-time signals have no names
    try:
        lines = read_text(console, errors="replace").split("\n")
    except OSError:
        return f"exit code {code}"
    last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
    return one_line(last)[:300]
