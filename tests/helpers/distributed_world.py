"""Real gloo processes for the tests of sharding: one start per world size, in which many checks run one by one.

The checks live in modules of their own and register themselves there; each runs on all processes of a world, and what
it raised on any of them is what the test of that check reports.
"""

import faulthandler
import importlib
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import CONTEXT, preload, start_server

# imported once, before the processes are forked
_PRELOAD = (
    "leanstep.optimizers", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
    "torch.distributed.optim", "torch.distributed.tensor",
)  # fmt: skip

# How the end of a process reads that the system killed, as it does when memory is short, or that torch aborted: its
# threads end a process now and then with "terminate called without an active exception".
_KILLED = tuple(f"(exit code {-number})" for number in (signal.SIGKILL, signal.SIGABRT))

# How the end of a process reads in which memory was accessed that is not its own, and what its stacks say where a
# thread that runs Python did so. Gloo's threads run none.
_CRASHED, _IN_PYTHON = f"(exit code {-signal.SIGSEGV})", "Current thread"

# the longest that processes wait for one another: a check that fails on one of them leaves the others waiting
_PATIENCE = 30


@dataclass(frozen=True)
class World:
    """What a check is given: its world, and a folder that the worlds of a test session share, one after the other."""

    rank: int
    size: int
    folder: Path


@dataclass(frozen=True)
class Case:
    """A check: its name, the world sizes it runs in, and the function."""

    name: str
    worlds: tuple[int, ...]
    function: Callable[[World], object]


CASES: dict[str, Case] = {}


def case(*worlds: int) -> Callable[[Callable[[World], object]], Callable[[World], object]]:
    """Register a check for worlds of these sizes, under its function's name."""

    def register(function: Callable[[World], object]) -> Callable[[World], object]:
        add_case(function.__name__, worlds, function)
        return function

    return register


def add_case(name: str, worlds: Iterable[int], function: Callable[[World], object]) -> None:
    assert name not in CASES, f"two checks are called {name}"
    CASES[name] = Case(name, tuple(worlds), function)


def load_cases(modules: Sequence[str]) -> None:
    """Import the modules whose checks register themselves."""
    for module in modules:
        importlib.import_module(module)


def run_world(
    size: int, names: list[str], folder: Path, modules: Sequence[str], patience: float = _PATIENCE
) -> dict[str, str]:
    """Run checks in worlds of ``size`` processes; the error text of each, "" where it passed on all processes.

    One world runs them all. Where a check fails, a new world goes on with the next, so that each fails for itself. A
    check during which the system killed a process, or torch ended it, is run once more, and standard error says so.
    """
    errors: dict[str, str] = {}
    killed: set[str] = set()
    while remaining := [name for name in names if name not in errors]:
        outcomes, ends = _run_processes(size, remaining, folder, modules, patience)
        for name in remaining:
            texts = [outcome.get(name, end) for outcome, end in zip(outcomes, ends, strict=True)]
            text = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
            if text and any(map(_ended_from_outside, ends)) and name not in killed:
                print(f"{name}: a process of {size} was ended, and the check runs once more:\n{text}", file=sys.stderr)
                killed.add(name)
                break
            errors[name] = text
            if text:
                break
    return errors


def _ended_from_outside(end: str) -> bool:
    """Whether a process ended by what no check's own code does: killed, or by a thread of torch's."""
    return any(killer in end for killer in _KILLED) or (_CRASHED in end and _IN_PYTHON not in end)


def _run_processes(
    size: int, names: list[str], folder: Path, modules: Sequence[str], patience: float
) -> tuple[list[dict[str, str]], list[str]]:
    """Start a world, and let it run checks up to the first that fails: what each rank sent, and how each ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    preload(*_PRELOAD, *modules)
    start_server()
    receivers, processes = [], []
    for rank in range(size):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        arguments = (rank, size, port, names, folder, modules, sender, patience)
        process = CONTEXT.Process(target=_work, args=arguments, daemon=True)
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    outcomes = [dict[str, str]() for _ in range(size)]
    for rank, receiver in enumerate(receivers):
        try:
            while receiver.poll(patience * 4):
                name, text = receiver.recv()
                outcomes[rank][name] = text
        except EOFError:
            pass
    ends = [_end(process, _crash_file(folder, size, rank)) for rank, process in enumerate(processes)]
    return outcomes, ends


def _end(process: Any, crash: Path) -> str:
    """Wait for a process, and say how it ended: what a check reports that the process did not bring to an end."""
    process.join(5)
    code = "still running" if process.exitcode is None else f"exit code {process.exitcode}"
    process.kill()
    stacks = crash.read_text() if crash.exists() else ""
    return f"did not come to an end ({code})\n{stacks}"


def _crash_file(folder: Path, size: int, rank: int) -> Path:
    """Where a process of a world writes its stacks when a signal such as SIGSEGV ends it."""
    return folder / f"crash-{size}-{rank}.txt"


def _work(
    rank: int,
    size: int,
    port: int,
    names: list[str],
    folder: Path,
    modules: Sequence[str],
    sender: Any,
    patience: float,
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", ACCELERATE_USE_CPU="true",
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    crash = _crash_file(folder, size, rank).open("w")
    faulthandler.enable(crash)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    load_cases(modules)
    dist.init_process_group("gloo", timeout=timedelta(seconds=patience))
    store = dist.distributed_c10d._get_default_store()
    for name in names:
        torch.manual_seed(0)
        text = ""
        try:
            CASES[name].function(World(rank, size, folder))
        except Exception:
            text = traceback.format_exc()
        sender.send((name, text))
        # wait without a collective, which an error on one side would have left in different places
        store.set(f"{name}/{rank}", "failed" if text else "passed")
        everyone = [store.get(f"{name}/{other}") for other in range(size)]
        if b"failed" in everyone:  # the others' collectives may be out of step
            break
    sender.close()
    # process 0 serves the store, and so goes last
    store.set(f"gone/{rank}", "")
    if rank == 0:
        store.wait([f"gone/{other}" for other in range(size)])
    dist.destroy_process_group()
