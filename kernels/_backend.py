"""Which implementation of an op runs, and why.

Every op has one name and up to three implementations:

* ``reference``: plain torch, the definition; runs everywhere, in every dtype.
* ``compiled``: the reference through ``torch.compile``; the fast path on a CPU with a C++ compiler.
* ``triton``: one launch for all tensors of a list; the fast path on a GPU.

``auto`` picks by device with the rules of :func:`choose`. A backend asked for by name with :func:`use_backend` that
cannot run raises :class:`BackendError` with the reason; nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import torch

BACKENDS = ("reference", "compiled", "triton")

# op name -> the backends that have an implementation of it
OPS: dict[str, tuple[str, ...]] = {
    "lion_step": BACKENDS,
    "lion_agreement": BACKENDS,
    "sinkhorn": BACKENDS,
    "scaled_step": BACKENDS,
    "row_dots": ("reference",),
    "linear_combination": ("reference",),
    "sparse_row_dots": ("reference",),
    "sparse_linear_combination": ("reference",),
}

_requested: contextvars.ContextVar[str] = contextvars.ContextVar("leanstep_backend", default="auto")


class BackendError(RuntimeError):
    """The backend asked for by name cannot run this op on this device."""


class Choice(NamedTuple):
    """The backend that runs an op, and the reason in words."""

    backend: str
    reason: str


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside the block on the backend ``name``.

    Args:
        name: ``"auto"``, ``"reference"``, ``"compiled"`` or ``"triton"``.

    Raises:
        ValueError: for any other name.
        BackendError: from the op, when the backend cannot run there; the message says why.

    Example:
        >>> from leanstep import use_backend
        >>> with use_backend("reference"):
        ...     pass  # optimizer.step()
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"use_backend: expected one of {('auto', *BACKENDS)}, got {name!r}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def has_triton() -> bool:
    """True when the ``triton`` package can be imported; nothing is imported to find out."""
    return importlib.util.find_spec("triton") is not None


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that ``torch.compile`` would use on a CPU, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _why_not_triton(device: torch.device) -> str | None:
    if not has_triton():
        return "the triton package is not installed"
    if device.type in ("cuda", "xpu"):
        return None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"tensors on {device.type!r} need a GPU for Triton (or TRITON_INTERPRET=1, to test)"


def _why_not_compiled(device: torch.device) -> str | None:
    if device.type == "cpu" and cpp_compiler() is None:
        return "no C++ compiler on the PATH (CXX, g++, clang++): torch.compile cannot build CPU code"
    if device.type != "cpu" and not has_triton():
        return "torch.compile needs the triton package on this device"
    if device.type == "meta":
        return "meta tensors hold no data"
    return None


# on a CPU these are calls of the BLAS on reused scratch memory: nothing for torch.compile to improve, none needed
_BLAS = ("sinkhorn",)


def why_not(op: str, backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run ``op`` on ``device``; None when it can."""
    if backend not in OPS[op]:
        return f"{op} has no {backend} implementation"
    if backend == "triton":
        return _why_not_triton(device)
    if backend == "compiled" and not (op in _BLAS and device.type == "cpu"):
        return _why_not_compiled(device)
    return None


def choose(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Choice:
    """Pick the backend of ``op`` for tensors of ``dtype`` on ``device``.

    Raises:
        BackendError: when a backend was asked for with :func:`use_backend` and cannot run here.
    """
    requested = _requested.get()
    if requested != "auto":
        reason = why_not(op, requested, device)
        if requested == "triton" and dtype is torch.float64:
            reason = "the Triton kernels compute in fp32, which float64 parameters would lose by"
        if reason is not None:
            raise BackendError(f"{op}: backend {requested!r} was asked for on {device}, but {reason}")
        return Choice(requested, "asked for with use_backend")
    if dtype is torch.float64:
        return Choice("reference", "float64 is for checking: the definition runs")
    if device.type == "cpu":
        reason = why_not(op, "compiled", device)
        if reason is None:
            return Choice("compiled", "BLAS products in reused memory" if op in _BLAS else "CPU with a C++ compiler")
        return Choice("reference", reason)
    reason = why_not(op, "triton", device)
    if reason is None:
        return Choice("triton", f"{device.type} device with Triton")
    return Choice("reference", reason)


def backend_table() -> list[tuple[str, str, str, str]]:
    """Rows (op, device, backend, reason) for the CPU and, where there is one, the accelerator."""
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        devices.append(accelerator)
    return [(op, str(device), *choose(op, device)) for device in devices for op in OPS]
