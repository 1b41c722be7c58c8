"""LANTON's momentum and previous gradient in 8 bits, one layer at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leanstep.kernels.reference.steps.average_int8 import averages
from leanstep.kernels.steps.average_int8 import average_step_int8
from leanstep.kernels.steps.common import StepOptions, compute_dtype, constant
from leanstep.optimizers.common.column_shards import cuts_rows, encode
from leanstep.optimizers.common.quantized import average_options, average_values, scale_key
from leanstep.optimizers.common.rounding import seeds_for
from leanstep.optimizers.common.sharding import Reducer, local, positions_of

if TYPE_CHECKING:
    from leanstep.optimizers.lanton.step import LayerStep

# makes the random bits of stored gradients independent of those of momenta
_PREVIOUS = 0x2545F491


def values_int8(layer: LayerStep, key: str, weight: float, *, nesterov: bool = False) -> Tensor:
    """Return the values of an average in 8 bits, with ``nesterov`` averaged with G; leave the stored one."""
    if cuts_rows(layer.shard):
        return _average_of_columns(layer, key, weight, nesterov=nesterov, update=False)[1]
    values = _new_values(layer)
    _average_int8(layer, key, weight, output=values, nesterov=nesterov, update=False)
    return values


def update_int8(layer: LayerStep, key: str, weight: float, skip: Tensor | None) -> Reducer[None]:
    """Update an average in 8 bits by the gradient; ``skip`` as for :func:`_average_int8`."""
    if not cuts_rows(layer.shard):
        _average_int8(layer, key, weight, skip)
        return
    average, _ = _average_of_columns(layer, key, weight)
    skips = None if skip is None else [skip]
    yield from encode([average], [layer.state], key, [layer.shard], _seeds(layer, key).unbind(), skips)


def _average_int8(
    layer: LayerStep,
    key: str,
    weight: float,
    skip: Tensor | None = None,
    output: Tensor | None = None,
    *,
    nesterov: bool = False,
    update: bool = True,
) -> None:
    """Update an average in 8 bits by the gradient, or write its values, by :func:`average_step_int8`.

    Args:
        weight: of the old average.
        skip: int32, one per tensor of the parameter's first dimension, or one for all. None: update all.
    """
    grad, codes, scales = (local(t) for t in (layer.grad, layer.state[key], layer.state[scale_key(key)]))
    if grad.numel() == 0:  # a process without matrices of a stack has no flags
        return
    seeds = _seeds(layer, key)
    offsets = positions_of([layer.shard], grad.device)["offsets"]
    lists = [[grad], [codes], [scales], [] if output is None else [output]]
    if skip is not None and skip.numel() > 1:  # each matrix of a stack has a flag
        lists = [[row for tensor in tensors for row in tensor.split(1)] for tensors in lists]
        distances = constant([i * grad[0].numel() for i in range(len(grad))], grad.device, torch.int64)
        seeds, offsets = seeds.expand(len(grad)).contiguous(), offsets + distances
    options = _options(layer, key, weight, seeds, offsets)
    grads, all_codes, all_scales, outputs = lists
    average_step_int8(grads, all_codes, all_scales, outputs, options, skip=skip, nesterov=nesterov, update=update)


def _average_of_columns(
    layer: LayerStep, key: str, weight: float, *, nesterov: bool = False, update: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the new average and the output, where shards cut rows: the definition, in plain torch."""
    options = _options(layer, key, weight, None, None)
    old = average_values(layer.state, key, layer.shard, options.scalars.dtype)
    return averages(old, local(layer.grad), options, nesterov=nesterov, update=update)


def _options(layer: LayerStep, key: str, weight: float, seeds: Tensor | None, offsets: Tensor | None) -> StepOptions:
    """Return the options of an average with this weight of the old one. G' has the gradient's own sign."""
    maximize = layer.group["maximize"] and key == "momentum_buffer"
    return average_options(weight, local(layer.param), seeds, offsets)._replace(maximize=maximize)


def _seeds(layer: LayerStep, key: str) -> Tensor:
    seeds = seeds_for([layer.state["step"]], [layer.param_index], layer.group["seed"], local(layer.param).device)
    return seeds ^ (_PREVIOUS if key == "previous_grad" else 0)


def _new_values(layer: LayerStep) -> Tensor:
    weight = local(layer.param)
    return torch.empty_like(weight, dtype=compute_dtype(weight.dtype), memory_format=torch.contiguous_format)
