"""Several processes acting as one: check that they are connected, reduce values, handle signals.

Signals become a flag that the training loop reads at safe points, so that a run ends between two steps, saved. A
handler must not save by itself: it may run in the middle of an optimizer step, and in a group of processes each would
be at another place. Here it only notes the signal; the loop agrees on it with the other processes and acts.
"""

import os
import random
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

NPROC_VARIABLE = "LEANSTEP_NPROC"
T = TypeVar("T")


class WorldError(ValueError):
    """The number of connected processes is not the number that was asked for."""


def asked_world_size(environ: Mapping[str, str] = os.environ, parent: str | None = None) -> dict[str, int]:
    """Collect the numbers of processes that were asked for, by where they were asked for.

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
    match = re.search(r"accelerate(\s|\.commands\.)launch\s.*--num[_-]processes[= ](\d+)", command)
    if match:
        asked["accelerate launch --num_processes"] = int(match[2])
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
    """The largest ``value`` of all processes. A collective call if there are several."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor([value], device=accelerator.device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return int(tensor.item())


def all_agree(accelerator: Accelerator, fine: bool) -> bool:
    """Whether ``fine`` is true in every process. A collective call if there are several."""
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


# exit code of a run that a signal ended after saving. SIGUSR1 is the warning that batch systems send before they take
# the machine away; it says the same as SIGTERM and gets the same code.
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


class StopFlag:
    """Context manager that turns SIGTERM, SIGUSR1 and SIGINT into :attr:`received`; restores the old handlers.

    A second SIGINT calls ``leaving`` and leaves at once with exit code 130, saving nothing: checkpoints are written
    aside and renamed, so there is none to damage. Only the main thread may install handlers; elsewhere Python raises
    ValueError.
    With ``enabled=False`` it installs nothing and the signals keep their usual effect.
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python and cannot be put back from here
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
