"""Prune a model: check the settings, split the data, and run the planner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanstep.pruning.allocate.allocation import METHODS
from leanstep.pruning.allocate.budgets import Budget, LatencyTable
from leanstep.pruning.measure.batches import Batch, as_batches
from leanstep.pruning.measure.checks import CORRECTIONS
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.measure import Progress, Stored, WeightSnapshot, evaluating
from leanstep.pruning.measure.metrics import Metric
from leanstep.pruning.planner import Planner
from leanstep.pruning.result import PruneResult
from leanstep.pruning.score.base import NEEDS
from leanstep.pruning.score.targets import count_uses, find_targets, make_groups
from leanstep.sparsity import NM


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
    budget: Budget | LatencyTable | str | None = None,
    score_options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    stored: Stored | None = None,
) -> PruneResult:
    """Prune a model in place, each matrix to the sparsity that an allocation gives it. Existing zeros stay zero.

    With ``allocation="dp"``, the distortion of each matrix is measured at some levels (:func:`measure_curves`), and
    dynamic programming finds the levels with the smallest sum of distortions under the budget (:func:`allocate`). This
    allocation and uniform sparsity are then measured on held-out data, and the better one is applied.

    Args:
        model: any module with linear layers, convolutions or transformers' expert weights.
        data: calibration data, see :func:`leanstep.pruning.measure.batches.as_batches`. May be None for
            ``score="magnitude"`` with ``uniform``, ``global``, ``lamp`` or ``erk``, which measure nothing.
        sparsity: fraction of zeros over all pruned matrices, in (0, 1). With a ``budget`` by name or a table, fraction
            of the dense cost to remove. None with a :class:`Budget` or a fixed pattern.
        allocation: ``dp``, ``uniform``, ``global``, ``lamp``, ``erk``, ``owl`` or ``atp``. For ``atp``, up to 9 slopes
            are tried; the one with the smallest joint distortion on ``curve_data`` is taken.
        score: ``magnitude``, ``wanda``, ``sparsegpt`` (updates the remaining weights) or ``mfac``.
        pattern: ``unstructured``; ``N:8`` (any M), which chooses n for each matrix; or a fixed one such as ``2:4``.
        metric: distortion of the curves; see :func:`measure_curves`.
        granularity: ``matrix``, ``role`` or ``block``: which matrices share a level, with ``dp``.
        include, exclude: see :func:`find_targets`.
        held_out: data for the comparison. None sets aside the last fifth of ``data``. False skips the comparison and
            applies the allocation in any case.
        curve_data: data for the curves; None: ``data``. Curves need fewer samples than scores.
        curves: curves measured earlier with the same score; None measures them.
        correction: ``none``; ``relinearise``, which measures curves again around the uniformly pruned model; or
            ``coefficients``, which searches a random factor for each curve. The allocation with the smallest joint
            distortion on ``curve_data`` is taken.
        levels: sparsities at which curves are measured; None: a grid around ``sparsity``.
        budget: with ``dp``, a constraint other than the number of weights. ``"flops"``, ``"bytes"`` or a
            :class:`leanstep.pruning.LatencyTable` limits that cost to ``1 - sparsity`` of the dense model's. A
            :class:`leanstep.pruning.Budget` has its own target. With a table, curves are measured at its levels.
        score_options: further arguments of :func:`leanstep.pruning.layer_pruner`.
        batch_size, resume, progress: see :func:`measure_curves`.
        stored: function from a parameter's name to its original values, or None. Parameters with such values are read
            again on restoring, not copied before pruning.

    Returns:
        :class:`PruneResult`.

    Raises:
        ValueError: for unknown or contradictory settings, too little data, or a target out of reach; the message gives
            the range in reach. The model is unchanged after any error.

    Notes:
        Memory besides the model: a copy of the pruned matrices that are not ``stored``, the statistics of one block,
        the pruner of one matrix, and the memory of :func:`measure_curves`. ``global`` with SparseGPT or M-FAC keeps all
        scores, and ``correction="relinearise"`` keeps the pruners of all matrices.

        Masks are chosen block by block, from inputs that the already pruned blocks compute. Whole heads and
        channels are not pruned: transformers gives all layers of a model one width and could not open the result.
        Unstructured zeros make a model neither smaller nor faster in PyTorch.

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
    )
    targets = find_targets(model, include=include, exclude=exclude)
    fixed = fixed_pattern(pattern)
    if fixed is not None and sparsity is None:
        sparsity = fixed.sparsity
    batches, held_out_batches, curve_batches = _split_data(model, data, held_out, curve_data, batch_size)
    if "flops" in (budget, getattr(budget, "kind", None)):
        with evaluating(model):
            targets = count_uses(model, targets, batches[0])
    if isinstance(budget, LatencyTable) and levels is None and pattern == "unstructured":
        levels = budget.levels[1:]
    planner = Planner(
        model=model,
        groups=make_groups(targets, granularity if allocation == "dp" else "matrix"),
        sparsity=sparsity,
        budget=budget,
        score=score,
        pattern=pattern,
        metric=metric,
        batches=batches,
        held_out=held_out_batches,
        curve_batches=curve_batches,
        score_options=dict(score_options or {}),
        progress=progress,
        levels=levels,
        resume=resume,
        snapshot=WeightSnapshot(targets, stored),
    )
    with planner.snapshot.restored_on_error(), evaluating(model):
        return planner.run(allocation, correction, curves, fixed)


def check_choices(
    *,
    data: Any,
    sparsity: float | None = None,
    allocation: str = "dp",
    score: str = "wanda",
    pattern: str = "unstructured",
    correction: str = "none",
    budget: Budget | LatencyTable | str | None = None,
    **others: Any,
) -> None:
    """Raise ValueError for unknown or contradictory settings of :func:`prune`, before anything is loaded."""
    for name, value, known in (
        ("allocation", allocation, METHODS),
        ("score", score, tuple(NEEDS)),
        ("correction", correction, CORRECTIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if isinstance(budget, str) and budget not in ("params", "flops", "bytes"):
        raise ValueError(
            f"budget must be params, flops, bytes, a Budget or, for latencies, a LatencyTable; got {budget!r}"
        )
    by_weights = budget in (None, "params")
    fixed = fixed_pattern(pattern)
    if fixed is not None:
        if sparsity is not None and abs(sparsity - fixed.sparsity) > 1e-9:
            raise ValueError(
                f"pattern {pattern} is a sparsity of {fixed.sparsity:g}, and {sparsity:g} was asked for; leave "
                f"sparsity out, or use the pattern N:{fixed.m}, which chooses n for each matrix"
            )
        if allocation not in ("uniform", "dp"):
            raise ValueError(
                f"pattern {pattern} is the same for every matrix, which leaves {allocation!r} nothing to allocate"
            )
        if not by_weights:
            raise ValueError(f"pattern {pattern} is the same for every matrix, whatever the budget; leave that out")
    elif (sparsity is None) != isinstance(budget, Budget):
        raise ValueError("expected a sparsity, such as 0.6, alone or with the name of a budget; or a Budget alone")
    if sparsity is not None and not 0 < sparsity < 1:
        raise ValueError(f"sparsity is the fraction of zeros and must lie between 0 and 1, got {sparsity:g}")
    if not by_weights and allocation != "dp":
        raise ValueError(f"a budget other than a number of weights needs allocation='dp', got {allocation!r}")
    if correction != "none" and allocation != "dp":
        raise ValueError(
            f"correction={correction!r} corrects curves, which only allocation='dp' has; got {allocation!r}"
        )
    if data is None and (NEEDS[score] or (allocation in ("dp", "owl", "atp") and fixed is None)):
        raise ValueError(
            f"allocation={allocation!r} with score={score!r} needs data; without data, use score='magnitude' and one "
            "of uniform, global, lamp, erk"
        )


def fixed_pattern(pattern: str) -> NM | None:
    """Parse a fixed pattern such as "2:4"; None for "unstructured" and for "N:8"."""
    return None if pattern == "unstructured" or pattern.startswith("N:") else NM.parse(pattern)


def _split_data(
    model: nn.Module, data: Any, held_out: Any, curve_data: Any, batch_size: int
) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """Return batches for the scores, for the held-out comparison, and for the curves."""
    if data is None:
        return [], [], []
    if held_out is None:
        whole = data if isinstance(data, Tensor) else as_batches(data, model, batch_size=batch_size)
        if len(whole) < 2:
            unit = "sample" if isinstance(data, Tensor) else "batch"
            raise ValueError(f"data has one {unit}: one at least has to be held out; give more, or held_out")
        first = len(whole) - max(1, len(whole) // 5)
        data, held_out = whole[:first], whole[first:]
    batches = as_batches(data, model, batch_size=batch_size)
    compared = [] if held_out is False else as_batches(held_out, model, batch_size=batch_size, what="held_out")
    if curve_data is None:
        return batches, compared, batches
    return batches, compared, as_batches(curve_data, model, batch_size=batch_size, what="curve_data")
