"""Checks that end their process, for the test of what then happens: tests/distributed/test_world.py."""

import ctypes
import os
import signal
import time

from distributed_world import World, case


@case(2)
def passes(world: World) -> None:
    """Nothing to find."""


def crash_outside_python() -> None:
    """Start a thread at an address that holds no code."""
    thread = ctypes.c_ulong()
    ctypes.CDLL(None).pthread_create(ctypes.byref(thread), None, ctypes.c_void_p(8), None)
    time.sleep(60)


@case(2)
def thread_crashes_once(world: World) -> None:
    """A thread that runs no Python crashes on process 1, and does not the next time."""
    before = world.folder / "crashed"
    if world.rank == 1 and not before.exists():
        before.touch()
        crash_outside_python()


@case(2)
def thread_crashes_always(world: World) -> None:
    """A thread that runs no Python crashes on process 1 each time."""
    if world.rank == 1:
        crash_outside_python()


@case(2)
def killed_once(world: World) -> None:
    """Process 1 is killed, and is not the next time."""
    before = world.folder / "killed"
    if world.rank == 1 and not before.exists():
        before.touch()
        os.kill(os.getpid(), signal.SIGKILL)


@case(2)
def python_crashes_once(world: World) -> None:
    """Code that Python called crashes on process 1, and would not the next time."""
    before = world.folder / "python"
    if world.rank == 1 and not before.exists():
        before.touch()
        ctypes.string_at(0)
