"""Results: an allocation, its cost on held-out data, and a pruned model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.score.targets import Group

if TYPE_CHECKING:
    from leanstep.pruning.recovery import RecoveryResult

_FRONT_POINTS = 100
# a note appears if joint / summed distortion, or its inverse, is larger
_ADDITIVE = 1.5


@dataclass(frozen=True)
class Allocation:
    """Number of weights that each layer keeps.

    Attributes:
        method: the method of :func:`allocate`, or ``refined`` after a search on joint distortion.
        numel, counts: number of weights of each layer, and how many of them it keeps.
        target: largest sum of the counts; None for other budgets.
        patterns: N:M pattern of each layer; empty for unstructured pruning.
        budget_kind, cost: kind of the budget, and the allocation's cost in its unit.
        predicted: sum of the layers' distortions by their curves; None without curves.
        front: for "dp", up to 200 points (cost, summed distortion) of the Pareto front.
    """

    method: str
    numel: dict[str, int]
    counts: dict[str, int]
    target: int | None = None
    patterns: dict[str, str] = field(default_factory=dict)
    budget_kind: str = "params"
    cost: float | None = None
    predicted: float | None = None
    front: tuple[tuple[float, float], ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all layers together."""
        return 1 - sum(self.counts.values()) / sum(self.numel.values())

    @property
    def kept(self) -> dict[str, int]:
        """The former name of :attr:`counts`."""
        return self.counts

    def level(self, name: str) -> tuple[int, str]:
        """Number of weights that a layer keeps, and its N:M pattern or ""."""
        return self.counts[name], self.patterns.get(name, "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"front": [list(point) for point in self.front]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Allocation:
        """The allocation that :meth:`to_dict` wrote, also under former names."""
        renamed = {"counts" if key == "kept" else key: v for key, v in values.items() if key != "lagrange_gap"}
        return cls(**{**renamed, "front": tuple((c, d) for c, d in values.get("front", ()))})


@dataclass(frozen=True)
class Additivity:
    """Joint and summed distortion of an allocation on held-out data.

    Attributes:
        method: of the allocation.
        joint, joint_stderr: distortion with all matrices pruned.
        summed: sum of the distortions with one matrix pruned at a time, at the same levels; NaN: not measured, because
            it would have taken longer than ``minutes``.
        ratio: joint / summed; NaN for 0 / 0 or no sum. It is 1 where distortions add up, as the paper's theorem
            predicts. Far from 1, the sum does not rank allocations.
    """

    method: str
    joint: float
    joint_stderr: float
    summed: float

    @property
    def ratio(self) -> float:
        """joint / summed."""
        if self.summed > 0:
            return self.joint / self.summed
        return math.inf if self.joint > 0 and not self.summed else math.nan

    def note(self) -> str:
        """A remark for the reader if the summed distortion is far from the joint one, else ""."""
        if not self.summed or math.isnan(self.ratio) or 1 / _ADDITIVE <= self.ratio <= _ADDITIVE:
            return ""
        return (
            f"distortions do not add up here: all matrices together cost {self.joint:.4g} on held-out data, "
            f"{self.ratio:.2f} times the sum of their single costs. The allocation is no worse than uniform sparsity, "
            "but the smallest sum need not be the smallest cost: correcting the curves (relinearise) or another "
            "allocation may do better"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; None for NaN and infinity."""
        return finite_values(asdict(self) | {"ratio": self.ratio})


def finite_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, None for NaN and infinity, which JSON has not."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@dataclass
class PruneResult:
    """The result of :func:`leanstep.pruning.prune`.

    Attributes:
        allocation: the applied allocation.
        score, pattern, inputs, metric: the settings, with defaults filled in.
        curve_score: the score of the curves, of the slopes that ATP tried, and of the search; None without them.
        groups: the matrices, in groups that share a level.
        curves: the measured curves, raw; empty for allocations without curves.
        held_out: cost on held-out data of the allocation that was applied; None without data.
        compared: cost of every measured allocation, including the applied one.
        notes: remarks for the reader, in sentences.
        data: hash of the calibration data.
        budget: its ``kind`` and ``target``, and the cost of the ``dense`` matrices, of the model ``before`` and of the
            model ``after``, in weights, operations per sample, bytes or seconds.
        perplexity: ``before`` and ``after`` on held-out sequences, and the number of ``tokens`` predicted; empty where
            it was not measured.
        refinement: the search on joint distortion: exchanges judged (``evaluations``) and ``accepted``, its ``seconds``
            and ``passes`` of the model, why it ``ended``, and ``points`` (evaluation, seconds, joint distortion on its
            own data, standard error); empty without it. The last point is of the model that is pruned by the last
            allocation, on its own inputs; the points before it are on the inputs of the search's start. ``start`` is
            the distortion of the model that is pruned by the first: where the last point is not below it, that stays.
        recovery: what training after pruning did; None without it.
    """

    allocation: Allocation
    score: str
    pattern: str
    metric: str
    groups: list[Group]
    curves: dict[str, Curve] = field(default_factory=dict)
    held_out: Additivity | None = None
    compared: list[Additivity] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: str = ""
    budget: dict[str, Any] = field(default_factory=dict)
    inputs: str = "pruned"
    curve_score: str | None = None
    perplexity: dict[str, Any] = field(default_factory=dict)
    refinement: dict[str, Any] = field(default_factory=dict)
    recovery: RecoveryResult | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned matrices, counted in the current weights."""
        return sparsity_of(self.layers())

    def layers(self) -> list[dict[str, Any]]:
        """One row per matrix, with zeros counted in the current weights.

        Reads all of them: of a folder, pages of its files, which then stay in memory while the system has room.
        """
        rows = []
        for group in self.groups:
            pattern = self.allocation.patterns.get(group.name)
            for target in group.targets:
                nonzero = int(target.weight.count_nonzero())
                rows.append(
                    {
                        "name": target.name,
                        "shape": list(target.layer.shape),
                        "numel": target.layer.numel,
                        "nonzero": nonzero,
                        "sparsity": 1 - nonzero / target.layer.numel,
                        "pattern": pattern,
                        "block": target.layer.block,
                    }
                )
        return rows

    def to_dict(self, layers: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Plain values, for JSON.

        Args:
            layers: the rows of :meth:`layers`; None: count the zeros now.
        """
        allocation = self.allocation.to_dict()
        # a hundred points suffice to draw the front
        step = -(-len(allocation["front"]) // _FRONT_POINTS) or 1
        allocation["front"] = allocation["front"][::step]
        layers = self.layers() if layers is None else layers
        return {
            "sparsity": sparsity_of(layers),
            "budget": self.budget,
            "allocation": allocation,
            "score": self.score,
            "curve_score": self.curve_score,
            "pattern": self.pattern,
            "inputs": self.inputs,
            "metric": self.metric,
            "calibration": self.data,
            "held_out": None if self.held_out is None else self.held_out.to_dict(),
            "compared": [one.to_dict() for one in self.compared],
            "perplexity": finite_values(self.perplexity) or None,
            "refinement": self.refinement or None,
            "recovery": None if self.recovery is None else self.recovery.to_dict(),
            "notes": self.notes,
            "layers": layers,
            "curves": {name: curve.to_dict() for name, curve in self.curves.items()},
        }


def sparsity_of(layers: list[dict[str, Any]]) -> float:
    """Fraction of zeros of rows of :meth:`PruneResult.layers`."""
    return 1 - sum(row["nonzero"] for row in layers) / sum(row["numel"] for row in layers)
