"""State and seeds for rounding fp32 updates to parameters of lower precision.

``leanstep.kernels.reference.rounding`` defines the rounding modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep._torch import is_dtensor, join_parts
from leanstep.kernels.reference.rounding import hash32, hash_number, narrow, widen
from leanstep.kernels.steps.common import constant
from leanstep.optimizers.common.checks import describe
from leanstep.optimizers.common.saved_tensors import COUNT, StateRule
from leanstep.optimizers.common.sharding import local, locals_of, new_state, plain, readable
from leanstep.optimizers.common.state import Entry, new_count

# state key of each rounding mode
STATE_KEY = {"kahan": "kahan_compensation", "master": "master_param", "split": "split_difference"}

# Kernels take a compensation in the parameter's dtype, a master in fp32 and a difference in int8. Parameters of another
# dtype at the time of saving had none. :func:`init_rounding` creates the entries.
ENTRIES = (
    Entry("kahan_compensation", used=False, loads=StateRule((torch.bfloat16, torch.float16), cast=True)),
    Entry("master_param", dtype=torch.float32, used=False, loads=StateRule((torch.float32,))),
    Entry("split_difference", dtype=torch.int8, used=False, loads=StateRule((torch.int8,))),
    Entry("step", dtype=torch.float32, shape=(), used=False, loads=COUNT),
)


def effective(owner: str, group: dict[str, Any], position: int, param: Tensor) -> str:
    """Return a parameter's rounding mode: "nearest" for fp32 and fp64, else the group's.

    Raises:
        ValueError: for "stochastic" and "split" of fp16. Near the ends of fp16's range the first cannot be unbiased;
            the second is defined by the bits of bf16.
    """
    rounding = group["rounding"]
    if param.dtype in (torch.float32, torch.float64):
        return "nearest"
    if rounding in ("stochastic", "split") and param.dtype != torch.bfloat16:
        raise ValueError(
            f"{owner}: rounding={rounding!r} supports bfloat16 parameters, but {describe(group, position)} is "
            f"{param.dtype}. Use rounding='master' or 'kahan' for it."
        )
    return rounding


def init_rounding(state: dict[str, Any], param: Tensor, rounding: str) -> None:
    """Create the state of a parameter's rounding mode, if it has one and it is missing.

    The state of another mode is converted, and dropped: the setting was changed after a step.
    """
    if rounding == "stochastic" and "step" not in state:
        state["step"] = new_count(param)
    key = STATE_KEY.get(rounding)
    if key is None or key in state:
        return
    weight = None
    for mode, other in STATE_KEY.items():
        if other in state and state[other].shape == param.shape:
            weight = widen(readable(param), local(state.pop(other)), mode)
    if rounding == "master":
        state[key] = plain(param.detach()).to(torch.float32, copy=True)
    else:
        state[key] = new_state(param, torch.int8 if rounding == "split" else None)
    if weight is not None:
        new_param, new_rounding_state = narrow(weight, param, rounding)
        assert new_rounding_state is not None
        local(param).copy_(new_param)
        local(state[key]).copy_(new_rounding_state)


def multiply(param: Tensor, state: dict[str, Any], rounding: str, factor: Tensor) -> None:
    """Multiply this process's shard of a parameter, with what the state of its rounding mode adds to it, in place.

    ``factor`` broadcasts to the shard.
    """
    key, shard = STATE_KEY.get(rounding), local(param)
    if key not in state or shard.dtype.itemsize != 2:
        shard.mul_(factor)
        return
    new_param, new_state = narrow(widen(readable(param), local(state[key]), rounding) * factor, shard, rounding)
    assert new_state is not None
    shard.copy_(new_param)
    local(state[key]).copy_(new_state)


def full_precision(param: Tensor, state: dict[str, Any], rounding: str) -> Tensor:
    """Return a copy of a parameter in fp32 (fp64 for fp64), with what the state of its rounding mode adds to it."""
    key, shard = STATE_KEY.get(rounding), readable(param.detach())
    if key in state and shard.dtype.itemsize == 2:
        weight = widen(shard, local(state[key]), rounding)
    else:
        weight = shard.clone() if shard.dtype == torch.float64 else shard.to(torch.float32, copy=True)
    return join_parts(weight, param, param.shape) if is_dtensor(param) else weight


def seeds_for(steps: list[Tensor], indices: list[int], seed: int, device: torch.device) -> Tensor:
    """Hash (seed, tensor index, step count) to one 32-bit seed per tensor, int64 [n]."""
    # as Python numbers: torch.compile's inductor multiplies constants without wrapping them to 32 bits
    hashed = constant([hash_number(index, seed) for index in indices], device, torch.int64)
    count = torch.stack([s.to(device) for s in steps]).to(torch.int64)
    return hash32(count, hashed).to(torch.int64) & 0xFFFFFFFF


def rounding_states(states: Sequence[dict[str, Any]], rounding: str) -> list[Tensor]:
    """Return this process's shards of the rounding state; an empty list if ``rounding`` has none."""
    return locals_of([s[STATE_KEY[rounding]] for s in states]) if rounding in STATE_KEY else []
