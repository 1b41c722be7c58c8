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
    values = [t.new_empty(t.shape, dtype=compute_dtype(t.dtype)) for t in [layer.weight for layer in layers]]
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


def update_int8(updates: Sequence[tuple[LayerStep, Tensor | None]], key: str) -> Reducer[None]:
    """Update averages in 8 bits by the gradients.

    A flag above 0 leaves codes as they are: one for a layer, or one per tensor of its first dimension; None: no flag.
    """
    for indices, layers in _alike([layer for layer, _ in updates]):
        flags, states = [updates[i][1] for i in indices], [layer.state for layer in layers]
        seed, device = layers[0].group["seed"], layers[0].weight.device
        seeds = seeds_for([state["step"] for state in states], [layer.param_index for layer in layers], seed, device)
        if key == "previous_grad":
            seeds = seeds ^ _PREVIOUS
        if cuts_rows(layers[0].shard):  # one layer after another, because each is decoded
            for layer, flag, hashed in zip(layers, flags, seeds.unbind(), strict=True):
                skip = None if flag is None else [flag]
                yield from encode([_of_columns(layer, key)[0]], [layer.state], key, [layer.shard], [hashed], skip)
            continue
        offsets = positions_of([layer.shard for layer in layers], device)["offsets"]
        grads, (codes, scales), skips = [layer.grad for layer in layers], average_codes(states, key), None
        if any([flag is not None for flag in flags]):  # a stack whose matrices have flags is one tensor per matrix
            none = constant([0], device, torch.int32)
            parts = [none if flag is None else flag for flag in flags]
            counts, skips = [flag.numel() for flag in parts], torch.cat(parts)
            starts = [k * grad[0].numel() for grad, n in zip(grads, counts, strict=True) for k in range(n)]
            grads, codes, scales = (
                [part for t, n in zip(ts, counts, strict=True) for part in (t.split(1) if n > 1 else [t])]
                for ts in (grads, codes, scales)
            )
            repeats = constant(counts, device, torch.int64)
            seeds, offsets = (t.repeat_interleave(repeats, output_size=len(starts)) for t in (seeds, offsets))
            offsets = offsets + constant(starts, device, torch.int64)
        average_step_int8(grads, codes, scales, [], _options(layers[0], key, seeds, offsets), skip=skips)


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
