"""Levels of a matrix: the counts of weights at which its curve is measured, and from which an allocation takes one."""

from __future__ import annotations

from collections.abc import Sequence

from leanstep.pruning.compress.menu import MenuGroup
from leanstep.pruning.config import PruneConfig
from leanstep.pruning.measure.curves import Levels
from leanstep.pruning.score.targets import Group, check_filled

# of a curve over a menu, about
_MENU_LEVELS = 10


def level_grid(numel: int, target: float, *, highest: float = 0.95) -> tuple[int, ...]:
    """Counts of weights at which to measure a curve, for a target sparsity of the model.

    Sparsities 0, 0.1, 0.2, 0.3, 0.4; target plus and minus 0.05, 0.1, 0.15, 0.2, 0.25; and 1 - 2^-j, which are dense
    near 1, where layers differ most. At a target of 98 %, an even grid has only two or three useful points.

    Args:
        numel: weights of the matrix.
        target: sparsity of the whole model, 0 <= target < 1.
        highest: largest sparsity, at most 1. The default never removes a whole matrix.

    Returns:
        Strictly decreasing, the first ``numel``.

    Raises:
        ValueError: for values out of range.
    """
    if not 0 <= target < 1 or not 0 <= highest <= 1 or numel < 1:
        raise ValueError(
            f"level_grid: expected 0 <= target < 1, 0 <= highest <= 1 and numel >= 1; got target {target}, highest "
            f"{highest}, numel {numel}"
        )
    near = [target + sign * step for step in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25) for sign in (-1, 1)]
    halvings = [1 - 0.5**j for j in range(1, 8)]
    inside = [s for s in (0.1, 0.2, 0.3, 0.4, *near, *halvings, highest) if 0 < s <= highest]
    most = int(highest * numel + 1e-9)
    return tuple(numel - removed for removed in sorted({0, *(min(round(s * numel), most) for s in inside)}))


def nm_levels(numel: int, m: int = 8, fewest: int = 2) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Counts of weights and patterns m:m, (m-1):m, ..., fewest:m: the levels of mixed N:M sparsity.

    Raises:
        ValueError: if groups of m do not fill ``numel`` weights, or ``fewest`` is not in 0 .. m.
    """
    if m < 1 or numel % m or not 0 <= fewest <= m:
        raise ValueError(f"nm_levels: expected m to divide numel and 0 <= fewest <= m; got {m}, {numel} and {fewest}")
    group_counts = range(m, fewest - 1, -1)
    return tuple(numel // m * n for n in group_counts), tuple(f"{n}:{m}" for n in group_counts)


def nm_level_count(m: int) -> int:
    """Levels of a curve with a pattern N:m, from m:m to a quarter of m."""
    return m - max(1, m // 4) + 1


def check_levels(config: PruneConfig) -> None:
    """Raise ValueError for levels that are no sparsities from 0 to 1, and for any beside an N:M pattern."""
    levels, pattern = config.levels, config.pattern
    if levels is None:
        return
    if pattern != "unstructured":
        raise ValueError(f"pattern {pattern} has its own levels; leave levels out")
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels: expected sparsities from 0 to 1, got {', '.join(f'{level:g}' for level in levels)}")


def levels_of(groups: Sequence[Group], config: PruneConfig, sparsity: float) -> Levels:
    """Counts of weights and N:M patterns of every group's levels, finest around a sparsity. Existing zeros stay zero.

    Raises:
        ValueError: for another pattern, or as :func:`check_levels`.
    """
    check_levels(config)
    pattern, levels = config.pattern, config.effective_levels
    if config.menu:
        return {group.name: _split(group.menu) for group in groups if isinstance(group, MenuGroup)}
    if pattern != "unstructured":
        letter, _, m = pattern.partition(":")
        if letter != "N" or not m.isdecimal() or len(m) > 10 or int(m) < 2:
            raise ValueError(
                f"pattern: expected 'unstructured' or 'N:M' with a number for M, such as 'N:8'; got {pattern[:40]!r}"
            )
        check_filled(groups, int(m))
        fewest = int(m) - nm_level_count(int(m)) + 1
        return {group.name: nm_levels(group.layer.numel, int(m), fewest=fewest) for group in groups}
    # beyond the target, but never a whole matrix: no training brings it back
    highest = max(0.95, min(sparsity + 0.02, 1 - (1 - sparsity) / 4))
    by_group: Levels = {}
    for group in groups:
        size = group.layer.numel
        counts = (
            level_grid(size, sparsity, highest=highest)
            if levels is None
            else tuple(sorted({size - round(size * level) for level in (0.0, *levels)}, reverse=True))
        )
        if (nonzero := group.nonzero()) < counts[0]:
            counts = (nonzero, *(count for count in counts if count < nonzero))
        by_group[group.name] = (counts, ())
    return by_group


def _split(pairs: Sequence[tuple[int, str]]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    counts, names = zip(*pairs, strict=True)
    return counts, names


def level_count(config: PruneConfig) -> int:
    """Pruned levels of a curve."""
    if config.menu:
        return _MENU_LEVELS
    if config.pattern != "unstructured":
        return nm_level_count(int(config.pattern.partition(":")[2])) - 1
    return len(config.levels or level_grid(10**6, config.sparsity or 0.5)[1:])
