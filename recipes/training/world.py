"""Several processes acting as one: do they know of each other, and what do they agree on."""

import os
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

__all__ = [
    "WorldError",
    "all_agree",
    "asked_world_size",
    "check_world",
    "describe_world",
    "main_does",
    "maximum",
    "seed_process",
]

NPROC_VARIABLE = "LEANSTEP_NPROC"
T = TypeVar("T")


class WorldError(ValueError):
    """The number of connected processes is not the number that was asked for."""


def asked_world_size(environ: Mapping[str, str] = os.environ, parent: str | None = None) -> dict[str, int]:
    """Every number of processes that was asked for, by where it was asked.

    Looked at: ``--nproc`` (handed down by our launcher), ``WORLD_SIZE`` (torchrun and accelerate set it), and the
    command line of the parent process, because ``accelerate launch --cpu --num_processes 2`` starts one process and
    leaves no other trace of the two.
    """
    asked = {}
    if environ.get(NPROC_VARIABLE, "").isdigit():
        asked["--nproc"] = int(environ[NPROC_VARIABLE])
    if environ.get("WORLD_SIZE", "").isdigit():
        asked["WORLD_SIZE"] = int(environ["WORLD_SIZE"])
    command = _parent_command() if parent is None else parent
    found = re.search(r"accelerate(\s|\.commands\.)launch\s.*--num[_-]processes[= ](\d+)", command)
    if found:
        asked["accelerate launch --num_processes"] = int(found[2])
    return asked


def _parent_command() -> str:
    """The parent's command line where the system shows it (Linux), else an empty string."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def check_world(world_size: int, asked: Mapping[str, int]) -> None:
    """Raise WorldError when ``world_size``, as Accelerate reports it, is not what was asked for."""
    for where, number in asked.items():
        if number != world_size:
            raise WorldError(
                f"{where} asks for {number} processes, but Accelerate connected {world_size}: several would "
                f"train the same model side by side. Start with 'leanstep train ... --nproc {number}', or 'torchrun "
                f"--standalone --nproc_per_node {number} -m leanstep.recipes.training.train ...' (on a CPU, accelerate "
                "launch needs ACCELERATE_USE_CPU=true and --multi_gpu to start several processes)"
            )


def describe_world(accelerator: Accelerator) -> str:
    """``world size 2, backend gloo, device cpu, wrapping DDP``."""
    wrapping = "none"
    if accelerator.num_processes > 1:
        wrapping = "FSDP2" if accelerator.distributed_type == "FSDP" else "DDP"
    backend = "none"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        backend = torch.distributed.get_backend()
    return (
        f"world size {accelerator.num_processes}, backend {backend}, device {accelerator.device}, wrapping {wrapping}"
    )


def maximum(accelerator: Accelerator, value: int) -> int:
    """The largest ``value`` of all processes; a collective call when there are several."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor([value], device=accelerator.device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return int(tensor.item())


def all_agree(accelerator: Accelerator, fine: bool) -> bool:
    """Whether ``fine`` is true in every process; a collective call when there are several."""
    return maximum(accelerator, int(not fine)) == 0


def main_does(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run ``action`` in the first process and hand its result, or its ValueError or OSError, to all."""
    outcome: list[object] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def seed_process(seed: int, *more: int) -> None:
    """Seed Python's, numpy's and torch's generators from these numbers together."""
    words = np.random.SeedSequence([seed, *more]).generate_state(2, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[0] % 2**32))
    torch.manual_seed(int(words[1] % 2**63))


def device_name(device: torch.device) -> str:
    """``cuda:0 (NVIDIA H100)`` or ``cpu``."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
