"""Bring the scores of experts that are scored by magnitude to the unit of the others, with which they are compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from statistics import fmean

from torch import Tensor

from leanstep.pruning.score.base import LayerPruner
from leanstep.pruning.score.targets import Group


def ratio(pruner: LayerPruner, score: str) -> float:
    """Mean score of a matrix, divided by the mean of what it is by magnitude alone."""
    return float(pruner.scores.mean() / _power(pruner.weight.abs(), score).mean().clamp(min=1e-30))


def scales_of(groups: Sequence[Group], starved: Collection[str], ratio_of: Callable[[str], float]) -> dict[str, float]:
    """Factors of the experts that are scored by magnitude: the mean ratio of the other experts of their kind.

    Where there are none, it is the mean over all other matrices.

    Args:
        groups: the matrices, each a group.
        starved: names of these experts.
        ratio_of: :func:`ratio` of a matrix by name; called only if there are such experts.
    """
    experts = [group for group in groups if group.name in starved]
    ratios: dict[str, list[float]] = {}
    for group in groups if experts else ():
        if group.name not in starved:
            ratios.setdefault(group.targets[0].kind, []).append(ratio_of(group.name))
    every = [one for of_one in ratios.values() for one in of_one] or [1.0]
    return {group.name: fmean(ratios.get(group.targets[0].kind, every)) for group in experts}


def scaled(scores: Tensor, scale: float | None, score: str) -> Tensor:
    """Scores by magnitude in the unit of ``score``; with the scale None, scores as they are."""
    return scores if scale is None else _power(scores, score) * scale


def _power(magnitudes: Tensor, score: str) -> Tensor:
    """Magnitudes to the power with which they are in a score."""
    return magnitudes if score in ("magnitude", "wanda") else magnitudes.square()
