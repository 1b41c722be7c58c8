"""The memory of M-FAC's windows, checked against the free memory of their devices."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from leanstep._memory import free_memory
from leanstep._torch import local_part
from leanstep.optimizers.common.state import bytes_of
from leanstep.optimizers.mfac.scopes import scope_key
from leanstep.optimizers.mfac.state import SCOPE, WINDOW
from leanstep.optimizers.mfac.window import is_fake

_GIB = 2**30


def needed_bytes(groups: list[dict[str, Any]]) -> dict[torch.device, int]:
    """Return the bytes of all windows and scope states on this process, per device."""
    needed: dict[torch.device, int] = {}
    scopes: set[Any] = set()
    index = 0
    for group_index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            key = scope_key(group, group_index, position, index)
            index += 1
            if not param.requires_grad:
                continue
            part = local_part(param)
            once = 0 if key in scopes else bytes_of(SCOPE, group, param)
            scopes.add(key)
            window = bytes_of(WINDOW, group, param) * part.numel() // max(param.numel(), 1)  # sharded like it
            needed[part.device] = needed.get(part.device, 0) + window + once
    return needed


def check_memory(groups: list[dict[str, Any]], states: list[dict[str, Any]]) -> None:
    """Raise ValueError unless every device has the memory for the windows that are not in ``states`` yet.

    The message has the sizes, and those of smaller settings.
    """
    params = [p for g in groups for p in g["params"]]
    if any(is_fake(local_part(p)) or p.device.type == "meta" for p in params):
        return  # nothing will be allocated
    tensors = [local_part(v) for state in states for v in state.values() if isinstance(v, Tensor)]
    allocated = sum(t.numel() * t.element_size() for t in tensors)
    for device, needed in needed_bytes(groups).items():
        available = free_memory(device)
        if available is not None and device.type == "cpu":
            # the processes of torchrun on this machine share it
            available //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if available is not None and needed - allocated > available:
            raise ValueError(_refusal(groups, device, needed, available))


def _refusal(groups: list[dict[str, Any]], device: torch.device, needed: int, available: int) -> str:
    params = [p for g in groups for p in g["params"] if p.requires_grad and local_part(p).device == device]
    count, window = sum(local_part(p).numel() for p in params), groups[0]["window"]
    options = {
        "storage='bf16'": {"compression": None, "storage": "bf16"},
        "compression='topk'": {"compression": "topk", "storage": None},
        f"window={max(window // 8, 1)}": {"window": max(window // 8, 1)},
        "scope='model'": {"scope": "model"},
    }
    smaller = []
    for text, change in options.items():
        size = sum(needed_bytes([{**group, **change} for group in groups]).values())
        if size < needed:
            smaller.append(f"{text} takes {_gib(size)}")
    return (
        f"MFAC: a window of {window} gradients of {count:,} parameters takes {_gib(needed)} on {device}, which has "
        f"{_gib(available)} left. {'; '.join(smaller)}; fully_shard divides it by the number of processes."
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:,.1f} GiB" if size >= _GIB / 10 else f"{size / 2**20:,.1f} MiB"
