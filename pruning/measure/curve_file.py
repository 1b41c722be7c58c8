"""The points that a run has measured, in memory and in a file, and checks of files that interrupted runs left."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from leanstep._checkpoint.mapped import tensors_hash
from leanstep._files import one_line, open_locked, open_regular, read_text
from leanstep._processes import Processes
from leanstep.pruning.config import Progress
from leanstep.pruning.measure.curves import SOURCES, Curve, Levels, counts_and_patterns, curve_of
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.score.targets import Group, abbreviate


class PartialCurves:
    """A file with one line per measured point. Its first line identifies model, data and settings.

    Each line is JSON, a space and the CRC-32 of the JSON. What the clock decided is in it as well, so that a run that
    goes on does not decide anew: the method, where none was asked for, on how many samples curves are anchored, and
    that no further point is measured. Points are of any target; a decision for another one does not count.

    Args:
        path: the file; :meth:`add` creates it.
        identity: everything that the points depend on: hashes of model and data, metric, score, levels.
        target: what decisions depend on besides, in plain values; None: any.

    Raises:
        ValueError: for a file of another identity (the message lists the differences) or another format.
    """

    # those of :meth:`shared`
    processes = Processes()

    def __init__(self, path: Path, identity: dict[str, Any], target: Sequence[Any] | None = None) -> None:
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.target = None if target is None else list(target)
        self.points: dict[tuple[str, int], Distortion] = {}
        # of SOURCES, as chosen by time; None: not chosen
        self.method: str | None = None
        # on which curves are anchored; None: not chosen
        self.samples: int | None = None
        self.complete = False
        if os.path.lexists(path):
            self._read()

    @classmethod
    @contextmanager
    def shared(
        cls, path: Path, identity: dict[str, Any], processes: Processes, target: Sequence[Any] | None = None
    ) -> Iterator[PartialCurves]:
        """Context manager: the file of all processes, to which each appends what it measures.

        The first process locks it. A file that is still empty at the end is removed.

        Raises:
            ValueError: as the class, and for a file of a run that goes on.
        """
        with ExitStack() as stack:

            def read() -> PartialCurves:
                stack.enter_context(_locked(path))
                partial = cls(path, identity, target)
                if processes.size > 1 and not path.stat().st_size:
                    partial._append({"identity": partial.identity})  # before any of them adds a point
                return partial

            partial = processes.from_first(read)
            partial.processes = processes
            yield partial

    def add(self, name: str, count: int, point: Distortion) -> None:
        """Append a point, and sync the file to disk."""
        # of one sample no error is known, and curves have 0 then; JSON has no number that is not finite
        stderr = 0.0 if math.isnan(point.stderr) else point.stderr
        self._begin_and_append([name, count, *((point.mean, stderr) if point.is_finite else (None, 0.0))])
        self.points[name, count] = point

    def choose(self, method: str) -> None:
        """Append the method that time chose. The first process writes."""
        if self.processes.rank == 0 and self.method != method:
            self._begin_and_append({"method": method, "target": self.target})
        self.method = method

    def choose_samples(self, samples: int) -> None:
        """Append on how many of the first samples curves are anchored. The first process writes."""
        if self.processes.rank == 0 and self.samples != samples:
            self._begin_and_append({"samples": samples, "target": self.target})
        self.samples = samples

    def finish(self) -> None:
        """Append that no further point is measured. The first process writes."""
        if self.processes.rank == 0 and not self.complete:
            self._begin_and_append({"complete": True, "target": self.target})
        self.complete = True

    def _begin_and_append(self, content: Any) -> None:
        begun = self.path.exists() and self.path.stat().st_size
        self._append(*([] if begun else [{"identity": self.identity}]), content)

    def _append(self, *contents: Any) -> None:
        """Append lines in one write, between which no other process's can come, and sync the file to disk."""
        descriptor = open_regular(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with open(descriptor, "ab") as file:  # its buffer holds the lines: one write, or an error on a full disk
            file.write("".join(map(checked_line, contents)).encode())
            file.flush()
            os.fsync(file.fileno())

    def _take_decision(
        self, method: str | None = None, complete: bool = False, samples: int | None = None, target: Any = None
    ) -> None:
        """Check a decision that was read from the file, and follow it; decisions of earlier versions name no target."""
        is_number = samples is None or (type(samples) is int and samples > 0)
        if method not in (None, *SOURCES) or complete not in (False, True) or not is_number:
            raise ValueError(f"expected a method, a number of samples or an end, got {[method, samples, complete]}")
        if None not in (target, self.target) and target != self.target:
            return
        self.method, self.samples = self.method or method, self.samples or samples
        self.complete = self.complete or bool(complete)

    def _take(self, name: str, count: int, mean: float | None, stderr: float) -> None:
        point = Distortion(math.nan if mean is None else mean, stderr)
        mean = 0.0 if mean is None else mean
        numbers = all(type(value) in (int, float) and math.isfinite(value) for value in (mean, stderr))
        if not isinstance(name, str) or type(count) is not int or count < 0 or not numbers or stderr < 0:
            raise ValueError(f"expected a name, a count, a distortion and its error, got {[name, count, *point]}")
        if self.points.get((name, count), point) != point:
            raise ValueError(f"it has {name} with {count} weights twice")
        self.points[name, count] = point

    def _read(self) -> None:
        try:
            raw = read_text(self.path)
            whole = raw[: raw.rfind("\n") + 1]
            lines = whole.split("\n")[:-1]
            contents = [checked_content(line) for line in lines]
            identity = contents[0]["identity"] if lines else self.identity
            if not isinstance(identity, dict):
                raise ValueError("its first line identifies no model")
            for row in contents[1:]:
                if isinstance(row, dict):
                    self._take_decision(**row)
                else:
                    self._take(*row)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{self.path} holds no measured curves ({one_line(error)}); remove it, or name another file"
            ) from None
        check_identity(self.path, identity, self.identity)
        if whole != raw or not lines:  # a line that a crash cut short
            # in place: the lock is on the file
            with open(open_regular(self.path, os.O_RDWR), "r+b") as file:
                file.truncate(len(whole.encode()))
                os.fsync(file.fileno())


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


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Context manager: the file is this run's alone. It is created, and removed if it is still empty at the end."""
    try:
        descriptor = open_locked(path)
    except BlockingIOError:
        raise ValueError(
            f"another run measures curves and writes {path}; wait for it, stop it, or name another file"
        ) from None
    try:
        yield
    finally:
        try:
            if not os.fstat(descriptor).st_size:
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def check_identity(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError if a file was written for another model, other data or other settings."""
    differing = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if differing:
        changes = "; ".join(f"{key}: {_change(then.get(key), now.get(key))}" for key in differing)
        raise ValueError(
            f"{path} was measured under other circumstances ({one_line(changes)}): undo the change to go on "
            "with it, or remove it to begin again"
        )


def _change(then: Any, now: Any) -> str:
    """What differs between two values: of mappings the names of one alone, or the first that both have."""
    if all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in (then, now)):
        return "not the same"  # hashes, which tell nobody more
    if not (isinstance(then, Mapping) and isinstance(now, Mapping)):
        return f"{_brief(then)} then, {_brief(now)} now"
    parts = [
        f"{len(alone)} more {when} ({abbreviate(alone, 3)})"
        for when, alone in (("then", [k for k in then if k not in now]), ("now", [k for k in now if k not in then]))
        if alone
    ]
    if changed := [key for key in then if key in now and then[key] != now[key]]:
        parts.append(f"of {changed[0]} {_brief(then[changed[0]])} then, {_brief(now[changed[0]])} now")
    return ", ".join(parts)


def _brief(value: Any) -> str:
    """A value in at most 80 characters."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def checked_line(content: Any) -> str:
    """JSON and its checksum, as one line."""
    text = json.dumps(content)
    return f"{text} {zlib.crc32(text.encode()):08x}\n"


def checked_content(line: str) -> Any:
    """The content of a line of :func:`checked_line`; raises ValueError for a wrong checksum."""
    text, _, checksum = line.rpartition(" ")
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        raise ValueError("the checksum of a line is wrong")
    return json.loads(text)


def configuration_hash(model: nn.Module) -> str:
    """Hash of a transformers model's configuration, without path and version of the library; "" of another model."""
    config = getattr(model, "config", None)
    if config is None or not callable(getattr(config, "to_dict", None)):
        return ""
    values = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """Hash of all parameters and buffers."""
    return tensors_hash(model.state_dict(keep_vars=True).items())
