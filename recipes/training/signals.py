"""Signals become a flag that the training loop reads at safe points, so that a run ends between two steps, saved.

A handler must not save by itself: it may run in the middle of an optimizer step, and in a group of processes each would
be at another place. Here it only notes the signal; the loop agrees on it with the other processes and acts.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["EXIT_CODES", "StopFlag"]

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
