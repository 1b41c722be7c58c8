"""Allocations by name: dynamic programming over measured curves, and the rules it is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from leanstep.pruning.allocate.allocation import Allocation, Program
from leanstep.pruning.allocate.budgets import Budget, keep_total
from leanstep.pruning.allocate.closed_form import OWL_SPREAD, counts_by_rule
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.score.targets import Layer

METHODS = ("dp", "uniform", "global", "lamp", "erk", "owl", "atp")
# what each method needs besides a sparsity, by argument, and where it comes from
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
    at_least: float | Mapping[str, float] = 0.0,
    at_most: Mapping[str, int] | None = None,
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
    the bounds of every layer, until the counts add up, and the largest remainders are rounded up. With blocks of one
    size and no bound met, this is the papers' formula. "dp" spends what its table leaves of the budget on the layers
    where a weight saves most distortion.

    Args:
        layers: with unique names.
        sparsity: fraction of zeros in all layers together, 0 <= sparsity < 1; zeros are rounded up.
        method: of the table.
        budget: for "dp", instead of a sparsity: weights, operations, bytes or seconds.
        curves: for "dp", by name. Each is used as :meth:`Curve.cleaned`, with further levels between the measured ones
            unless these are N:M patterns (:meth:`Curve.dense_grid`). With other methods, for ``predicted``.
        scores: for "global" and "lamp", by name, >= 0. Each is read three times; a mapping may compute it on access.
            LAMP squares them: magnitudes, in the paper.
        outliers: for "owl", by block or name; :func:`leanstep.pruning.outlier_ratio`.
        spread: for "owl", lambda.
        beta: for "atp"; :func:`leanstep.pruning.atp_betas`.
        at_least: lowest density of all layers, or by name; a layer without an entry may lose all weights.
        at_most: most weights of a layer, by name: its nonzero weights, if it was pruned before and no zero may return.

    Returns:
        :class:`Allocation`. The order of the layers does not change it.

    Raises:
        InfeasibleBudget: where bounds or levels exclude the target; it says what is possible.
        ValueError: for an unknown method, names that occur twice, a missing argument of the method, or values out of
            range.

    Notes:
        "dp" is exact for weights and operations where the cheapest and the dearest levels are at most 65,536 units
        apart. Above, costs are rounded up to 1 / 32,768 of the dense cost; allocations whose true cost fits are still
        considered. It takes 32,768 additions per layer and level, and 8 bytes per layer and state. That distortions add
        up is an assumption; measure the result on other data.

    References:
        Xu et al., arXiv 2308.10438 ("dp"); Frantar, Alistarh, "SPDY", arXiv 2201.13096 (the same program under
        latency); Lee et al., arXiv 2010.07611 ("lamp"); Evci et al., arXiv 1911.11134 ("erk"); Yin et al., arXiv
        2310.05175 ("owl"); Huang et al., arXiv 2502.14770 ("atp").

    Example:
        >>> layers = [Layer("up", (8, 4)), Layer("down", (4, 8))]
        >>> allocate(layers, 0.5, method="uniform").kept
        {'up': 16, 'down': 16}
    """
    needed = {"curves": curves, "scores": scores, "outliers": outliers, "beta": beta}
    _check(layers, sparsity, method, budget, needed)
    lower, upper = _bounds(layers, at_least, at_most)
    keep = keep_total(sum(layer.numel for layer in layers), sparsity)
    if method == "dp":
        assert curves is not None
        return Program(layers, curves, budget or Budget("params", max(keep, 1)), lower, upper).allocation()
    # by name, so that the order in which layers come does not decide between equals
    ordered = sorted(layers, key=lambda layer: layer.name)
    low, high = (np.array([bound[layer.name] for layer in ordered], dtype=np.int64) for bound in (lower, upper))
    counts = counts_by_rule(
        ordered,
        method,
        sparsity or 0.0,
        keep,
        low,
        high,
        scores=scores,
        outliers=outliers,
        spread=spread,
        beta=beta,
    )
    by_name = {layer.name: int(count) for layer, count in zip(ordered, counts, strict=True)}
    kept = {layer.name: by_name[layer.name] for layer in layers}
    predicted = None
    if curves and all(n in curves and curves[n].kept[-1] <= count <= curves[n].kept[0] for n, count in by_name.items()):
        predicted = sum(curves[name].cleaned().at(count) for name, count in by_name.items())
    sizes = {layer.name: layer.numel for layer in layers}
    return Allocation(method, sizes, kept, keep, cost=float(keep), predicted=predicted)


def allocations_along(
    layers: Sequence[Layer],
    sparsities: Sequence[float],
    *,
    curves: Mapping[str, Curve],
    at_least: float | Mapping[str, float] = 0.0,
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
    program = Program(layers, curves, Budget("params", max(targets)), *_bounds(layers, at_least, at_most))
    return [program.allocation(target) for target in targets]


def _check(
    layers: Sequence[Layer],
    sparsity: float | None,
    method: str,
    budget: Budget | None,
    needed: Mapping[str, Any],
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
        # a layer that was pruned below the floor before stays as it is
        lower[layer.name] = min(math.ceil(density * layer.numel - 1e-6), upper[layer.name])
    return lower, upper
