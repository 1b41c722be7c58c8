"""State of 8 bits: codes with one fp32 scale for every 128 neighbours of a row.

``leanstep.kernels.reference.quantization`` defines the codes. An average ``KEY`` in codes has the entry ``KEY_scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep._torch import is_dtensor, join_parts
from leanstep.kernels.reference.quantization import dequantize, quantize, scale_shape
from leanstep.kernels.steps.common import StepOptions, compute_dtype, pack
from leanstep.optimizers.common.rounding import init_step
from leanstep.optimizers.common.saved_tensors import COUNT, StateRule
from leanstep.optimizers.common.sharding import dtype_of, local, new_state, shard_of


def is_quantized(setting: torch.dtype | str | None, param: Tensor) -> bool:
    """Whether a dtype's setting is int8 and the parameter has the two dimensions that codes need."""
    return dtype_of(setting) == torch.int8 and param.dim() >= 2


def scale_key(key: str) -> str:
    """Return the name of the scales of an average."""
    return f"{key}_scale"


def quantized_rules(key: str, *, squares: bool = False) -> dict[str, StateRule]:
    """Return what loading accepts of an average in codes. Scales may be infinite or NaN, as other averages."""
    codes = StateRule((torch.uint8 if squares else torch.int8,), shaped=True)
    # the step count seeds the rounding of the codes
    return {key: codes, scale_key(key): StateRule((torch.float32,)), "step": COUNT._replace(required=True)}


def scale_shapes(param: Tensor, *keys: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the scales of averages, before sharding."""
    return {scale_key(key): scale_shape(param.shape) for key in keys}


def init_average(
    state: dict[str, Any], key: str, param: Tensor, setting: torch.dtype | str | None, *, squares: bool = False
) -> None:
    """Create the average ``key`` as the setting of its dtype says, with its scales if that is int8.

    Parameters without two dimensions have an average in their own dtype. Converts an average whose scales, or their
    absence, contradict the setting: it was changed after a step. A parameter with int8 is whole or sharded along
    dimension 0.
    """
    if key in state and state[key].shape != param.shape:
        return  # resized after a step, which the step refuses by name
    scales_name, wide = scale_key(key), compute_dtype(param.dtype)
    if is_quantized(setting, param):
        init_step(state, param)
        if scales_name in state:
            return
        codes, scales = new_state(param, torch.uint8 if squares else torch.int8), _new_scales(param)
        if key in state:
            new_codes, new_scales = quantize(local(state[key]).to(wide), 0, squares=squares)
            local(codes).copy_(new_codes)
            local(scales).copy_(new_scales)
        state[scales_name], state[key] = scales, codes
    elif key not in state or scales_name in state:
        average = new_state(param, None if dtype_of(setting) == torch.int8 else setting)
        if key in state:
            local(average).copy_(dequantize(local(state[key]), local(state.pop(scales_name)), wide))
        state[key] = average


def average_codes(states: Sequence[dict[str, Any]], key: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return this process's codes and scales of an average of several parameters."""
    return [local(state[key]) for state in states], [local(state[scale_key(key)]) for state in states]


def average_options(weight: float, like: Tensor, seeds: Tensor | None, offsets: Tensor | None) -> StepOptions:
    """Return the options of :func:`average_step_int8` for averages with this weight of the old one.

    Args:
        like: an output, or a tensor of its device and dtype.
        seeds, offsets: of the random bits, one per tensor.
    """
    scalars = pack([weight, 1.0 - weight], like.device, compute_dtype(like.dtype))
    return StepOptions(scalars, seeds=seeds, offsets=offsets)


def _new_scales(param: Tensor) -> Tensor:
    """Return zeros for the scales, with the placements of the parameter."""
    shard = shard_of(param)
    scales = torch.zeros(scale_shape(local(param).shape), dtype=torch.float32, device=local(param).device)
    return join_parts(scales, param, scale_shape(shard.shape)) if is_dtensor(param) else scales
