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


def matrix_shape(group: dict[str, Any], shape: torch.Size) -> tuple[int, int]:
    """(out, in) of a stored matrix, stack of matrices or convolution."""
    m, n = (shape[-2], shape[-1]) if len(shape) == 3 else (shape[0], math.prod(shape[1:]))
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
