"""Prune a model: choose how far each matrix goes, choose the weights inside it, and say what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanstep.pruning.allocate.budgets import KINDS, Budget
from leanstep.pruning.allocate.latency import LatencyTable
from leanstep.pruning.allocate.limit import Limit, limit_of
from leanstep.pruning.measure.batches import Batch, as_batches
from leanstep.pruning.measure.corrections import CORRECTIONS
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.groups import Group, make_groups
from leanstep.pruning.measure.measure import Progress, evaluating, levels_of
from leanstep.pruning.measure.metrics import Metric
from leanstep.pruning.measure.snapshot import Originals, Stored
from leanstep.pruning.planner import Planner
from leanstep.pruning.result import PruneResult
from leanstep.pruning.score.statistics import NEEDS
from leanstep.pruning.score.targets import count_uses, find_targets
from leanstep.sparsity import NM

__all__ = ["ALLOCATIONS", "check_choices", "prune"]

ALLOCATIONS = ("dp", "uniform", "global", "lamp", "erk", "owl", "atp")


def prune(
    model: nn.Module,
    data: Any = None,
    *,
    sparsity: float | None = None,
    allocation: str = "dp",
    score: str = "wanda",
    pattern: str = "unstructured",
    metric: str | Metric | None = None,
    granularity: str = "matrix",
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    held_out: Any = None,
    curve_data: Any = None,
    curves: Mapping[str, Curve] | None = None,
    correction: str = "none",
    levels: Sequence[float] | None = None,
    budget: Budget | str | None = None,
    latencies: LatencyTable | None = None,
    at_least: float = 0.0,
    beta: float | None = None,
    score_options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    prefix_cache: bool = True,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    stored: Stored | None = None,
) -> PruneResult:
    """Prune a model in place: each matrix as far as the allocation says, and no weight that was zero comes back.

    With ``allocation="dp"``, each matrix's distortion is measured at some levels (:func:`measure_curves`), and the
    levels are chosen whose sum is smallest under the budget, exactly (:func:`allocate`). On held-out data the result
    is compared with uniform sparsity, and the better of the two is what the model gets; ``notes`` says so.

    Args:
        model: any module with linear layers, convolutions or transformers' expert weights.
        data: calibration data, see :func:`leanstep.pruning.measure.batches.as_batches`. May be None for
            ``score="magnitude"`` with an allocation that measures nothing: ``uniform``, ``global``, ``lamp``, ``erk``.
        sparsity: fraction of zeros over all pruned matrices, in (0, 1); with the name of a ``budget``, fraction of its
            cost that is removed. None with a :class:`Budget` or a fixed pattern.
        allocation: ``dp``, ``uniform``, ``global``, ``lamp``, ``erk``, ``owl`` or ``atp``.
        score: ``magnitude``, ``wanda``, ``sparsegpt`` (other weights make up for the pruned ones) or ``mfac``.
        pattern: ``unstructured``; ``N:8`` (any M): each matrix keeps some n of 8; or a fixed pattern such as ``2:4``.
        metric: what curves measure, see :func:`measure_curves`.
        granularity: ``matrix``, ``role`` or ``block``: which matrices share a level, with ``dp``.
        include, exclude: see :func:`find_targets`.
        held_out: data for the comparison; None: the last fifth of ``data`` is set aside; False: nothing is compared,
            and the model gets what ``allocation`` says.
        curve_data: data that curves are measured on; None: ``data``. Fewer samples than for the scores do.
        curves: curves measured before, under the same score; None: they are measured.
        correction: ``none``; ``relinearise``: curves are measured again around the uniformly pruned model; or
            ``coefficients``: each curve gets a factor, chosen by search. Of all allocations so found, the one with the
            smallest joint distortion on ``curve_data`` is taken.
        levels: sparsities at which curves are measured; None: a grid around ``sparsity``.
        budget: what is limited instead of weights, with ``dp``: ``flops``, ``bytes`` or ``latency``, of whose cost in
            the dense matrices ``1 - sparsity`` may be left, or a :class:`leanstep.pruning.Budget` with the most itself.
        latencies: for ``budget="latency"``: :class:`leanstep.pruning.LatencyTable`; curves are measured at its levels.
        at_least: lowest density of any matrix.
        beta: slope of ``atp``; None: the best of some, by joint distortion on ``curve_data``.
        score_options: further arguments of :func:`leanstep.pruning.layer_pruner`.
        batch_size, prefix_cache, resume, progress: see :func:`measure_curves`.
        stored: gives the values of a parameter by its name, as they are before, where they lie elsewhere: they are read
            again when they are needed, instead of copied. None: nothing does.

    Returns:
        :class:`PruneResult`.

    Raises:
        ValueError: settings that are none or do not go together, too little data, a target that cannot be met (with the
            range that can). The model is unchanged after any error.

    Notes:
        Memory besides the model: a copy of the pruned matrices that are not ``stored``, the statistics of one block,
        what one matrix takes to be pruned, and what :func:`measure_curves` takes. With ``global`` on SparseGPT or M-FAC
        also the scores of all, with ``correction="relinearise"`` of all what one takes.

        The masks are chosen from the first block to the last, on inputs that earlier, already pruned blocks give. Whole
        heads and channels are not pruned here: transformers has one width for all layers of a model, so that the result
        would open nowhere. Unstructured zeros make a model neither smaller nor faster in PyTorch.

    References:
        K. Xu et al., arXiv 2308.10438; for the baselines see :func:`allocate`.
    """
    check_choices(
        data=data,
        sparsity=sparsity,
        allocation=allocation,
        score=score,
        pattern=pattern,
        correction=correction,
        budget=budget,
        latencies=latencies,
    )
    targets = find_targets(model, include=include, exclude=exclude)
    fixed = _fixed_pattern(pattern)
    if fixed is not None:
        sparsity = fixed.sparsity if sparsity is None else sparsity
    batches, aside, measured = _split_data(model, data, held_out, curve_data, batch_size)
    if "flops" in (budget, getattr(budget, "kind", None)):
        with evaluating(model):
            targets = count_uses(model, targets, batches[0])
    groups = make_groups(targets, granularity if allocation == "dp" else "matrix")
    if latencies is not None and levels is None and pattern == "unstructured":
        levels = latencies.levels[1:]
    limit = _limit(budget, groups, sparsity, latencies, pattern, levels)
    planner = Planner(
        model=model,
        groups=groups,
        sparsity=sparsity if limit is None else None,
        limit=limit,
        score=score,
        pattern=pattern,
        metric=metric,
        batches=batches,
        held_out=aside,
        measured=measured,
        at_least=at_least,
        score_options=dict(score_options or {}),
        prefix_cache=prefix_cache,
        progress=progress,
        levels=levels,
        resume=resume,
        originals=Originals(targets, stored),
    )
    with planner.originals.kept_on_error(), evaluating(model):
        return planner.run(allocation, correction, beta, curves, fixed)


def check_choices(
    *,
    data: Any,
    sparsity: float | None = None,
    allocation: str = "dp",
    score: str = "wanda",
    pattern: str = "unstructured",
    correction: str = "none",
    budget: Budget | str | None = None,
    latencies: LatencyTable | None = None,
    **others: Any,
) -> None:
    """Refuse settings of :func:`prune` that are none or do not go together, before anything is loaded."""
    for name, value, known in (
        ("allocation", allocation, ALLOCATIONS),
        ("score", score, tuple(NEEDS)),
        ("correction", correction, CORRECTIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    fixed = _fixed_pattern(pattern)
    if fixed is not None:
        if sparsity is not None and abs(sparsity - fixed.sparsity) > 1e-9:
            raise ValueError(
                f"pattern {pattern} is a sparsity of {fixed.sparsity:g}, and {sparsity:g} was asked for; leave "
                f"sparsity out, or take the pattern N:{fixed.m}, whose n each matrix chooses"
            )
        if allocation not in ("uniform", "dp"):
            raise ValueError(
                f"pattern {pattern} is the same for every matrix, which leaves {allocation!r} nothing to allocate"
            )
        if budget not in (None, "params"):
            raise ValueError(f"pattern {pattern} is the same for every matrix, whatever the budget; leave that out")
    elif (sparsity is None) == (budget is None or isinstance(budget, str)):
        raise ValueError("expected a sparsity, such as 0.6, alone or with the name of a budget; or a Budget alone")
    if sparsity is not None and not 0 < sparsity < 1:
        raise ValueError(f"sparsity is the fraction of zeros and must lie between 0 and 1, got {sparsity:g}")
    _check_budget(budget, latencies, allocation)
    if correction != "none" and allocation != "dp":
        raise ValueError(
            f"correction={correction!r} corrects curves, which only allocation='dp' has; got {allocation!r}"
        )
    if data is None and (NEEDS[score] or (allocation in ("dp", "owl", "atp") and fixed is None)):
        raise ValueError(
            f"allocation={allocation!r} with score={score!r} needs data; without any, take score='magnitude' and one "
            "of uniform, global, lamp, erk"
        )


def _check_budget(budget: Budget | str | None, latencies: LatencyTable | None, allocation: str) -> None:
    if isinstance(budget, str) and budget not in KINDS:
        raise ValueError(f"budget must be one of {', '.join(KINDS)}, or a Budget; got {budget!r}")
    if budget not in (None, "params") and allocation != "dp":
        raise ValueError(f"a budget other than a number of weights needs allocation='dp', got {allocation!r}")
    if (budget == "latency") != (latencies is not None):
        raise ValueError("budget='latency' goes with a table of latencies, and no other budget does")


def _limit(
    budget: Budget | str | None,
    groups: Sequence[Group],
    sparsity: float | None,
    latencies: LatencyTable | None,
    pattern: str,
    levels: Sequence[float] | None,
) -> Limit | None:
    """What the groups may cost; None where that is a number of weights by their sparsity."""
    if budget is None or budget == "params":
        return None
    kept: dict[str, Sequence[int]] = {}
    if "latency" in (budget, getattr(budget, "kind", None)):
        kept = {name: counts for name, (counts, _) in levels_of(groups, 0.5, pattern, levels=levels).items()}
    return limit_of(budget, groups, sparsity, latencies, kept)


def _fixed_pattern(pattern: str) -> NM | None:
    """The N:M pattern of a text such as "2:4"; None for levels."""
    if pattern == "unstructured" or pattern.startswith("N:"):
        return None
    return NM.parse(pattern)


def _split_data(
    model: nn.Module, data: Any, held_out: Any, curve_data: Any, batch_size: int
) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """Batches for scores, for the held-out comparison, and for curves."""
    if data is None:
        return [], [], []
    if held_out is None:
        if isinstance(data, Tensor):
            if len(data) < 2:
                raise ValueError(
                    f"data has {len(data)} sample: one at least has to be held out; give more, or held_out"
                )
            cut = len(data) - max(1, len(data) // 5)
            data, held_out = data[:cut], data[cut:]
        else:
            batches = as_batches(data, model, batch_size=batch_size)
            if len(batches) < 2:
                raise ValueError("data has one batch: one at least has to be held out; give more, or held_out")
            cut = len(batches) - max(1, len(batches) // 5)
            data, held_out = batches[:cut], batches[cut:]
    batches = as_batches(data, model, batch_size=batch_size)
    aside = [] if held_out is False else as_batches(held_out, model, batch_size=batch_size, what="held_out")
    measured = (
        batches if curve_data is None else as_batches(curve_data, model, batch_size=batch_size, what="curve_data")
    )
    return batches, aside, measured
