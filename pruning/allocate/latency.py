"""Seconds that layers take at some sparsities, measured elsewhere and read from a file: for budgets of latency."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanstep.pruning.measure.groups import Group

__all__ = ["LatencyTable"]

# a level is meant by a sparsity that is this near to it: 0.333 is 3:9
_NEAR = 1e-3


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of every layer at every level.

    Attributes:
        levels: sparsities, increasing, the first 0.
        seconds: by the name of a matrix, as ``sparsity.json`` and :func:`leanstep.pruning.find_targets` have it, its
            seconds at each of the levels; at least 0, and more than 0 at the first.

    Raises:
        ValueError: for levels or seconds that are none, or a layer without one of the levels; it names both.
    """

    levels: tuple[float, ...]
    seconds: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        if not all(map(_is_number, self.levels)) or not all(0 <= level < 1 for level in self.levels):
            raise ValueError(f"levels are sparsities from 0 to below 1, got {list(self.levels)}")
        rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if len(self.levels) < 2 or self.levels[0] != 0 or not rising:
            raise ValueError(f"expected two levels or more, increasing, the first 0; got {list(self.levels)}")
        if not self.seconds:
            raise ValueError("expected a row of seconds for every layer, got none")
        for name, row in self.seconds.items():
            _check_row(name, row, self.levels)

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """The table of a file: JSON, or CSV where the name ends so.

        JSON: ``{"levels": [0, 0.5, 0.75], "seconds": {"model.layers.0.mlp.up_proj.weight": [3e-4, 2e-4, 1e-4], ...}}``.
        CSV: a first row ``layer,0,0.5,0.75``, and one row ``NAME,3e-4,2e-4,1e-4`` per layer.

        Raises:
            ValueError: the file cannot be read or holds no such table; it names the file.
        """
        path = Path(path).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the latency table {path} cannot be read: {error}") from None
        try:
            return _from_csv(text) if path.suffix.lower() == ".csv" else _from_json(text)
        except ValueError as error:
            raise ValueError(f"the latency table {path}: {error}") from None

    def of(self, groups: Sequence[Group], kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[float, ...]]:
        """By group, the seconds at each of its levels: of several matrices, those of all together.

        Args:
            groups: what is pruned.
            kept: by group, weights that are left at each level. What a matrix has lost before, between two levels of
                the table, is not counted: its first level takes the seconds of the denser one.

        Raises:
            ValueError: a layer or a level that the table does not have.
        """
        names = [target.name for group in groups for target in group.targets]
        missing = [name for name in names if name not in self.seconds]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"the latency table has no row for {missing[0]}{more}; every matrix that is pruned needs one, others "
                "are left out with exclude"
            )
        found = {}
        for group in groups:
            places = [self._place(group, count, first=k == 0) for k, count in enumerate(kept[group.name])]
            rows = [self.seconds[target.name] for target in group.targets]
            found[group.name] = tuple(sum(row[place] for row in rows) for place in places)
        return found

    def _place(self, group: Group, count: int, *, first: bool) -> int:
        """Number of the level that a group is at with so many weights left."""
        numel = group.layer.numel
        sparsity = 1 - count / numel
        nearest = min(range(len(self.levels)), key=lambda place: abs(self.levels[place] - sparsity))
        if abs(self.levels[nearest] - sparsity) <= max(_NEAR, 0.5 / numel + 1e-12):
            return nearest
        if first:
            return max(place for place, level in enumerate(self.levels) if level <= sparsity)
        raise ValueError(
            f"the latency table has no level {sparsity:.4g}, which {group.name} may be pruned to; its levels are "
            f"{_shown(self.levels)}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_row(name: str, row: Any, levels: Sequence[float]) -> None:
    if not isinstance(row, (list, tuple)) or len(row) != len(levels):
        found = f"{len(row)} numbers" if isinstance(row, (list, tuple)) else type(row).__name__
        raise ValueError(f"{name} needs {len(levels)} numbers, one for each level {_shown(levels)}; got {found}")
    for level, value in zip(levels, row, strict=True):
        if not _is_number(value) or value < 0 or (level == 0 and value == 0):
            raise ValueError(f"{name} at level {level:g}: expected seconds, got {value!r}")


def _shown(levels: Iterable[float]) -> str:
    return ", ".join(f"{level:g}" for level in levels)


def _from_json(text: str) -> LatencyTable:
    content = json.loads(text)
    if not isinstance(content, dict) or set(content) != {"levels", "seconds"}:
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected an object with 'levels' and 'seconds', got {found or 'an empty one'}")
    levels, seconds = content["levels"], content["seconds"]
    if not isinstance(levels, list) or not isinstance(seconds, dict):
        raise ValueError("expected a list of levels, and an object of seconds by the name of a layer")
    rows = {name: tuple(row) if isinstance(row, list) else row for name, row in seconds.items()}
    return LatencyTable(tuple(levels), rows)


def _from_csv(text: str) -> LatencyTable:
    rows = [row for row in csv.reader(text.splitlines()) if row]
    if not rows or rows[0][0].strip() != "layer":
        raise ValueError("expected a first row 'layer,0,...' with the levels")
    levels = tuple(_number(cell, "the first row") for cell in rows[0][1:])
    seconds: dict[str, tuple[float, ...]] = {}
    for name, *cells in rows[1:]:
        if name in seconds:
            raise ValueError(f"{name} has two rows")
        if len(cells) != len(levels):
            raise ValueError(f"{name} needs {len(levels)} numbers, one for each level {_shown(levels)}; got {cells}")
        seconds[name] = tuple(_number(cell, name) for cell in cells)
    return LatencyTable(levels, seconds)


def _number(cell: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{where}: expected a number, got {cell.strip()!r}") from None
