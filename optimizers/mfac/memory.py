"""What a window of gradients costs, and whether the device has it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.common.sharding import local
from leanstep.optimizers.mfac.compiled import is_fake
from leanstep.optimizers.mfac.scopes import home_bytes, scope_key, window_bytes

_GIB = 2**30
# a limit that stands for none
_NO_LIMIT = 2**60


def needed_bytes(groups: list[dict[str, Any]]) -> dict[torch.device, int]:
    """Bytes of windows and Gram matrices that this process holds, or will, by device."""
    needed: dict[torch.device, int] = {}
    homes: set[Any] = set()
    index = 0
    for number, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            key = scope_key(group, number, position, index)
            index += 1
            if not param.requires_grad:
                continue
            device = local(param).device
            extra = 0 if key in homes else home_bytes(param, group)
            homes.add(key)
            needed[device] = needed.get(device, 0) + window_bytes(param, group) + extra
    return needed


def check_memory(groups: list[dict[str, Any]], held: int = 0) -> None:
    """Raise unless every device has room for the windows; ``held``: bytes of them that are allocated already.

    Raises:
        ValueError: with the numbers, and what smaller forms would take.
    """
    params = [p for g in groups for p in g["params"]]
    if any(is_fake(local(p)) or p.device.type == "meta" for p in params):
        return  # nothing will be allocated
    for device, needed in needed_bytes(groups).items():
        available = available_bytes(device)
        if available is not None and needed - held > available:
            raise ValueError(_refusal(groups, device, needed, available))


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, as far as its system tells; None where it does not."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch's allocator keeps for itself is there as well
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _host_bytes() if device.type == "cpu" else None


def _host_bytes() -> int | None:
    """Of the machine, or of what a container allows."""
    found: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
        if limit.exists() and (text := limit.read_text().strip()).isdigit() and int(text) < _NO_LIMIT:
            found.append(int(text) - int(used.read_text()))
    except (OSError, ValueError):
        pass
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) if found else None


def _refusal(groups: list[dict[str, Any]], device: torch.device, needed: int, available: int) -> str:
    params = [p for g in groups for p in g["params"] if p.requires_grad and local(p).device == device]
    count, window = sum(local(p).numel() for p in params), groups[0]["window"]
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
        f"{_gib(available)} left. {'; '.join(smaller)}; shard_window=True or fully_shard divide it by the number of "
        "processes."
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:,.1f} GiB" if size >= _GIB / 10 else f"{size / 2**20:,.1f} MiB"


def state_bytes_of(states: list[dict[str, Any]]) -> int:
    """Bytes held here by state tensors."""
    tensors = [local(v) for state in states for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
