"""From settings to a pruned model: measure curves, allocate, compare on held-out data, prune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanstep.pruning.allocate.allocation import allocate, snap
from leanstep.pruning.allocate.budgets import Budget, BudgetConstraint, LatencyTable, keep_total
from leanstep.pruning.allocate.closed_form import ComputedScores, atp_betas, outlier_ratio
from leanstep.pruning.allocate.knapsack import InfeasibleBudget
from leanstep.pruning.measure.activation_cache import ActivationCache
from leanstep.pruning.measure.batches import Batch, batches_hash
from leanstep.pruning.measure.checks import (
    apply_allocation,
    joint_of,
    measure_additivity,
    relinearised_curves,
    tuned_coefficients,
)
from leanstep.pruning.measure.curves import Curve, Levels, levels_of
from leanstep.pruning.measure.measure import Measurement, Progress, WeightSnapshot, measure_curves
from leanstep.pruning.measure.metrics import LOCAL_METRICS, Metric, metric_name
from leanstep.pruning.result import Additivity, Allocation, PruneResult, levels_by_group
from leanstep.pruning.score.calibration import Pruning
from leanstep.pruning.score.targets import Group, Layer
from leanstep.sparsity import NM

# most slopes of ATP to try
_SLOPES = 9
# add a note if joint / summed distortion, or its inverse, exceeds this
_ADDITIVE = 1.5
# search for coefficients: each try solves a knapsack and runs the model on the data of the curves
SEARCH = {"starts": 100, "patience": 100}


@dataclass
class Planner:
    """One call of :func:`leanstep.pruning.prune` after its checks; :meth:`run` is the order of events."""

    model: nn.Module
    groups: list[Group]
    sparsity: float | None
    budget: Budget | LatencyTable | str | None
    score: str
    pattern: str
    metric: str | Metric | None
    batches: list[Batch]
    held_out: list[Batch]
    curve_batches: list[Batch]
    score_options: dict[str, Any]
    progress: Progress | None
    levels: Sequence[float] | None
    resume: str | Path | None
    snapshot: WeightSnapshot
    notes: list[str] = field(default_factory=list)

    def run(self, method: str, correction: str, curves: Mapping[str, Curve] | None, fixed: NM | None) -> PruneResult:
        """Measure, allocate, compare, prune."""
        self.before = self._nonzero()
        self.constraint = self._constraint()
        measured: dict[str, Curve] = {}
        if fixed is not None:
            candidate = self._fixed(fixed)
        elif method == "dp":
            self._check_reach()
            measured = self._measure() if curves is None else dict(curves)
            candidate = self._by_curves(measured, correction)
        else:
            candidate = self._by_rule(method)
        allocation, compared = self._compare_and_prune(candidate)
        return PruneResult(
            allocation=allocation,
            score=self.score,
            pattern=self.pattern,
            metric=metric_name(self.metric, self.model),
            groups=self.groups,
            levels=levels_by_group(allocation, self.groups),
            curves=measured,
            held_out=next((one for one in compared if one.method == allocation.method), None),
            compared=compared,
            notes=self.notes,
            data=batches_hash(self.batches),
            budget={
                "kind": self.constraint.budget.kind,
                "target": self.constraint.budget.target if allocation.target is None else allocation.target,
                "dense": self.constraint.dense,
                "before": self.constraint.cost(self.before),
                "after": self.constraint.cost(self._nonzero()),
            },
        )

    @cached_property
    def pruning(self) -> Pruning:
        """The score, and the calibration data for its statistics."""
        cache = ActivationCache(self.model, self.batches, enabled=bool(self.batches))
        if cache.note:
            self.notes.append(cache.note)
        return Pruning(cache, self.score, self.score_options)

    # -- budget and levels ------------------------------------------------------------------------------------------

    def _constraint(self) -> BudgetConstraint:
        if self.budget in (None, "params"):
            assert self.sparsity is not None
            total = sum(group.layer.numel for group in self.groups)
            return BudgetConstraint.of(
                Budget("params", max(keep_total(total, self.sparsity), 1)), self.groups, None, {}
            )
        kept: dict[str, Sequence[int]] = {}
        if isinstance(self.budget, LatencyTable) or getattr(self.budget, "kind", None) == "latency":
            levels = levels_of(self.groups, 0.5, self.pattern, levels=self.levels)
            kept = {name: counts for name, (counts, _) in levels.items()}
        assert self.budget is not None
        return BudgetConstraint.of(self.budget, self.groups, self.sparsity, kept)

    def _nonzero(self) -> dict[str, int]:
        """Current number of nonzero weights of each group."""
        return {group.name: sum(int(t.weight.count_nonzero()) for t in group.targets) for group in self.groups}

    def _by_weights(self) -> bool:
        """Whether the target is a sparsity, not a cost."""
        return self.constraint.budget.kind == "params" and self.sparsity is not None

    def _around(self) -> float:
        """Sparsity at the center of the grid of levels."""
        if self._by_weights():
            assert self.sparsity is not None
            return self.sparsity
        return self.constraint.uniform_sparsity

    def _levels(self) -> Levels:
        return levels_of(self.groups, self._around(), self.pattern, levels=self.levels)

    def _check_reach(self) -> None:
        """Before measuring, raise InfeasibleBudget for a target that no levels meet."""
        budget = self.constraint.budget
        least, most = self.constraint.reach(self._levels(), self.before)
        if budget.target >= least:
            return
        wanted, removed, kept = (1 - cost / self.constraint.dense for cost in (budget.target, least, most))
        if self._by_weights():
            message = (
                f"a sparsity of {self.sparsity:g} is out of reach: the levels of these matrices give sparsities from "
                f"{kept:.4g} to {removed:.4g}"
            )
        else:
            message = (
                f"removing {wanted:.4g} of the cost ({budget.kind}) is out of reach: the levels of these matrices "
                f"remove from {max(kept, 0.0):.4g} to {removed:.4g}"
            )
        raise InfeasibleBudget(message, least, most)

    # -- allocations ------------------------------------------------------------------------------------------------

    def _measure(self) -> dict[str, Curve]:
        return measure_curves(
            self.model,
            self.curve_batches,
            sparsity=self._around(),
            score=self.score,
            pattern=self.pattern,
            metric=self.metric,
            groups=self.groups,
            levels=self.levels,
            score_options=self.score_options,
            score_data=self.batches,
            resume=self.resume,
            progress=self.progress,
        )

    def _by_curves(self, curves: Mapping[str, Curve], correction: str) -> Allocation:
        """Minimize the summed distortion, or with a correction the joint distortion."""
        if correction == "none":
            return self._solve(curves)
        with self._measurement(self.curve_batches) as measurement:
            if correction == "coefficients":
                return tuned_coefficients(curves, self._solve, lambda one: self._joint(measurement, one), **SEARCH)[0]
            return self._relinearised(self._solve(curves), measurement)

    def _solve(self, curves: Mapping[str, Curve]) -> Allocation:
        missing = [group.name for group in self.groups if group.name not in curves]
        if missing:
            raise ValueError(f"there is no curve for {missing[0]}; measure with the same model and granularity")
        return self._allocate("dp", curves={group.name: curves[group.name] for group in self.groups})

    def _relinearised(self, plain: Allocation, measurement: Measurement) -> Allocation:
        """Measure curves around the uniform allocation, then around the new one, while the joint distortion falls."""
        best, lowest = plain, self._joint(measurement, plain)
        around, levels = self._uniform() or plain, self._levels()
        for _ in range(2):
            curves = relinearised_curves(
                measurement,
                self.groups,
                levels,
                levels_by_group(around, self.groups),
                self.pruning,
                self.snapshot,
                self.progress,
            )
            around = self._solve(curves)
            joint = self._joint(measurement, around)
            if joint >= lowest:
                break
            best, lowest = around, joint
        return best

    def _by_rule(self, method: str) -> Allocation:
        if method == "global":
            return self._allocate(method, scores=self._scores())
        if method == "lamp":  # LAMP squares the weights
            return self._allocate(method, scores={group.name: group.targets[0].weight for group in self.groups})
        if method == "owl":
            return self._allocate(method, outliers=self._outliers())
        return self._best_slope() if method == "atp" else self._allocate(method)

    def _scores(self) -> Mapping[str, Tensor]:
        """Scores of all matrices. Magnitude and Wanda are recomputed on access, the others are stored."""
        pruners = self.pruning.pruners(self.groups)
        if self.score in ("magnitude", "wanda"):
            return ComputedScores([g.name for g in self.groups], lambda name: pruners.once(name).scores)
        scores = {}
        for group in self.groups:
            scores[group.name] = pruners[group.name].scores
            pruners.release(group)
        return scores

    def _outliers(self) -> dict[str, float]:
        """Percentage of outliers among the Wanda scores of each layer's block, or of a layer outside all blocks."""
        pruners = Pruning(self.pruning.cache, "wanda").pruners(self.groups)
        blocks: dict[int | str, list[Group]] = {}
        for group in self.groups:
            blocks.setdefault(group.name if group.layer.block is None else group.layer.block, []).append(group)
        ratios = {}
        for block in blocks.values():
            ratio = outlier_ratio([pruners[group.name].scores for group in block])
            for group in block:
                ratios[group.name] = ratio
                pruners.release(group)
        return ratios

    def _best_slope(self) -> Allocation:
        """Try several slopes of ATP; return the allocation with the smallest joint distortion on the curves' data."""
        assert self.sparsity is not None
        blocks = {layer.block for layer in _in_blocks([group.layer for group in self.groups])}
        betas = atp_betas(self.sparsity, len(blocks))
        candidates = [self._allocate("atp", beta=beta) for beta in betas[:: -(-len(betas) // _SLOPES)]]
        with self._measurement(self.curve_batches) as measurement:
            return min(candidates, key=lambda one: self._joint(measurement, one))

    def _uniform(self) -> Allocation | None:
        """Uniform sparsity within the budget; None if no uniform sparsity meets it."""
        budget = self.constraint.budget
        if self._by_weights():
            return self._allocate("uniform")
        any_count = budget.kind != "latency" and not self.pattern.startswith("N:")
        uniform = self.constraint.uniform(self._nonzero(), None if any_count else self._levels())
        if uniform is None:
            return None
        sizes = {group.name: group.layer.numel for group in self.groups}
        return Allocation("uniform", sizes, uniform[0], None, uniform[1], budget.kind, self.constraint.cost(uniform[0]))

    def _allocate(self, method: str, **needed: Any) -> Allocation:
        """Allocate weights to the groups; existing zeros stay zero."""
        nonzero = self._nonzero()
        layers = [group.layer for group in self.groups]
        by_weights = self._by_weights()
        allocation = allocate(
            _in_blocks(layers) if method == "atp" else layers,
            self.sparsity if by_weights else None,
            method=method,
            budget=None if by_weights else self.constraint.budget,
            at_most={layer.name: nonzero[layer.name] for layer in layers if nonzero[layer.name] < layer.numel},
            **needed,
        )
        if self.pattern.startswith("N:") and not allocation.patterns:
            allocation = snap(allocation, self._levels())
        return allocation

    def _fixed(self, pattern: NM) -> Allocation:
        for target in (target for group in self.groups for target in group.targets):
            if target.layer.shape[1] % pattern.m:
                raise ValueError(
                    f"{target.name} has {target.layer.shape[1]} inputs, which groups of {pattern.m} do not fill; leave "
                    "it out with exclude, or use another pattern"
                )
        numel = {group.name: group.layer.numel for group in self.groups}
        kept = {name: size // pattern.m * pattern.n for name, size in numel.items()}
        return Allocation("uniform", numel, kept, sum(kept.values()), dict.fromkeys(numel, str(pattern)))

    # -- cost and pruning ----------------------------------------------------------------------------------------------

    def _compare_and_prune(self, candidate: Allocation) -> tuple[Allocation, list[Additivity]]:
        """Measure on held-out data, and prune; for "dp", by uniform sparsity if that is better.

        The candidate is measured last, so that the model is already pruned if it wins.
        """
        if not self.held_out:
            self.notes.append("there was no held-out data: the cost of pruning was not measured")
            self._apply(candidate)
            return candidate, []
        uniform = self._uniform() if candidate.method == "dp" else None
        if candidate.method == "dp" and uniform is None:
            self.notes.append("no uniform sparsity meets the budget: the allocation was compared with nothing")
        with self._measurement(self.held_out) as measurement:
            baseline = None if uniform is None else self._additivity(measurement, uniform, stay=False)
            cost = self._additivity(measurement, candidate, stay=True)
        if uniform is None or baseline is None:
            return candidate, [cost]
        if cost.joint < baseline.joint:
            self._note_ratio(cost)
            return candidate, [cost, baseline]
        self.notes.append(
            f"the allocation by dynamic programming costs {cost.joint:.4g} on held-out data, uniform sparsity "
            f"{baseline.joint:.4g}: the model was pruned uniformly. The summed distortion of the allocation is "
            f"{1 / cost.ratio:.2f} times its joint distortion"
        )
        self.snapshot.restore()
        self._apply(uniform)
        return uniform, [cost, baseline]

    def _apply(self, allocation: Allocation) -> None:
        self.snapshot.take()
        apply_allocation(self.groups, levels_by_group(allocation, self.groups), self.pruning)

    def _additivity(self, measurement: Measurement, allocation: Allocation, *, stay: bool) -> Additivity:
        return measure_additivity(measurement, self.groups, allocation, self.pruning, self.snapshot, stay=stay)

    def _note_ratio(self, cost: Additivity) -> None:
        """Add a note if the summed distortion is far from the joint one."""
        if not cost.summed or 1 / _ADDITIVE <= cost.ratio <= _ADDITIVE:
            return
        self.notes.append(
            f"distortions do not add up here: all matrices together cost {cost.joint:.4g} on held-out data, "
            f"{cost.ratio:.2f} times the sum of their single costs. The allocation is better than uniform sparsity, "
            "but the smallest sum need not be the smallest cost: a correction (relinearise, coefficients) or another "
            "allocation may do better"
        )

    def _joint(self, measurement: Measurement, allocation: Allocation) -> float:
        levels = levels_by_group(allocation, self.groups)
        return joint_of(measurement, self.groups, levels, self.pruning, self.snapshot).mean

    def _measurement(self, batches: list[Batch]) -> closing[Measurement]:
        # a local metric measures one layer; the joint distortion needs the model's output
        metric = None if self.metric in LOCAL_METRICS else self.metric
        return closing(Measurement(self.model, batches, metric, like=self.pruning.cache))


def _in_blocks(layers: Sequence[Layer]) -> list[Layer]:
    """Give layers outside all blocks the number of the preceding block, or of the first block."""
    block, numbered = min((layer.block for layer in layers if layer.block is not None), default=0), []
    for layer in layers:
        block = block if layer.block is None else layer.block
        numbered.append(replace(layer, block=block))
    return numbered
