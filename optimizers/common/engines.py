"""Sharding engines that change parameters behind an optimizer: what they leave to see, and the errors about it.

DTensors say how they are sharded. These engines do not: FSDP1 and ZeRO-2/3 flatten parameters, torch's ZeRO-1 gives
each process some of them, and a stage of a pipeline has some of the layers.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.common.checks import describe

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
_PIPELINING = "torch.distributed.pipelining.stage"


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP1 has flattened a parameter: torch's mark, also on the views that use_orig_params=True shows."""
    return bool(getattr(param, "_fsdp_flattened", False))


def inside_zero() -> bool:
    """Whether torch's ZeroRedundancyOptimizer calls, on several processes. It leaves no other sign of itself."""
    if _ZERO not in sys.modules or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return False
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == _ZERO:
            return True
    return False


def in_pipeline(groups: list[dict[str, Any]]) -> bool:
    """Whether parameters belong to one of several stages of torch.distributed.pipelining. Looks at all objects."""
    module = sys.modules.get(_PIPELINING)
    if module is None:
        return False
    ids = {id(param) for group in groups for param in group["params"]}
    stages = [o for o in gc.get_objects() if issubclass(type(o), module._PipelineStageBase) and o.num_stages > 1]
    return any(id(param) in ids for stage in stages for param in stage.submod.parameters())


def refuse_flattened(owner: str, group: dict[str, Any], position: int) -> None:
    """Raise ValueError if FSDP1 has flattened a parameter."""
    if is_flattened(group["params"][position]):
        raise _flattened(owner, describe(group, position), "FSDP1 has flattened it")


def refuse_replaced(owner: str, group: dict[str, Any], position: int, dims: list[int]) -> None:
    """Raise ValueError if a group lost parameters since it was added, or the one here has other dimensions.

    DeepSpeed's ZeRO replaces the parameters of a group by one vector, after the optimizer was built.
    """
    count, now = len(group["params"]), group["params"][position].dim()
    if count < len(dims):
        change = f"its group had {len(dims)} parameters when the optimizer was built, and has {count} now"
    elif position < len(dims) and now != dims[position]:
        change = f"it had {dims[position]} dimensions when the optimizer was built, and has {now} now"
    else:
        return
    name = f"parameter {position} {tuple(group['params'][position].shape)} of group {group.get('name', '(unnamed)')!r}"
    raise _flattened(owner, name, change)


def _flattened(owner: str, name: str, change: str) -> ValueError:
    return ValueError(
        f"{owner}: expected {name} as the model has it, but {change}. A sharding engine that flattens parameters "
        "(FSDP1, DeepSpeed ZeRO) leaves no rows and columns, and a part of each gradient; nothing was changed. Shard "
        "by FSDP2 (torch.distributed.fsdp.fully_shard; Accelerate: fsdp_version=2) or take DDP."
    )


def partial_model(owner: str, setting: str, engine: str, advice: str) -> ValueError:
    """Return the error of a rule over all parameters where a process has only some of them."""
    return ValueError(
        f"{owner}: {setting} needs all parameters of the model, but {engine} gives this process some of them whole and "
        f"would make another step than one process. {advice}; FSDP2 and DDP take every setting."
    )
