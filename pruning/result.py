"""Results: an allocation, its cost on held-out data, a recovery with its settings, and a pruned model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.score.targets import Group

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
            "but the smallest sum need not be the smallest cost: curves taken again around the pruned model "
            "(--correction relinearise) or another allocation may do better"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; None for NaN and infinity."""
        return finite_values(asdict(self) | {"ratio": self.ratio})


def finite_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, None for NaN and infinity, which JSON has not."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@dataclass(frozen=True)
class Recovery:
    """Settings of :func:`leanstep.pruning.recover`.

    Attributes:
        steps: number of updates.
        lr: root mean square of an entry's change in a step, of all entries of a matrix, zeros among them; None: 3e-4,
            with ``rank`` 3e-3. Its factor rises in the first tenth of the steps, times a cosine that falls to 0 from
            the first step on, so that its highest value is about 0.98.
        rank: train LoRA factors of this rank in place of the weights of linear layers, and merge them; None: the
            weights. Other matrices, such as the experts in one parameter, are not trained then, which a note says.
        batch_size: samples of a step.
        distill: train on the dense model's outputs; False: on the data's next tokens. None: as memory allows, where a
            folder is recovered; else as a teacher is given.
        seed: of the order of the samples, and of the factors.

    Raises:
        ValueError: for a number that is not positive, or not whole, other than ``lr``.
    """

    steps: int
    lr: float | None = None
    rank: int | None = None
    batch_size: int = 8
    distill: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        positive = {"steps": self.steps, "lr": self.step_size, "rank": self.rank or 1, "batch_size": self.batch_size}
        if self.rank == 0 or not all(value > 0 and math.isfinite(value) for value in positive.values()):
            given = ", ".join(f"{name}={getattr(self, name)}" for name in positive)
            raise ValueError(f"recovery takes positive steps, lr, rank and batch_size, got {given}")
        for name in ("steps", "rank", "batch_size", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int | None):
                raise ValueError(f"recovery takes a whole number as {name}, such as 100, got {value!r}")

    @property
    def step_size(self) -> float:
        """The learning rate, with the default filled in."""
        return (3e-4 if self.rank is None else 3e-3) if self.lr is None else self.lr


@dataclass(frozen=True)
class RecoveryResult:
    """The result of :func:`leanstep.pruning.recover`.

    Attributes:
        settings: with defaults filled in.
        losses: mean training loss of every step: KL from the dense model in nats per token, or the cross-entropy.
        metric: of ``before`` and ``after``: ``kl`` or ``cross_entropy``.
        before, after: mean on held-out data, and its standard error, of the pruned and of the trained model; None
            without such data.
        applied: whether the trained weights were taken. False: they were no better on held-out data, and the pruned
            ones are back.
        perplexity: of the model in the end on held-out sequences; None where it was not measured.
        notes: remarks for the reader, in sentences.
    """

    settings: Recovery
    losses: tuple[float, ...]
    metric: str
    before: Distortion | None = None
    after: Distortion | None = None
    applied: bool = True
    perplexity: float | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; None for what is not finite, as a standard error of one sample."""
        costs = {"before": self.before, "after": self.after}
        plain = {name: None if cost is None else finite_values(cost._asdict()) for name, cost in costs.items()}
        return finite_values(asdict(self)) | plain | {"losses": list(self.losses)}


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
        quality: of embedding models and classifiers: the number of held-out ``samples``, and ``before`` and ``after``
            the ``mean`` and ``stderr`` of each measure by name; empty where it was not measured.
        refinement: the search on joint distortion: exchanges judged (``evaluations``) and ``accepted``, its ``seconds``
            and ``passes`` of the model, why it ``ended``, and ``points`` (evaluation, seconds, joint distortion on its
            own data, standard error); empty without it. The last point is of the model that is pruned by the last
            allocation, on its own inputs; the points before it are on the inputs of the search's start. ``start`` is
            the distortion of the model that is pruned by the first: where the last point is not below it, that stays.
        recovery: what training after pruning did; None without it.
        encoded: with a menu, level of each matrix, and its bytes (``ggml``: uint8 [out, bytes of a row]) or the scales
            of its codes (``sparse``).
        reconstruction: the training of blocks: its ``steps`` and ``lr``; ``blocks``, each with its ``name``, the
            relative error of its outputs on held-back samples ``before`` and ``after``, and whether it was ``applied``;
            and the distortion on ``held_out`` data after it (``held_out`` of the result is before). Empty without it.
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
    quality: dict[str, Any] = field(default_factory=dict)
    refinement: dict[str, Any] = field(default_factory=dict)
    recovery: RecoveryResult | None = None
    encoded: dict[str, tuple[str, Tensor]] = field(default_factory=dict, repr=False)
    reconstruction: dict[str, Any] = field(default_factory=dict)

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
                bits = 8 * self.allocation.counts[group.name] / target.layer.numel if self.encoded else None
                rows.append(
                    {
                        "name": target.name,
                        "shape": list(target.layer.shape),
                        "numel": target.layer.numel,
                        "nonzero": nonzero,
                        "sparsity": 1 - nonzero / target.layer.numel,
                        "pattern": pattern,
                        "block": target.layer.block,
                        **({} if bits is None else {"bits": bits}),
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
            "quality": self.quality or None,
            "refinement": self.refinement or None,
            "reconstruction": self.reconstruction or None,
            "recovery": None if self.recovery is None else self.recovery.to_dict(),
            "notes": self.notes,
            "layers": layers,
            "curves": {name: curve.to_dict() for name, curve in self.curves.items()},
        }


def sparsity_of(layers: list[dict[str, Any]]) -> float:
    """Fraction of zeros of rows of :meth:`PruneResult.layers`."""
    return 1 - sum(row["nonzero"] for row in layers) / sum(row["numel"] for row in layers)
