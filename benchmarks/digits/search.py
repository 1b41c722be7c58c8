"""Which runs the comparison of N:M methods needs, made on worker processes into a file, and its complete cells."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from common import append_json_line, machine_line, read_json_lines
from comparison.search import Point, best_inside, grid_search, is_interior
from comparison.training import start_worker

from digits.tables import FINALISTS, Cell, Judged
from digits.training import FINETUNE, WEIGHT_DECAY, Run, train
from leanstep.sparsity.training.methods import SRSTE_LAMBDA

PATTERNS = ("2:4", "1:4", "1:8", "1:16", "1:32")
DECAYS = ("mdgf-exponential", "mdgf-linear", "sdgf-stepwise", "sdgf-geometric")
# method -> learning rate and second setting in the middle of the first grid
STARTS = {"dense": (1e-3, WEIGHT_DECAY), "srste": (1e-3, SRSTE_LAMBDA), **dict.fromkeys(DECAYS, (1e-3, FINETUNE))}
TUNE_SEED = 0
CELLS = [Cell("dense", ""), *(Cell(method, p) for p in PATTERNS for method in STARTS if method != "dense")]


class State(NamedTuple):
    """Where a cell stands: runs to make now, settings to judge, and whether the best lies on the edge of the grid."""

    missing: list[Run]
    finalists: list[Run]
    on_edge: bool = False


def plan(cell: Cell, done: dict[Run, dict[str, Any]], budget: int, seeds: int, steps: int) -> State:
    """Replay the search of a cell on the results so far."""
    start = STARTS[cell.method]

    def tuning(point: Point) -> Run:
        rate, second = (value * 2.0**power for value, power in zip(start, point, strict=True))
        return Run("tune", *cell, TUNE_SEED, steps // 2, rate, second)

    reach = range(-budget, budget + 1)  # no search gets further: a round moves the edge by one
    losses = {p: done[tuning(p)]["loss"] for p in ((i, j) for i in reach for j in reach) if tuning(p) in done}
    points, missing = grid_search(losses, budget)
    if missing:
        return State([tuning(point) for point in missing], [])
    finalists = finalists_of(losses, points)
    runs = [tuning(point) for point in finalists]
    if not is_interior(finalists[0], points):
        return State([], runs, True)
    return State([run for each in runs for run in judged_runs(each, seeds, steps) if run not in done], runs)


def finalists_of(losses: dict[Point, float], points: list[Point]) -> list[Point]:
    """The settings to judge: the best one inside, then those of the next lowest tuning losses, each loss once.

    Settings of equal loss are one: less than a step at the target is none, for instance.
    """
    finalists = [best_inside(losses, points)]
    for point in sorted(points, key=lambda point: (losses[point], sum(point), point)):
        if len(finalists) < FINALISTS and losses[point] not in [losses[other] for other in finalists]:
            finalists.append(point)
    return finalists


def judged_runs(chosen: Run, seeds: int, steps: int) -> list[Run]:
    """The judged runs of the settings of a tuning run, by seed."""
    return [chosen._replace(kind="judge", seed=seed, steps=steps) for seed in range(1, seeds + 1)]


def read(path: Path) -> tuple[dict[str, Any], dict[Run, dict[str, Any]]]:
    """Settings of a file, none where there is no file yet, and its results by run."""
    settings, *rows = read_json_lines(path) or [{}]
    return settings, {Run(**row["run"]): row["result"] for row in rows}


def make(path: Path, settings: dict[str, Any], workers: int) -> None:
    """Make the runs that the file lacks, cell by cell.

    Raises ValueError for a file of other settings.
    """
    saved, done = read(path)
    differ = {name: saved.get(name) for name, value in settings.items() if saved and saved.get(name) != value}
    if differ:
        raise ValueError(f"{path} was made with {differ}, not {settings}; give those settings or another --out")
    if not saved:
        append_json_line(path, {**settings, "machine": machine_line()})
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (os.getpid(), 1)) as pool:
        running: dict[Future[dict[str, Any]], Run] = {}
        while True:
            missing = (run for cell in CELLS for run in plan(cell, done, **settings).missing)
            waiting = (run for run in missing if run not in running.values())
            for run in list(itertools.islice(waiting, workers - len(running))):
                running[pool.submit(train, run)] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                done[run] = future.result()
                append_json_line(path, {"run": run._asdict(), "result": done[run]})
                print(f"{' '.join(map(str, run))}: {done[run]}", flush=True)


def summarise(path: Path) -> tuple[dict[str, Any], dict[Cell, Judged], list[Cell]]:
    """Settings of a file, its cells with judged settings, and those whose best settings lie on the edge of the grid."""
    settings, done = read(path)
    options = {name: settings[name] for name in ("budget", "seeds", "steps")}
    cells, on_edge = {}, []
    for cell in CELLS:
        state = plan(cell, done, **options)
        if state.on_edge:
            on_edge.append(cell)
            continue
        runs = {each: judged_runs(each, settings["seeds"], settings["steps"]) for each in state.finalists}
        results = {each: [done[run] for run in judged] for each, judged in runs.items() if done.keys() >= set(judged)}
        if results:
            cells[cell] = Judged(results)
    return settings, cells, on_edge
