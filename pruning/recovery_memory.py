"""Memory that recovery takes, by use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from leanstep._torch import device_of
from leanstep.lora import saved_bytes
from leanstep.optimizers import param_groups
from leanstep.pruning.measure.batches import Batch, as_batches
from leanstep.pruning.measure.measure import evaluating
from leanstep.pruning.measure.metrics import logits_of
from leanstep.pruning.recovery import Recovery, Samples, is_adapted, training
from leanstep.pruning.score.targets import find_targets


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
    parameters = {target.parameter: getattr(target.module, target.attribute) for target in targets}
    trained = [target for target in targets if recovery.rank is None or is_adapted(target)]
    names = {target.parameter for target in trained}
    masked = {name for name, parameter in parameters.items() if bool((parameter == 0).any())}
    factors = 0
    if recovery.rank is not None:  # in fp32 at least
        factors = sum(recovery.rank * sum(p.shape) * max(4, p.element_size()) for p in _of(parameters, names))
    weights = sum(p.nbytes for p in _of(parameters, names)) if recovery.rank is None else factors
    with evaluating(model):
        samples = Samples(data, model, model, recovery)
        batch, rows, passes = _largest_pass(samples.data, samples.rows, model, recovery)
        logits = logits_of(batch.run(model))
        with training(model, trained, Recovery(1)), torch.enable_grad():
            activations = saved_bytes(lambda: batch.run(model), model.parameters())
            groups = [] if recovery.rank is not None else param_groups(model)
    # of a head; matrices of layers have no state
    moments = sum(2 * p.nbytes for group in groups if group["algorithm"] == "adamw" for _, p in group["params"])
    always = {
        "dense model": dense,
        "pruned model": in_files,
        "masks": sum(parameter.numel() for parameter in _of(parameters, masked)),
        "copies of the pruned weights": sum(p.nbytes for p in parameters.values()) if snapshot else 0,
        "factors": factors,
        "optimizer's state": moments,
        # the update, or a product of factors and its gradient, in fp32
        "largest matrix": 8 * max((parameter.numel() for parameter in _of(parameters, names)), default=0),
    }
    a_pass = {
        # of one pass they replace its activations, one after another
        "gradients": weights if passes > 1 else 0,
        # autograd holds the sum of each matrix and of its masked product
        "masked products": 0 if recovery.rank is None else sum(p.nbytes for p in _of(parameters, names & masked)),
        "activations": rows * activations,
        # those of both models, in fp32 their logarithms and probabilities, and three more of one sample
        "logits": logits.numel() * (rows * (2 * logits.element_size() + 8) + 12),
    }
    a_step = {"gradients": weights}
    # the gradients are gone then. Of another device, the copy is in the host's memory
    a_state = {"copy for the state": weights if device_of(model).type == "cpu" else 0}
    uses = always | max(a_pass, a_step, a_state, key=lambda phase: sum(phase.values()))
    return {use: size for use, size in uses.items() if size}


def _of(parameters: dict[str, Tensor], names: Iterable[str]) -> list[Tensor]:
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
