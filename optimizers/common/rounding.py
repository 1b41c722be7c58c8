"""State and seeds for rounding fp32 updates to parameters of lower precision.

``leanstep.kernels.reference.rounding`` defines the rounding modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.reference.rounding import hash32, hash_number
from leanstep.kernels.steps.common import constant
from leanstep.optimizers.common.checks import describe
from leanstep.optimizers.common.saved_tensors import COUNT, StateRule
from leanstep.optimizers.common.sharding import local, new_state, plain

# state key of each rounding mode
STATE_KEY = {"kahan": "kahan_compensation", "master": "master_param"}

# Kernels take a compensation in the parameter's dtype and a master in fp32. Parameters of another dtype at the time of
# saving had none.
STATE_RULES = {
    "kahan_compensation": StateRule((torch.bfloat16, torch.float16), cast=True, required=False, shaped=True),
    "master_param": StateRule((torch.float32,), required=False, shaped=True),
    "step": COUNT,
}


def effective(owner: str, group: dict[str, Any], position: int, param: Tensor) -> str:
    """Return a parameter's rounding mode: "nearest" for fp32 and fp64, else the group's.

    Raises:
        ValueError: for stochastic rounding of fp16; near the ends of fp16's range it cannot be unbiased.
    """
    rounding = group["rounding"]
    if param.dtype in (torch.float32, torch.float64):
        return "nearest"
    if rounding == "stochastic" and param.dtype != torch.bfloat16:
        raise ValueError(
            f"{owner}: rounding='stochastic' supports bfloat16 parameters, but {describe(group, position)} is "
            f"{param.dtype}. Use rounding='master' or 'kahan' for it."
        )
    return rounding


def init_rounding(state: dict[str, Any], param: Tensor, rounding: str) -> None:
    """Create the state of a parameter's rounding mode, if it has one and it is missing."""
    if rounding == "kahan" and "kahan_compensation" not in state:
        state["kahan_compensation"] = new_state(param)
    elif rounding == "master" and "master_param" not in state:
        state["master_param"] = plain(param.detach()).to(torch.float32, copy=True)
    elif rounding == "stochastic":
        init_step(state, param)


def init_step(state: dict[str, Any], param: Tensor) -> None:
    """Create the step count that seeds stochastic rounding, if it is missing."""
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=local(param).device)


def seeds_for(steps: list[Tensor], indices: list[int], seed: int, device: torch.device) -> Tensor:
    """Hash (seed, tensor index, step count) to one 32-bit seed per tensor, int64 [n]."""
    # as Python numbers: torch.compile's inductor multiplies constants without wrapping them to 32 bits
    hashed = constant([hash_number(index, seed) for index in indices], device, torch.int64)
    count = torch.stack([s.to(device) for s in steps]).to(torch.int64)
    return hash32(count, hashed).to(torch.int64) & 0xFFFFFFFF


def rounding_states(states: Sequence[dict[str, Any]], rounding: str) -> list[Tensor]:
    """Return this process's shards of the rounding state; an empty list if ``rounding`` has none."""
    return [local(s[STATE_KEY[rounding]]) for s in states] if rounding in STATE_KEY else []
