"""An evolutionary search over the levels of matrices, as EvoPress describes it, to compare allocations with.

O. Sieberling, D. Kuznedelev, E. Kurtic, D. Alistarh, "EvoPress: Accurate Dynamic Model Compression via Evolutionary
Search", arXiv 2410.14649. Levels are steps of the same number of weights in every matrix, so that a matrix one step up
and another one step down keep the budget. The search starts from uniform sparsity. A generation makes children of one
parent, each by a few such switches, and selects among them on more and more data; the parent takes part in the last
selection and stays unless a child is better.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

Counts = dict[str, int]
# joint distortion of counts on the first batches of the judging data, of which there are so many
Fitness = Callable[[Counts, int], float]

CHILDREN = 16
# survivors of each selection, and the part of the data that it takes
SELECTIONS = ((4, 1 / 8), (1, 1 / 2))
# most switches of a child; the number is the smaller of two drawn ones, as in the paper
SWITCHES = 3
# weights of a step, as a fraction of the mean matrix
STEP = 0.05
# in rows of results: the judge's levels are those of the parent
MOVES = {"moves": True}
OF_START = (
    "In searches with a *, by an earlier version, every child was pruned in all that differed from the start, and run "
    "from there on: the longer the search, the fewer generations it made in a second."
)
# most bytes of pruned matrices that are remembered
REMEMBERED = 2**30


class Evolution:
    """The search; :meth:`generation` is one round.

    Args:
        start: counts of the weights of every matrix.
        bounds: smallest and largest count of each.
        fitness: see :data:`Fitness`; smaller is better.
        batches: number of batches of all the data.
        seed: of all random choices.
        adopt: called with the counts of every new parent.
    """

    def __init__(
        self,
        start: Mapping[str, int],
        bounds: Mapping[str, tuple[int, int]],
        fitness: Fitness,
        batches: int,
        seed: int,
        adopt: Callable[[Counts], Any] = lambda _: None,
    ) -> None:
        self.parent, self._bounds, self._fitness, self._batches = dict(start), bounds, fitness, batches
        self._adopt = adopt
        self._generator = np.random.default_rng(seed)
        self._step = max(1, round(STEP * np.mean([most for _, most in bounds.values()])))
        self.value = fitness(self.parent, batches)

    def generation(self) -> bool:
        """Make and select children; returns whether one replaced the parent."""
        children: list[Counts] = [self._child() for _ in range(CHILDREN)]
        for survivors, part in SELECTIONS:
            batches = max(1, round(part * self._batches))
            values = [self._fitness(child, batches) for child in children]
            best = np.argsort(values, kind="stable")[:survivors]
            children = [children[index] for index in best]
        value = self._fitness(children[0], self._batches)
        if value >= self.value:
            return False
        self.parent, self.value = children[0], value
        self._adopt(self.parent)
        return True

    def _child(self) -> Counts:
        child = dict(self.parent)
        for _ in range(int(min(self._generator.integers(1, SWITCHES + 1, 2)))):
            up = self._drawn([n for n, count in child.items() if count + self._step <= self._bounds[n][1]])
            down = self._drawn(
                [n for n, count in child.items() if count - self._step >= self._bounds[n][0] and n != up]
            )
            child[up] += self._step
            child[down] -= self._step
        return child

    def _drawn(self, names: Sequence[str]) -> str:
        return names[int(self._generator.integers(len(names)))]


def evolution_of(judge: Any, bounds: Mapping[str, tuple[int, int]], batches: int, seed: int) -> Evolution:
    """The search from a judge's levels (:class:`leanstep.pruning.measure.joint.JointJudge`).

    The judge's model has the levels of the parent: of a child, only what its switches change is pruned and run anew.
    """

    def adopt(counts: Counts) -> None:
        judge.go_to(counts, {}, measured=False)

    return Evolution(judge.counts, bounds, judge.at, batches, seed, adopt)


class RememberedLevels:
    """A pruner whose levels are pruned once, and then remembered, as EvoPress has all levels of a matrix in files.

    Args:
        pruner: of one matrix.
        levels: of all matrices, by (pruner's number, count); those used last.
    """

    def __init__(self, pruner: Any, levels: OrderedDict[tuple[int, Any], Any]) -> None:
        self._pruner, self._levels = pruner, levels

    @property
    def given(self) -> Any:
        """The matrix that is pruned."""
        return self._pruner.given

    def prune(self, count: Any) -> Any:
        """The pruned matrix, as ``weight``."""
        key = (id(self._pruner), count)
        if key not in self._levels:
            self._levels[key] = self._pruner.prune(count).weight
            while sum(weight.nbytes for weight in self._levels.values()) > REMEMBERED and len(self._levels) > 1:
                self._levels.popitem(last=False)
        self._levels.move_to_end(key)
        return SimpleNamespace(weight=self._levels[key])


def remembering(pruners: Mapping[str, Any]) -> dict[str, RememberedLevels]:
    """Pruners by name that remember their levels together."""
    levels: OrderedDict[tuple[int, Any], Any] = OrderedDict()
    return {name: RememberedLevels(pruner, levels) for name, pruner in pruners.items()}
