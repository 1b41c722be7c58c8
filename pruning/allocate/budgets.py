"""Budgets: the cost of kept weights, operations, bytes or seconds, and its limit."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from leanstep._checkpoint import unique_names
from leanstep.pruning.score.targets import Group, Layer

KINDS = ("params", "flops", "bytes", "latency")
UNITS = {"params": "weights", "flops": "operations per sample", "bytes": "bytes", "latency": "seconds"}


@dataclass(frozen=True)
class Budget:
    """The most that the pruned layers may cost together.

    Attributes:
        kind: * "params": weights that are kept.
            * "flops": operations per sample, 2 for every kept weight and use (``Layer.uses``).
            * "bytes": the kept values and a mask of one bit per weight, or the dense matrix if that is smaller.
            * "latency": seconds, from a table.
        target: the most, in that unit.
        seconds: for "latency": by layer name, seconds at every level of its curve, as measured.

    Raises:
        ValueError: for an unknown kind, a target that is not positive, "latency" without ``seconds``, or ``seconds``
            with another kind.
    """

    kind: str
    target: float
    seconds: Mapping[str, Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Budget: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0 < self.target < math.inf:
            raise ValueError(f"Budget: expected a positive target, got {self.target}")
        if (self.kind == "latency") != (self.seconds is not None):
            raise ValueError("Budget: kind 'latency' goes with a table of seconds, and no other kind does")

    @classmethod
    def fraction(
        cls, kind: str, of_dense: float, layers: Sequence[Layer], seconds: Mapping[str, Sequence[float]] | None = None
    ) -> Budget:
        """A fraction of the dense layers' cost. In ``seconds``, the first level of each layer is the dense one."""
        if seconds is not None:
            return cls(kind, of_dense * sum(seconds[layer.name][0] for layer in layers), seconds)
        return cls(kind, of_dense * sum(float(cost(kind, layer, layer.numel)) for layer in layers))


def cost(kind: str, layer: Layer, kept: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Integer cost of kept counts; every kind except "latency"."""
    counts = np.asarray(kept, dtype=np.int64)
    if kind == "params":
        return counts
    if kind == "flops":
        return 2 * layer.uses * counts
    if kind == "bytes":
        return np.minimum(layer.numel * layer.itemsize, counts * layer.itemsize + -(-layer.numel // 8))
    raise ValueError(f"no cost of kept weights is known for a budget of kind {kind!r}")


def quantize(
    costs: Sequence[npt.NDArray[np.float64]], budget: float, unit: float
) -> tuple[list[npt.NDArray[np.int64]], int]:
    """Costs and budget in whole units, counted from each group's cheapest level.

    Costs are rounded up and the budget is rounded down, so that levels that fit in units fit the budget.
    """
    least = [float(cost.min()) for cost in costs]
    # 1e-9: a rounding error must not add a unit
    whole = [np.ceil((cost - low) / unit - 1e-9).astype(np.int64) for cost, low in zip(costs, least, strict=True)]
    return whole, math.floor((budget - sum(least)) / unit + 1e-9)


Levels = Mapping[str, tuple[Sequence[int], Sequence[str]]]

# largest distance of a sparsity from the level it means: 0.333 means 3:9
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
        """Read a table from a file: CSV if its name ends in ``.csv``, else JSON.

        JSON: ``{"levels": [0, 0.5, 0.75], "seconds": {"model.layers.0.mlp.up_proj.weight": [3e-4, 2e-4, 1e-4], ...}}``.
        CSV: a first row ``layer,0,0.5,0.75``, and one row ``NAME,3e-4,2e-4,1e-4`` per layer.

        Raises:
            ValueError: if the file cannot be read or holds no such table; the message names the file.
        """
        path = Path(path).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the latency table {path} cannot be read: {error}") from None
        try:
            return _from_csv(text) if path.suffix.lower() == ".csv" else _from_json(text)
        except (ValueError, RecursionError, csv.Error) as error:
            raise ValueError(f"the latency table {path}: {error}") from None

    def of(self, groups: Sequence[Group], kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[float, ...]]:
        """Seconds of each group at each of its levels: the sum over its matrices.

        Args:
            groups: the groups that are pruned.
            kept: kept weights at each level of each group. The first level may lie between two levels of the table,
                as for a model that was pruned before; the denser of the two is used.

        Raises:
            ValueError: if the table lacks a layer or a level.
        """
        names = [target.name for group in groups for target in group.targets]
        missing = [name for name in names if name not in self.seconds]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"the latency table has no row for {missing[0]}{more}; every matrix that is pruned needs one, others "
                "are left out with exclude"
            )
        seconds = {}
        for group in groups:
            levels = [self._level(group, count, first=k == 0) for k, count in enumerate(kept[group.name])]
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
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_row(name: str, row: Any, levels: Sequence[float]) -> None:
    if not isinstance(row, (list, tuple)) or len(row) != len(levels):
        got = f"{len(row)} numbers" if isinstance(row, (list, tuple)) else type(row).__name__
        raise ValueError(f"{name} needs {len(levels)} numbers, one for each level {_shown(levels)}; got {got}")
    for level, value in zip(levels, row, strict=True):
        if not _is_number(value) or value < 0 or (level == 0 and value == 0):
            raise ValueError(f"{name} at level {level:g}: expected seconds, got {value!r}")


def _shown(levels: Iterable[float]) -> str:
    return ", ".join(f"{level:g}" for level in levels)


def _from_json(text: str) -> LatencyTable:
    content = json.loads(text, object_pairs_hook=unique_names)
    if not isinstance(content, dict) or set(content) != {"levels", "seconds"}:
        got = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected an object with 'levels' and 'seconds', got {got or 'an empty one'}")
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
        name = name.strip()
        if name in seconds:
            raise ValueError(f"{name} has two rows")
        seconds[name] = tuple(_number(cell, name) for cell in cells)
    return LatencyTable(levels, seconds)


def _number(cell: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{where}: expected a number, got {cell.strip()!r}") from None


# center of the levels if no uniform sparsity meets the budget; the solver then reports the reachable range
_SPARSEST = 0.99


@dataclass(frozen=True)
class BudgetConstraint:
    """A budget for some layers, and the cost of these layers at any density.

    Attributes:
        budget: kind, target, and for latencies the seconds of each layer at each of its levels.
        dense: cost of the layers with all their weights.
        layers: one for each group.
        kept: for latencies, kept weights at each level of each layer.
    """

    budget: Budget
    dense: float
    layers: Sequence[Layer]
    kept: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        budget: Budget | LatencyTable | str,
        groups: Sequence[Group],
        sparsity: float | None,
        kept: Mapping[str, Sequence[int]],
    ) -> BudgetConstraint:
        """Make a constraint from a budget, or from a cost that may be at most ``1 - sparsity`` of the dense model's.

        Args:
            budget: a budget; ``flops`` or ``bytes``; or a table of latencies.
            groups: groups of matrices; for ``flops``, with their uses counted.
            sparsity: fraction of the dense cost to remove; None with a :class:`Budget`.
            kept: for latencies, kept weights at each level of each group's curve.

        Raises:
            ValueError: if the table lacks a layer or a level, or for "flops" if the matrices of a group are not used
                equally often.
        """
        layers = [group.layer for group in groups]
        if isinstance(budget, LatencyTable):
            assert sparsity is not None
            by_level = budget.of(groups, kept)
            dense = sum(budget.seconds[target.name][0] for group in groups for target in group.targets)
            return cls(Budget("latency", (1 - sparsity) * dense, by_level), dense, layers, kept)
        kind = budget if isinstance(budget, str) else budget.kind
        if kind == "flops":
            _check_uses(groups)
        if isinstance(budget, Budget) and budget.seconds is not None:
            seconds = budget.seconds
            return cls(budget, sum(seconds[x.name][0] for x in layers if x.name in seconds), layers, kept)
        dense = sum(float(cost(kind, layer, layer.numel)) for layer in layers)
        if isinstance(budget, str):
            assert sparsity is not None
            budget = Budget(kind, (1 - sparsity) * dense)
        return cls(budget, dense, layers, kept)

    @property
    def uniform_sparsity(self) -> float:
        """The uniform sparsity that meets the budget, at most 0.99; 0.5 for latencies. Levels lie around it."""
        if self.budget.kind == "latency":
            return 0.5
        low, high = 0.0, 1.0
        for _ in range(40):
            density = (low + high) / 2
            spent = self.cost({layer.name: int(density * layer.numel) for layer in self.layers})
            low, high = (density, high) if spent <= self.budget.target else (low, density)
        return min(1 - low, _SPARSEST)

    def cost(self, kept: Mapping[str, int]) -> float:
        """Cost of kept counts. Latencies are those of the sparsest level that keeps at least as many."""
        if self.budget.seconds is None:
            return sum(float(cost(self.budget.kind, layer, kept[layer.name])) for layer in self.layers)
        total = 0.0
        for layer in self.layers:
            enough = [level for level, count in enumerate(self.kept[layer.name]) if count >= kept[layer.name]]
            total += self.budget.seconds[layer.name][max(enough, default=0)]
        return total

    def reach(self, levels: Levels, upper: Mapping[str, int]) -> tuple[float, float]:
        """Least and largest total cost of levels that keep at most ``upper`` weights."""
        least = most = 0.0
        for layer in self.layers:
            kept = levels[layer.name][0]
            if self.budget.seconds is None:
                costs = cost(self.budget.kind, layer, kept).astype(np.float64)
            else:
                costs = np.asarray(self.budget.seconds[layer.name], dtype=np.float64)
            allowed = costs[[count <= upper[layer.name] for count in kept]]
            allowed = allowed if len(allowed) else costs[-1:]
            least, most = least + float(allowed.min()), most + float(allowed.max())
        return least, most

    def uniform(self, upper: Mapping[str, int], levels: Levels | None) -> tuple[dict[str, int], dict[str, str]] | None:
        """Kept weights and patterns of the densest uniform sparsity within the budget; None if there is none.

        Args:
            upper: most weights of each layer.
            levels: kept counts and patterns of each layer, for N:M patterns and latencies. Each layer takes its
                densest level that is at least as sparse. None: any count is possible.
        """
        sizes = {layer.name: layer.numel for layer in self.layers}
        if levels is None:
            density = 1 - self.uniform_sparsity
            kept = {name: min(int(density * size), upper[name]) for name, size in sizes.items()}
            return (kept, {}) if self.cost(kept) <= self.budget.target else None
        for sparsity in sorted({1 - count / sizes[name] for name in sizes for count in levels[name][0]}):
            at = {name: _level_at(levels[name][0], sizes[name], sparsity) for name in sizes}
            kept = {name: int(levels[name][0][level]) for name, level in at.items()}
            if self.cost(kept) <= self.budget.target:
                return kept, {name: levels[name][1][level] for name, level in at.items() if levels[name][1]}
        return None


def _check_uses(groups: Sequence[Group]) -> None:
    for group in groups:
        if len({target.layer.uses for target in group.targets}) > 1:
            raise ValueError(
                f"{group.name} has matrices that are used differently often: its operations are not proportional "
                "to its weights; use granularity='matrix'"
            )


def _level_at(kept: Sequence[int], numel: int, sparsity: float) -> int:
    """Index of the densest level of at least this sparsity, or of the sparsest level."""
    most = math.floor((1 - sparsity) * numel + 0.5)
    return next((level for level, count in enumerate(kept) if count <= most), len(kept) - 1)


def keep_total(total: int, sparsity: float | None) -> int:
    """Number of kept weights of ``total``; the number of zeros is rounded up."""
    # 1e-6: in floating point, 0.7 * 1000 is slightly more than 700
    return total - math.ceil((sparsity or 0.0) * total - 1e-6)
