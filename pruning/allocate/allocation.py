"""Choose how many weights each layer keeps: by dynamic programming over measured curves, or by a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from leanstep.pruning.allocate.budgets import Budget, cost, keep_total
from leanstep.pruning.allocate.closed_form import OWL_SPREAD, check_beta, counts_by_rule
from leanstep.pruning.allocate.knapsack import STATES, InfeasibleBudget, LayerKnapsack, LayerLevels
from leanstep.pruning.allocate.relaxed import MOST_GROUPS
from leanstep.pruning.measure.curves import POINTS, Curve
from leanstep.pruning.result import Allocation
from leanstep.pruning.score.targets import Layer

# costs of many groups are not rounded to a table's states, and so need no coarser levels
_STATES_OF_A_GROUP = STATES // MOST_GROUPS
METHODS = ("dp", "uniform", "global", "lamp", "erk", "owl", "atp")
# argument that a method needs besides the sparsity, and a hint for the error message
_NEEDED = {
    "dp": ("curves", ""),
    "global": ("scores", ""),
    "lamp": ("scores", ""),
    "owl": ("outliers", " (see outlier_ratio)"),
    "atp": ("beta", " (see atp_betas)"),
}


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
    at_most: Mapping[str, int] | None = None,
) -> Allocation:
    """Choose how many weights each layer keeps, so that all of them together meet a target.

    =========  ====================================================================================================
    method     layers keep
    =========  ====================================================================================================
    "dp"       counts that minimize the sum of the curves' distortions: exact, by dynamic programming
    "uniform"  the same fraction
    "global"   the largest scores of all layers
    "lamp"     the largest LAMP scores of all layers
    "erk"      a fraction proportional to sum(shape) / prod(shape), at most 1
    "owl"      a fraction that rises with the outlier ratio of their block, over a range of 2 ``spread``
    "atp"      a fraction that falls by ``beta`` from block to block
    =========  ====================================================================================================

    Every rule meets the target exactly: fractions are scaled ("uniform", "erk") or shifted ("owl", "atp") within the
    bounds of each layer until the counts add up. The largest remainders are rounded up. For blocks of equal size, and
    if no bound is reached, this is the papers' formula. "dp" spends the rest of its budget where a weight saves most
    distortion.

    Args:
        layers: with unique names.
        sparsity: fraction of zeros in all layers together, 0 <= sparsity < 1. The number of zeros is rounded up.
        method: a name of the table.
        budget: for "dp", instead of a sparsity: weights, operations, bytes or seconds.
        curves: for "dp", by name. Curves are cleaned (:meth:`Curve.cleaned`). Unstructured ones get levels between the
            measured ones (:meth:`Curve.dense_grid`). Other methods use curves only for ``predicted``.
        scores: for "global" and "lamp", by name, >= 0. Each is read three times; a mapping may compute it on access.
            LAMP squares them; its paper uses magnitudes.
        outliers: for "owl", by block or name; :func:`leanstep.pruning.outlier_ratio`.
        spread: for "owl", lambda.
        beta: for "atp"; :func:`leanstep.pruning.atp_betas`.
        at_most: most weights of a layer, by name. For a layer with zeros that must stay: its number of nonzeros.

    Returns:
        :class:`Allocation`. The order of the layers does not change it.

    Raises:
        InfeasibleBudget: if bounds or levels exclude the target; the message gives the possible range.
        ValueError: for an unknown method, duplicate names, a missing argument of the method, or values out of range.

    Notes:
        "dp" is exact, except for latencies, if the cheapest and the dearest levels are at most 65,536 units apart.
        Otherwise costs are rounded up to 1 / 32,768 of the dense cost; allocations whose true cost fits are still
        considered. Time: at most 65,536 additions per layer and level. Memory: 8 bytes per layer and state.
        With more than 512 layers, levels follow the slopes of the curves' convex hulls, without a table: the sum is
        above the least by less than one step of one layer.
        "dp" assumes that distortions add up: measure the result on other data.

    References:
        Xu et al., arXiv 2308.10438 ("dp"); Frantar, Alistarh, "SPDY", arXiv 2201.13096 (the same program under
        latency); Lee et al., arXiv 2010.07611 ("lamp"); Evci et al., arXiv 1911.11134 ("erk"); Yin et al., arXiv
        2310.05175 ("owl"); Huang et al., arXiv 2502.14770 ("atp").

    Example:
        >>> layers = [Layer("up", (8, 4)), Layer("down", (4, 8))]
        >>> allocate(layers, 0.5, method="uniform").counts
        {'up': 16, 'down': 16}
    """
    needed = {"curves": curves, "scores": scores, "outliers": outliers, "beta": beta}
    _check(layers, sparsity, method, budget, needed)
    keep = keep_total(sum(layer.numel for layer in layers), sparsity)
    if method == "dp":
        assert curves is not None
        return _knapsack(layers, curves, budget or Budget("params", max(keep, 1)), at_most).allocation()
    upper = _bounds(layers, at_most)
    # sorted by name: the order of the layers must not break ties
    ordered = sorted(layers, key=lambda layer: layer.name)
    bounds = np.array([upper[layer.name] for layer in ordered], dtype=np.int64)
    by_rule = counts_by_rule(ordered, method, keep, bounds, scores=scores, outliers=outliers, spread=spread, beta=beta)
    by_name = {layer.name: int(count) for layer, count in zip(ordered, by_rule, strict=True)}
    predicted = None
    if curves and all(n in curves and curves[n].counts[-1] <= c <= curves[n].counts[0] for n, c in by_name.items()):
        predicted = sum(curves[name].cleaned().at(count) for name, count in by_name.items())
    sizes = {layer.name: layer.numel for layer in layers}
    counts = {name: by_name[name] for name in sizes}
    return Allocation(method, sizes, counts, keep, cost=float(keep), predicted=predicted)


def allocations_along(
    layers: Sequence[Layer],
    sparsities: Sequence[float],
    *,
    curves: Mapping[str, Curve],
    at_most: Mapping[str, int] | None = None,
) -> list[Allocation]:
    """The allocations of method "dp" for several sparsities, from one table.

    Arguments, result and errors are those of :func:`allocate`.
    """
    if not sparsities:
        return []
    for sparsity in sparsities:
        _check(layers, sparsity, "dp", None, {"curves": curves})
    total = sum(layer.numel for layer in layers)
    targets = [max(keep_total(total, sparsity), 1) for sparsity in sparsities]
    knapsack = _knapsack(layers, curves, Budget("params", max(targets)), at_most)
    return [knapsack.allocation(target) for target in targets]


def _check(
    layers: Sequence[Layer], sparsity: float | None, method: str, budget: Budget | None, needed: Mapping[str, Any]
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
    argument, where = _NEEDED.get(method, ("", ""))
    if argument and needed[argument] is None:
        raise ValueError(f"allocate: method {method!r} needs {argument}{where}")
    if argument == "scores" and (missing := [name for name in names if name not in needed["scores"]]):
        raise ValueError(f"allocate: no scores of {missing[:5]}")
    if method == "atp" and sparsity is not None:
        check_beta(layers, sparsity, needed["beta"])


def _bounds(layers: Sequence[Layer], at_most: Mapping[str, int] | None) -> dict[str, int]:
    upper = {layer.name: min(layer.numel, (at_most or {}).get(layer.name, layer.numel)) for layer in layers}
    negative = [name for name, count in upper.items() if count < 0]
    if negative:
        raise ValueError(f"allocate: expected at_most >= 0, got {upper[negative[0]]} for {negative[0]!r}")
    return upper


def _knapsack(
    layers: Sequence[Layer], curves: Mapping[str, Curve], budget: Budget, at_most: Mapping[str, int] | None
) -> LayerKnapsack:
    """The knapsack of some layers: curves become levels with costs."""
    _check_curves(layers, curves)
    unit = _unit(layers, curves, budget)
    return LayerKnapsack(layer_levels(layers, curves, budget, at_most), budget.kind, budget.target, unit)


def layer_levels(
    layers: Sequence[Layer], curves: Mapping[str, Curve], budget: Budget, at_most: Mapping[str, int] | None = None
) -> list[LayerLevels]:
    """The levels of layers by their curves, with costs; arguments as for :func:`allocate`.

    Unstructured curves get levels between the measured ones, except for latencies, which are known at the measured
    levels only.
    """
    upper, unit = _bounds(layers, at_most), _unit(layers, curves, budget)
    return [_levels(layer, curves[layer.name], budget, upper[layer.name], unit) for layer in layers]


def _unit(layers: Sequence[Layer], curves: Mapping[str, Curve], budget: Budget) -> float:
    """Cost of one state of a table whose costs have to be rounded."""
    ordered = sorted(layers, key=lambda layer: layer.name)
    if budget.seconds is None:
        dense = sum(float(cost(budget.kind, layer, curves[layer.name].counts[0])) for layer in ordered)
    else:
        dense = sum(float(next(iter(budget.seconds.get(layer.name, ())), 0.0)) for layer in ordered)
    return dense / (STATES if len(layers) <= MOST_GROUPS else _STATES_OF_A_GROUP * len(layers))


def _check_curves(layers: Sequence[Layer], curves: Mapping[str, Curve]) -> None:
    for layer in layers:
        curve = curves.get(layer.name)
        if curve is None:
            raise ValueError(f"allocate: method 'dp' needs a curve of every layer, and {layer.name!r} has none")
        if curve.numel != layer.numel:
            raise ValueError(
                f"allocate: the curve of {layer.name!r} is for {curve.numel} weights, the layer has {layer.numel}"
            )
    metrics = {curves[layer.name].metric for layer in layers}
    if len(metrics) > 1:
        raise ValueError(f"allocate: distortions of different metrics cannot be added: {', '.join(sorted(metrics))}")


def _levels(layer: Layer, curve: Curve, budget: Budget, upper: int, unit: float) -> LayerLevels:
    """The levels of a layer with at most ``upper`` weights."""
    clean = curve.cleaned()
    if budget.seconds is None and not curve.patterns and len(curve.counts) > 1:
        # one step costs the same in all layers
        weight = float(cost(budget.kind, layer, 1) - cost(budget.kind, layer, 0)) or 1.0
        clean = clean.dense_grid(POINTS, max(1, int(unit / weight)))
    counts, loss = np.array(clean.counts), np.array(clean.distortion)
    if budget.seconds is not None:
        costs = np.asarray(budget.seconds.get(layer.name, ()), dtype=np.float64)
        if len(costs) < len(counts) or not (costs >= 0).all():
            raise ValueError(f"allocate: expected {len(counts)} latencies of {layer.name!r}, one per level")
        costs = costs[: len(counts)]  # a curve may end before the table: see Planner._by_effect and curve_of
    else:
        if not curve.patterns and counts[-1] < upper < counts[0]:
            # add the bound as a level
            bounded = np.union1d(counts, [upper]).astype(np.int64)[::-1]
            counts, loss = bounded, np.interp(bounded, counts[::-1], loss[::-1])
        costs = cost(budget.kind, layer, counts).astype(np.float64)
    inside = counts <= upper
    if curve.patterns and not inside.any():
        inside[-1] = True  # the sparsest pattern removes nothing from a matrix with more zeros than it asks for
    if not inside.any():
        raise InfeasibleBudget(
            f"allocate: no level of {layer.name!r} keeps {upper} weights or fewer; its levels keep {counts[-1]} to "
            f"{counts[0]}",
            int(counts[-1]),
            int(counts[0]),
        )
    patterns = tuple(p for p, fits in zip(clean.patterns, inside, strict=False) if fits)
    between = None if curve.patterns or budget.seconds is not None else partial(cost, budget.kind, layer)
    return LayerLevels(layer.name, layer.numel, counts[inside], loss[inside], costs[inside], patterns, between)
