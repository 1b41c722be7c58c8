"""A file of results: one JSON object a line, safe against kill -9, checked when it is read."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from comparison.methods import METHODS, run_id
from comparison.protocol import VERSION, ComparisonError, Protocol, Run, digest
from comparison.search import Search
from leanstep._files import free_bytes, is_disk_full

_ROOM = 64 << 20  # bytes; a file of results has less than one


@dataclass
class Results:
    """Content of a file of results.

    Attributes:
        protocol: what its first line says.
        rows: the line of each run.
        timing: the last timing of steps, or None.
        search: budget and starts of the last call.
        unfinished: whether the last line was cut.
    """

    protocol: Protocol
    rows: dict[Run, dict[str, Any]] = field(default_factory=dict)
    timing: dict[str, Any] | None = None
    search: Search = Search(0, {})
    unfinished: bool = False

    @property
    def losses(self) -> dict[Run, float]:
        """Last loss of each run; inf where it diverged."""
        return {run: final_loss(row) for run, row in self.rows.items()}

    def environments(self) -> list[dict[str, str]]:
        """Distinct machines, versions and commits, in order."""
        return list({digest(row["environment"]): row["environment"] for row in self.rows.values()}.values())


def final_loss(row: dict[str, Any]) -> float:
    """Loss at the last evaluation; inf for a run that diverged."""
    return float(row["losses"][-1][2]) if row["status"] == "done" else math.inf


def run_row(protocol: Protocol, run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """The line of a run."""
    definition = METHODS[run.method].definition
    plain = json.loads(json.dumps(definition))
    identity = run_id(protocol.id, plain, asdict(run))
    return {"id": identity, "protocol": protocol.id, **asdict(run), "optimizer": plain, **result}


def read(path: Path) -> Results:
    """Read and check a file. Raises ComparisonError for one that is damaged, mixed, or of another version."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ComparisonError(
            f"{path} cannot be read: {error.strerror}; docs/results/ has the committed files"
        ) from None
    whole, _, rest = content.rpartition(b"\n")
    lines = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            lines.append(json.loads(line))
            assert isinstance(lines[-1], dict)
        except (ValueError, AssertionError):
            raise ComparisonError(
                f"{path}:{number} is not a JSON object; remove the line, and its run is made again"
            ) from None
    if not lines or "definition" not in lines[0]:
        raise ComparisonError(f"{path} does not begin with a protocol; it is no file of results, or its start is lost")
    results = Results(_protocol(path, lines[0]["definition"]), unfinished=bool(rest))
    identity = digest(lines[0]["definition"])
    for number, line in enumerate(lines[1:], start=2):
        if line.get("kind") == "search":
            try:
                starts = {method: (float(hidden), float(other)) for method, (hidden, other) in line["starts"].items()}
                results.search = Search(int(line["budget"]), starts)
            except (AttributeError, KeyError, TypeError, ValueError):
                raise ComparisonError(
                    f"{path}:{number} has no budget and starts; remove the line, it is made again"
                ) from None
        elif line.get("kind") == "timing":
            results.timing = line
        else:
            _add(results, f"{path}:{number}", line, identity)
    _check_machines(path, results)
    return results


def _check_machines(path: Path, results: Results) -> None:
    """Raise ComparisonError if runs are of several processors, versions or texts; commits may differ."""
    known: dict[str, str] = {}
    for other in results.environments():
        if names := changed_keys(known, other):
            changes = ", ".join(f"{name} {known[name]} and {other[name]}" for name in names)
            raise ComparisonError(f"{path} mixes results of several environments: {changes}; give each its own file")
        known |= other


def changed_keys(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """Keys of two environments whose values differ, the commit aside. Older rows have no hash of the text."""
    return [key for key in then if key in now and key != "commit" and then[key] != now[key]]


def _protocol(path: Path, definition: dict[str, Any]) -> Protocol:
    version = definition.get("version")
    if version != VERSION:
        raise ComparisonError(
            f"{path} has results of protocol version {version}, this is version {VERSION}; start a new file, or use "
            "the commit that its lines name"
        )
    fields = {name: value for name, value in definition.items() if name in Protocol.__dataclass_fields__}
    return Protocol(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def _add(results: Results, where: str, line: dict[str, Any], protocol_id: str) -> None:
    try:
        run = Run(**{name: line[name] for name in Run.__dataclass_fields__})
        identity = run_id(protocol_id, line["optimizer"], asdict(run))
        if line["protocol"] != protocol_id:
            raise ComparisonError(
                f"{where} is a result of protocol {line['protocol']} in a file of protocol {protocol_id}: results of "
                "several protocols are mixed; give each its own file"
            )
        if line["id"] != identity:
            raise ComparisonError(
                f"{where}: its settings are not those that its id {line['id']} was made of; remove it"
            )
        numbers = [number for evaluation in line["losses"] for number in evaluation]
        whole = bool(numbers) and line["losses"][-1][0] == run.steps(results.protocol)
        sound = line["status"] == "done" and whole or line["status"].startswith("diverged")
        if not sound or not all(map(math.isfinite, [*numbers, *line["bytes"].values()])):
            raise TypeError("its status, a number, or its last step")
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ComparisonError(
            f"{where} is no complete result ({error!r}); remove the line, its run is made again"
        ) from None
    if run.method not in METHODS:
        raise ComparisonError(f"{where}: unknown method {run.method!r}; the methods are {', '.join(METHODS)}")
    expected = json.loads(json.dumps(METHODS[run.method].definition))
    if line["optimizer"] != expected:
        raise ComparisonError(
            f"{where}: {run.method} ran with {line['optimizer']}, this version has {expected}; remove its lines to run "
            "it again, or start a new file"
        )
    if run in results.rows and results.rows[run]["losses"] != line["losses"]:
        raise ComparisonError(f"{where}: a second result of the same run, with other losses; remove one of them")
    results.rows.setdefault(run, line)


class Writer:
    """An open file of results, locked against other processes."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self._file = path, file

    def append(self, row: dict[str, Any]) -> None:
        """Add a line and flush it to disk. Raises ComparisonError on a full disk, with the file as it was."""
        size = os.fstat(self._file.fileno()).st_size
        line = (json.dumps(row) + "\n").encode()
        try:
            if os.write(self._file.fileno(), line) != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)
            advice = "make room" if is_disk_full(error) else "repair the disk"
            raise ComparisonError(
                f"{self.path}: {error.strerror}; earlier results are there: {advice}, go on"
            ) from None


@contextmanager
def writing(path: Path, protocol: Protocol) -> Iterator[tuple[Results, Writer]]:
    """Open a file of results to go on with; a new one gets the protocol as its first line.

    Removes a last line that was cut when its writer was killed. Raises ComparisonError as :func:`read`, for a file of
    another protocol, one that another process writes, a folder that cannot be, or a disk without room.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ComparisonError(f"--out is a folder of results, and {path.parent} is a file or lies below one") from None
    except OSError as error:
        raise ComparisonError(f"--out: {path.parent} cannot be made: {error.strerror}; take another folder") from None
    if free_bytes(path.parent) < _ROOM:
        raise ComparisonError(f"{path.parent}: less than {_ROOM >> 20} MB are free on its disk; make room first")
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ComparisonError(f"another process writes {path}; wait for it, or take another --out") from None
        writer = Writer(path, file)
        content = path.read_bytes()
        os.ftruncate(file.fileno(), content.rfind(b"\n") + 1)
        if b"\n" not in content:
            writer.append({"id": protocol.id, "definition": protocol.definition})
        results = read(path)
        definition = first_line(path)
        if digest(definition) != protocol.id:
            raise ComparisonError(
                f"{path} has results of another protocol: {_differences(definition, protocol.definition)}; go on with "
                "those settings, or take another --out"
            )
        yield results, writer


def first_line(path: Path) -> dict[str, Any]:
    """The definition of the protocol with which a file begins."""
    with path.open("rb") as file:
        return json.loads(file.readline())["definition"]


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """``judge_steps 200, not 100``: fields in which definitions differ."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {json.dumps(old.get(key))[:200]}, not {json.dumps(new.get(key))[:200]}" for key in keys)
