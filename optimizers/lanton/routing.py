"""Which of LANTON's norms a parameter has, whose maximum it shares, and when its noise is measured."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def norm_of(group: dict[str, Any], param: Tensor) -> str:
    """The norm that a group gives to a parameter: "rms", "sign" or "vector"."""
    if group["norm"] != "auto":
        return group["norm"]
    return "rms" if param.dim() >= 2 else "vector"


def is_stack(group: dict[str, Any], norm: str, dims: int) -> bool:
    """Whether a parameter of so many dimensions is a stack of matrices, with an estimate for each."""
    return norm == "rms" and dims == 3 and not group["flatten"]


def matrix_count(group: dict[str, Any], norm: str, param: Tensor) -> int:
    """How many estimates a parameter has."""
    return param.shape[0] if is_stack(group, norm, param.dim()) else 1


def matrix_shape(group: dict[str, Any], shape: torch.Size) -> tuple[int, int]:
    """(out, in) of a stored matrix, stack of matrices or convolution."""
    stack = is_stack(group, "rms", len(shape))
    m, n = (shape[-2], shape[-1]) if stack else (shape[0], math.prod(shape[1:]))
    return (n, m) if group["transposed"] else (m, n)


def maximum_of(group: dict[str, Any], norm: str, param: Tensor) -> str:
    """Name of the maximum that a parameter shares in."""
    if group["grouping"] == "norm":
        return norm
    if group["grouping"] == "role":
        return f"{norm}/{group['name']}"
    shape = matrix_shape(group, param.shape) if norm == "rms" else param.shape
    return f"{norm}/{'x'.join(map(str, shape))}"


def is_due(group: dict[str, Any]) -> bool:
    """Whether this step measures noise: one of every ``noise_every``, after the one that keeps its gradient."""
    return group["noise_clock"] == (1 % group["noise_every"] if group["noise"] == "previous" else 0)
