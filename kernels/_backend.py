"""Which implementation of an op runs, and why.

Every op has one name and up to four implementations:

* ``reference``: plain torch, the definition; runs everywhere, in every dtype.
* ``cpp``: a small C++ file, compiled on first use; the fast path on a CPU, one call for all tensors of a list.
* ``compiled``: the reference through ``torch.compile``; the fast path on a CPU for what the C++ files do not cover.
* ``triton``: one launch for all tensors of a list; the fast path on a GPU.

``auto`` picks by device with the rules of :func:`choose`. A backend asked for by name with :func:`use_backend` that
cannot run raises :class:`BackendError` with the reason; nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from leanstep.kernels.cpp_impl._build import TYPES, cpp_compiler, why_not_cpp

BACKENDS = ("reference", "cpp", "compiled", "triton")
_TORCH = ("reference", "compiled", "triton")
_WINDOW = ("reference", "cpp", "triton")

# op name -> the backends that have an implementation of it
OPS: dict[str, tuple[str, ...]] = {
    "lion_step": BACKENDS,
    "lion_agreement": BACKENDS,
    "sinkhorn": BACKENDS,
    "scaled_step": BACKENDS,
    "nonfinite_flags": ("reference", "cpp"),
    "adamw_step": ("reference", "cpp"),
    "newton_schulz": _TORCH,
    "nuclear_norm": _TORCH,
    "row_dots": _WINDOW,
    "linear_combination": _WINDOW,
    "sparse_row_dots": _WINDOW,
    "sparse_linear_combination": _WINDOW,
    "nm_mask": _WINDOW,
    "nm_apply": _WINDOW,
    "nm_apply_backward": _WINDOW,
    "nm_matmul": _WINDOW,
    "lora_dropout": _WINDOW,
    "lora_down": _WINDOW,
    "lora_down_backward": _WINDOW,
    "lora_up": _WINDOW,
    "lora_norms": ("reference", "triton"),
    "lora_scale": _WINDOW,
    "lora_swiglu": _WINDOW,
    "poly_features": _WINDOW,
    "poly_features_backward": _WINDOW,
}

# parts of a step that are torch's own on every backend but "cpp": a request for one they do not have is none
_TORCH_ELSEWHERE = ("nonfinite_flags", "adamw_step")

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
        name: ``"auto"``, ``"reference"``, ``"cpp"``, ``"compiled"`` or ``"triton"``.

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


def _why_not_cpp(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if device.type != "cpu":
        return f"C++ kernels run on the CPU, not on {device.type!r}"
    foreign = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes if dtype not in TYPES})
    if foreign:
        return f"the C++ kernels take fp32 and bf16, not {', '.join(foreign)}"
    return why_not_cpp()


# on a CPU these are calls of the BLAS on reused scratch memory: nothing for torch.compile to improve, none needed
_BLAS = ("sinkhorn", "newton_schulz", "nuclear_norm")


def why_not(op: str, backend: str, device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why ``backend`` cannot run ``op`` on ``device`` with tensors of ``dtypes``; None when it can."""
    if backend not in OPS[op]:
        return f"{op} has no {backend} implementation"
    if backend == "triton":
        if torch.float64 in dtypes:
            return "the Triton kernels compute in fp32, which float64 parameters would lose by"
        return _why_not_triton(device)
    if backend == "cpp":
        return _why_not_cpp(device, dtypes)
    if backend == "compiled" and not (op in _BLAS and device.type == "cpu"):
        return _why_not_compiled(device)
    return None


def choose(op: str, device: torch.device, *dtypes: torch.dtype) -> Choice:
    """Pick the backend of ``op`` for tensors of ``dtypes`` (the parameters' first) on ``device``.

    Raises:
        BackendError: when a backend was asked for with :func:`use_backend` and cannot run here.
    """
    requested = _requested.get()
    if op in _TORCH_ELSEWHERE and requested not in ("auto", *OPS[op]):
        return Choice("reference", f"torch's own: {op} has no {requested} implementation")
    if requested != "auto":
        reason = why_not(op, requested, device, *dtypes)
        if reason is not None:
            raise BackendError(f"{op}: backend {requested!r} was asked for on {device}, but {reason}")
        return Choice(requested, "asked for with use_backend")
    if dtypes[:1] == (torch.float64,):
        return Choice("reference", "float64 is for checking: the definition runs")
    if device.type != "cpu":
        reason = why_not(op, "triton", device)
        return Choice("reference", reason) if reason else Choice("triton", f"{device.type} device with Triton")
    if OPS[op] == ("reference", "triton"):
        return Choice("reference", "BLAS products")
    not_cpp = why_not(op, "cpp", device, *dtypes)
    if not_cpp is None:
        return Choice("cpp", "CPU with a C++ compiler")
    reason = why_not(op, "compiled", device)
    if reason is not None:
        return Choice("reference", not_cpp if "cpp" in OPS[op] else reason)
    return Choice("compiled", "BLAS products in reused memory" if op in _BLAS else f"torch.compile; {not_cpp}")


def backend_table() -> list[tuple[str, str, str, str]]:
    """Rows (op, device, backend, reason) for the CPU and, where there is one, the accelerator."""
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        devices.append(accelerator)
    return [(op, str(device), *choose(op, device)) for device in devices for op in OPS]
