"""Latency tables: measured seconds of every matrix at several sparsities."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanstep._checkpoint.files import unique_names
from leanstep._files import one_line, read_text
from leanstep.pruning.score.targets import Group

# largest distance between a sparsity and its level in the table: 0.333 stands for 1/3
_NEAR = 1e-3


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of every layer at every level.

    Attributes:
        levels: sparsities, increasing, the first 0.
        seconds: of each matrix at each level, by the matrix's name in ``sparsity.json`` and
            :func:`leanstep.pruning.find_targets`; >= 0, and > 0 at the first level.

    Raises:
        ValueError: for invalid levels or seconds, or a layer without seconds for a level; the message names both.
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
        """Read ``{"levels": [0, 0.5], "seconds": {"model.layers.0.mlp.up_proj.weight": [3e-4, 2e-4], ...}}`` from JSON.

        Raises:
            ValueError: if the file cannot be read or holds no such table; the message names the file.
        """
        path = Path(path).expanduser()
        try:
            content = json.loads(read_text(path, follow=True), object_pairs_hook=unique_names)
            if not isinstance(content, dict) or set(content) != {"levels", "seconds"}:
                got = ", ".join(content) if isinstance(content, dict) else type(content).__name__
                raise ValueError(f"expected an object with 'levels' and 'seconds', got {got or 'an empty one'}")
            levels, seconds = content["levels"], content["seconds"]
            if not isinstance(levels, list) or not isinstance(seconds, dict):
                raise ValueError("expected a list of levels, and an object of seconds by the name of a layer")
            rows = {name: tuple(row) if isinstance(row, list) else row for name, row in seconds.items()}
            return cls(tuple(levels), rows)
        except OSError as error:
            raise ValueError(f"the latency table {path} cannot be read: {error}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the latency table {path}: {one_line(error)}") from None

    def of(self, groups: Sequence[Group], counts: Mapping[str, Sequence[int]]) -> dict[str, tuple[float, ...]]:
        """Seconds of each group at each of its levels: the sum over its matrices.

        Args:
            groups: the groups that are pruned.
            counts: weights left at each level of each group. The first level may lie between two levels of the table,
                as for a model that was pruned before; the denser of the two is used.

        Raises:
            ValueError: if the table lacks a layer or a level.
        """
        names = [target.name for group in groups for target in group.targets]
        missing = [name for name in names if name not in self.seconds]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"the latency table has no row for {missing[0]}{more}; every pruned matrix needs one; leave others "
                "out with exclude"
            )
        seconds = {}
        for group in groups:
            levels = [self._level(group, count, first=k == 0) for k, count in enumerate(counts[group.name])]
            rows = [self.seconds[target.name] for target in group.targets]
            seconds[group.name] = tuple(sum(row[level] for row in rows) for level in levels)
        return seconds

    def _level(self, group: Group, count: int, *, first: bool) -> int:
        """Index of the level of a group with ``count`` weights left."""
        numel = group.layer.numel
        sparsity = 1 - count / numel
        nearest = min(range(len(self.levels)), key=lambda level: abs(self.levels[level] - sparsity))
        if abs(self.levels[nearest] - sparsity) <= max(_NEAR, 0.5 / numel + 1e-12):
            return nearest
        if first:
            return max(index for index, level in enumerate(self.levels) if level <= sparsity)
        raise ValueError(
            f"the latency table has no level {sparsity:.4g}, which {group.name} may be pruned to; its levels are "
            f"{_shown(self.levels)}"
        )


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _check_row(name: str, row: Any, levels: Sequence[float]) -> None:
    if not isinstance(row, (list, tuple)) or len(row) != len(levels):
        got = f"{len(row)} numbers" if isinstance(row, (list, tuple)) else type(row).__name__
        raise ValueError(f"{name} needs {len(levels)} numbers, one for each level {_shown(levels)}; got {got}")
    for level, value in zip(levels, row, strict=True):
        if not _is_number(value) or value < 0 or (level == 0 and value == 0):
            raise ValueError(f"{name} at level {level:g}: expected seconds, got {value!r}")


def _shown(levels: Iterable[float]) -> str:
    return ", ".join(f"{level:g}" for level in levels)
