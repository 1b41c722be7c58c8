"""From settings to an allocation and a pruned model: the order of events of :func:`leanstep.pruning.prune`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanstep.pruning.allocate.allocation import Allocation, allocate, snap
from leanstep.pruning.allocate.closed_form import atp_betas, outlier_ratio
from leanstep.pruning.allocate.knapsack import InfeasibleBudget
from leanstep.pruning.allocate.limit import Limit
from leanstep.pruning.measure.activation_cache import PrefixCache
from leanstep.pruning.measure.batches import Batch, batches_hash
from leanstep.pruning.measure.checks import Additivity, apply_allocation, chosen_levels, joint_of, measure_additivity
from leanstep.pruning.measure.corrections import relinearised_curves, tuned_coefficients
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.groups import Group
from leanstep.pruning.measure.measure import Levels, Measurement, Progress, levels_of, measure_curves
from leanstep.pruning.measure.metrics import LOCAL_METRICS, Metric, default_metric
from leanstep.pruning.measure.snapshot import Originals
from leanstep.pruning.result import PruneResult
from leanstep.pruning.score.layers import Layer
from leanstep.pruning.score.pruners import Pruning, Scores
from leanstep.sparsity import NM

__all__ = ["Planner"]

# slopes of ATP that are tried, of all those there are
_SLOPES = 9
# from this ratio of joint to summed distortion on, or its inverse, a reader is told
_ADDITIVE = 1.5
# tries of the search for coefficients, each a knapsack and a forward pass over the data that curves are measured on
SEARCH = {"starts": 100, "patience": 100}


@dataclass
class Planner:
    """The settings of one call of :func:`leanstep.pruning.prune`, checked; :meth:`run` is the order of events."""

    model: nn.Module
    groups: list[Group]
    sparsity: float | None
    limit: Limit | None
    score: str
    pattern: str
    metric: str | Metric | None
    batches: list[Batch]
    held_out: list[Batch]
    measured: list[Batch]
    at_least: float
    score_options: dict[str, Any]
    prefix_cache: bool
    progress: Progress | None
    levels: Sequence[float] | None
    resume: str | Path | None
    originals: Originals
    notes: list[str] = field(default_factory=list)

    def run(
        self, method: str, correction: str, beta: float | None, curves: Mapping[str, Curve] | None, fixed: NM | None
    ) -> PruneResult:
        """Measure, allocate, compare, prune."""
        before = self._counts()
        self.pruning = Pruning(self._cache(self.batches), self.score, self.score_options)
        if self.pruning.cache.note:
            self.notes.append(self.pruning.cache.note)
        found: dict[str, Curve] = {}
        if fixed is not None:
            candidate = self._fixed(fixed)
        elif method == "dp":
            self._check_reach()
            found = dict(curves) if curves is not None else self._measure()
            candidate = self._by_curves(found, correction)
        else:
            candidate = self._baseline(method, beta)
        allocation, compared = self._compare_and_prune(candidate)
        chosen = chosen_levels(allocation, self.groups)
        return PruneResult(
            allocation=allocation,
            score=self.score,
            pattern=self.pattern,
            metric=self._metric_name(),
            groups=self.groups,
            chosen=chosen,
            curves=found,
            held_out=next((one for one in compared if one.method == allocation.method), None),
            compared=compared,
            notes=self.notes,
            data=batches_hash(self.batches),
            budget=self._budget(allocation, before),
        )

    def _budget(self, allocation: Allocation, before: Mapping[str, int]) -> dict[str, Any]:
        """What was limited, and what of it was spent before and after."""
        if self.limit is None:
            dense = sum(allocation.numel.values())
            left = {"before": sum(before.values()), "after": sum(self._counts().values())}
            return {"kind": "params", "target": allocation.target, "dense": dense, **left}
        spent = {"before": self.limit.spent(before), "after": self.limit.spent(allocation.kept)}
        return {"kind": self.limit.budget.kind, "target": self.limit.budget.target, "dense": self.limit.dense, **spent}

    # -- allocations ------------------------------------------------------------------------------------------------

    def _measure(self) -> dict[str, Curve]:
        return measure_curves(
            self.model,
            self.measured,
            sparsity=self._around(),
            score=self.score,
            pattern=self.pattern,
            metric=self.metric,
            groups=self.groups,
            levels=self.levels,
            score_options=self.score_options,
            score_data=self.batches,
            prefix_cache=self.prefix_cache,
            resume=self.resume,
            progress=self.progress,
        )

    def _check_reach(self) -> None:
        """Refuse a target that no choice of levels meets, before anything is measured."""
        levels = self._levels()
        flat = {
            group.name: Curve(
                name=group.name,
                numel=group.layer.numel,
                kept=kept,
                distortion=(0.0,) * len(kept),
                stderr=(0.0,) * len(kept),
                metric="none",
                patterns=patterns,
            )
            for group in self.groups
            for kept, patterns in [levels[group.name]]
        }
        try:
            self._allocate("dp", curves=flat)
        except InfeasibleBudget as error:
            if self.limit is not None:
                raise self._out_of_reach(self.limit, error) from None
            assert self.sparsity is not None
            total = sum(group.layer.numel for group in self.groups)
            sparsest, densest = 1 - error.lowest / total, 1 - error.highest / total
            raise InfeasibleBudget(
                f"a sparsity of {self.sparsity:g} is out of reach: the levels of these matrices give sparsities from "
                f"{densest:.4g} to {sparsest:.4g}",
                error.lowest,
                error.highest,
            ) from None

    def _out_of_reach(self, limit: Limit, error: InfeasibleBudget) -> InfeasibleBudget:
        wanted, most, least = (1 - cost / limit.dense for cost in (limit.budget.target, error.lowest, error.highest))
        return InfeasibleBudget(
            f"removing {wanted:.4g} of the cost ({limit.budget.kind}) is out of reach: the levels of these matrices "
            f"remove from {max(least, 0.0):.4g} to {most:.4g}",
            error.lowest,
            error.highest,
        )

    def _by_curves(self, curves: Mapping[str, Curve], correction: str) -> Allocation:
        """The allocation of smallest summed distortion, and where that is to be corrected, of smallest joint one."""
        plain = self._solve(curves)
        if correction == "none":
            return plain
        measurement = self._measurement(self.measured)
        try:
            if correction == "coefficients":
                return self._scaled(curves, measurement)
            return self._relinearised(plain, measurement)
        finally:
            measurement.close()

    def _solve(self, curves: Mapping[str, Curve]) -> Allocation:
        missing = [group.name for group in self.groups if group.name not in curves]
        if missing:
            raise ValueError(f"there is no curve for {missing[0]}; measure with the same model and granularity")
        return self._allocate("dp", curves={group.name: curves[group.name] for group in self.groups})

    def _scaled(self, curves: Mapping[str, Curve], measurement: Measurement) -> Allocation:
        def joint(allocation: Allocation) -> float:
            return self._joint(measurement, allocation)

        return tuned_coefficients(curves, self._solve, joint, **SEARCH)[0]

    def _relinearised(self, plain: Allocation, measurement: Measurement) -> Allocation:
        best, lowest = plain, self._joint(measurement, plain)
        around = self._uniform() or plain
        levels = self._levels()
        for _ in range(2):
            curves = relinearised_curves(
                measurement,
                self.groups,
                levels,
                chosen_levels(around, self.groups),
                self.pruning,
                progress=self.progress,
                originals=self.originals,
            )
            around = self._solve(curves)
            joint = self._joint(measurement, around)
            if joint >= lowest:
                break
            best, lowest = around, joint
        return best

    def _baseline(self, method: str, beta: float | None) -> Allocation:
        more: dict[str, Any] = {}
        if method == "global":
            more["scores"] = self._scores()
        elif method == "lamp":
            more["scores"] = {group.name: group.targets[0].weight for group in self.groups}  # it squares them
        elif method == "owl":
            more["outliers"] = self._outliers()
        elif method == "atp":
            if beta is None:
                return self._best_slope()
            more["beta"] = beta
        return self._allocate(method, **more)

    def _scores(self) -> Mapping[str, Tensor]:
        """The scores of all matrices, and nothing else of their pruners; those that take a product, only when asked."""
        pruners = self.pruning.pruners(self.groups)
        if self.score in ("magnitude", "wanda"):
            return Scores(pruners)
        found = {}
        for group in self.groups:
            found[group.name] = pruners[group.name].scores
            pruners.release(group)
        return found

    def _outliers(self) -> dict[str, float]:
        """Percent of its block's Wanda scores that are outliers, by layer; one without a block is one by itself."""
        pruners = Pruning(self.pruning.cache, "wanda").pruners(self.groups)
        blocks: dict[int | str, list[Group]] = {}
        for group in self.groups:
            block = group.name if group.layer.block is None else group.layer.block
            blocks.setdefault(block, []).append(group)
        ratios = {}
        for members in blocks.values():
            ratio = outlier_ratio([pruners[group.name].scores for group in members])
            for group in members:
                ratios[group.name] = ratio
                pruners.release(group)
        return ratios

    def _best_slope(self) -> Allocation:
        """ATP's slope by trial, on the data that curves are measured on."""
        assert self.sparsity is not None
        blocks = {layer.block for layer in _placed([group.layer for group in self.groups])}
        betas = atp_betas(self.sparsity, len(blocks))
        candidates = [self._allocate("atp", beta=beta) for beta in betas[:: -(-len(betas) // _SLOPES)]]
        measurement = self._measurement(self.measured)
        try:
            return min(candidates, key=lambda one: self._joint(measurement, one))
        finally:
            measurement.close()

    def _uniform(self) -> Allocation | None:
        """The same sparsity for all, within the same budget; None where it allows none."""
        if self.limit is None:
            return self._allocate("uniform")
        upper = self._counts()
        lower = {
            group.name: min(math.ceil(self.at_least * group.layer.numel - 1e-6), upper[group.name])
            for group in self.groups
        }
        between = self.limit.budget.kind != "latency" and not self.pattern.startswith("N:")
        return self.limit.uniform(lower, upper, None if between else self._levels())

    def _counts(self) -> dict[str, int]:
        """Weights of each group that are not zero, as they are now."""
        return {group.name: sum(int(t.weight.count_nonzero()) for t in group.targets) for group in self.groups}

    def _allocate(self, method: str, **more: Any) -> Allocation:
        """An allocation over the groups that never brings a zero back."""
        nonzero = self._counts()
        at_most = {group.name: nonzero[group.name] for group in self.groups if nonzero[group.name] < group.layer.numel}
        layers = [group.layer for group in self.groups]
        found = allocate(
            _placed(layers) if method == "atp" else layers,
            self.sparsity,
            method=method,
            budget=None if self.limit is None else self.limit.budget,
            at_least=self.at_least,
            at_most=at_most or None,
            **more,
        )
        if self.pattern.startswith("N:") and not found.patterns:
            found = snap(found, self._levels())
        return found

    def _fixed(self, pattern: NM) -> Allocation:
        kept, patterns = {}, {}
        for group in self.groups:
            for target in group.targets:
                columns = target.layer.shape[1]
                if columns % pattern.m:
                    raise ValueError(
                        f"{target.name} has {columns} inputs, which groups of {pattern.m} do not fill; leave it out "
                        "with exclude, or take another pattern"
                    )
            kept[group.name] = group.layer.numel // pattern.m * pattern.n
            patterns[group.name] = str(pattern)
        numel = {group.name: group.layer.numel for group in self.groups}
        return Allocation(method="uniform", kept=kept, numel=numel, target=sum(kept.values()), patterns=patterns)

    # -- what it costs ----------------------------------------------------------------------------------------------

    def _compare_and_prune(self, candidate: Allocation) -> tuple[Allocation, list[Additivity]]:
        """Prune, and measure on held-out data; an allocation by curves that is not better than uniform gives way to it.

        The candidate comes last and stays: what is measured is not pruned again.
        """
        if not self.held_out:
            self.notes.append("there was no held-out data, so what the pruning costs was not measured")
            self._apply(candidate)
            return candidate, []
        uniform = self._uniform() if candidate.method == "dp" else None
        if candidate.method == "dp" and uniform is None:
            self.notes.append("no uniform sparsity meets the budget, so that nothing was compared with it")
        measurement = self._measurement(self.held_out)
        try:
            evenly = None if uniform is None else self._additivity(measurement, uniform, stay=False)
            own = self._additivity(measurement, candidate, stay=True)
        finally:
            measurement.close()
        if uniform is None or evenly is None:
            return candidate, [own]
        if own.joint < evenly.joint:
            self._note_ratio(own)
            return candidate, [own, evenly]
        self.notes.append(
            f"the allocation by dynamic programming costs {own.joint:.4g} on held-out data, uniform sparsity "
            f"{evenly.joint:.4g}: the model was pruned uniformly. Distortions add up to {1 / own.ratio:.2f} of what "
            "they are together"
        )
        self.originals.restore()
        self._apply(uniform)
        return uniform, [own, evenly]

    def _apply(self, allocation: Allocation) -> None:
        self.originals.before_changes()
        apply_allocation(self.groups, chosen_levels(allocation, self.groups), self.pruning)

    def _additivity(self, measurement: Measurement, allocation: Allocation, *, stay: bool) -> Additivity:
        return measure_additivity(measurement, self.groups, allocation, self.pruning, self.originals, stay=stay)

    def _note_ratio(self, one: Additivity) -> None:
        """Say so where the sum that was minimized is not near what it stands for."""
        if not one.summed or 1 / _ADDITIVE <= one.ratio <= _ADDITIVE:
            return
        self.notes.append(
            f"distortions do not add up here: all matrices together cost {one.joint:.4g} on held-out data, "
            f"{one.ratio:.2f} times the sum of what each costs alone. The allocation is better than uniform sparsity, "
            "but the smallest sum need not be the smallest cost: a correction (relinearise, coefficients) or another "
            "allocation may do better"
        )

    def _joint(self, measurement: Measurement, allocation: Allocation) -> float:
        chosen = chosen_levels(allocation, self.groups)
        return joint_of(measurement, self.groups, chosen, self.pruning, self.originals).mean

    def _measurement(self, batches: list[Batch]) -> Measurement:
        metric = self.metric
        if isinstance(metric, str) and metric in LOCAL_METRICS:
            metric = None  # of one layer only; what all do together is seen at the output
        cache = self.pruning.cache
        return Measurement(self.model, batches, metric, prefix_cache=self.prefix_cache, like=cache)

    def _metric_name(self) -> str:
        if self.metric is None:
            return default_metric(self.model)
        return self.metric if isinstance(self.metric, str) else self.metric.name

    def _levels(self) -> Levels:
        return levels_of(self.groups, self._around(), self.pattern, levels=self.levels)

    def _around(self) -> float:
        """The sparsity that levels lie around."""
        if self.limit is not None:
            return self.limit.around
        assert self.sparsity is not None
        return self.sparsity

    def _cache(self, batches: list[Batch]) -> PrefixCache:
        return PrefixCache(self.model, batches, enabled=self.prefix_cache and bool(batches))


def _placed(layers: Sequence[Layer]) -> list[Layer]:
    """The layers, those outside of all blocks with the number of the block before them, or of the first one."""
    numbers = [layer.block for layer in layers if layer.block is not None]
    place, found = min(numbers, default=0), []
    for layer in layers:
        place = place if layer.block is None else layer.block
        found.append(replace(layer, block=place))
    return found
