"""LANTON's momenta and previous gradients in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leanstep.kernels.reference.steps.average_int8 import averages
from leanstep.kernels.steps.average_int8 import average_step_int8
from leanstep.kernels.steps.common import StepOptions, compute_dtype, constant
from leanstep.optimizers.common.column_shards import cuts_rows, encode
from leanstep.optimizers.common.quantized import average_codes, average_options, average_values
from leanstep.optimizers.common.rounding import seeds_for
from leanstep.optimizers.common.sharding import Reducer, positions_of
from leanstep.optimizers.lanton.layers import LayerStep

# makes the random bits of stored gradients independent of those of momenta
_PREVIOUS = 0x2545F491


def values_int8(layers: Sequence[LayerStep], key: str) -> list[Tensor]:
    """Return the values of averages in 8 bits; those of momenta averaged with G if the group has ``nesterov``."""
    values = [
        torch.empty_like(t, dtype=compute_dtype(t.dtype), memory_format=torch.contiguous_format)
        for t in [layer.weight for layer in layers]
    ]
    for indices, alike in _alike(layers):
        if cuts_rows(alike[0].shard):
            for i, layer in zip(indices, alike, strict=True):
                values[i] = _of_columns(layer, key, update=False)[1]
            continue
        lists = ([layer.grad for layer in alike], *average_codes([layer.state for layer in alike], key))
        unused = constant([0] * len(alike), alike[0].weight.device, torch.int64)
        nesterov, options = key == "momentum_buffer" and alike[0].group["nesterov"], _options(alike[0], key, unused)
        average_step_int8(*lists, [values[i] for i in indices], options, nesterov=nesterov, update=False)
    return values


def update_int8(layers: Sequence[LayerStep], key: str, skips: Sequence[Tensor | None]) -> Reducer[None]:
    """Update averages in 8 bits by the gradients.

    Args:
        skips: per layer, flags that are above 0 to leave codes as they are: one, or one per tensor of the first
            dimension. None: update all.
    """
    for indices, alike in _alike(layers):
        flags, device = [skips[i] for i in indices], alike[0].weight.device
        seeds = _seeds(alike, key)
        if cuts_rows(alike[0].shard):
            new = [_of_columns(layer, key)[0] for layer in alike]
            none = constant([0], device, torch.int32)
            skip = [none if flag is None else flag for flag in flags] if any([f is not None for f in flags]) else None
            states, shards = [layer.state for layer in alike], [layer.shard for layer in alike]
            yield from encode(new, states, key, shards, seeds.unbind(), skip)
            continue
        offsets = positions_of([layer.shard for layer in alike], device)["offsets"]
        _update_rows(alike, key, flags, seeds, offsets)


def _update_rows(
    layers: Sequence[LayerStep], key: str, flags: Sequence[Tensor | None], seeds: Tensor, offsets: Tensor
) -> None:
    """Update averages of whole rows in one call; a stack whose matrices have flags is one tensor per matrix."""
    grads, (codes, scales) = [layer.grad for layer in layers], average_codes([layer.state for layer in layers], key)
    skip = None
    if any([flag is not None for flag in flags]):
        device, counts = seeds.device, [1 if flag is None else flag.numel() for flag in flags]
        starts = [k * grad[0].numel() for grad, n in zip(grads, counts, strict=True) for k in range(n)]
        grads, codes, scales = (
            [part for tensor, n in zip(ts, counts, strict=True) for part in (tensor.split(1) if n > 1 else [tensor])]
            for ts in (grads, codes, scales)
        )
        repeats = constant(counts, device, torch.int64)
        seeds, offsets = (t.repeat_interleave(repeats, output_size=sum(counts)) for t in (seeds, offsets))
        offsets = offsets + constant(starts, device, torch.int64)
        none = constant([0], device, torch.int32)
        skip = torch.cat([none if flag is None else flag for flag in flags])
    average_step_int8(grads, codes, scales, [], _options(layers[0], key, seeds, offsets), skip=skip)


def _alike(layers: Sequence[LayerStep]) -> list[tuple[list[int], list[LayerStep]]]:
    """Return the layers that one call takes, with their indices; none of whole rows that has no entry here."""
    sets: dict[object, list[int]] = {}
    for i, layer in enumerate(layers):
        cut = bool(layer.shard.cuts) and cuts_rows(layer.shard)
        if cut or layer.weight.numel() > 0:  # all processes reduce the blocks of columns
            sets.setdefault((id(layer.group), layer.weight.device, layer.weight.dtype, cut), []).append(i)
    return [(indices, [layers[i] for i in indices]) for indices in sets.values()]


def _of_columns(layer: LayerStep, key: str, *, update: bool = True) -> tuple[Tensor, Tensor]:
    """Return the new average and the output, where shards cut rows: the definition, in plain torch."""
    options = _options(layer, key)
    old = average_values(layer.state, key, layer.shard, options.scalars.dtype)
    nesterov = key == "momentum_buffer" and not update and layer.group["nesterov"]
    return averages(old, layer.grad, options, nesterov=nesterov, update=update)


def _options(layer: LayerStep, key: str, seeds: Tensor | None = None, offsets: Tensor | None = None) -> StepOptions:
    """Return the options of the averages of a layer's group. G' has the gradient's own sign, and no old average."""
    momentum = key == "momentum_buffer"
    weight = layer.group["betas"][0] if momentum else 0.0
    return average_options(weight, layer.weight, seeds, offsets)._replace(maximize=momentum and layer.group["maximize"])


def _seeds(layers: Sequence[LayerStep], key: str) -> Tensor:
    steps, indices = [layer.state["step"] for layer in layers], [layer.param_index for layer in layers]
    seeds = seeds_for(steps, indices, layers[0].group["seed"], layers[0].weight.device)
    return seeds ^ (_PREVIOUS if key == "previous_grad" else 0)
