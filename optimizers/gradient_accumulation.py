"""Sums of gradients inside an optimizer's momentum, for rules that use the gradient through that momentum alone.

A step computes m = w * m + (1 - w) * g, with the weight w of the old momentum. Adding (1 - w) / w * g to m beforehand
has the effect of adding g to the gradient of that step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.common.base import GradientAverage, LeanOptimizer, count_nonfinite, dense_gradient
from leanstep.optimizers.common.checks import describe
from leanstep.optimizers.common.sharding import local


def refuse_accumulation(optimizer: LeanOptimizer) -> None:
    """Raise ValueError if a step needs the gradient of a parameter itself, or if a parameter is sharded."""
    for group in optimizer.param_groups:
        for position, param in enumerate(group["params"]):
            if param.requires_grad and not isinstance(reason := average_of(optimizer, group, param), GradientAverage):
                raise ValueError(
                    "release_gradients: accumulate() expected rules that use gradients through a momentum alone, but "
                    f"{type(optimizer).__name__}'s step of {describe(group, position)} {reason}. Nothing was changed. "
                    "Take accumulate(keep_others=True), which keeps such gradients until the last pass, or larger "
                    "batches."
                )


def keeping_gradients(optimizer: LeanOptimizer) -> list[Tensor]:
    """Return the parameters that keep their gradients until the last pass, under ``accumulate(keep_others=True)``."""
    return [
        param
        for group in optimizer.param_groups
        for param in group["params"]
        if param.requires_grad and not isinstance(average_of(optimizer, group, param), GradientAverage)
    ]


def average_of(optimizer: LeanOptimizer, group: dict[str, Any], param: Tensor) -> GradientAverage | str:
    """Return the average that takes a parameter's gradients, or why there is none, as the end of a sentence."""
    if hasattr(param, "device_mesh"):
        return "is that of a shard, whose processes accumulate by set_requires_gradient_sync(False)"
    return optimizer._gradient_average(group, param)


@torch.no_grad()
def add_to_average(optimizer: LeanOptimizer, group: dict[str, Any], position: int) -> bool:
    """Add the gradient of a parameter to its average and free it; return False if there is no such average.

    A gradient with non-finite entries is left out and counted, unless the group has nonfinite="pass".
    """
    param = group["params"][position]
    average = average_of(optimizer, group, param)
    if not isinstance(average, GradientAverage):
        return False
    if param.grad is not None:
        addend = local(dense_gradient(type(optimizer).__name__, group, position, param))
        buffer = local(optimizer._state_of(group, position, param)[average.key])
        if group["nonfinite"] == "skip":
            finite = torch.isfinite(addend).all()
            addend = torch.where(finite, addend, 0.0)
            count_nonfinite(group, (~finite).reshape(1))
        factor = (1.0 - average.weight) / average.weight
        buffer.add_(addend, alpha=-factor if group["maximize"] else factor)
    param.grad = None
    return True
