"""Make the runs of a comparison on worker processes, until all are there or the time is up."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from comparison.protocol import ComparisonError, Protocol, Run
from comparison.results import Results, Writer, changed_keys, run_row
from comparison.search import EdgeError, Search, judged_runs, plan
from comparison.training import environment, start_worker, time_steps, train


class Stopped(Exception):
    """The time is up; the message says what is left."""


class Scheduler:
    """Runs what the methods need, those of earlier methods first."""

    def __init__(self, results: Results, writer: Writer, methods: list[str], search: Search, workers: int,
                 minutes: float, again: Mapping[str, Sequence[str]] | None = None) -> None:  # fmt: skip
        """``again`` has the methods that are judged once more, by kind of :class:`Run`."""
        self.results, self.writer, self.methods, self.again = results, writer, methods, again or {}
        self.protocol: Protocol = results.protocol
        self.search = search
        self.workers = workers
        self.deadline = time.monotonic() + 60 * minutes if minutes else math.inf
        self.edges: dict[str, str] = {}
        self.environment = environment(self.protocol)
        self.seconds: list[float] = []  # of a step, in the runs of this call
        self.started: dict[Run, float] = {}

    def go(self) -> None:
        """Make all runs, then time the steps. Raises Stopped at the deadline, ComparisonError if a worker dies."""
        self._check_environment()
        if self.results.search != self.search:
            self.writer.append({"kind": "search", **self.search._asdict()})
            self.results.search = self.search
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.workers, context, start_worker, (os.getpid(), self.protocol.threads))
        try:
            self._work(pool)
            self._time(pool)
        except BrokenProcessPool:
            raise ComparisonError(
                "a worker process was killed, perhaps for want of memory; finished runs are in "
                f"{self.writer.path}: give the same command again, with fewer --workers if it happens again"
            ) from None
        finally:
            # a run that is cut off is made again; waiting for it would pass the deadline
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(cancel_futures=True)

    def _work(self, pool: ProcessPoolExecutor) -> None:
        running: dict[Future[dict[str, Any]], Run] = {}
        while True:
            wanted = [run for run in self.wanted() if run not in running.values()]
            for run in wanted[: self.workers - len(running)]:
                if self._expected(run) <= self.deadline - time.monotonic():
                    running[pool.submit(train, self.protocol, run)] = run
                    self.started[run] = time.monotonic()
            if not running:
                if wanted:
                    raise Stopped(self._left(wanted))
                return
            left = None if math.isinf(self.deadline) else max(0.0, self.deadline - time.monotonic())
            done, _ = wait(running, timeout=left, return_when=FIRST_COMPLETED)
            if not done:
                raise Stopped(self._left([*running.values(), *wanted]))
            for future in done:
                self._store(running.pop(future), future.result())

    def wanted(self) -> list[Run]:
        """Runs that could start now, in order; methods that end on an edge have none."""
        runs: list[Run] = []
        more: list[Run] = []
        for method in self.methods:
            try:
                state = plan(method, self.protocol, self.search, self.results.losses)
                runs += state.missing
                for kind in [kind for kind, methods in self.again.items() if method in methods and state.chosen]:
                    assert state.chosen is not None
                    more += judged_runs(state.chosen, self.protocol, kind)
            except EdgeError as error:
                if method not in self.edges:
                    self.edges[method] = str(error)
                    print(f"error: {error}", flush=True)
        return runs + [run for run in more if run not in self.results.rows]

    def _store(self, run: Run, result: dict[str, Any]) -> None:
        row = run_row(self.protocol, run, {**result, "environment": self.environment})
        self.writer.append(row)
        self.results.rows[run] = row
        self.seconds.append((time.monotonic() - self.started.pop(run)) / run.steps(self.protocol))
        loss = f"loss {row['losses'][-1][2]:.4f}" if row["status"] == "done" else row["status"]
        print(f"{describe(run)}: {loss}, {row['seconds']['wall']:.0f} s", flush=True)

    def _expected(self, run: Run) -> float:
        """Seconds that a run will take, by the runs of this call; 0 before the first one ended."""
        return statistics.median(self.seconds) * run.steps(self.protocol) if self.seconds else 0.0

    def _left(self, wanted: list[Run]) -> str:
        least = min(map(self._expected, wanted))
        hint = f" (the next run takes about {least:.0f} s)" if least else ""
        return f"time is up; {len(self.results.rows)} runs are in {self.writer.path}{hint}; the same command goes on"

    def _time(self, pool: ProcessPoolExecutor) -> None:
        chosen = []
        for method in self.methods:
            if method not in self.edges:
                run = plan(method, self.protocol, self.search, self.results.losses).chosen
                assert run is not None
                chosen.append(run)
        if (
            self.search.carries
            or not chosen
            or self.results.timing
            and {run.method for run in chosen} <= set(self.results.timing["optimizers"])
        ):
            return
        timing = pool.submit(time_steps, self.protocol, chosen)
        left = None if math.isinf(self.deadline) else max(0.0, self.deadline - time.monotonic())
        if not wait([timing], timeout=left).done:
            raise Stopped(f"time is up before the steps were timed; the runs are in {self.writer.path}")
        row = {"kind": "timing", **timing.result(), "environment": self.environment}
        self.writer.append(row)
        self.results.timing = row

    def _check_environment(self) -> None:
        """Raise ComparisonError if earlier runs are of another processor or other versions; commits may differ."""
        for other in self.results.environments():
            if names := changed_keys(other, self.environment):
                changes = ", ".join(f"{name} {other[name]}, now {self.environment[name]}" for name in names)
                raise ComparisonError(
                    f"{self.writer.path} has results of another environment: {changes}; go on there, or take another "
                    "--out"
                )


def describe(run: Run) -> str:
    """``tune adamw, seed 0, hidden 0.001, other 0.02, weight decay 0.1, warm-up 5 %``."""
    text = f"{run.kind} {run.method}, seed {run.seed}"
    if run.hidden_lr is None:
        return text
    decay = f"weight decay {run.weight_decay:g}, warm-up {run.warmup:.0%}"
    return f"{text}, hidden {run.hidden_lr:g}, other {run.other_lr:g}, {decay}"
