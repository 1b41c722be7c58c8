"""How many weights each layer keeps: dynamic programming over measured curves, and the rules it is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor

from leanstep.pruning.allocate.budgets import Budget, quantize
from leanstep.pruning.allocate.closed_form import (
    OWL_SPREAD,
    Ints,
    LampScores,
    atp,
    counts_above_threshold,
    erk,
    owl,
    scaled,
    shifted,
)
from leanstep.pruning.allocate.dynamic import STATES, Problem, common_step
from leanstep.pruning.allocate.knapsack import InfeasibleBudget, solve_knapsack
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.score.targets import Layer

METHODS = ("dp", "uniform", "global", "lamp", "erk", "owl", "atp")


@dataclass(frozen=True)
class Allocation:
    """Weights that each layer keeps.

    Attributes:
        method: that chose them.
        numel, kept: weights and weights kept, by layer.
        target: weights that all layers were to keep at most; None for a budget of another kind.
        patterns: N:M patterns by layer, where layers have such levels.
        budget_kind, cost: what was limited, and what the allocation costs in that unit.
        predicted: sum of the layers' distortions, if there are curves.
        lagrange_gap: by how much the summed distortion of the Lagrangian's answer is larger; >= 0.
        front: costs at which a larger budget first pays, and the summed distortions, for method "dp": some 200 of them.
    """

    method: str
    numel: dict[str, int]
    kept: dict[str, int]
    target: int | None = None
    patterns: dict[str, str] = field(default_factory=dict)
    budget_kind: str = "params"
    cost: float | None = None
    predicted: float | None = None
    lagrange_gap: float | None = None
    front: tuple[tuple[float, float], ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all layers together."""
        return 1 - sum(self.kept.values()) / sum(self.numel.values())

    def layer_sparsity(self, name: str) -> float:
        """Fraction of zeros in one layer."""
        return 1 - self.kept[name] / self.numel[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"front": [list(point) for point in self.front]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Allocation:
        """The allocation that :meth:`to_dict` wrote."""
        return cls(**{**values, "front": tuple((c, d) for c, d in values.get("front", ()))})


def allocate(
    layers: Sequence[Layer],
    sparsity: float | None = None,
    *,
    method: str = "dp",
    budget: Budget | None = None,
    curves: Mapping[str, Curve] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    outliers: Mapping[int, float] | Mapping[str, float] | None = None,
    spread: float = OWL_SPREAD,
    beta: float | None = None,
    at_least: float | Mapping[str, float] = 0.0,
    at_most: Mapping[str, int] | None = None,
    points: int = 101,
    states: int = STATES,
) -> Allocation:
    """Choose how many weights each layer keeps, so that all of them together meet a target.

    =========  ====================================================================================================
    method     layers keep
    =========  ====================================================================================================
    "dp"       what minimizes the sum of their distortions, by the curves: exact, by dynamic programming
    "uniform"  the same fraction
    "global"   the largest scores of all layers
    "lamp"     the largest LAMP scores of all layers
    "erk"      a fraction in proportion to sum(shape) / prod(shape); those that would keep more than all are dense
    "owl"      a fraction that rises with the share of outliers among the scores of their block, within 2 ``spread``
    "atp"      a fraction that falls by ``beta`` from block to block
    =========  ====================================================================================================

    Every rule meets the target to the weight: fractions are scaled ("uniform", "erk") or shifted ("owl", "atp"), within
    the bounds of every layer, until the counts add up, and what rounding leaves goes to the largest remainders. With
    blocks of one size and no bound met, this is the papers' formula. "dp" gives what its table leaves of the budget to
    the layers where a weight saves most distortion.

    Args:
        layers: with unique names.
        sparsity: fraction of zeros in all layers together, 0 <= sparsity < 1; zeros are rounded up.
        method: of the table.
        budget: for "dp", instead of a sparsity: weights, operations, bytes or seconds.
        curves: for "dp", by name. Used as :meth:`Curve.cleaned`, and refined to ``points`` levels unless their levels
            are N:M patterns. With other methods, for ``predicted``.
        scores: for "global" and "lamp", by name, >= 0; asked for three times, so that a mapping may compute them.
            LAMP squares them: magnitudes, in the paper.
        outliers: for "owl", by block or name; :func:`leanstep.pruning.outlier_ratio`.
        spread: for "owl", lambda.
        beta: for "atp"; :func:`leanstep.pruning.atp_betas`.
        at_least: lowest density of a layer, or by name; layers that are not named may lose all.
        at_most: most weights of a layer, by name: what it kept when it was pruned before, so that nothing comes back.
        points: for "dp", levels per layer between which it chooses.
        states: for "dp", size of the table; see :func:`leanstep.pruning.solve_knapsack`.

    Returns:
        :class:`Allocation`. Equal input gives an equal one, in whatever order the layers come.

    Raises:
        InfeasibleBudget: where bounds or levels exclude the target; it says what is possible.
        ValueError: for an unknown method, names that occur twice, a method without what it needs, or values out of
            range.

    Notes:
        "dp" takes ``states`` times levels additions per layer, and 8 bytes per state and layer. That distortions add up
        is an assumption; measure it on other data.

    References:
        Xu et al., arXiv 2308.10438 ("dp"); Frantar, Alistarh, "SPDY", arXiv 2201.13096 (the same program under
        latency); Lee et al., arXiv 2010.07611 ("lamp"); Evci et al., arXiv 1911.11134 ("erk"); Yin et al., arXiv
        2310.05175 ("owl"); Huang et al., arXiv 2502.14770 ("atp").

    Example:
        >>> layers = [Layer("up", (8, 4)), Layer("down", (4, 8))]
        >>> allocate(layers, 0.5, method="uniform").kept
        {'up': 16, 'down': 16}
    """
    _check(layers, sparsity, method, budget, curves, scores, outliers, beta)
    lower, upper = _bounds(layers, at_least, at_most)
    total = sum(layer.numel for layer in layers)
    if method == "dp":
        assert curves is not None
        wanted = budget or Budget("params", max(keep_total(total, sparsity), 1))
        problem = Problem(layers, curves, wanted, lower, upper, points, states)
        return _from_problem(problem, layers, wanted.kind, wanted.target)
    # by name, so that the order in which layers come does not decide between equals
    ordered = sorted(layers, key=lambda layer: layer.name)
    low, high = (np.array([bound[layer.name] for layer in ordered], dtype=np.int64) for bound in (lower, upper))
    keep = keep_total(total, sparsity)
    counts = _by_rule(ordered, sparsity or 0.0, method, scores, outliers, spread, beta, keep, low, high)
    found = {layer.name: int(count) for layer, count in zip(ordered, counts, strict=True)}
    predicted = sum(curves[name].cleaned().at(found[name]) for name in found) if _covers(curves, found) else None
    kept = {layer.name: found[layer.name] for layer in layers}
    sizes = {layer.name: layer.numel for layer in layers}
    return Allocation(method, sizes, kept, keep, cost=float(keep), predicted=predicted)


def allocations_along(
    layers: Sequence[Layer],
    sparsities: Sequence[float],
    *,
    curves: Mapping[str, Curve],
    at_least: float | Mapping[str, float] = 0.0,
    at_most: Mapping[str, int] | None = None,
    points: int = 101,
    states: int = STATES,
) -> list[Allocation]:
    """The allocations of method "dp" for several sparsities, from one table.

    Arguments, result and errors are those of :func:`allocate`.
    """
    if not sparsities:
        return []
    for sparsity in sparsities:
        _check(layers, sparsity, "dp", None, curves, None, None, None)
    total = sum(layer.numel for layer in layers)
    targets = [max(keep_total(total, sparsity), 1) for sparsity in sparsities]
    bounds = _bounds(layers, at_least, at_most)
    problem = Problem(layers, curves, Budget("params", max(targets)), *bounds, points, states)
    return [_from_problem(problem, layers, "params", target) for target in targets]


def snap(
    allocation: Allocation, levels: Mapping[str, tuple[Sequence[int], Sequence[str]]], *, states: int = STATES
) -> Allocation:
    """The nearest allocation whose layers have N:M patterns: for rules that know nothing of them.

    Minimizes the sum of ``numel * (difference of densities)^2``, with no more weights in all than before.

    Args:
        allocation: of any method.
        levels: by layer, kept counts and patterns, for instance :func:`leanstep.pruning.nm_levels`.
        states: see :func:`allocate`.

    Raises:
        InfeasibleBudget: where the sparsest patterns keep more weights than the allocation.
    """
    names = sorted(levels)
    costs = [np.array(levels[name][0], dtype=np.float64) for name in names]
    losses = [
        (cost - allocation.kept[name]) ** 2 / allocation.numel[name] for name, cost in zip(names, costs, strict=True)
    ]
    total = float(sum(allocation.kept[name] for name in names))
    least, most = (sum(float(pick(cost)) for cost in costs) for pick in (np.min, np.max))
    if total < least:
        raise InfeasibleBudget(
            f"snap: {total:g} weights cannot be kept: the patterns keep {least:g} or more", least, most
        )
    unit = max(common_step(costs), math.ceil((min(total, most) - least) / (2 * states)), 1)
    whole, units = quantize(costs, min(total, most), unit)
    table = solve_knapsack(whole, losses, units)
    chosen = {name: (levels[name][0][k], levels[name][1][k]) for name, k in zip(names, table.choose(), strict=True)}
    kept = {name: int(chosen[name][0]) if name in chosen else count for name, count in allocation.kept.items()}
    patterns = {name: chosen[name][1] for name in allocation.kept if name in chosen}
    cost = float(sum(kept.values()))
    return replace(
        allocation, kept=kept, patterns=patterns, cost=cost, predicted=None, lagrange_gap=None, budget_kind="params"
    )


def keep_total(total: int, sparsity: float | None) -> int:
    """Weights that are kept of ``total``, zeros being rounded up."""
    # 0.7 * 1000 is a bit more than 700: what is a whole number but for rounding is taken as one
    return total - math.ceil((sparsity or 0.0) * total - 1e-6)


def _from_problem(problem: Problem, layers: Sequence[Layer], kind: str, target: float) -> Allocation:
    choice = problem.choose(target)
    names = [layer.name for layer in layers]
    return Allocation(
        "dp",
        {layer.name: layer.numel for layer in layers},
        {name: choice.kept[name] for name in names},
        int(target) if kind == "params" else None,
        {name: choice.patterns[name] for name in names if name in choice.patterns},
        kind,
        choice.cost,
        choice.predicted,
        choice.lagrange_gap,
        tuple(problem.front()),
    )


def _by_rule(
    layers: Sequence[Layer],
    sparsity: float,
    method: str,
    scores: Mapping[str, Tensor] | None,
    outliers: Mapping[int, float] | Mapping[str, float] | None,
    spread: float,
    beta: float | None,
    keep: int,
    lower: Ints,
    upper: Ints,
) -> Ints:
    numel = np.array([layer.numel for layer in layers], dtype=np.int64)
    fit = numel, keep, lower, upper
    if method == "uniform":
        return scaled(np.ones(len(layers)), *fit)
    if method == "erk":
        return scaled(erk(layers), *fit)
    if method == "owl":
        assert outliers is not None
        return shifted(owl(layers, outliers, spread), *fit)
    if method == "atp":
        assert beta is not None
        return shifted(atp(layers, sparsity, beta), *fit)
    assert scores is not None
    compared = LampScores(scores) if method == "lamp" else scores
    return counts_above_threshold([layer.name for layer in layers], compared, keep, lower, upper)


def _bounds(
    layers: Sequence[Layer], at_least: float | Mapping[str, float], at_most: Mapping[str, int] | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Fewest and most weights by layer."""
    upper = {layer.name: min(layer.numel, (at_most or {}).get(layer.name, layer.numel)) for layer in layers}
    lower = {}
    for layer in layers:
        density = at_least.get(layer.name, 0.0) if isinstance(at_least, Mapping) else at_least
        if not 0 <= density <= 1 or upper[layer.name] < 0:
            raise ValueError(f"allocate: bounds of {layer.name!r} are out of range: {density} and {upper[layer.name]}")
        # what was pruned below the floor before stays as it is
        lower[layer.name] = min(math.ceil(density * layer.numel - 1e-6), upper[layer.name])
    return lower, upper


def _covers(curves: Mapping[str, Curve] | None, kept: Mapping[str, int]) -> TypeGuard[Mapping[str, Curve]]:
    """Whether there is a curve of every layer, and it reaches to what is kept."""
    return curves is not None and all(
        name in curves and curves[name].kept[-1] <= count <= curves[name].kept[0] for name, count in kept.items()
    )


def _check(
    layers: Sequence[Layer],
    sparsity: float | None,
    method: str,
    budget: Budget | None,
    curves: Mapping[str, Curve] | None,
    scores: Mapping[str, Tensor] | None,
    outliers: Mapping[int, float] | Mapping[str, float] | None,
    beta: float | None,
) -> None:
    if method not in METHODS:
        raise ValueError(f"allocate: method must be one of {', '.join(METHODS)}, got {method!r}")
    names = [layer.name for layer in layers]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"allocate: expected layers with unique names, got {len(names)}, {len(set(names))} of them unique"
        )
    if (sparsity is None) == (budget is None):
        raise ValueError("allocate: give a sparsity or a budget, one of the two")
    if budget is not None and method != "dp":
        raise ValueError(f"allocate: a budget is for method 'dp'; {method!r} takes a sparsity")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"allocate: expected 0 <= sparsity < 1, got {sparsity}")
    for wanting, needed, given in (
        (("dp",), "curves", curves),
        (("global", "lamp"), "scores", scores),
        (("owl",), "outliers (see outlier_ratio)", outliers),
        (("atp",), "beta (see atp_betas)", beta),
    ):
        if method in wanting and given is None:
            raise ValueError(f"allocate: method {method!r} needs {needed}")
    if method in ("global", "lamp") and scores is not None:
        missing = [name for name in names if name not in scores]
        if missing:
            raise ValueError(f"allocate: no scores of {missing[:5]}")
