"""Trackers of Accelerate, such as TensorBoard. One that fails is given up, and the run goes on."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator


class Trackers:
    """The trackers of a run. A tracker that fails with OSError is told once and gets nothing more.

    Accelerate opens them in the first process only; the other processes may call all methods.
    """

    def __init__(self, accelerator: Accelerator, say: Callable[[str], object]) -> None:
        self._accelerator, self._say = accelerator, say
        self._threads_hook = threading.excepthook

    def open(self, config: Mapping[str, Any]) -> None:
        """Start the trackers of the accelerator with the recipe."""
        _hide_errors_of_writing_threads()
        self._accelerator.init_trackers("leanstep", config=dict(config))

    def log(self, numbers: Mapping[str, Any], step: int) -> None:
        """Give every tracker the numbers that are not None."""
        values = {key: value for key, value in numbers.items() if value is not None}
        self._each(lambda tracker: tracker.log(values, step=step))

    def close(self) -> None:
        """Flush and close the trackers."""
        if self._accelerator.is_main_process:
            self._each(lambda tracker: tracker.finish())
        self._accelerator.trackers = []
        threading.excepthook = self._threads_hook

    def _each(self, call: Callable[[Any], object]) -> None:
        for tracker in list(self._accelerator.trackers):
            try:
                call(tracker)
            except OSError as error:
                self._accelerator.trackers.remove(tracker)
                self._say(f"WARNING: tracker {tracker.name}: {error}; it gets nothing more")


def _hide_errors_of_writing_threads() -> None:
    """Print no traceback of TensorBoard's thread for an OSError, which the next call of its writer raises again."""
    shown = threading.excepthook

    def hook(caught: threading.ExceptHookArgs) -> None:
        package = type(caught.thread).__module__.partition(".")[0]
        if package != "tensorboard" or not issubclass(caught.exc_type, OSError):
            shown(caught)

    threading.excepthook = hook
