"""Which implementation of an op runs, and why.

Every op has one name and up to three implementations:

* ``reference``: the definition in plain torch; runs everywhere, in every dtype.
* ``cpp``: a small C++ file, prebuilt in a wheel or compiled on first use; the fast path on a CPU, one call for all
  tensors of a list.
* ``triton``: one launch for all tensors of a list; the fast path on a GPU.

``auto`` runs Triton on a GPU and C++ on a CPU. It runs the definition in float64, without Triton, without prebuilt C++
kernels and a compiler, and in dtypes that the C++ kernels do not take. An op raises :class:`BackendError` if
:func:`use_backend` selected a backend that cannot run it: nothing falls back silently.

A backward pass runs on the backend that was selected in its forward pass. Autograd's threads do not inherit the
selection, so an autograd function saves it with :func:`remember_backend` and restores it with
:func:`on_remembered_backend`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from leanstep.kernels.cpp_impl._build import TYPES, origin, why_not_cpp

P = ParamSpec("P")
T = TypeVar("T")

BACKENDS = ("reference", "cpp", "triton")


class Support(NamedTuple):
    """What can run an op.

    Attributes:
        backends: that have an implementation of it. Without "cpp", torch's BLAS computes its products on a CPU.
        types: dtypes of its C++ kernel.
        kernel: the C++ file, if a wheel holds it for newer instructions than others.
        is_optional: whether plain torch runs where a backend is requested that the op does not have.
        instructions: names the processor's instructions that its C++ kernel uses, if its speed depends on them most.
    """

    backends: tuple[str, ...] = BACKENDS
    types: Mapping[torch.dtype, str] = TYPES
    kernel: str = ""
    is_optional: bool = False
    instructions: Callable[[], str] | None = None


# The steps. All other ops add their rows (leanstep.kernels.op).
OPS: dict[str, Support] = {
    "lion_step": Support(),
    "lion_agreement": Support(),
    "lion_step_int8": Support(kernel="steps/lion_int8"),
    "lion_agreement_int8": Support(kernel="steps/lion_int8"),
    "adamw_step_int8": Support(),
    "average_step_int8": Support(kernel="steps/average_int8"),
    "scaled_step": Support(),
    "nonfinite_flags": Support(("reference", "cpp"), is_optional=True),
    "adamw_step": Support(("reference", "cpp"), is_optional=True),
}

_requested: contextvars.ContextVar[str] = contextvars.ContextVar("leanstep_backend", default="auto")


class BackendError(RuntimeError):
    """The requested backend cannot run this op on this device."""


class Choice(NamedTuple):
    """The backend that runs an op, and the reason in words."""

    backend: str
    reason: str


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside the block on the backend ``name``.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.

    Raises:
        ValueError: for any other name.
        BackendError: raised by an op that the backend cannot run; the message says why.

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


def requested_backend() -> str:
    """Return the name given to the innermost :func:`use_backend`, or "auto"."""
    return _requested.get()


def remember_backend(ctx: Any) -> None:
    """Save the requested backend on the context of an autograd function. Call it in the forward pass."""
    if not torch.compiler.is_compiling():
        ctx.backend = _requested.get()


def on_remembered_backend(backward: Callable[P, T]) -> Callable[P, T]:
    """Decorate ``backward(ctx, ...)`` to run on the backend that :func:`remember_backend` saved on ``ctx``."""

    @functools.wraps(backward)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        ctx: Any = args[0]
        if torch.compiler.is_compiling() or not hasattr(ctx, "backend"):  # traced ops choose when they run
            return backward(*args, **kwargs)
        with use_backend(ctx.backend):
            return backward(*args, **kwargs)

    return run


def has_triton() -> bool:
    """Whether the ``triton`` package is installed. Does not import it."""
    return importlib.util.find_spec("triton") is not None


def why_not(op: str, backend: str, device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Say why ``backend`` cannot run ``op`` on ``device`` with tensors of ``dtypes``; None if it can."""
    if backend not in OPS[op].backends:
        return f"{op} has no {backend} implementation"
    if backend == "triton":
        if torch.float64 in dtypes:
            return "the Triton kernels compute in fp32, and float64 parameters need float64"
        if not has_triton():
            return "the triton package is not installed"
        if device.type not in ("cuda", "xpu") and os.environ.get("TRITON_INTERPRET") != "1":
            return f"tensors on {device.type!r} need a GPU for Triton (or TRITON_INTERPRET=1, to test)"
    if backend == "cpp":
        if device.type != "cpu":
            return f"C++ kernels run on the CPU, not on {device.type!r}"
        types = OPS[op].types
        unsupported = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes if dtype not in types})
        taken = "fp32, bf16 and fp16" if torch.float16 in types else "fp32 and bf16"
        return f"the C++ kernels take {taken}, not {', '.join(unsupported)}" if unsupported else why_not_cpp()
    return None


def choose(op: str, device: torch.device, *dtypes: torch.dtype) -> Choice:
    """Choose the backend of ``op`` for tensors of ``dtypes`` on ``device``.

    Raises:
        BackendError: if :func:`use_backend` selected a backend that cannot run here.
    """
    requested = _requested.get()
    support = OPS[op]
    if support.is_optional and requested not in ("auto", *support.backends):
        return Choice("reference", f"torch's own: {op} has no {requested} implementation")
    if requested != "auto":
        reason = why_not(op, requested, device, *dtypes)
        if reason is not None:
            raise BackendError(f"{op}: backend {requested!r} was asked for on {device}, but {reason}")
        return Choice(requested, "asked for with use_backend")
    if torch.float64 in dtypes:
        return Choice("reference", "float64 is for checking: the definition runs")
    if device.type != "cpu":
        reason = why_not(op, "triton", device)
        return Choice("reference", reason) if reason else Choice("triton", f"{device.type} device with Triton")
    if "cpp" not in support.backends:
        return Choice("reference", "products of torch's BLAS")
    reason = why_not(op, "cpp", device, *dtypes)
    return Choice("reference", reason) if reason else Choice("cpp", f"CPU, {origin(support.kernel)}")


def backend_table() -> list[tuple[str, str, str, str]]:
    """Return rows (op, device, backend, reason) for the CPU and the accelerator, if there is one."""
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        devices.append(accelerator)
    return [(op, str(device), *_with_instructions(op, choose(op, device))) for device in devices for op in OPS]


def _with_instructions(op: str, choice: Choice) -> Choice:
    """Add the processor's instructions to the reason, for an op whose speed depends on them most."""
    instructions = OPS[op].instructions
    if instructions is None or choice.backend != "cpp":
        return choice
    return Choice(choice.backend, f"{choice.reason}, by {instructions()}")
