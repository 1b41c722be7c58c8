"""The result of pruning a model: levels, curves, and cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from leanstep.pruning.allocate.allocation import Allocation
from leanstep.pruning.measure.checks import Additivity
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.score.targets import Group

_FRONT_POINTS = 100


@dataclass
class PruneResult:
    """The result of :func:`leanstep.pruning.prune`.

    Attributes:
        allocation: how many weights each matrix (or group) kept.
        score, pattern, metric: as asked for, or the defaults.
        groups: the matrices, in groups that share a level.
        levels: kept weights and N:M pattern of each group.
        curves: the measured curves, raw; empty for allocations without curves.
        held_out: cost on held-out data of the allocation that was applied; None without data.
        compared: cost of every allocation that was tried, the applied one included.
        notes: remarks for the reader, in sentences.
        data: hash of the calibration data.
        budget: its ``kind`` and ``target``, and the cost of the ``dense`` matrices, of the model ``before`` and of the
            model ``after``, in weights, operations per sample, bytes or seconds.
        perplexity: ``before`` and ``after`` on held-out sequences, and the number of ``tokens`` predicted; empty where
            it was not measured.
    """

    allocation: Allocation
    score: str
    pattern: str
    metric: str
    groups: list[Group]
    levels: dict[str, tuple[int, str]]
    curves: dict[str, Curve] = field(default_factory=dict)
    held_out: Additivity | None = None
    compared: list[Additivity] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: str = ""
    budget: dict[str, Any] = field(default_factory=dict)
    perplexity: dict[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned matrices, counted."""
        return 1 - sum(layer["nonzero"] for layer in self.layers()) / sum(layer["numel"] for layer in self.layers())

    def layers(self) -> list[dict[str, Any]]:
        """One row per matrix, counted in the weights as they are now."""
        rows = []
        for group in self.groups:
            pattern = self.levels[group.name][1]
            for target in group.targets:
                nonzero = int(target.weight.count_nonzero())
                rows.append(
                    {
                        "name": target.name,
                        "shape": list(target.layer.shape),
                        "numel": target.layer.numel,
                        "nonzero": nonzero,
                        "sparsity": 1 - nonzero / target.layer.numel,
                        "pattern": pattern or None,
                        "block": target.layer.block,
                    }
                )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        allocation = self.allocation.to_dict()
        # the front has a point for every state of the table; a hundred of them draw it
        step = -(-len(allocation["front"]) // _FRONT_POINTS) or 1
        allocation["front"] = allocation["front"][::step]
        return {
            "sparsity": self.sparsity,
            "budget": self.budget,
            "allocation": allocation,
            "score": self.score,
            "pattern": self.pattern,
            "metric": self.metric,
            "calibration": self.data,
            "held_out": None if self.held_out is None else self.held_out.to_dict(),
            "compared": [one.to_dict() for one in self.compared],
            "perplexity": self.perplexity or None,
            "notes": self.notes,
            "layers": self.layers(),
            "curves": {name: curve.to_dict() for name, curve in self.curves.items()},
        }
