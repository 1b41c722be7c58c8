"""Refine an allocation by exchanges that are judged by the joint distortion: the search, its state, and its result.

From the allocation by dynamic programming, each round proposes exchanges in the order of the slopes of the joint
distortion: of many layers at once, then of fewer, then of two. The first that the judge accepts ends the round, and is
repeated for as long as that is accepted too, which takes no new slopes. A round without one halves the step. After the
smallest step, exchanges are drawn at random.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from leanstep._files import one_line, read_text, write_text
from leanstep._processes import Processes
from leanstep.pruning.allocate.exchange import Counts, ExchangeSpace
from leanstep.pruning.config import Refinement
from leanstep.pruning.measure.curve_file import check_identity, checked_content, checked_line
from leanstep.pruning.measure.metrics import Distortion

# fraction of a layer's weights that an exchange moves, round by round
STEPS = (0.1, 0.05, 0.025)
# exchanges of two layers in a round, for each layer
_PAIRS = 1
# draws until an exchange is possible
_DRAWS = 100

Levels = Mapping[str, tuple[int, str]]


class Judge(Protocol):
    """What the search needs to know of a model: :class:`leanstep.pruning.measure.joint.JointJudge`."""

    counts: dict[str, int]
    passes: float

    @property
    def distortion(self) -> Distortion:
        """Joint distortion of the current levels."""

    def go_to(self, counts: Mapping[str, int], patterns: Mapping[str, str]) -> None:
        """Take other levels."""

    def judge(self, counts: Mapping[str, int], patterns: Mapping[str, str], noise: float) -> Distortion | None:
        """Take other levels if they are better than the current ones by more than their noise."""

    def slopes(self, levels: Levels) -> dict[str, float] | None:
        """First-order change of the joint distortion if one layer alone goes to another level; None if not known."""


@dataclass
class Descent:
    """How far a search has come.

    Attributes:
        evaluations: exchanges judged.
        seconds, passes: time of the search, and its work in passes of the model over the judging data.
        points: (evaluation, seconds, joint distortion, standard error) of the start and of each accepted exchange.
        ended: why the search ended: ``minutes``, ``evaluations``, or ``no exchange`` if none is possible.
        round_: number of the step in :data:`STEPS`; beyond them, exchanges are random.
        position: exchanges judged in this round, repetitions not counted.
        last: change of each count by the last accepted exchange, to be repeated; empty if there is none.
    """

    counts: Counts
    evaluations: int = 0
    seconds: float = 0.0
    passes: float = 0.0
    points: list[tuple[int, float, float, float]] = field(default_factory=list)
    ended: str = ""
    round_: int = 0
    position: int = 0
    last: Counts = field(default_factory=dict)

    @property
    def accepted(self) -> int:
        """Number of accepted exchanges."""
        return max(len(self.points) - 1, 0)

    def to_dict(self, start: Distortion, final: Distortion) -> dict[str, Any]:
        """Plain values, for JSON; None for what is not finite.

        Args:
            start, final: of the models that are pruned by the first and the last allocation, each on its own inputs.
        """
        points = [*self.points, (self.evaluations, self.seconds, *final)]
        facts = {name: getattr(self, name) for name in ("evaluations", "seconds", "passes", "accepted", "ended")}
        rows = [[None if not math.isfinite(value) else value for value in point] for point in points]
        return facts | {"start": start.mean if math.isfinite(start.mean) else None, "points": rows}


class SearchFile:
    """The state of a search, as one line with a checksum; replaced atomically.

    Args:
        path: the file; None stores nothing.
        identity: everything that the search depends on.

    Raises:
        ValueError: for a file of another search (the message lists the differences) or another format.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, checked_content(checked_line(dict(identity)).rstrip("\n"))

    def read(self) -> Descent | None:
        """The stored state; None if there is no file."""
        if self.path is None or not os.path.lexists(self.path):
            return None
        try:
            content = checked_content(read_text(self.path).rstrip("\n"))
            identity, state = content["identity"], content["descent"]
            if not isinstance(identity, dict):
                raise ValueError("it identifies no search")
            descent = _descent(state)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{self.path} holds no state of a search ({one_line(error)}); remove it, or name another file"
            ) from None
        check_identity(self.path, identity, self.identity)
        return descent

    def write(self, descent: Descent) -> None:
        """Replace the stored state."""
        if self.path is not None:
            write_text(self.path, checked_line({"identity": self.identity, "descent": asdict(descent)}))


def _descent(state: Mapping[str, Any]) -> Descent:
    points, last = [tuple(point) for point in state["points"]], dict(state.get("last", {}))
    counts, whole = dict(state["counts"]), (state["evaluations"], state["round_"], state["position"])
    numbers = [state["seconds"], state["passes"], *(value for point in points for value in point[:3])]
    if not all(type(value) is int and value >= 0 for value in (*whole, *counts.values())):
        raise ValueError("expected whole numbers from 0 on as counts and positions")
    if not set(last) <= set(counts) or not all(type(change) is int for change in last.values()):
        raise ValueError("expected whole numbers as changes of counts")
    if not points or any(len(point) != 4 for point in points):
        raise ValueError("expected points of four numbers")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
        raise ValueError("expected finite numbers")
    if not all(type(point[3]) is float for point in points):
        raise ValueError("expected numbers as errors")
    return Descent(**{**state, "points": points, "counts": counts, "last": last})


def descend(
    judge: Judge,
    space: ExchangeSpace,
    settings: Refinement,
    file: SearchFile,
    progress: Callable[[int, int, str], Any] | None = None,
    processes: Processes | None = None,
) -> Descent:
    """Search from the judge's levels until a limit is reached. The judge's model is left at the result.

    Args:
        judge: measures joint distortion; its current levels are the start.
        space: the levels of the layers, and the budget.
        settings: limits, seed and noise.
        file: with the state of an interrupted search, which is continued.
        progress: called with (exchanges judged, exchanges in all, "refinement"), or with a limit of time (seconds,
            seconds in all, "refinement time").
        processes: of the judge. The first keeps the time and the file.

    Returns:
        :class:`Descent`. A continued search ends as one that was not interrupted, if evaluations limit it.

    Raises:
        ValueError: for a file of another search, or one whose counts are not within the budget.
    """
    search = _Search(judge, space, settings, file, progress, processes or Processes())
    return search.run()


class _Search:
    def __init__(
        self,
        judge: Judge,
        space: ExchangeSpace,
        settings: Refinement,
        file: SearchFile,
        progress: Callable[[int, int, str], Any] | None,
        processes: Processes,
    ) -> None:
        self.judge, self.space, self.settings, self.file, self.progress = judge, space, settings, file, progress
        self.processes = processes
        stored = processes.from_first(file.read)
        if stored is None:
            self.descent = Descent(dict(judge.counts))
            self.descent.points.append((0, 0.0, *judge.distortion))
        else:
            if not space.holds(stored.counts):
                raise ValueError(f"{file.path} holds counts that are no levels within the budget; remove it")
            self.descent = stored
            judge.go_to(stored.counts, space.patterns(stored.counts))
        self._before = self.descent.seconds, self.descent.passes
        self._begin, self._saved, self._passes = time.monotonic(), time.monotonic(), judge.passes

    def run(self) -> Descent:
        """Judge exchanges until a limit is reached."""
        descent = self.descent
        descent.ended = self._limit()
        while not descent.ended:
            accepted = False
            for counts in self._proposals():
                accepted = self._judge(counts)
                descent.ended = self._limit()
                if accepted or descent.ended:
                    break
            else:
                if descent.round_ >= len(STEPS):  # beyond it where a search that had ended is continued
                    descent.ended = "no exchange"
                descent.round_, descent.position = descent.round_ + 1, 0
            if accepted:
                self._save()
        self._save()
        return descent

    def _judge(self, counts: Counts) -> bool:
        descent, judge = self.descent, self.judge
        judge.judge(counts, self.space.patterns(counts), self.settings.noise)
        descent.evaluations += 1
        # a rejected repetition leaves the exchanges of this round, and their number, as they were
        descent.position += not descent.last
        descent.seconds = self._before[0] + time.monotonic() - self._begin
        descent.passes = self._before[1] + judge.passes - self._passes
        accepted, before = judge.counts == counts, descent.counts
        descent.last = {n: count - before[n] for n, count in counts.items() if count != before[n]} if accepted else {}
        if accepted:
            descent.counts, descent.position = dict(counts), 0
            descent.points.append((descent.evaluations, descent.seconds, *judge.distortion))
        elif time.monotonic() - self._saved > 1:
            self._save()
        self._report()
        return accepted

    def _report(self) -> None:
        if self.progress is None:
            return
        settings, descent = self.settings, self.descent
        if settings.minutes is None:
            self.progress(descent.evaluations, settings.evaluations or 0, "refinement")
        else:
            total = math.ceil(60 * settings.minutes)
            self.progress(min(int(descent.seconds), total), total, "refinement time")

    def _save(self) -> None:
        if self.processes.is_first:
            self.file.write(self.descent)
        self._saved = time.monotonic()

    def _limit(self) -> str:
        """The limit that is reached, or ""."""
        settings, descent = self.settings, self.descent
        if settings.evaluations is not None and descent.evaluations >= settings.evaluations:
            return "evaluations"
        if settings.minutes is None:
            return ""
        return "minutes" if self.processes.all_gather(descent.seconds)[0] >= 60 * settings.minutes else ""

    def _proposals(self) -> Iterator[Counts]:
        """The last exchange once more, and then those of this round that are not judged yet."""
        descent = self.descent
        again = {name: count + descent.last.get(name, 0) for name, count in descent.counts.items()}
        if descent.last and self.space.holds(again):
            yield again
        descent.last = {}
        if descent.round_ >= len(STEPS):
            yield from self._random()
            return
        share = STEPS[descent.round_]
        up, down = self._slopes(share)
        pairs = _PAIRS * len(self.space.levels)
        for index, counts in enumerate(self.space.proposals(descent.counts, up, down, share, pairs)):
            if index >= descent.position:
                yield counts

    def _random(self) -> Iterator[Counts]:
        """Exchanges drawn at random, each by the seed and its number."""
        while True:
            generator = np.random.default_rng([self.settings.seed, self.descent.evaluations])
            shares = generator.choice(STEPS, _DRAWS)
            drawn = (self.space.random(self.descent.counts, generator, float(share)) for share in shares)
            counts = next((counts for counts in drawn if counts is not None), None)
            if counts is None:
                return
            yield counts

    def _slopes(self, share: float) -> tuple[dict[str, float], dict[str, float]]:
        """Change of the joint distortion per unit of cost, for a step up and a step down of each layer.

        Of a metric without a gradient, those of the layer's curve.
        """
        space, counts = self.space, self.descent.counts
        ups = self._per_cost({name: space.denser(name, counts[name], share) for name in space.levels})
        downs = self._per_cost({name: space.step_down(name, counts[name], share) for name in space.levels})
        return space.curve_slopes(counts, share) if ups is None or downs is None else (ups, downs)

    def _per_cost(self, to: Mapping[str, int | None]) -> dict[str, float] | None:
        """Slopes of the judge per unit of cost, for the layers that can go to another count."""
        space, counts = self.space, self.descent.counts
        possible = {name: count for name, count in to.items() if count is not None}
        slopes = self.judge.slopes({name: (count, space.pattern(name, count)) for name, count in possible.items()})
        if slopes is None:
            return None
        moved = {
            n: abs(space.levels[n].cost_of(count) - space.levels[n].cost_of(counts[n])) for n, count in possible.items()
        }
        return {name: slopes[name] / max(cost, 1e-300) for name, cost in moved.items()}
