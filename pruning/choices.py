"""The settings of a pruning run: which exist, and which go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from leanstep.pruning.allocate.allocation import METHODS
from leanstep.pruning.allocate.budgets import Budget
from leanstep.pruning.allocate.descent import Refinement
from leanstep.pruning.allocate.latency import LatencyTable
from leanstep.pruning.measure.checks import CORRECTIONS, INPUTS
from leanstep.pruning.measure.curves import SOURCES, Curve, check_levels
from leanstep.pruning.measure.metrics import METRICS, Metric
from leanstep.pruning.measure.products import PRODUCTS
from leanstep.pruning.score.base import NEEDS
from leanstep.pruning.score.targets import GRANULARITIES
from leanstep.sparsity import NM

MINUTES = 30.0  # for measurements, where no time is given
# settings that only the curves of allocation="dp" have, with their defaults
CURVE_SETTINGS: dict[str, Any] = {
    "granularity": "matrix",
    "correction": "none",
    "curves": None,
    "levels": None,
}


def check_choices(
    *,
    data: Any,
    sparsity: float | None = None,
    allocation: str = "dp",
    score: str = "wanda",
    curve_score: str | None = None,
    pattern: str = "unstructured",
    granularity: str = "matrix",
    correction: str = "none",
    inputs: str = "pruned",
    curves: Mapping[str, Curve] | str | None = None,
    minutes: float = MINUTES,
    budget: Budget | LatencyTable | str | None = None,
    metric: str | Metric | None = None,
    refine: Refinement | None = None,
    products: str = "auto",
    levels: Sequence[float] | None = None,
    **others: Any,
) -> None:
    """Raise ValueError for unknown or contradictory settings of ``prune``, before anything is loaded."""
    for name, value, known in (
        ("allocation", allocation, METHODS),
        ("score", score, tuple(NEEDS)),
        *([] if curve_score is None else [("curve_score", curve_score, tuple(NEEDS))]),
        ("granularity", granularity, GRANULARITIES),
        ("correction", correction, CORRECTIONS),
        ("inputs", inputs, INPUTS),
        ("products", products, PRODUCTS),
        *([("metric", metric, tuple(METRICS))] if isinstance(metric, str) else []),
        *([("curves", curves, SOURCES)] if isinstance(curves, str) else []),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if isinstance(budget, str) and budget not in ("params", "flops", "bytes"):
        raise ValueError(
            f"budget must be params, flops, bytes, a Budget or, for latencies, a LatencyTable; got {budget!r}"
        )
    if not minutes > 0:
        raise ValueError(f"minutes is the time for measurements and must be positive, got {minutes:g}")
    if minutes != MINUTES and data is None:
        raise ValueError(f"minutes={minutes:g} is the time for measurements on data, which is missing")
    by_weights = budget in (None, "params")
    fixed = fixed_pattern(pattern)
    if fixed is not None:
        if sparsity is not None and abs(sparsity - fixed.sparsity) > 1e-9:
            raise ValueError(
                f"pattern {pattern} has a sparsity of {fixed.sparsity:g}, got sparsity={sparsity:g}; leave "
                f"sparsity out, or use the pattern N:{fixed.m}, which chooses n for each matrix"
            )
        if allocation not in ("uniform", "dp"):
            raise ValueError(
                f"pattern {pattern} is the same for every matrix, which leaves {allocation!r} nothing to allocate"
            )
        if not by_weights:
            raise ValueError(f"pattern {pattern} is the same for every matrix, whatever the budget; leave that out")
    elif (sparsity is None) != isinstance(budget, Budget):
        got = "neither" if sparsity is None else f"sparsity={sparsity:g} and a Budget"
        raise ValueError(
            "expected a sparsity, such as 0.6 (--sparsity 0.6), alone or with the name of a budget; or a fixed "
            f"pattern, such as 2:4 (--pattern 2:4); or, in Python, a Budget alone; got {got}"
        )
    if fixed is not None and not 0 < fixed.sparsity < 1:
        raise ValueError(
            f"pattern {pattern} has a sparsity of {fixed.sparsity:g}, and must lie between 0 and 1, such as 2:4"
        )
    if sparsity is not None and not 0 < sparsity < 1:
        near = f"; did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
        raise ValueError(f"sparsity is the fraction of zeros and must lie between 0 and 1, got {sparsity:g}{near}")
    if not by_weights and allocation != "dp":
        raise ValueError(f"a budget other than a number of weights needs allocation='dp', got {allocation!r}")
    if curve_score is not None and (allocation not in ("dp", "atp") or fixed is not None):
        raise ValueError(
            f"curve_score={curve_score!r} is the score of curves, and of the slopes that ATP tries: expected "
            "allocation='dp' or 'atp', and a pattern that leaves a choice, unstructured or N:M with a number for M; "
            f"got allocation={allocation!r}, pattern={pattern!r}"
        )
    if correction != "none" and allocation != "dp":
        raise ValueError(
            f"correction={correction!r} corrects curves, which only allocation='dp' has; got {allocation!r}"
        )
    if refine is not None and (allocation != "dp" or fixed is not None):
        problem = f"got {allocation!r}"
        if fixed is not None:
            problem = f"got the pattern {pattern}, by which every matrix keeps {fixed.n} of {fixed.m} weights"
        raise ValueError(
            "refine exchanges weights between matrices: expected allocation='dp', and a pattern that leaves a choice, "
            f"unstructured or N:M with a number for M, such as N:8; {problem}. Leave out refine (--refine, "
            "--refine-evaluations), or take another --allocation or --pattern"
        )
    _check_curve_settings(
        allocation,
        pattern,
        granularity=granularity,
        correction=correction,
        curves=curves,
        levels=levels,
    )
    if data is None and (NEEDS[score] or (allocation in ("dp", "owl", "atp") and fixed is None)):
        raise ValueError(
            f"allocation={allocation!r} with score={score!r} needs data; without data, use score='magnitude' and one "
            "of uniform, global, lamp, erk"
        )


def _check_curve_settings(allocation: str, pattern: str, **given: Any) -> None:
    """Raise ValueError for settings of curves, other than the defaults, where no curve is measured."""
    set_by_caller = [
        name
        for name, default in CURVE_SETTINGS.items()
        if (given[name] is not None if default is None else given[name] != default)
    ]
    if not set_by_caller:
        return
    name, value = set_by_caller[0], given[set_by_caller[0]]
    what = f"{name}={value!r}" if isinstance(value, (str, float, int)) else name
    if allocation != "dp":
        verb = "is" if name == "granularity" else "are"
        raise ValueError(f"{what} {verb} for allocation='dp' only, got {allocation!r}")
    if fixed_pattern(pattern) is not None:
        raise ValueError(
            f"pattern {pattern} is the same for every matrix, so that {what} would have no effect; leave {name} out"
        )
    check_levels(given["levels"], pattern)


def asked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``prune`` that its result does not show, as they were asked for, in plain values for JSON."""
    defaults = {"allocation": "dp", "minutes": MINUTES, "curve_score": None, "products": "auto", **CURVE_SETTINGS}
    asked = {name: settings.get(name, default) for name, default in defaults.items()}
    asked |= {name: settings.get(name) for name in ("metric", "include", "exclude", "budget")}
    if not isinstance(asked["budget"], str):
        by_table = isinstance(asked["budget"], LatencyTable)
        asked["budget"] = "latency" if by_table else getattr(asked["budget"], "kind", "params")
    for name, given in (("metric", "custom"), ("curves", "given")):
        if not isinstance(asked[name], (str, NoneType)):
            asked[name] = given
    return asked | {name: list(asked[name] or ()) for name in ("include", "exclude", "levels")}


def sparsity_asked(sparsity: float | None, pattern: str) -> float | None:
    """The sparsity, or that of a fixed pattern."""
    fixed = fixed_pattern(pattern)
    return fixed.sparsity if sparsity is None and fixed is not None else sparsity


def levels_asked(
    levels: Sequence[float] | None, budget: Budget | LatencyTable | str | None, pattern: str
) -> Sequence[float] | None:
    """The levels to measure: those of a table of latencies, if none are named; None: a grid."""
    if isinstance(budget, LatencyTable) and levels is None and pattern == "unstructured":
        return budget.levels[1:]
    return levels


def fixed_pattern(pattern: str) -> NM | None:
    """Parse a fixed pattern such as "2:4"; None for "unstructured" and for "N:8"."""
    return None if pattern == "unstructured" or pattern.startswith("N:") else NM.parse(pattern)
