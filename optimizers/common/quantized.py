"""State of 8 bits: codes with one fp32 scale for every 128 neighbours of a row.

``leanstep.kernels.reference.quantization`` defines the codes. An average ``KEY`` in codes has the entry ``KEY_scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep._torch import is_dtensor, join_parts
from leanstep.kernels.reference.quantization import FP8, dequantize, quantize, scale_shape
from leanstep.kernels.steps.common import StepOptions, compute_dtype, pack
from leanstep.optimizers.common.column_shards import cuts_rows, decoded, encode, scale_placements
from leanstep.optimizers.common.sharding import Reducer, Shard, dtype_of, first_index, local, locals_of, shard_of

# what a setting of a momentum's dtype may be, besides ordinary dtypes
CODES = (torch.int8, FP8)


def is_quantized(setting: torch.dtype | str | None, param: Tensor) -> bool:
    """Whether a dtype's setting is one of codes, and the parameter has the two dimensions that codes need."""
    return dtype_of(setting) in CODES and param.dim() >= 2


def scale_key(key: str) -> str:
    """Return the name of the scales of an average."""
    return f"{key}_scale"


def average_values(state: dict[str, Any], key: str, shard: Shard, dtype: torch.dtype) -> Tensor:
    """Return the values of this process's codes of an average, in fp32 or fp64."""
    codes, scales = local(state[key]), local(state[scale_key(key)])
    return decoded(codes, scales, shard, dtype) if cuts_rows(shard) else dequantize(codes, scales, dtype)


def store_averages(
    values: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    key: str,
    shards: Sequence[Shard],
    seeds: Sequence[Tensor | int],
) -> Reducer[None]:
    """Store this process's values of averages as codes and scales, in fp32 or fp64.

    Args:
        seeds: of the random bits, one for each tensor.
    """
    rows = list(zip(values, states, shards, seeds, strict=True))
    if cut := [row for row in rows if cuts_rows(row[2])]:
        cut_values, cut_states, cut_shards, cut_seeds = zip(*cut, strict=True)
        yield from encode(cut_values, cut_states, key, cut_shards, cut_seeds)
    for value, state, shard, seed in rows:
        if cuts_rows(shard):
            continue
        offset = first_index(shard)
        assert offset is not None
        new = quantize(value, seed, offset, dtype=local(state[key]).dtype)
        for tensor, result in zip((state[key], state[scale_key(key)]), new, strict=True):
            local(tensor).copy_(result)


def average_codes(states: Sequence[dict[str, Any]], key: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return this process's codes and scales of an average of several parameters."""
    name = scale_key(key)
    return locals_of([state[key] for state in states]), locals_of([state[name] for state in states])


def average_options(weight: float, like: Tensor, seeds: Tensor | None, offsets: Tensor | None) -> StepOptions:
    """Return the options of :func:`average_step_int8` for averages with this weight of the old one.

    Args:
        like: an output, or a tensor of its device and dtype.
        seeds, offsets: of the random bits, one per tensor.
    """
    scalars = pack([weight, 1.0 - weight], like.device, compute_dtype(like.dtype))
    return StepOptions(scalars, seeds=seeds, offsets=offsets)


def new_scales(param: Tensor) -> Tensor:
    """Return zeros for the scales, with the placements of the parameter where they do not divide blocks."""
    shard, part = shard_of(param), local(param)
    placements = scale_placements(param, shard)
    shape = scale_shape(part.shape) if placements is None else (len(part), scale_shape(shard.shape)[1])
    scales = torch.zeros(shape, dtype=torch.float32, device=part.device)
    return join_parts(scales, param, scale_shape(shard.shape), placements) if is_dtensor(param) else scales
