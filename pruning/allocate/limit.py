"""A budget beside what the dense layers cost, and the same sparsity for all layers within it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from leanstep.pruning.allocate.allocation import Allocation
from leanstep.pruning.allocate.budgets import Budget, cost
from leanstep.pruning.allocate.latency import LatencyTable
from leanstep.pruning.measure.groups import Group
from leanstep.pruning.score.layers import Layer

__all__ = ["Limit", "limit_of"]

# of a budget that uniform sparsity cannot meet: levels are laid around this, and the solver says what they reach
_SPARSEST = 0.99


@dataclass(frozen=True)
class Limit:
    """What groups may cost together.

    Attributes:
        budget: kind, most, and of latencies the seconds at each level of each group.
        dense: what the groups cost with all their weights.
        layers: of the groups.
        kept: by group, weights left at each level; for latencies.
    """

    budget: Budget
    dense: float
    layers: Sequence[Layer]
    kept: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """The sparsity at which all layers, pruned alike, cost what the budget allows; 0.5 for latencies."""
        if self.budget.kind == "latency":
            return 0.5
        low, high = 0.0, 1.0
        for _ in range(40):
            density = (low + high) / 2
            spent = self.spent({layer.name: int(density * layer.numel) for layer in self.layers})
            low, high = (density, high) if spent <= self.budget.target else (low, density)
        return 1 - low

    @property
    def around(self) -> float:
        """The sparsity that levels of curves are laid around."""
        return min(self.sparsity, _SPARSEST)

    def spent(self, kept: Mapping[str, int]) -> float:
        """What kept weights cost; in seconds, those of the sparsest level that keeps as many."""
        if self.budget.seconds is None:
            return sum(float(cost(self.budget.kind, layer, kept[layer.name])) for layer in self.layers)
        total = 0.0
        for layer in self.layers:
            enough = [place for place, count in enumerate(self.kept[layer.name]) if count >= kept[layer.name]]
            total += self.budget.seconds[layer.name][max(enough, default=0)]
        return total

    def uniform(
        self,
        lower: Mapping[str, int],
        upper: Mapping[str, int],
        levels: Mapping[str, tuple[Sequence[int], Sequence[str]]] | None,
    ) -> Allocation | None:
        """The densest uniform allocation that the budget allows; None where it allows none.

        Args:
            lower, upper: fewest and most weights of each layer.
            levels: by layer, kept counts and patterns, where there is nothing between them: for N:M patterns and
                latencies. Each layer takes the densest of its levels that is at least as sparse as is asked of all.
        """
        sizes = {layer.name: layer.numel for layer in self.layers}
        if levels is None:
            density = 1 - self.sparsity
            kept = {name: min(max(int(density * size), lower[name]), upper[name]) for name, size in sizes.items()}
            return self._allocation(sizes, kept, {})
        for sparsity in sorted({1 - count / sizes[name] for name in sizes for count in levels[name][0]}):
            places = {name: _place(levels[name][0], sizes[name], sparsity, lower[name]) for name in sizes}
            kept = {name: int(levels[name][0][place]) for name, place in places.items()}
            patterns = {name: levels[name][1][place] for name, place in places.items() if levels[name][1]}
            found = self._allocation(sizes, kept, patterns)
            if found is not None:
                return found
        return None

    def _allocation(self, sizes: dict[str, int], kept: dict[str, int], patterns: dict[str, str]) -> Allocation | None:
        spent = self.spent(kept)
        if spent > self.budget.target:
            return None
        return Allocation("uniform", sizes, kept, None, patterns, self.budget.kind, spent)


def limit_of(
    budget: Budget | str,
    groups: Sequence[Group],
    sparsity: float | None,
    latencies: LatencyTable | None,
    kept: Mapping[str, Sequence[int]],
) -> Limit:
    """The limit that a budget sets, or the name of a kind and the fraction of the dense cost that is to go.

    Args:
        budget: a budget, or ``flops``, ``bytes`` or ``latency``.
        groups: what is pruned; for ``flops``, with their uses counted.
        sparsity: with a name: fraction of the cost to remove.
        latencies: for ``latency``.
        kept: by group, weights left at each level of its curve.

    Raises:
        ValueError: a layer or level that the table does not have, or a group of matrices that are not used equally
            often.
    """
    layers = [group.layer for group in groups]
    kind = budget if isinstance(budget, str) else budget.kind
    if kind == "flops":
        _check_uses(groups)
    if kind != "latency":
        dense = sum(float(cost(kind, layer, layer.numel)) for layer in layers)
        seconds: Any = None
    elif isinstance(budget, Budget):
        seconds = budget.seconds
        dense = sum(seconds[layer.name][0] for layer in layers if layer.name in seconds)
    else:
        assert latencies is not None
        seconds = latencies.of(groups, kept)
        dense = sum(latencies.seconds[target.name][0] for group in groups for target in group.targets)
    if isinstance(budget, str):
        assert sparsity is not None
        budget = Budget(kind, (1 - sparsity) * dense, seconds)
    return Limit(budget, dense, layers, kept)


def _check_uses(groups: Sequence[Group]) -> None:
    for group in groups:
        if len({target.layer.uses for target in group.targets}) > 1:
            raise ValueError(
                f"{group.name} has matrices that are used differently often, so that its operations are no multiple of "
                "its weights; take granularity='matrix'"
            )


def _place(kept: Sequence[int], numel: int, sparsity: float, lower: int) -> int:
    """Number of the densest level of at least this sparsity; of the sparsest that is allowed, where there is none."""
    allowed = [place for place, count in enumerate(kept) if count >= lower] or [0]
    most = math.floor((1 - sparsity) * numel + 0.5)
    return next((place for place in allowed if kept[place] <= most), allowed[-1])
