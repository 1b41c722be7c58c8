"""Momenta of 8 bits: int8 codes with one fp32 scale for every 128 neighbours of a row.

``leanstep.kernels.reference.quantization`` defines the codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep._torch import is_dtensor, join_parts
from leanstep.kernels.reference.quantization import dequantize, quantize, scale_shape
from leanstep.kernels.steps.common import compute_dtype
from leanstep.optimizers.common.rounding import init_step
from leanstep.optimizers.common.saved_tensors import COUNT, StateRule
from leanstep.optimizers.common.sharding import dtype_of, local, new_state, shard_of

SCALE_KEY = "exp_avg_scale"

# scales may be infinite or NaN, as other momenta
QUANTIZED_RULES = {
    "exp_avg": StateRule((torch.int8,), shaped=True),
    SCALE_KEY: StateRule((torch.float32,)),
    # it seeds the rounding of the codes
    "step": COUNT._replace(required=True),
}


def is_quantized(group: dict[str, Any], param: Tensor) -> bool:
    """Whether a group's setting ``momentum_dtype`` is int8 and the parameter has the two dimensions that it needs."""
    return dtype_of(group["momentum_dtype"]) == torch.int8 and param.dim() >= 2


def momentum_scale_shape(param: Tensor) -> tuple[int, int]:
    """Return the shape of a parameter's scales before sharding."""
    return scale_shape(param.shape)


def init_momentum(state: dict[str, Any], group: dict[str, Any], param: Tensor) -> None:
    """Create ``exp_avg`` in the dtype of the group's setting, with its scales if it is int8.

    Converts a momentum whose scales, or their absence, contradict the setting: it was changed after a step. A
    parameter with int8 is whole or sharded along dimension 0.
    """
    quantized = is_quantized(group, param)
    setting = dtype_of(group["momentum_dtype"])
    floating = param.dtype if setting == torch.int8 else setting
    if quantized:
        init_step(state, param)
    if "exp_avg" not in state:
        if quantized:
            state[SCALE_KEY] = _new_scales(param)
        state["exp_avg"] = new_state(param, torch.int8 if quantized else floating)
    elif state["exp_avg"].shape != param.shape:
        return  # resized after a step, which the step refuses by name
    elif quantized and SCALE_KEY not in state:
        scales, codes = _new_scales(param), new_state(param, torch.int8)
        new_codes, new_scales = quantize(local(state["exp_avg"]).to(compute_dtype(param.dtype)), 0)
        local(codes).copy_(new_codes)
        local(scales).copy_(new_scales)
        state["exp_avg"], state[SCALE_KEY] = codes, scales
    elif not quantized and SCALE_KEY in state:
        momentum = new_state(param, floating)
        scales = state.pop(SCALE_KEY)
        local(momentum).copy_(dequantize(local(state["exp_avg"]), local(scales), compute_dtype(param.dtype)))
        state["exp_avg"] = momentum


def _new_scales(param: Tensor) -> Tensor:
    """Return zeros for the scales, with the placements of the parameter."""
    shard = shard_of(param)
    scales = torch.zeros(scale_shape(local(param).shape), dtype=torch.float32, device=local(param).device)
    return join_parts(scales, param, scale_shape(shard.shape)) if is_dtensor(param) else scales
