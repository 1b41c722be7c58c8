"""Exchanges: some layers get more weights and others fewer, within the budget; and the order in which to try them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from leanstep.pruning.allocate.knapsack import LayerLevels

Counts = dict[str, int]


@dataclass(frozen=True)
class Exchange:
    """Counts after an exchange, and the change of the distortion that the slopes predict."""

    counts: Counts
    predicted: float


class ExchangeSpace:
    """The levels of some layers, and a budget that exchanges stay within.

    Args:
        levels: of each layer; those of :func:`leanstep.pruning.allocate.allocation.layer_levels`.
        target: largest total cost.
    """

    def __init__(self, levels: Sequence[LayerLevels], target: float) -> None:
        self.levels = {layer.name: layer for layer in sorted(levels, key=lambda layer: layer.name)}
        self.target = target

    def cost(self, counts: Mapping[str, int]) -> float:
        """Total cost of counts."""
        return sum(layer.cost_of(counts[name]) for name, layer in self.levels.items())

    def pattern(self, name: str, count: int) -> str:
        """N:M pattern of a layer with a count; "" for unstructured levels."""
        layer = self.levels[name]
        return layer.patterns[layer.index(count)] if layer.patterns else ""

    def patterns(self, counts: Mapping[str, int]) -> dict[str, str]:
        """N:M pattern of every layer that has some."""
        return {name: self.pattern(name, counts[name]) for name, layer in self.levels.items() if layer.patterns}

    def holds(self, counts: Mapping[str, int]) -> bool:
        """Whether counts are levels of these layers, within the budget."""
        if set(counts) != set(self.levels):
            return False
        inside = (
            layer.counts[-1] <= counts[name] <= layer.counts[0]
            and (layer.between is not None or counts[name] in layer.counts)
            for name, layer in self.levels.items()
        )
        return all(inside) and self.cost(counts) <= self.target * (1 + 1e-9)

    def denser(self, name: str, count: int, share: float) -> int | None:
        """The count with about ``share`` of the layer's weights more, at least one level; None at the densest."""
        layer, most = self.levels[name], count + max(1, round(share * self.levels[name].numel))
        above = layer.counts[layer.counts > count]
        if not len(above):
            return None
        if layer.between is not None:
            return min(most, int(layer.counts[0]))
        return int(max(above[above <= most], default=above[-1]))

    def sparser(self, name: str, count: int, freed: float) -> int:
        """The largest count that costs at least ``freed`` less; the sparsest level if none does."""
        layer, limit = self.levels[name], self.levels[name].cost_of(count) - freed
        if layer.between is None:
            below = [int(c) for c, cost in zip(layer.counts, layer.cost, strict=True) if c <= count and cost <= limit]
            return max(below, default=min(count, int(layer.counts[-1])))
        low, high = min(count, int(layer.counts[-1])), count
        if layer.cost_of(low) >= limit:
            return low
        while high - low > 1:  # cost does not decrease in the count
            middle = (low + high) // 2
            low, high = (middle, high) if layer.cost_of(middle) <= limit else (low, middle)
        return high if layer.cost_of(high) <= limit else low

    def exchange(self, counts: Counts, up: Sequence[str], down: Sequence[str], share: float) -> Counts | None:
        """Give each layer of ``up`` about ``share`` of its weights, and take the cost from those of ``down``.

        They pay in proportion to their size. Returns None if they cannot, or if nothing changes.
        """
        new = dict(counts)
        for name in up:
            denser = self.denser(name, counts[name], share)
            if denser is None:
                return None
            new[name] = denser
        excess = self.cost(new) - self.target
        sizes = [self.levels[name].numel for name in down]
        for index, name in enumerate(down):
            if excess <= 0:
                break
            part = excess * sizes[index] / sum(sizes[index:])
            new[name] = self.sparser(name, counts[name], part)
            excess -= self.levels[name].cost_of(counts[name]) - self.levels[name].cost_of(new[name])
        return None if excess > 1e-9 * self.target or new == counts else new

    def curve_slopes(self, counts: Counts, share: float) -> tuple[dict[str, float], dict[str, float]]:
        """Change of each layer's own distortion per unit of cost, for a step up (below 0) and a step down (above 0)."""
        up, down = {}, {}
        for name, layer in self.levels.items():
            here, denser = counts[name], self.denser(name, counts[name], share)
            if denser is not None:
                up[name] = _loss(layer, denser, here) / max(layer.cost_of(denser) - layer.cost_of(here), 1e-300)
            sparser = self.step_down(name, here, share)
            if sparser is not None:
                down[name] = _loss(layer, sparser, here) / max(layer.cost_of(here) - layer.cost_of(sparser), 1e-300)
        return up, down

    def step_down(self, name: str, count: int, share: float) -> int | None:
        """The count with about ``share`` of the layer's weights fewer; None at the sparsest level."""
        layer = self.levels[name]
        least = count - max(1, round(share * layer.numel))
        below = layer.counts[layer.counts < count]
        if not len(below):
            return None
        if layer.between is not None:
            return max(least, int(layer.counts[-1]))
        return int(min(below[below >= least], default=below[0]))

    def proposals(
        self, counts: Counts, up: Mapping[str, float], down: Mapping[str, float], share: float, pairs: int
    ) -> Iterator[Counts]:
        """Exchanges in the order to try them: of many layers at once, then of fewer, then of two.

        Args:
            up, down: predicted change of the distortion per unit of cost, of a step up and of a step down.
            share: size of a step.
            pairs: most exchanges of two layers.
        """
        gainers = sorted(up, key=lambda name: (up[name], name))
        payers = sorted(down, key=lambda name: (down[name], name))
        tried: list[Counts] = [counts]
        width = len(self.levels) // 2
        while width > 1:
            ups = gainers[:width]
            new = self.exchange(counts, ups, [name for name in payers if name not in ups][:width], share)
            if new is not None and new not in tried:
                tried.append(new)
                yield new
            width //= 2
        predicted = sorted((up[a] + down[b], a, b) for a in gainers for b in payers if a != b)
        for _, a, b in predicted[:pairs]:
            new = self.exchange(counts, [a], [b], share)
            if new is not None and new not in tried:
                tried.append(new)
                yield new

    def random(self, counts: Counts, generator: np.random.Generator, share: float) -> Counts | None:
        """An exchange between one to three layers and as many others, drawn at random."""
        names, number = list(self.levels), int(generator.integers(1, 4))
        drawn = [names[index] for index in generator.permutation(len(names))[: 2 * number]]
        return self.exchange(counts, drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :], share)


def _loss(layer: LayerLevels, to: int, since: int) -> float:
    """Change of the layer's own distortion between two counts."""
    return layer.loss_of(to) - layer.loss_of(since)
