"""Prune a model: the function, and the split of the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from leanstep.pruning.allocate.refine import judging_batches
from leanstep.pruning.config import Execution, PruneConfig, read_config, read_fields, takes_fields
from leanstep.pruning.measure.batches import Batch, as_batches, evaluating
from leanstep.pruning.measure.metrics import check_runs
from leanstep.pruning.measure.products import products_in, products_note
from leanstep.pruning.planner import Planner, Samples, groups_of, targets_of
from leanstep.pruning.result import PruneResult
from leanstep.pruning.score.base import NEEDS
from leanstep.pruning.score.calibration import leave_out
from leanstep.pruning.score.targets import WeightSnapshot, count_uses, dense_note


@takes_fields(Execution, PruneConfig)
def prune(
    model: nn.Module,
    data: Any = None,
    config: PruneConfig | None = None,
    *,
    held_out: Any = None,
    curve_data: Any = None,
    **options: Any,
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
        config: the settings, as one object.
        held_out: data for the comparison. None sets aside the last fifth of ``data``. False skips the comparison and
            applies the allocation in any case.
        curve_data: data for the curves; None: ``data``. Curves need fewer samples than scores.
        **options: settings by name, the fields of :class:`leanstep.pruning.PruneConfig`, which change those of
            ``config``; and the fields of :class:`leanstep.pruning.Execution`.

    Returns:
        :class:`PruneResult`.

    Raises:
        TypeError: for data that is no tensor, mapping or sequence of them, and for an unknown option.
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

        ``reconstruct`` prunes anew by the allocation that the comparison found to be better, and trains each block. It
        keeps the activations before a block of the dense model besides those of the pruned one, and of one block the
        memory of :func:`leanstep.pruning.training.reconstruction.reconstruct_block`.

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
    execution = read_fields(Execution, options)
    config = read_config("prune", config, options)
    config.check(has_data=data is not None, alone=execution.processes is None or execution.processes.size == 1)
    targets = targets_of(model, config)
    batch_size = config.batch_size
    data, held_out = _set_aside(model, data, held_out, batch_size)
    judging: list[Batch] = []
    if config.refine is not None:
        data, judging = judging_batches(model, data, config.refine, batch_size)
    samples = _split_data(model, data, held_out, curve_data, batch_size)
    notes = [] if config.include is not None else list(filter(None, [dense_note(model)]))
    if any_batches := samples.batches or samples.held_out:
        with products_in(model, config.products), evaluating(model):
            check_runs(model, any_batches[0])
            used = {*config.scores, *(["wanda"] if config.allocation == "owl" else [])}
            if {"square_sum", "gram"} & {need for name in used for need in NEEDS[name]}:
                targets, left_out = leave_out(model, targets, samples.batches)
                notes += left_out
    if config.counts_operations:
        with evaluating(model):
            targets = count_uses(model, targets, samples.batches[0])
    planner = Planner(
        model,
        config,
        execution,
        groups=groups_of(targets, config),
        samples=replace(samples, judging=judging),
        snapshot=WeightSnapshot(targets, execution.stored),
        notes=notes,
    )
    with planner.snapshot.restored_on_error(), products_in(model, config.products), evaluating(model):
        planner.notes += filter(None, [products_note(model)])
        return planner.run()


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


def _split_data(model: nn.Module, data: Any, held_out: Any, curve_data: Any, batch_size: int) -> Samples:
    """Make batches for the scores, for the held-out comparison, and for the curves."""
    has_held_out = held_out is not None and held_out is not False
    compared = as_batches(held_out, model, batch_size=batch_size, what="held_out") if has_held_out else []
    if data is None:
        return Samples([], compared, [])
    batches = as_batches(data, model, batch_size=batch_size)
    if curve_data is None:
        return Samples(batches, compared, batches)
    return Samples(batches, compared, as_batches(curve_data, model, batch_size=batch_size, what="curve_data"))
