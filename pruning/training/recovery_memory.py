"""Memory that recovery takes, by use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leanstep._torch import device_of
from leanstep.lora import saved_bytes
from leanstep.optimizers import param_groups
from leanstep.pruning.measure.batches import Batch, as_batches, evaluating
from leanstep.pruning.measure.metrics import logits_of
from leanstep.pruning.score.targets import Target, empty_targets, find_targets, parameters_of
from leanstep.pruning.training.recovery import Recovery, Samples, is_adapted, pass_rows, training


def distillation_bytes(
    model: nn.Module,
    data: Any,
    recovery: Recovery,
    *,
    dense: int,
    include: Iterable[str] | None = None,
    snapshot: bool = False,
    in_files: int = 0,
) -> dict[str, int]:
    """Estimate what :func:`leanstep.pruning.recover` takes with a teacher, in memory of the model's device.

    Runs the model on one sample, once with gradients. Counts what the code holds at the same time: a pass over some
    samples, a step, or a copy for the state, whichever takes most. A test compares the sum with a measured peak.

    Args:
        model: the pruned model, loaded.
        data, recovery, include: as for :func:`leanstep.pruning.recover`.
        dense: bytes of the teacher, which is not loaded yet.
        snapshot: whether the trained matrices are copied for a return to the pruned weights, because they are not
            stored as they are.
        in_files: bytes of the model's weights that are pages of files. The system counts such pages as free memory.

    Returns:
        Bytes by use; they add up to the peak besides a model in memory.

    Raises:
        ValueError: for a model or data that :func:`leanstep.pruning.recover` refuses.
    """
    targets = find_targets(model, include=include)
    parameters = parameters_of(targets)
    masked = {name for name, parameter in parameters.items() if bool((parameter == 0).any())}
    with evaluating(model):
        samples = Samples(data, model, model, recovery)
        batch, rows, passes = _largest_pass(samples.data, samples.rows, model, recovery)
        sizes = _PassSizes.of(model, targets, batch, recovery)
    models = {"dense model": dense, "pruned model": in_files}
    models = {use: size for use, size in models.items() if size}
    return models | _uses(model, targets, masked, sizes, rows, passes, recovery, snapshot=snapshot)


def expected_distillation_bytes(
    model: nn.Module, batch: Batch, samples: int, recovery: Recovery, *, include: Iterable[str], snapshot: bool
) -> dict[str, int]:
    """As :func:`distillation_bytes` without both models, of one that is not pruned yet and that may have no values.

    Args:
        model: dense, of real tensors or of those of torch's FakeTensorMode, which is active then.
        batch: of one sample, of such tensors.
        samples: number of them in the calibration data.
        recovery, snapshot: as for :func:`distillation_bytes`.
        include: patterns of the names of matrices to prune, all of which have zeros then.
    """
    targets = empty_targets(model, include=include)
    with evaluating(model):
        sizes = _PassSizes.of(model, targets, batch, recovery)
    step = min(recovery.batch_size, samples)
    rows = pass_rows(step, sizes.logits)
    masked = {target.parameter for target in targets}
    return _uses(model, targets, masked, sizes, rows, -(-step // rows), recovery, snapshot=snapshot)


@dataclass(frozen=True)
class _PassSizes:
    """Of a pass of one sample: bytes that autograd saves, and the number of logits and bytes of one.

    ``moments``: bytes of the optimizer's state.
    """

    activations: int
    logits: int
    itemsize: int
    moments: int

    @classmethod
    def of(cls, model: nn.Module, targets: Sequence[Target], batch: Batch, recovery: Recovery) -> _PassSizes:
        logits = logits_of(batch.run(model))
        with training(model, _trained(targets, recovery), Recovery(1)), torch.enable_grad():
            activations = saved_bytes(lambda: batch.run(model), model.parameters())
            groups = [] if recovery.rank is not None else param_groups(model)
        # of a head; matrices of layers have no state
        moments = sum(2 * p.nbytes for group in groups if group["algorithm"] == "adamw" for _, p in group["params"])
        return cls(activations, logits.numel(), logits.element_size(), moments)


def _trained(targets: Sequence[Target], recovery: Recovery) -> list[Target]:
    return [target for target in targets if recovery.rank is None or is_adapted(target)]


def _uses(
    model: nn.Module,
    targets: Sequence[Target],
    masked: set[str],
    sizes: _PassSizes,
    rows: int,
    passes: int,
    recovery: Recovery,
    *,
    snapshot: bool,
) -> dict[str, int]:
    """Bytes by use, of ``passes`` of ``rows`` samples in a step."""
    parameters = parameters_of(targets)
    names = {target.parameter for target in _trained(targets, recovery)}
    factors = 0
    if recovery.rank is not None:  # in fp32 at least
        factors = sum(recovery.rank * sum(p.shape) * max(4, p.element_size()) for p in _of(parameters, names))
    weights = sum(p.nbytes for p in _of(parameters, names)) if recovery.rank is None else factors
    always = {
        "masks": sum(parameter.numel() for parameter in _of(parameters, masked)),
        "copies of the pruned weights": sum(p.nbytes for p in parameters.values()) if snapshot else 0,
        "factors": factors,
        "optimizer's state": sizes.moments,
        # the update, or a product of factors and its gradient, in fp32
        "largest matrix": 8 * max((parameter.numel() for parameter in _of(parameters, names)), default=0),
    }
    a_pass = {
        # of one pass they replace its activations, one after another
        "gradients": weights if passes > 1 else 0,
        "activations": rows * sizes.activations,
        # those of both models, in fp32 their logarithms and probabilities, and three more of one sample
        "logits": sizes.logits * (rows * (2 * sizes.itemsize + 8) + 12),
    }
    a_step = {"gradients": weights}
    # the gradients are gone then. Of another device, the copy is in the host's memory
    a_state = {"copy for the state": weights if device_of(model).type == "cpu" else 0}
    uses = always | max(a_pass, a_step, a_state, key=lambda phase: sum(phase.values()))
    return {use: size for use, size in uses.items() if size}


def _of(parameters: Mapping[str, Tensor], names: Iterable[str]) -> list[Tensor]:
    return [parameter for name, parameter in parameters.items() if name in set(names)]


def _largest_pass(
    data: Tensor | list[Batch], rows: int, model: nn.Module, recovery: Recovery
) -> tuple[Batch, int, int]:
    """One sample, the number of those in the largest pass, and the number of passes in a step."""
    if isinstance(data, Tensor):
        rows = min(rows, len(data))
        (batch,) = as_batches(data[:1], model)
        return batch, rows, -(-min(recovery.batch_size, len(data)) // rows)
    largest = max(data, key=_elements)
    return largest.sample(0), largest.size, 1


def _elements(batch: Batch) -> int:
    return sum(value.numel() for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, Tensor))
