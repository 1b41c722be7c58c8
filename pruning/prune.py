"""Prune a model: the function, its checks, and the split of the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanstep._mapped import Scratch
from leanstep._processes import Processes
from leanstep.pruning.allocate.budgets import Budget
from leanstep.pruning.allocate.descent import Refinement
from leanstep.pruning.allocate.latency import LatencyTable
from leanstep.pruning.choices import check_choices, fixed_pattern, levels_asked, sparsity_asked
from leanstep.pruning.measure.batches import Batch, as_batches
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.measure import (
    Stored,
    WeightSnapshot,
    evaluating,
)
from leanstep.pruning.measure.metrics import Metric, check_runs
from leanstep.pruning.measure.points import Progress
from leanstep.pruning.measure.products import products_in, products_note
from leanstep.pruning.planner import Planner
from leanstep.pruning.refine import judging_batches
from leanstep.pruning.result import PruneResult
from leanstep.pruning.score.base import NEEDS
from leanstep.pruning.score.calibration import leave_out
from leanstep.pruning.score.targets import count_uses, dense_note, find_targets, make_groups


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
    curves: Mapping[str, Curve] | str | None = None,
    curve_score: str | None = None,
    minutes: float = 30.0,
    correction: str = "none",
    inputs: str = "pruned",
    levels: Sequence[float] | None = None,
    budget: Budget | LatencyTable | str | None = None,
    score_options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    stored: Stored | None = None,
    refine: Refinement | None = None,
    scratch: str | Path | Scratch | None = None,
    processes: Processes | None = None,
    products: str = "auto",
) -> PruneResult:
    """Prune a model in place, each matrix to the sparsity that an allocation gives it. Existing zeros stay zero.

    With ``allocation="dp"``, the distortion of each matrix is measured at some levels (:func:`measure_curves`), and
    dynamic programming finds the levels with the smallest sum of distortions under the budget (:func:`allocate`). This
    allocation and uniform sparsity are then measured on held-out data, and the better one is applied.

    Args:
        model: any module with linear layers, convolutions or transformers' expert weights.
        data: calibration data, see :func:`leanstep.pruning.measure.batches.as_batches`. May be None for
            ``score="magnitude"`` with ``uniform``, ``global``, ``lamp``, ``erk`` or a fixed pattern, which measure
            nothing.
        sparsity: fraction of zeros over all pruned matrices, in (0, 1). With a ``budget`` by name or a table, fraction
            of the dense cost to remove. None with a :class:`Budget` or a fixed pattern.
        allocation: ``dp``, ``uniform``, ``global``, ``lamp``, ``erk``, ``owl`` or ``atp``. For ``atp``, up to 9 slopes
            are tried; the one with the smallest joint distortion on ``curve_data`` is taken.
        score: ``magnitude``, ``wanda``, or one that updates the remaining weights: ``sparsegpt``, ``alps``, ``mfac``.
        pattern: ``unstructured``; ``N:8`` (any M), which chooses n for each matrix, from a quarter of M on; or a fixed
            one such as ``2:4``.
        metric: distortion of the curves; see :func:`measure_curves`.
        granularity: ``matrix``, ``role`` or ``block``: which matrices share a level, with ``dp``.
        include, exclude: see :func:`find_targets`.
        held_out: data for the comparison. None sets aside the last fifth of ``data``. False skips the comparison and
            applies the allocation in any case.
        curve_data: data for the curves; None: ``data``. Curves need fewer samples than scores.
        curves: how curves are obtained with ``dp``: ``measured``, ``fisher`` (to second order, in the time of a few
            passes) or ``anchored`` (Fisher curves scaled to a few measurements); see :func:`measure_curves`. None:
            ``measured`` where that takes less than ``minutes``, else ``anchored``. Or curves measured earlier.
        curve_score: score by which matrices are pruned for curves, for the slopes of ``atp`` and for ``refine``; None:
            ``score``. ``sparsegpt`` takes a tenth of the time of ``alps`` for a level, or less. Of ``score_options``,
            another score takes those that ALPS and SparseGPT share.
        minutes: time for measurements; see :func:`measure_curves`. On held-out data, matrices are pruned one by one
            as long as that takes no longer, first for the allocation that was asked for.
        correction: ``none``; or ``relinearise``, which takes curves again around the uniformly pruned model, and once
            more around the new allocation if that is better: measured ones where all curves are measured, else to
            second order, first-order terms included. The allocation with the smallest joint distortion on
            ``curve_data`` is taken.
        inputs: on which a block is pruned: ``pruned``, those that the pruned blocks before it produce; or ``dense``,
            those of the dense model. Curves are of one matrix in the dense model with either.
        levels: sparsities at which curves are measured; None: a grid around ``sparsity``.
        budget: with ``dp``, a constraint other than the number of weights. ``"flops"``, ``"bytes"`` or a
            :class:`leanstep.pruning.LatencyTable` limits that cost to ``1 - sparsity`` of the dense model's. A
            :class:`leanstep.pruning.Budget` has its own target. With a table, curves are measured at its levels.
        score_options: further arguments of :func:`leanstep.pruning.layer_pruner`.
        batch_size, resume: see :func:`measure_curves`.
        progress: as for :func:`measure_curves`; and with (done, in all, name of a phase), 0 of 0 where a phase begins:
            ``statistics``, ``curves``, ``refinement``, ``comparison`` or ``pruning``.
        stored: function from a parameter's name to its original values, or None. Parameters with such values are read
            again on restoring, not copied before pruning.
        refine: with ``dp``, limits of a search from its allocation: exchanges of weights between matrices within the
            budget, each judged by the joint distortion on data of its own. None: no search.
        scratch: see :func:`measure_curves`.
        processes: those that prune this model together, each with all of it and all data. The calibration batches, and
            the points of curves, the samples that judge an exchange and the matrices of a block are spread over them.
            The result is that of one process with as many threads: bit for bit, but for sums of Gram matrices, which
            are added in another order. None: this one.
        products: dtype of the model's products: ``stored``, that of the weights; ``bf16``; or ``auto``: ``stored``,
            except for a 16-bit dtype in which this CPU is slow: its products are computed in bf16 where that is fast,
            else in fp32. See :func:`leanstep.pruning.measure.products.product_dtype`. Weights keep their dtype.

    Returns:
        :class:`PruneResult`.

    Raises:
        TypeError: for data that is no tensor, mapping or sequence of them.
        ValueError: for unknown or contradictory settings, too little data, data that the model cannot take, or a target
            out of reach; the message gives the range in reach. The model is unchanged after any error.

    Notes:
        Memory besides the model: a copy of the pruned matrices that are not ``stored``, the statistics of one block,
        the pruner of one matrix, and the memory of :func:`measure_curves`. ``global`` with SparseGPT, ALPS or M-FAC
        keeps all scores, and ``correction="relinearise"`` keeps the pruners of all matrices, and with curves to second
        order a gradient of them in fp32.

        Layers whose inputs a score needs and the model does not show are left out: those that it never calls, such as
        depth-wise convolutions of state-space models, and convolutions with groups. Experts with fewer than 32
        calibration tokens (with ``mfac`` without a sample that has a gradient) are pruned by magnitude, which
        ``global`` and ``owl`` multiply by the other experts' mean ratio of score to magnitude. SparseGPT prunes experts
        with fewer tokens than two thirds of their inputs by Wanda's score. The result's notes name all of these.

        ``mfac`` takes the gradients of the first 128 samples, in fp32 [samples, weights of a matrix], of one block at
        a time, or with ``global`` of all matrices.

        ``refine`` keeps the pruners of all matrices, the gradient of each, the weights that an exchange replaces, and
        as many inputs of blocks as a quarter of the free memory holds. A pass with gradients takes the activations of
        one block besides, which the backward pass computes again. An exchange takes a pass over its data from the
        first changed block on, a round of exchanges one more with gradients. The refined allocation, that of dynamic
        programming and uniform sparsity are compared on held-out data, and the best is applied.

        ``inputs="dense"`` keeps all pruned matrices until the last one is pruned, which takes the memory of a copy.
        With ``scratch``, they are in files, and for ``refine`` and a correction the statistics, gradients and
        replaced weights of all matrices; a pruner is then made anew where it is used. ``inputs="pruned"`` takes a
        pass over the data for every block of a model whose activations cannot be cached.

        Whole heads and channels are not pruned: transformers gives all layers of a model one width and could not open
        the result.
        Unstructured zeros make a model neither smaller nor faster in PyTorch.

    References:
        K. Xu et al., arXiv 2308.10438; for the baselines see :func:`allocate`.
    """
    check_choices(
        data=data,
        sparsity=sparsity,
        allocation=allocation,
        score=score,
        curve_score=curve_score,
        pattern=pattern,
        granularity=granularity,
        correction=correction,
        inputs=inputs,
        curves=curves,
        minutes=minutes,
        budget=budget,
        metric=metric,
        refine=refine,
        products=products,
        levels=levels,
    )
    targets = find_targets(model, include=include, exclude=exclude)
    fixed = fixed_pattern(pattern)
    sparsity = sparsity_asked(sparsity, pattern)
    data, held_out = _set_aside(model, data, held_out, batch_size)
    judging: list[Batch] = []
    if refine is not None:
        data, judging = judging_batches(model, data, refine, batch_size)
    batches, held_out_batches, curve_batches = _split_data(model, data, held_out, curve_data, batch_size)
    planned = [curve_score or score] if allocation in ("dp", "atp") and fixed is None else []
    notes = [] if include is not None else list(filter(None, [dense_note(model)]))
    if any_batches := batches or held_out_batches:
        with products_in(model, products), evaluating(model):
            check_runs(model, any_batches[0])
            used = {score, *planned, *(["wanda"] if allocation == "owl" else [])}
            if {"square_sum", "gram"} & {need for name in used for need in NEEDS[name]}:
                targets, left_out = leave_out(model, targets, batches)
                notes += left_out
    if "flops" in (budget, getattr(budget, "kind", None)):
        with evaluating(model):
            targets = count_uses(model, targets, batches[0])
    planner = Planner(
        model=model,
        groups=make_groups(targets, granularity),
        sparsity=sparsity,
        method=allocation,
        score=score,
        curve_score=curve_score or score,
        pattern=pattern,
        metric=metric,
        correction=correction,
        inputs=inputs,
        levels=levels_asked(levels, budget, pattern),
        curve_method=curves if isinstance(curves, str) else None,
        minutes=minutes,
        budget=budget or "params",
        batches=batches,
        held_out=held_out_batches,
        curve_batches=curve_batches,
        score_options=dict(score_options or {}),
        resume=resume,
        progress=progress,
        snapshot=WeightSnapshot(targets, stored),
        notes=notes,
        refine=refine,
        judging=judging,
        scratch=Scratch.of(scratch),
        processes=processes or Processes(),
    )
    with planner.snapshot.restored_on_error(), products_in(model, products), evaluating(model):
        planner.notes += filter(None, [products_note(model)])
        return planner.run(None if isinstance(curves, str) else curves, fixed)


def _set_aside(model: nn.Module, data: Any, held_out: Any, batch_size: int) -> tuple[Any, Any]:
    """Return calibration data and held-out data, by default the last fifth of all."""
    if data is None or held_out is not None:
        return data, held_out
    whole = data if isinstance(data, Tensor) else as_batches(data, model, batch_size=batch_size)
    if len(whole) < 2:
        unit = "sample" if isinstance(data, Tensor) else "batch"
        raise ValueError(f"data has one {unit}, and at least one is held out; give more, or held_out")
    first = len(whole) - max(1, len(whole) // 5)
    return whole[:first], whole[first:]


def _split_data(
    model: nn.Module, data: Any, held_out: Any, curve_data: Any, batch_size: int
) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """Return batches for the scores, for the held-out comparison, and for the curves."""
    has_held_out = held_out is not None and held_out is not False
    compared = as_batches(held_out, model, batch_size=batch_size, what="held_out") if has_held_out else []
    if data is None:
        return [], compared, []
    batches = as_batches(data, model, batch_size=batch_size)
    if curve_data is None:
        return batches, compared, batches
    return batches, compared, as_batches(curve_data, model, batch_size=batch_size, what="curve_data")
