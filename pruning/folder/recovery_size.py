"""Memory that recovery takes, from a pass of the model without values."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leanstep._files import one_line
from leanstep.pruning.folder.files import DTYPES, Checkpoint, most_common_dtype
from leanstep.pruning.folder.loading import empty_model_of
from leanstep.pruning.measure.batches import Batch, as_batches
from leanstep.pruning.recovery import Recovery
from leanstep.pruning.recovery_memory import expected_distillation_bytes


def recovery_bytes(
    checkpoint: Checkpoint, names: list[str], recovery: Recovery, *, samples: int, tokens: int
) -> tuple[dict[str, int], str]:
    """Memory of :func:`leanstep.pruning.folder.recovery.recover_model` by use, and why it is not known, or "".

    The model runs once on tensors that have shapes and no values (torch's FakeTensorMode), which takes seconds. In
    such a pass transformers makes the masks of causal attention, which a run may do without: they are counted.

    Args:
        checkpoint: the dense model.
        names: of the parameters to prune.
        recovery: the settings; unless it has ``distill=False``, with the dense model as teacher.
        samples, tokens: of the calibration data. Images have the size in the configuration.
    """
    dtype = DTYPES[most_common_dtype(checkpoint)]
    is_half = dtype == torch.float16  # is trained in fp32
    try:
        model = empty_model_of(checkpoint, torch.float32 if is_half else dtype)
        batch = _sample(model, tokens)
        with _on_cpu(model):
            patterns = [escape(name) for name in names]
            sample = _batch_on_cpu(batch)
            uses = expected_distillation_bytes(model, sample, samples, recovery, include=patterns, snapshot=is_half)
            weights = sum(parameter.nbytes for parameter in model.parameters())
    except Exception as error:  # noqa: BLE001  # of any model that cannot run so
        return {}, f"memory of recovery, since the model does not run without values ({one_line(error)})"
    teacher = 0 if recovery.distill is False else checkpoint.size
    models = {"dense model": teacher, "pruned model": weights}
    return {use: size for use, size in models.items() if size} | uses, ""


def _sample(model: nn.Module, tokens: int) -> Batch:
    """One sample of a model on the meta device, without values as well."""
    config: Any = model.config
    if model.main_input_name == "input_ids":
        data = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    else:
        size = config.image_size
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        data = torch.zeros(1, config.num_channels, *sides, device="meta")
    (batch,) = as_batches(data, model)
    return batch


@contextmanager
def _on_cpu(model: nn.Module) -> Iterator[None]:
    """Context manager: tensors that are made have no values; those of the model, of the meta device, are replaced."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it prints the traceback of an error that is raised as well
    try:
        with FakeTensorMode():
            model._apply(_empty)
            model.tie_weights()  # type: ignore[operator]  # of transformers
            yield
    finally:
        log.setLevel(level)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _batch_on_cpu(batch: Batch) -> Batch:
    def copied(value: Any) -> Any:
        return _empty(value) if isinstance(value, Tensor) else value

    kwargs = {name: copied(value) for name, value in batch.kwargs.items()}
    return Batch(tuple(map(copied, batch.args)), kwargs, copied(batch.mask), copied(batch.labels))
