"""LANTON's noise="halves": gradients of the first half of a batch, stored between its micro-batches."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from leanstep._torch import is_dtensor
from leanstep.optimizers.common.base import dense_gradient
from leanstep.optimizers.common.quantized import CODES
from leanstep.optimizers.common.sharding import Reduction, dtype_of, local, placed_like, run

# Entries of a group. half_content: content of its parameters' ``half_grad``: "none", the "gradient" of the first half,
# or its "difference" from the whole gradient. half_fraction: fraction of the batch in the first half. half_marked:
# whether mark_half() was ever called.
UNMARKED: dict[str, Any] = {"half_content": "none", "half_fraction": 0.5, "half_marked": False}

# tensors per all-reduce
_BUCKET = 16


class MarkedHalves:
    """The part of :class:`leanstep.optimizers.LANTON` that compares the halves of a batch."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]

    @torch.no_grad()
    def mark_half(
        self,
        fraction: float = 0.5,
        *,
        averaged: bool | None = None,
        process_group: Any = None,
        loss_scale: float | Tensor = 1.0,
    ) -> None:
        """Copy the gradients accumulated over the first half of a step's micro-batches, for ``noise="halves"``.

        ``step()`` compares the copies with the whole gradients and deletes them::

            for i, batch in enumerate(micro_batches):
                (model(batch) / len(micro_batches)).backward()
                if 2 * (i + 1) == len(micro_batches):
                    optimizer.mark_half()
            optimizer.step()

        A step without this call (a last batch of one micro-batch) leaves H unchanged. If clipping or
        ``GradScaler.unscale_`` changes the gradients before the step, call :meth:`mark_whole` before that.

        Args:
            fraction: fraction of the micro-batches done so far, in (0, 1); the halves need not be equal.
            averaged: whether the gradients of replicated parameters are averaged over processes already. True:
                ``DistributedDataParallel`` has done so in the backward pass. False: they come from ``no_sync()`` (which
                Accelerate's ``accumulate()`` uses before its last micro-batch); average the copies here, by one
                reduction of all gradients; a process that did not use a parameter adds zeros. None: one process, or
                sharded parameters (FSDP2 reduces in every pass).
            process_group: the processes to average over; None: all.
            loss_scale: factor of the loss that the gradients still contain, such as ``scaler.get_scale()``.

        Raises:
            RuntimeError: no group has noise="halves"; no parameter has a gradient.
            ValueError: the fraction is outside (0, 1); ``averaged`` is None with several processes and replicated
                parameters.
        """
        _check_fraction("mark_half", fraction)
        groups = self._groups_with_halves()
        if not groups:
            raise RuntimeError("LANTON.mark_half: no group has noise='halves'")
        entries: list[tuple[dict[str, Any], int, Tensor]] = []
        for group in groups:
            self._delete_halves(group)
            group["half_fraction"], group["half_marked"] = float(fraction), True
            if not group["noise_clock"]:
                group["half_content"] = "gradient"
                entries += [(group, position, param) for position, param in enumerate(group["params"])]
        has_gradient = _with_gradient([param for *_, param in entries], averaged, process_group)
        copies: list[Tensor] = []
        for (group, position, param), has in zip(entries, has_gradient, strict=True):
            if has:
                copies.append(_copy_of_gradient(group, position, param, loss_scale))
                self.state[param]["half_grad"] = copies[-1]
        if averaged is False:
            _average([copy for copy in copies if not is_dtensor(copy)], process_group)
        if not copies and any(g["half_content"] == "gradient" for g in groups):
            raise RuntimeError(
                "LANTON.mark_half: no parameter has a gradient yet; call it after the backward passes of the first "
                "half (under FSDP2, with gradients reduced in each of them)"
            )

    @torch.no_grad()
    def mark_whole(self, *, fraction: float | None = None, loss_scale: float | Tensor = 1.0) -> None:
        """Compute the difference of the halves from the current gradients; call it after the last backward pass.

        Needed only if gradients are changed before ``step()`` (clipping, unscaling). H is in units of the gradients
        before that change.

        Args:
            fraction: fraction of the micro-batches before :meth:`mark_half`, if there were more or fewer after it than
                expected, as in the last step of an epoch; None: as told there.
            loss_scale: as for :meth:`mark_half`.

        Raises:
            RuntimeError: :meth:`mark_half` was never called.
            ValueError: the fraction is outside (0, 1).
        """
        if fraction is not None:
            _check_fraction("mark_whole", fraction)
        groups = self._groups_with_halves()
        if not any(g["half_marked"] for g in groups):
            raise RuntimeError("LANTON.mark_whole: call mark_half() after the first half of the micro-batches")
        for group in groups:
            if group["half_content"] != "gradient":
                continue
            if fraction is not None:
                group["half_fraction"] = float(fraction)
            for param in group["params"]:
                state = self.state.get(param, {})
                if "half_grad" in state and param.grad is not None:
                    grad = _unscaled(local(placed_like(param.grad, param)), loss_scale)
                    local(state["half_grad"]).sub_(grad, alpha=group["half_fraction"])
            group["half_content"] = "difference"

    def _groups_with_halves(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _check_marked(self, group: dict[str, Any]) -> None:
        """Raise RuntimeError if mark_half() was never called, because all factors would silently stay at 1.

        Does not raise at lr 0: torch.distributed.checkpoint makes such a step to create the state.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "LANTON: noise='halves' cannot be compiled into a step, because torch.compile does not track state "
                "that is created and deleted between steps. Do not compile the step (the model may be compiled), or "
                "use noise='previous'."
            )
        has_gradient = any(param.grad is not None for param in group["params"])
        if not group["half_marked"] and has_gradient and float(group["lr"]) != 0:
            raise RuntimeError(
                "LANTON: noise='halves' compares the two halves of a step's micro-batches, but mark_half() was not "
                "called between them; nothing was updated. Call it, or take noise='previous', which needs no "
                "accumulation."
            )

    def _delete_halves(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            self.state.get(param, {}).pop("half_grad", None)
        group["half_content"] = "none"


class HalvesMarker:
    """Marks the halves of the steps of a trainer, which says after each micro-batch that one is done.

    Args:
        optimizer: a LANTON with noise="halves".
        count: micro-batches of a step; the last step of an epoch may have fewer.
        averaged: as for :meth:`MarkedHalves.mark_half`.

    Raises:
        TypeError: for another optimizer.
        ValueError: for fewer than two micro-batches, or without noise="halves".
    """

    def __init__(self, optimizer: Any, count: int, *, averaged: bool) -> None:
        if not isinstance(optimizer, MarkedHalves):
            raise TypeError(f"MarkHalves: expected LANTON(..., noise='halves'), got {type(optimizer).__name__}")
        if not optimizer._groups_with_halves():
            raise ValueError(
                "MarkHalves: no group of LANTON has noise='halves'; build it with that, or drop the callback"
            )
        if count < 2:
            raise ValueError(
                f"MarkHalves: expected two or more micro-batches per step, got {count}, without halves. Accumulate "
                "gradients over more, or take noise='previous'"
            )
        self.optimizer, self.count, self.averaged = optimizer, count, averaged
        self.done, self.marked = 0, 0

    def after_micro_batch(self) -> None:
        """Count a micro-batch; mark the half of the step after its first half."""
        self.done += 1
        if self.done == self.count // 2:
            self.optimizer.mark_half(self.done / self.count, averaged=self.averaged)
            self.marked = self.done

    def before_step(self) -> None:
        """Compare the halves; call it after the last micro-batch of a step, before gradients are clipped."""
        if 0 < self.marked < self.done:
            self.optimizer.mark_whole(fraction=self.marked / self.done)
        elif self.marked:  # there is no second half
            for group in self.optimizer._groups_with_halves():
                self.optimizer._delete_halves(group)
        self.done = self.marked = 0


def _check_fraction(method: str, fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"LANTON.{method}: expected a fraction of the micro-batches in (0, 1), got {fraction}")


def _unscaled(grad: Tensor, loss_scale: float | Tensor) -> Tensor:
    return grad / loss_scale if isinstance(loss_scale, Tensor) or loss_scale != 1 else grad


def _copy_of_gradient(group: dict[str, Any], position: int, param: Tensor, loss_scale: float | Tensor) -> Tensor:
    """Return the unscaled gradient in the dtype of copies; zeros for a parameter that has none in this process."""
    dtype = dtype_of(group["noise_dtype"])
    dtype = param.dtype if dtype is None or dtype in CODES else dtype
    if param.grad is None:
        return torch.zeros_like(param, dtype=dtype)
    grad = dense_gradient("LANTON", group, position, param).detach()
    return _unscaled(grad, loss_scale).to(dtype, copy=True)


def _with_gradient(params: list[Tensor], averaged: bool | None, process_group: Any) -> list[bool]:
    """Tell for each parameter whether it has a gradient: where copies are averaged, in any of the processes.

    DistributedDataParallel with find_unused_parameters leaves those that a process did not use without one there.
    """
    flags = [param.grad is not None for param in params]
    replicated = [i for i, param in enumerate(params) if not is_dtensor(param)]
    world = _world_size(process_group)
    if world == 1 or averaged is True or not replicated:
        return flags
    if averaged is None:
        if not any(flags[i] for i in replicated):
            return flags
        raise ValueError(
            f"LANTON.mark_half: expected averaged=True or False for parameters replicated on {world} processes, got "
            "None. Pass averaged=False inside DistributedDataParallel's no_sync() (Accelerate's accumulate() uses it), "
            "averaged=True outside."
        )
    anywhere = torch.tensor([flags[i] for i in replicated], dtype=torch.int32, device=params[replicated[0]].device)
    torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX, process_group)
    for i, flag in zip(replicated, anywhere.tolist(), strict=True):
        flags[i] = bool(flag)
    return flags


def _world_size(process_group: Any) -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size(process_group) if distributed else 1


def _average(copies: list[Tensor], process_group: Any) -> None:
    world = _world_size(process_group)
    if world == 1 or not copies:
        return
    process_group = process_group or torch.distributed.group.WORLD
    starts = range(0, len(copies), _BUCKET)
    run([Reduction(copy, process_group) for copy in copies[i : i + _BUCKET]] for i in starts)
    torch._foreach_div_(copies, world)
