"""LANTON's noise="halves": gradients of the first half of a batch, stored between its micro-batches."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from leanstep._torch import is_dtensor
from leanstep.optimizers.common.base import dense_gradient
from leanstep.optimizers.common.sharding import Reduction, dtype_of, local, placed_like, run

# Entries of a group. half_content: content of its parameters' ``half_grad``: "none", the "gradient" of the first half,
# or its "difference" from the whole gradient. half_fraction: fraction of the batch in the first half. half_marked:
# whether mark_half() was ever called.
UNMARKED: dict[str, Any] = {"half_content": "none", "half_fraction": 0.5, "half_marked": False}

# tensors per all-reduce
_BUCKET = 16

State = MutableMapping[Tensor, dict[str, Any]]


def mark_half(
    groups: list[dict[str, Any]],
    state: State,
    fraction: float,
    averaged: bool | None,
    process_group: Any,
    loss_scale: float | Tensor,
) -> None:
    """See :meth:`leanstep.optimizers.LANTON.mark_half`; ``groups`` are those with noise="halves"."""
    if not 0 < fraction < 1:
        raise ValueError(f"LANTON.mark_half: expected a fraction of the micro-batches in (0, 1), got {fraction}")
    if not groups:
        raise RuntimeError("LANTON.mark_half: no group has noise='halves'")
    copies: list[Tensor] = []
    for group in groups:
        group["half_content"], group["half_fraction"], group["half_marked"] = "none", float(fraction), True
        if group["noise_clock"]:
            continue
        for position, param in enumerate(group["params"]):
            state.get(param, {}).pop("half_grad", None)
            if param.grad is None:
                continue
            grad = dense_gradient("LANTON", group, position, param).detach()
            half = _unscaled(grad, loss_scale).to(dtype_of(group["noise_dtype"]) or param.dtype, copy=True)
            state[param]["half_grad"] = half
            copies.append(half)
        group["half_content"] = "gradient"
    whole = [c for c in copies if not is_dtensor(c)]
    if whole and averaged is not True:
        _average(whole, averaged, process_group)
    if not copies and any(g["half_content"] == "gradient" for g in groups):
        raise RuntimeError(
            "LANTON.mark_half: no parameter has a gradient yet; call it after the backward passes of the first half "
            "(under FSDP2, with gradients reduced in each of them)"
        )


def _unscaled(grad: Tensor, loss_scale: float | Tensor) -> Tensor:
    return grad / loss_scale if isinstance(loss_scale, Tensor) or loss_scale != 1 else grad


def _average(copies: list[Tensor], averaged: bool | None, process_group: Any) -> None:
    """Average copies over processes, unless ``averaged`` or a single process."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.get_world_size(process_group) if distributed else 1
    if world == 1:
        return
    if averaged is None:
        raise ValueError(
            f"LANTON.mark_half: expected averaged=True or False for parameters replicated on {world} processes, got "
            "None. Pass averaged=False inside DistributedDataParallel's no_sync() (Accelerate's accumulate() uses it), "
            "averaged=True outside."
        )
    process_group = process_group or torch.distributed.group.WORLD
    starts = range(0, len(copies), _BUCKET)
    run([Reduction(copy, process_group) for copy in copies[i : i + _BUCKET]] for i in starts)
    torch._foreach_div_(copies, world)


def mark_whole(groups: list[dict[str, Any]], state: State, loss_scale: float | Tensor) -> None:
    """See :meth:`leanstep.optimizers.LANTON.mark_whole`; ``groups`` are those with noise="halves"."""
    if not any(g["half_marked"] for g in groups):
        raise RuntimeError("LANTON.mark_whole: call mark_half() after the first half of the micro-batches")
    for group in groups:
        if group["half_content"] != "gradient":
            continue
        for param in group["params"]:
            param_state = state.get(param, {})
            if "half_grad" in param_state and param.grad is not None:
                grad = _unscaled(local(placed_like(param.grad, param)), loss_scale)
                local(param_state["half_grad"]).sub_(grad, alpha=group["half_fraction"])
        group["half_content"] = "difference"


def check_marked(group: dict[str, Any]) -> None:
    """Raise RuntimeError if mark_half() was never called, because all factors would silently stay at 1.

    Does not raise at lr 0: torch.distributed.checkpoint makes such a step to create the state.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "LANTON: noise='halves' cannot be compiled into a step, because torch.compile does not track state that is "
            "created and deleted between steps. Do not compile the step (the model may be compiled), or use "
            "noise='previous'."
        )
    if group["half_marked"]:
        return
    if any(param.grad is not None for param in group["params"]) and float(group["lr"]) != 0:
        raise RuntimeError(
            "LANTON: noise='halves' compares the two halves of a step's micro-batches, but mark_half() was not called "
            "between them; nothing was updated. Call it, or take noise='previous', which needs no accumulation."
        )


def forget(group: dict[str, Any], state: State) -> None:
    """Delete the copies after the step."""
    if group["half_content"] == "none":
        return
    for param in group["params"]:
        if param in state:
            state[param].pop("half_grad", None)
    group["half_content"] = "none"
