"""The layers of LANTON: what a step asks about a parameter, once, and what it knows of its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.optimizers.common import matrices as common
from leanstep.optimizers.common.sharding import Shard
from leanstep.optimizers.lanton import rule


class Form(NamedTuple):
    """What depends on a parameter's shape and its group's settings alone."""

    norm: str  # "rms", "sign" or "vector"
    stacked: bool  # a stack of matrices, each with its own noise estimate
    shape: tuple[int, int]  # (out, in) of its matrices; (1, 1) of other norms
    block_rows: tuple[int, ...]  # the rows of every block of its matrices
    scales: tuple[float, ...]  # rule.dual_norm_scale of every block; empty for a parameter without entries
    estimates: int  # how many: those of a matrix's blocks are adjacent


class Layer(NamedTuple):
    """A parameter with noise estimates: one, or one per matrix of a stack."""

    group: dict[str, Any]
    param: Tensor
    state: dict[str, Any]
    form: Form


class LayerStep(NamedTuple):
    """A parameter with a gradient at this step."""

    group: dict[str, Any]
    param: Tensor
    state: dict[str, Any]
    form: Form
    codes: list[str]  # the averages in its state that have 8 bits
    weight: Tensor  # this process's shard of the parameter
    grad: Tensor  # and of its gradient
    rounding: str
    shard: Shard
    param_index: int  # counted over all groups
    rows: slice  # of the step's table: one per noise estimate
    held: slice  # those of this process's matrices of a stack; otherwise all
    measures: bool  # this step's difference enters H
    noise_scale: float  # gives the difference the variance of G - G'
    stores: bool  # this step's gradient is stored as G' of the next step
    on_host: bool  # reading values neither waits for a device nor breaks a graph of torch.compile


class GradientInfo(NamedTuple):
    """A parameter with a gradient, and what the processes found out about it together."""

    layer: LayerStep
    factor: Tensor  # [1], or [e] for a stack
    nonfinite: Tensor  # 0-d bool: the gradient is not finite, and the parameter is not updated
    square: Tensor  # 0-d: sum of squares of a vector's momentum


def norm_of(group: dict[str, Any], param: Tensor) -> str:
    """Return a parameter's norm, "rms", "sign" or "vector", with "auto" resolved."""
    if group["norm"] != "auto":
        return group["norm"]
    return "rms" if param.dim() >= 2 else "vector"


def estimate_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of H, a squared sum over a matrix: fp64, or fp32 on devices without fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def matrix_shape(group: dict[str, Any], shape: torch.Size) -> tuple[int, int]:
    """Return (out, in) of a matrix, stack of matrices or convolution of the stored ``shape``."""
    return common.matrix_shape(common.oriented(Shard(shape), group["transposed"], group["flatten"]))


def form_of(group: dict[str, Any], param: Tensor) -> Form:
    """Return what a step asks about a parameter."""
    norm = norm_of(group, param)
    if norm != "rms":
        return Form(norm, False, (1, 1), (1,), (rule.dual_norm_scale(norm, tuple(param.shape)),), 1)
    m, n = matrix_shape(group, param.shape)
    rows = tuple(common.block_sizes(group["blocks"], m))
    scales = [rule.dual_norm_scale("rms", (k, n), group["scaling"]) for k in rows if param.numel() > 0]
    stacked = param.dim() == 3 and not group["flatten"]
    return Form(norm, stacked, (m, n), rows, tuple(scales), len(rows) * (param.shape[0] if stacked else 1))


def stores_gradient(group: dict[str, Any]) -> bool:
    """Whether steps store their gradients for the next one."""
    return group["noise_adaptive"] and group["noise"] == "previous"
