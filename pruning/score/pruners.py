"""The pruners of many matrices: made when they are asked for, and forgotten when they are done with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from leanstep.pruning.measure.activation_cache import PrefixCache
from leanstep.pruning.measure.groups import Group, split_kept
from leanstep.pruning.score.calibration import statistics_for
from leanstep.pruning.score.pruner import LayerPruner
from leanstep.pruning.score.scores import layer_pruner
from leanstep.pruning.score.statistics import NEEDS, LayerStatistics
from leanstep.pruning.score.targets import Target

__all__ = ["Pruners", "Pruning", "Scores", "prune_group"]


class Pruning:
    """How weights are chosen inside a matrix: a score, and the data that its statistics come from.

    Args:
        cache: the model on the calibration data. It is moved on by :meth:`pruners`, with the weights of that moment.
        score, options: see :func:`leanstep.pruning.layer_pruner`.
    """

    def __init__(self, cache: PrefixCache, score: str, options: Mapping[str, Any] | None = None) -> None:
        self.cache, self.score, self.options = cache, score, dict(options or {})

    def pruners(self, groups: Sequence[Group], start: int = 0) -> Pruners:
        """One pruner per matrix, with the statistics of now, from one pass over the data from ``start`` on."""
        targets = [target for group in groups for target in group.targets]
        if NEEDS[self.score] and start in self.cache.starts:
            self.cache.advance(start)
        return Pruners(self, targets, statistics_for(self.cache, targets, NEEDS[self.score]))

    def pruner(self, target: Target, statistics: LayerStatistics) -> LayerPruner:
        """The pruner of one matrix."""
        spacing = math.prod(target.layer.shape[2:])  # N:M groups of a convolution lie along its in-channels
        return layer_pruner(target.weight.clone(), self.score, statistics, spacing=spacing, **self.options)


class Pruners(Mapping[str, LayerPruner]):
    """The pruners of some matrices, by name; each is made of the weights at the moment when it is first asked for.

    A pruner and its statistics take some times the memory of the matrix. :meth:`release` gives back those of a group
    that is done with, so that a block is never there as a whole.
    """

    def __init__(self, pruning: Pruning, targets: Sequence[Target], statistics: Mapping[str, LayerStatistics]) -> None:
        self._pruning, self._statistics = pruning, dict(statistics)
        self._targets = {target.name: target for target in targets}
        self._made: dict[str, LayerPruner] = {}

    def __getitem__(self, name: str) -> LayerPruner:
        if name not in self._made:
            self._made[name] = self.once(name)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def once(self, name: str) -> LayerPruner:
        """A pruner that is not kept."""
        return self._pruning.pruner(self._targets[name], self._statistics[name])

    def release(self, group: Group) -> None:
        """Forget the pruners of a group, and what they were made from."""
        for target in group.targets:
            self._made.pop(target.name, None)
            self._statistics.pop(target.name, None)


class Scores(Mapping[str, Tensor]):
    """The scores of some matrices, by name, computed whenever they are asked for and kept nowhere."""

    def __init__(self, pruners: Pruners) -> None:
        self._pruners = pruners

    def __getitem__(self, name: str) -> Tensor:
        return self._pruners.once(name).scores

    def __contains__(self, name: object) -> bool:
        return name in self._pruners

    def __iter__(self) -> Iterator[str]:
        return iter(self._pruners)

    def __len__(self) -> int:
        return len(self._pruners)


def prune_group(
    group: Group, pruners: Mapping[str, LayerPruner], kept: int, pattern: str = ""
) -> list[tuple[Target, Tensor]]:
    """The matrices of a group at a level, not written yet."""
    shares: list[Any] = [pattern] * len(group.targets) if pattern else list(split_kept(kept, group.sizes))
    return [
        (target, pruners[target.name].prune(share).weight) for target, share in zip(group.targets, shares, strict=True)
    ]
