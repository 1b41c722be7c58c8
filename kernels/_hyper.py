"""Scalars of an update rule packed into one small tensor.

Kernels read their scalars from memory, so that a changed learning rate never compiles anything again, and a learning
rate that lives on the device is never read by the host.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an update of parameters of ``dtype`` is computed in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    host = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)  # from pageable memory the host would wait


# what a captured CUDA graph reads must outlive the cache
_captured: list[Tensor] = []


def constant(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """1-D tensor of Python numbers, from a small cache: not to be written to.

    On a GPU nothing is sent when the numbers are those of an earlier step, so that the step can be captured.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        # a tensor made under a dispatch mode (fake tensors, tracing) must not be found by a real step later
        return torch.tensor(tuple(values), dtype=dtype, device=device)
    found = _constant(tuple(values), device, dtype)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(found)
    return found


def pack(values: list[float | Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """1-D tensor of the values, which may be Python numbers or one-element tensors.

    Numbers are rounded once from Python's double precision. Tensors that live on ``device`` are copied there without
    reading them on the host; a CPU tensor beside parameters on a GPU is read (that needs no wait). Tensors of numbers
    alone are kept in a small cache, so that a captured CUDA graph finds them in place.
    """
    if torch.compiler.is_compiling():
        wide = [torch.as_tensor(v, dtype=torch.float64, device=device).reshape(()) for v in values]
        return torch.stack(wide).to(dtype)
    plain: list[float] = []
    on_device: dict[int, Tensor] = {}
    for position, value in enumerate(values):
        if isinstance(value, Tensor) and value.device == device and device.type != "cpu":
            on_device[position] = value
            plain.append(0.0)
        else:
            plain.append(float(value))
    packed = constant(plain, device, dtype)
    if on_device:
        packed = packed.clone()
        for position, value in on_device.items():
            packed[position : position + 1].copy_(value.reshape(1))
    return packed


def decay_factor(lr: float | Tensor, weight_decay: float) -> float | Tensor:
    """1 - lr * weight_decay, in double precision until it is packed."""
    if isinstance(lr, Tensor):
        return 1.0 - lr.to(torch.float64) * weight_decay
    return 1.0 - lr * weight_decay
