"""The process of a command: its streams, its signals, the end of its parent, its processor. Imports no torch."""

import contextlib
import errno
import gc
import io
import logging
import os
import platform
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from leanstep._files import format_bytes

_PR_SET_PDEATHSIG = 1
# process number of the one that `leanstep train` ends with
PARENT_VARIABLE = "LEANSTEP_PARENT"


def processor_name() -> str:
    """Model of this machine's processor, as the system names it."""
    name = platform.processor() or platform.machine()
    if (file := Path("/proc/cpuinfo")).exists():
        lines = file.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return name


class LossyOutput(io.RawIOBase):
    """Writes to a descriptor until that fails, and then drops everything.

    Attributes:
        error: why it failed (a closed pipe, a full disk, a closed terminal), or None.
    """

    def __init__(self, descriptor: int) -> None:
        self.error: OSError | None = None
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, content: Any) -> int:
        size = memoryview(content).nbytes
        while self.error is None:
            try:
                return os.write(self._descriptor, content)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.error = error
        return size


def open_standard_streams() -> None:
    """Make output to sys.stdout and sys.stderr never fail, and open on /dev/null the streams that are closed.

    Without that, the next file that is opened takes the number of a closed stream and receives its output. Characters
    that the encoding lacks are escaped. Streams that Python code has replaced are left alone.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # takes the lowest free number, which is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        by_line = number == 2 or os.isatty(number)
        if stream is not None:
            try:
                # PYTHONUNBUFFERED leaves the buffer out
                raw = getattr(stream.buffer, "raw", None)
                if stream.fileno() != number or isinstance(raw, LossyOutput):
                    continue
                by_line |= raw is None
                stream.flush()
            except (OSError, ValueError, AttributeError):
                continue
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                io.BufferedWriter(LossyOutput(number)),
                encoding=getattr(stream, "encoding", "utf-8"),
                errors="backslashreplace",
                line_buffering=by_line,
            ),
        )


def output_error() -> OSError | None:
    """Flush sys.stdout; return why its output was lost, or None."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, LossyOutput) else None


# logger, the beginning of a message, and what else it says
_IMPORT_LINES = (
    ("torchao", "Failed to load ", "torchao/_C"),
    ("torch.utils._pytree", "<enum ", " is an Enum subclass and is now natively supported by torch.compile"),
)


def quiet_imports() -> None:
    """Drop two warnings of torchao's import, which transformers starts: they ask nothing of whoever runs a command.

    The one about libraries for GPUs is dropped only where torch sees no GPU.
    """
    for name, start, words in _IMPORT_LINES:
        logger = logging.getLogger(name)
        if not any(isinstance(entry, _ImportLine) for entry in logger.filters):
            logger.addFilter(_ImportLine(start, words, without_gpu=name == "torchao"))


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector inside, for imports: they leave little garbage, and the search takes long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _ImportLine(logging.Filter):
    """Drops the messages that begin with ``start`` and contain ``words``; with ``without_gpu``, only without a GPU."""

    def __init__(self, start: str, words: str, *, without_gpu: bool) -> None:
        super().__init__()
        self._start, self._words, self._without_gpu = start, words, without_gpu

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not text.startswith(self._start) or self._words not in text:
            return True
        # the package that warns has imported it
        torch = sys.modules.get("torch")
        return self._without_gpu and torch is not None and bool(torch.cuda.is_available())


class InterruptibleStart:
    """Context manager: Ctrl-C raises KeyboardInterrupt at its end if the code inside swallowed it.

    A second Ctrl-C ends the process with code 130. Other handlers than Python's own, and ignored signals, stay.
    """

    def __enter__(self) -> "InterruptibleStart":
        self._interrupted = self._installed = False
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._interrupted and kind is not KeyboardInterrupt:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            os._exit(130)
        self._interrupted = True
        raise KeyboardInterrupt


def lacks_memory(error: BaseException) -> bool:
    """Whether the system refused memory: to Python, an allocator, a thread's stack, or the loader of a library.

    Also for an error that was raised because of such a one, as libraries turn any error into one of their own.
    """
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    signs = ("allocate memory", "failed to map segment", "bad_alloc", "can't start new thread")
    is_named = isinstance(error, (RuntimeError, ImportError, OSError)) and any(sign in str(error) for sign in signs)
    cause = error.__cause__ or error.__context__
    return is_named or type(error).__name__ == "OutOfMemoryError" or (cause is not None and lacks_memory(cause))


def allowed_memory() -> str:
    """How much the shell allows this process, and what to do; empty where it sets no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return ""
    return f"this shell allows {format_bytes(limit)} of addresses, which libraries fill, too; raise it by ulimit -v"


def system_refusal(error: BaseException) -> str | None:
    """Describe an error of the system that any command may meet: no memory, or a path that no call takes."""
    text = " ".join(str(error).split())
    if lacks_memory(error):
        return f"out of memory ({text[:200] or type(error).__name__}): {allowed_memory() or 'end other programs'}"
    # pathlib asks about paths of the command line in many places: too long, or in a folder that nobody may search
    if isinstance(error, OSError) and error.filename is not None:
        name = str(error.filename)
        shown = name if len(name) <= 100 else f"{name[:60]}..."
        return f"{shown!r}: {error.strerror}"
    return None


def wrong_launcher_variable() -> str | None:
    """Describe a variable of torchrun that holds no number. Removes empty ones, which scripts leave for unset ones."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name)
        if text == "":
            del os.environ[name]
        elif text is not None and not text.isdecimal():
            return f"{name}: expected a whole number, as torchrun sets it, got {text!r}; unset it"
    return None


# exit code of a run that saved and ended after a signal. Batch systems send SIGUSR1 or SIGUSR2 as a warning before they
# kill, terminals SIGHUP when they close.
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGHUP: 143, signal.SIGUSR1: 143, signal.SIGUSR2: 143, signal.SIGINT: 130}


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit with code 143 inside, so that half-written files are removed.

    Signals that the process ignores (``nohup``) or handles stay as they are, and so do all outside the main thread, and
    all of one of several processes: waiting for the others in a collective, it would not see them.
    """
    previous = {}
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, _exit)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(EXIT_CODES[signal.Signals(number)])


class StopFlag:
    """Context manager that stores a signal of :data:`EXIT_CODES` in :attr:`received` and restores the old handlers.

    The handler only sets a flag, because it may run in the middle of an optimizer step. The training loop reads the
    flag between steps, agrees on it with the other processes, saves and ends the run.

    A signal that the process ignores (``nohup``) stays ignored. A second SIGINT prints the text ``lost``, calls
    ``leaving`` and exits at once with code 130, without saving. With ``enabled=False`` it installs no handlers.

    Raises ValueError outside the main thread.
    """

    def __init__(self, enabled: bool = True, leaving: Callable[[], object] = lambda: None) -> None:
        self.received = 0
        self.lost = "nothing saved since the last checkpoint"
        self._leaving = leaving
        self._enabled = enabled
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        if self._enabled:
            for number in (number for number in EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not set from Python, which Python cannot restore
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os.write(2, f"\nleft at once, {self.lost}\n".encode(errors="backslashreplace"))
            try:
                self._leaving()
            finally:
                os._exit(EXIT_CODES[signal.SIGINT])
        self.received = number


def end_with_parent(parent: int | None = None) -> None:
    """Send this process SIGTERM when its parent ends; on Linux only.

    Args:
        parent: the process that started this one. If it has ended already, this process ends now.
    """
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        sys.exit(143)


def end_with_named_parent() -> None:
    """Call :func:`end_with_parent` if :data:`PARENT_VARIABLE` names a process, and remove that variable."""
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if parent.isdecimal():
        end_with_parent(int(parent))
