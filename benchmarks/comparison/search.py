"""Which runs a method needs next: the same number of tuning runs for every method, then the judged ones.

The search has no state of its own. It replays its decisions on the results so far, so an interrupted search goes on
where it stopped, on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from comparison.methods import METHODS, default_run
from comparison.protocol import ComparisonError, Protocol, Run

Point = tuple[int, int]  # powers of two of hidden and other learning rate, relative to the start
_REACH = 4
# losses this close are the same: the standard errors of judged rows are larger
TIE = 1e-3


class EdgeError(ComparisonError):
    """The best learning rates of a method are on the edge of those tried, and its budget is spent."""


class Search(NamedTuple):
    """Tuning runs of every method, and the hidden and other learning rate with which each one starts."""

    budget: int  # 0: no search; the starts are the tuned AdamW's rates, which every method but those of defaults has
    starts: Mapping[str, tuple[float, float]]

    @classmethod
    def of_this_version(cls, budget: int, model: str) -> Search:
        """The starts of :data:`comparison.methods.METHODS` on a model."""
        starts = {name: method.start_for(model) for name, method in METHODS.items()}
        return cls(budget, {name: start for name, start in starts.items() if start is not None})

    @property
    def carries(self) -> bool:
        """Whether nothing is searched, and all have AdamW's rates."""
        return self.budget == 0 and bool(self.starts)

    def takes(self, method: str) -> bool:
        """Whether a comparison has a row of a method: one without a search has AdamW and those that are not tuned."""
        if self.carries:
            return METHODS[method].start is None or method == "adamw"
        return METHODS[method].carried in (None, "create")


class Plan(NamedTuple):
    """State of a method: tuning runs that count, runs to make now, and the chosen settings once all are there."""

    counted: list[Run]
    missing: list[Run]
    chosen: Run | None


def square(reach: int, num_rates: int = 2) -> list[Point]:
    """The points of at most this distance from the start along the axis of each learning rate."""
    along = range(-reach, reach + 1)
    return [(i, j) for i in along for j in (along if num_rates == 2 else (0,))]


def grid_size(protocol: Protocol, budget: int) -> int:
    """Runs of the budget that go to learning rates. Raises ComparisonError for a budget too small to widen the grid."""
    first = len(square(1, protocol.num_rates))
    size = budget - len(protocol.other_settings())
    if size <= first:
        raise ComparisonError(
            f"a budget of {budget} tuning runs is too small: {first} are the first grid, "
            f"{len(protocol.other_settings())} are for weight decay and warm-up, and the grid must be able to widen; "
            f"take at least {first + len(protocol.other_settings()) + 1}"
        )
    return size


def grid_search(losses: Mapping[Point, float], size: int, num_rates: int = 2) -> tuple[list[Point], list[Point]]:
    """Replay the search of ``size`` learning-rate pairs. Returns (points tried or to try, those without a loss).

    After the first grid of 3 x 3 (3 where there is one rate), a round takes the untried points that are nearest to the
    best one, so the grid widens to the side of the best. Points of a round do not depend on each other.
    """
    points = square(1, num_rates)[:size]
    while not (missing := [point for point in points if point not in losses]) and len(points) < size:
        points = points + _nearest(best(losses, points), points, num_rates)[: size - len(points)]
    return points, missing


def _nearest(centre: Point, points: list[Point], num_rates: int) -> list[Point]:
    around = [(centre[0] + i, centre[1] + j) for i, j in square(_REACH, num_rates)]
    distances = {p: math.dist(p, centre) for p in around if p not in points}
    return [point for point, distance in distances.items() if distance == min(distances.values())]


def best(losses: Mapping[Point, float], points: list[Point]) -> Point:
    """The point of lowest loss; of equal ones (all diverged), that of the smallest rates."""
    return min(points, key=lambda point: (losses[point], sum(point), point))


def is_interior(point: Point, points: list[Point], num_rates: int = 2) -> bool:
    """Whether both neighbours of a point along the axis of each rate were tried."""
    i, j = point
    neighbours = {(i - 1, j), (i + 1, j)} | ({(i, j - 1), (i, j + 1)} if num_rates == 2 else set())
    return neighbours <= set(points)


def best_inside(losses: Mapping[Point, float], points: list[Point], num_rates: int = 2) -> Point:
    """The best point; if it is on an edge, the best one inside with the same loss (to :data:`TIE`), if there is one."""
    overall = best(losses, points)
    if is_interior(overall, points, num_rates):
        return overall
    inside = [
        point for point in points if is_interior(point, points, num_rates) and losses[point] <= losses[overall] + TIE
    ]
    return best(losses, inside) if inside else overall


def tune_run(
    method: str, protocol: Protocol, start: tuple[float, float], point: Point, settings: tuple[float, float]
) -> Run:
    """The tuning run of a method at a point of its grid, with a pair of weight decay and warm-up."""
    hidden, other = (rate * 2.0**power for rate, power in zip(start, point, strict=True))
    return Run("tune", method, protocol.tune_seed, hidden, other, *settings)


def plan(method: str, protocol: Protocol, search: Search, losses: Mapping[Run, float]) -> Plan:
    """What a method needs next, given the last loss of every finished run (inf where it diverged).

    Raises EdgeError if the best pair of the whole grid has an untried neighbour.
    """
    if search.carries and (method == "adamw" or METHODS[method].carried == "rates"):
        settings = *search.starts["adamw"], protocol.weight_decays[0], protocol.warmups[0]
        chosen = Run("judge", method, protocol.judge_seeds[0], *settings)
        return Plan([], [run for run in judged_runs(chosen, protocol) if run not in losses], chosen)
    if METHODS[method].start is None:
        chosen = default_run(method, protocol, protocol.judge_seeds[0])
        return Plan([], [run for run in judged_runs(chosen, protocol) if run not in losses], chosen)
    first, start = (protocol.weight_decays[0], protocol.warmups[0]), search.starts[method]
    size, num_rates = grid_size(protocol, search.budget), protocol.num_rates

    def run_at(point: Point, settings: tuple[float, float] = first) -> Run:
        return tune_run(method, protocol, start, point, settings)

    run_points = {_point(run, start) for run in losses if run.kind == "tune" and run.method == method}
    tried = {point: losses[run_at(point)] for point in run_points if run_at(point) in losses}
    points, missing = grid_search(tried, size, num_rates)
    grid = [run_at(point) for point in points]
    if missing:
        return Plan(grid, [run_at(point) for point in missing], None)
    centre = best_inside(tried, points, num_rates)
    if not is_interior(centre, points, num_rates) or math.isinf(tried[centre]):
        raise EdgeError(_edge(run_at(centre), search.budget, math.isinf(tried[centre])))
    others = [run_at(centre, settings) for settings in protocol.other_settings()]
    if missing_others := [run for run in others if run not in losses]:
        return Plan(grid + others, missing_others, None)
    chosen = min([run_at(centre), *others], key=lambda run: losses[run])
    return Plan(grid + others, [run for run in judged_runs(chosen, protocol) if run not in losses], chosen)


def _point(run: Run, start: tuple[float, float]) -> Point:
    """The grid point nearest to the learning rates of a tuning run."""
    assert run.hidden_lr is not None and run.other_lr is not None
    return round(math.log2(run.hidden_lr / start[0])), round(math.log2(run.other_lr / start[1]))


def _settings(run: Run) -> tuple[float | None, float | None, float | None, float]:
    return run.hidden_lr, run.other_lr, run.weight_decay, run.warmup


def judged_runs(chosen: Run, protocol: Protocol, kind: str = "judge") -> list[Run]:
    """The judged runs of the chosen settings, by seed; of kind "half", "double" or "warmup", see :class:`Run`."""
    hidden, other, decay, warmup = _settings(chosen)
    if kind == "double" and hidden is not None:
        hidden *= 2
    if kind == "warmup":
        warmup = protocol.warmups[(protocol.warmups.index(warmup) + 1) % len(protocol.warmups)]
    return [Run(kind, chosen.method, seed, hidden, other, decay, warmup) for seed in protocol.judge_seeds]


def _edge(run: Run, budget: int, diverged: bool) -> str:
    where = f"hidden {run.hidden_lr:g} and other {run.other_lr:g}"
    source = "comparison/methods.py"
    if diverged:
        return f"{run.method}: every run of the grid diverged, down to {where}; lower its start in {source}"
    return (
        f"{run.method}: the best learning rates, {where}, are on the edge of those tried, and all {budget} tuning "
        f"runs are spent; give all methods a larger budget (--budget {budget + 4}), or move the start of {run.method} "
        f"(MOVED_STARTS in {source}); finished runs are used again"
    )
