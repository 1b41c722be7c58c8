"""Launcher of adamw_step.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import integers, library, pointers


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    sizes: list[int],
    hypers: list[tuple[float, ...]],
    *,
    maximize: bool,
) -> None:
    """Step the first ``sizes`` entries, an even number, of bf16 tensors, every row of them in one dense layout.

    ``hypers``: seven numbers for each, in the order of the file's Hyper.
    """
    kernels = library("steps/adamw_step", {"MAXIMIZE": int(maximize)})
    numbers = [number for row in hypers for number in row]
    kernels.adamw_step(
        ctypes.c_int64(len(params)),
        pointers(params),
        pointers(grads),
        pointers(exp_avgs),
        pointers(exp_avg_sqs),
        integers(sizes),
        (ctypes.c_float * len(numbers))(*numbers),
        torch.get_num_threads(),
    )
