"""Free memory of a device, within the limits of control groups, and the peak of this process.

Imports torch only for an accelerator.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROCESS_CGROUPS = Path("/proc/self/cgroup")
PROCESS_STATUS = Path("/proc/self/status")

# files with the limit and the usage, and the key of the reclaimable page cache: cgroup v2, then v1
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def peak_process_memory() -> int | None:
    """Return the largest number of bytes of this process that were in memory at once, libraries included.

    None on Windows.
    """
    # what getrusage tells on Linux is no less than the size of the process that started this one
    with suppress(OSError):
        if match := re.search(r"VmHWM:\s+(\d+) kB", PROCESS_STATUS.read_text(encoding="utf-8", errors="replace")):
            return int(match[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: "torch.device | str") -> int | None:
    """Return the bytes that this process can still allocate on a device; None if the system does not report them.

    CPU: the machine's available memory, or less where control groups limit it (cgroup v1 and v2: containers, Slurm,
    systemd). CUDA and ROCm: the device's free memory and the unused memory of torch's allocator.
    """
    kind = str(device).partition(":")[0]
    if kind == "cpu":
        return min([psutil.virtual_memory().available, *_left_in_cgroups()])
    if kind != "cuda":
        return None
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _left_in_cgroups() -> Iterator[int]:
    """Yield the bytes left in each control group of this process and in each ancestor group."""
    for root, group, names in _cgroups():
        # in a container this is often a path of the host, which does not exist: then the root has the limit
        for folder in (root / group, *(root / group).parents):
            if folder.is_relative_to(root):
                yield from _left_in(folder, *names)


def _cgroups() -> Iterator[tuple[Path, str, tuple[str, str, str]]]:
    """Yield (mount point, path below it, file names) of each hierarchy that limits memory."""
    try:
        lines = PROCESS_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield CGROUP_ROOT, path.lstrip("/"), _V2
        elif "memory" in controllers.split(","):
            yield CGROUP_ROOT / "memory", path.lstrip("/"), _V1


def _left_in(folder: Path, limit_file: str, usage_file: str, cache_name: str) -> Iterator[int]:
    try:
        limit = (folder / limit_file).read_text(encoding="ascii").strip()
        if not limit.isdecimal():  # "max": no limit
            return
        usage = int((folder / usage_file).read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return
    yield max(0, int(limit) - usage + int(statistics.get(cache_name, 0)))
