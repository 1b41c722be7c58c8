"""Several processes acting as one: check that they are connected, reduce values, handle signals.

A signal handler only sets a flag, because it may run in the middle of an optimizer step. The training loop reads the
flag between steps, agrees on it with the other processes, saves and ends the run.
"""

import os
import random
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

NPROC_VARIABLE = "LEANSTEP_NPROC"
T = TypeVar("T")


class WorldError(ValueError):
    """The number of connected processes differs from the requested number."""


def asked_world_size(environ: Mapping[str, str] = os.environ, parent: str | None = None) -> dict[str, int]:
    """Collect the requested numbers of processes: {where: number}.

    Reads ``--nproc`` (which our launcher passes on), ``WORLD_SIZE`` (set by torchrun and accelerate), and the parent's
    command line, because ``accelerate launch --cpu --num_processes 2`` starts one process and leaves no other trace.
    """
    requested = {}
    if environ.get(NPROC_VARIABLE, "").isdigit():
        requested["--nproc"] = int(environ[NPROC_VARIABLE])
    if environ.get("WORLD_SIZE", "").isdigit():
        requested["WORLD_SIZE"] = int(environ["WORLD_SIZE"])
    command = parent
    if command is None:
        try:
            command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # Linux only
            command = ""
    match = re.search(r"accelerate(\s|\.commands\.)launch\s.*--num[_-]processes[= ](\d+)", command)
    if match:
        requested["accelerate launch --num_processes"] = int(match[2])
    return requested


def check_world(world_size: int, requested: Mapping[str, int]) -> None:
    """Raise WorldError if Accelerate's ``world_size`` is not the requested number."""
    for where, number in requested.items():
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
    """Largest ``value`` of all processes; a collective call."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor([value], device=accelerator.device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return int(tensor.item())


def all_agree(accelerator: Accelerator, fine: bool) -> bool:
    """Whether ``fine`` is true in every process; a collective call."""
    return maximum(accelerator, int(not fine)) == 0


def main_does(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run ``action`` in the first process and send its result, or its ValueError or OSError, to all."""
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
    """Seed the generators of Python, numpy and torch from these numbers."""
    words = np.random.SeedSequence([seed, *more]).generate_state(2, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[0] % 2**32))
    torch.manual_seed(int(words[1] % 2**63))


def device_name(device: torch.device) -> str:
    """``cuda:0 (NVIDIA H100)`` or ``cpu``."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


# exit code of a run that saved and ended after a signal. Batch systems send SIGUSR1 as a warning before they kill.
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


class StopFlag:
    """Context manager that stores SIGTERM, SIGUSR1 or SIGINT in :attr:`received` and restores the old handlers.

    A second SIGINT calls ``leaving`` and exits at once with code 130, without saving. With ``enabled=False`` it
    installs no handlers. Raises ValueError outside the main thread.
    """

    def __init__(self, enabled: bool = True, leaving: Callable[[], object] = lambda: None) -> None:
        self.received = 0
        self._leaving = leaving
        self._enabled = enabled
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        if self._enabled:
            for number in EXIT_CODES:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not set from Python, which Python cannot restore
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os.write(2, b"\nleft at once, nothing saved since the last checkpoint\n")
            try:
                self._leaving()
            finally:
                os._exit(EXIT_CODES[signal.SIGINT])
        self.received = number
