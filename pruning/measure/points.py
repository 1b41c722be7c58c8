"""Points of curves while they are measured: what an interrupted run left, and what is still missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from leanstep._processes import Processes
from leanstep.pruning.measure.curve_file import PartialCurves
from leanstep.pruning.measure.curves import Curve, Levels, counts_and_patterns, curve_of
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.score.targets import Group

# called with what is done, what there is in all, and the name of a matrix or a phase; with 0 and 0 where a phase begins
Progress = Callable[[int, int, str], Any]


def begin(progress: Progress | None, phase: str) -> None:
    """Tell a function that a phase begins of which nothing is counted yet."""
    if progress is not None:
        progress(0, 0, phase)


class Points:
    """Points of the curves of some groups: those of an interrupted run, and new ones as they come.

    Args:
        groups, levels: what to measure.
        partial: the file of points; None keeps none.
        progress: called with (points so far, points in all, name of the group).
        prefix: before a group's name in the file, for points that are not measured.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        levels: Levels,
        partial: PartialCurves | None = None,
        progress: Progress | None = None,
        prefix: str = "",
    ) -> None:
        self.groups, self._levels = groups, levels
        self._partial, self._progress, self._prefix = partial, progress, prefix
        self._points: dict[tuple[str, int], Distortion] = {}
        self.missing: dict[str, list[tuple[int, str]]] = {}
        stored = {} if partial is None else partial.points
        for group in groups:
            pruned = counts_and_patterns(levels[group.name])[1:]
            points = {(group.name, count): stored.get((prefix + group.name, count)) for count, _ in pruned}
            self._points |= {key: point for key, point in points.items() if point is not None}
            self.missing[group.name] = [level for level in pruned if (group.name, level[0]) not in self._points]
        self._total = len(self._points) + sum(map(len, self.missing.values()))
        # points since the last exchange
        self._new: dict[tuple[str, int], Distortion] = {}

    def at(self, name: str) -> dict[int, Distortion]:
        """The points of a group by count, the dense one not included."""
        return {count: point for (group, count), point in self._points.items() if group == name}

    def missing_level(self, name: str, count: int) -> tuple[int, str]:
        """(count, N:M pattern or "") of a missing point of a group."""
        return next(level for level in self.missing[name] if level[0] == count)

    def limit_to(self, levels: Mapping[str, Sequence[tuple[int, str]]]) -> None:
        """Tell ``progress`` of these missing points alone, and of those that are there."""
        self._total = len(self._points) + sum(map(len, levels.values()))

    def add(self, name: str, count: int, point: Distortion) -> None:
        """Add a point, in the file too."""
        if self._partial is not None:
            self._partial.add(self._prefix + name, count, point)
        self._points[name, count] = self._new[name, count] = point
        if self._progress is not None:
            self._progress(len(self._points), self._total, name)

    def exchange(self, processes: Processes) -> None:
        """Take the points that the other processes added, which have written them to the file."""
        for points in processes.all_gather(self._new):
            self._points |= points
        self._new = {}

    def curves(self, metric: str, source: str = "measured") -> dict[str, Curve]:
        """The curves of all groups, none of whose points is missing."""
        by_name = {}
        for group in self.groups:
            levels = self._levels[group.name]
            points = [self._points[group.name, count] for count in levels[0][1:]]
            by_name[group.name] = curve_of(group, levels, points, metric, source=source)
        return by_name
