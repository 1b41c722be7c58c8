"""Free memory of a device, within the limits of a container. Imports torch only for an accelerator."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROCESS_CGROUPS = Path("/proc/self/cgroup")

# names of the limit, the use, and the page cache that the kernel gives back on demand: cgroup v2, then v1
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory(device: "torch.device | str") -> int | None:
    """Bytes that this process can still allocate on a device; None where the system does not tell.

    On the CPU that is what the machine has available, or what the memory limits of the process's control groups
    (cgroup v1 and v2: containers, Slurm, systemd) leave, whichever is less. On CUDA and ROCm it is the free memory of
    the device and what torch's allocator holds unused.
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
    """Bytes left below the limit of each control group of this process, and of each group above it."""
    for root, group, names in _cgroups():
        # inside a container the path is often that of the host and not there: then the root is the container's own
        for folder in (root / group, *(root / group).parents):
            if folder.is_relative_to(root):
                yield from _left_in(folder, *names)


def _cgroups() -> Iterator[tuple[Path, str, tuple[str, str, str]]]:
    """(mount point, path below it, file names) of each hierarchy that limits memory."""
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
