"""Launchers of lion_step.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, address, integers, library, pointers


def lion_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    extras: list[Tensor],
    *,
    hyper: Tensor,
    rounding: str,
    cautious_scale: Tensor | None,
    decay_where_aligned: bool,
    maximize: bool,
    skip_nonfinite: bool,
    seeds: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """Step tensors of one dtype each (parameters, gradients, momenta), every row of them in one dense layout."""
    kernels = library(
        "steps/lion_step",
        {
            **_macros(grads[0], exp_avgs[0], maximize, skip_nonfinite),
            "PARAM": TYPES[params[0].dtype],
            "ROUNDING": rounding.upper(),
            "CAUTIOUS": int(cautious_scale is not None),
            "ALIGNED": int(decay_where_aligned),
        },
    )
    flags = torch.zeros(len(params), dtype=torch.int32)
    kernels.lion_step(
        ctypes.c_int64(len(params)),
        pointers(params),
        pointers(grads),
        pointers(exp_avgs),
        pointers(extras) if extras else None,
        integers([p.numel() for p in params]),
        address(hyper),
        address(cautious_scale),
        address(seeds),
        address(offsets),
        address(flags),
        torch.get_num_threads(),
    )
    return flags


def lion_agreement(
    grads: list[Tensor], exp_avgs: list[Tensor], *, hyper: Tensor, maximize: bool, skip_nonfinite: bool
) -> Tensor:
    """int64 counts of agreeing entries, for tensors of one dtype each."""
    macros = _macros(grads[0], exp_avgs[0], maximize, skip_nonfinite)
    kernels = library(
        "steps/lion_step", {**macros, "PARAM": "float", "ROUNDING": "NEAREST", "CAUTIOUS": 1, "ALIGNED": 0}
    )
    counts = torch.zeros(len(grads), dtype=torch.int64)
    kernels.lion_agreement(
        ctypes.c_int64(len(grads)),
        pointers(grads),
        pointers(exp_avgs),
        integers([g.numel() for g in grads]),
        address(hyper),
        address(counts),
        torch.get_num_threads(),
    )
    return counts


def _macros(grad: Tensor, exp_avg: Tensor, maximize: bool, skip_nonfinite: bool) -> dict[str, str | int]:
    return {
        "GRAD": TYPES[grad.dtype],
        "AVG": TYPES[exp_avg.dtype],
        "MAXIMIZE": int(maximize),
        "SKIP": int(skip_nonfinite),
    }
