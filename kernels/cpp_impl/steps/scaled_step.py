"""Launchers of scaled_step.cpp and sinkhorn_step.cpp."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, address, integers, library, pointer_array, pointers


def scaled_step(
    params: list[Tensor],
    mats: list[Tensor],
    rows: list[Tensor],
    cols: list[Tensor],
    extras: list[Tensor],
    *,
    hyper: Tensor,
    rounding: str,
    skip_nonfinite: bool,
    seeds: Tensor | None,
    offsets: Tensor | None,
    iterations: tuple[int, bool] | None = None,
) -> Tensor:
    """Step contiguous tensors [..., m, n] of one dtype each (parameters, matrices).

    ``iterations``: (num_iters, end_with_rows) of the scales, which are then found first; ``rows`` and ``cols`` are
    empty.
    """
    macros = {"PARAM": TYPES[params[0].dtype], "MAT": TYPES[mats[0].dtype], "ROUNDING": rounding.upper()}
    name = "scaled_step" if iterations is None else "sinkhorn_step"
    kernels = library(f"steps/{name}", {**macros, "SKIP": int(skip_nonfinite)})
    flags = torch.zeros(len(params), dtype=torch.int32)
    if any(p.dim() > 2 for p in params):  # a stack of matrices is several
        owners = [t for t, p in enumerate(params) for _ in range(p.shape[:-2].numel())]
        within = [e for p in params for e in range(p.shape[:-2].numel())]
    else:
        owners, within = list(range(len(params))), [0] * len(params)
    first = [0] * len(params) if offsets is None else offsets.tolist()
    sizes = [p.shape[-2] * p.shape[-1] for p in params]
    count = len(owners)
    heights, widths = [params[t].shape[-2] for t in owners], [params[t].shape[-1] for t in owners]
    extent: list[Any] = [integers(heights), integers(widths)]
    if iterations is None:
        row_places, col_places = pointers(_matrices(rows, 1)), pointers(_matrices(cols, 1))
    else:
        extent += [ctypes.c_int64(iterations[0]), int(iterations[1])]
        scales = torch.empty(sum(heights) + sum(widths))
        places = _consecutive(scales, [*heights, *widths])
        row_places, col_places = pointer_array(places[:count]), pointer_array(places[count:])
    getattr(kernels, name)(
        ctypes.c_int64(count),
        pointers(_matrices(params, 2)),
        pointers(_matrices(mats, 2)),
        row_places,
        col_places,
        pointers(_matrices(extras, 2)) if extras else None,
        *extent,
        address(hyper),
        None if seeds is None else integers(seeds[owners].tolist()),
        integers([first[t] + e * sizes[t] for t, e in zip(owners, within, strict=True)]),
        integers(owners),
        address(flags),
        torch.get_num_threads(),
    )
    return flags


def _consecutive(memory: Tensor, sizes: list[int]) -> list[int]:
    """Addresses of pieces of fp32 memory of these sizes, one after the other."""
    return [memory.data_ptr() + 4 * start for start in itertools.accumulate(sizes[:-1], initial=0)]


def _matrices(tensors: list[Tensor], dims: int) -> list[Tensor]:
    """The tensors, with stacks [..., m, n] (or their scales [..., m]) cut into their members."""
    if all(t.dim() == dims for t in tensors):
        return tensors
    return [part for t in tensors for part in (t.flatten(0, -dims - 1) if t.dim() > dims else t[None])]
