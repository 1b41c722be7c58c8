"""Optimizer steps inside the backward pass, one parameter at a time, so that gradients are freed at once."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from leanstep._torch import is_dtensor
from leanstep.optimizers.common.base import LeanOptimizer
from leanstep.optimizers.common.sharding import run, together


class GradientRelease:
    """Handle of :func:`release_gradients`. ``remove()``, or the end of the ``with`` block, removes the hooks."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Remove the hooks; the optimizer steps as usual again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def release_gradients(model: nn.Module, optimizer: LeanOptimizer) -> GradientRelease:
    """Update each parameter in the backward pass, as soon as its gradient is complete, and free the gradient.

    Gradient memory peaks at about the largest parameter, not at the whole model. The update is bit-identical to
    ``optimizer.step()`` after the backward pass, with one exception: SinkGD's AdamW parameters with a non-finite
    gradient are skipped one by one instead of together.

    Call ``optimizer.step()`` after each backward pass as usual; it ends the step. ``zero_grad()`` and learning-rate
    schedulers work as before.

    Args:
        model: the model whose parameters the optimizer has. Run one backward pass per step; gradient accumulation is
            not supported.
        optimizer: :class:`Lion` or :class:`SinkGD`.

    Returns:
        A handle with ``remove()``; also a context manager.

    Raises:
        TypeError: the optimizer's rule needs the gradients of several parameters together.
        ValueError: the optimizer has parameters that are not the model's; a group has nonfinite="raise", which checks
            all gradients before any update; the model is sharded or in DistributedDataParallel, where gradients are
            complete only after communication.
        RuntimeError: a second backward pass runs before ``step()`` (raised by ``backward()``).

    Notes:
        Do not clip by global norm: ``clip_grad_norm_`` finds no gradient after ``backward()``. Do not use
        ``GradScaler``: the hooks would step on scaled gradients. SinkGD's normalized updates need neither.
    """
    _refuse(model, optimizer)
    stepped: set[Tensor] = set()

    @torch.no_grad()
    def step_one(group_index: int, first_index: int, position: int, param: Tensor) -> None:
        if param in stepped:
            raise RuntimeError(
                "release_gradients: a second backward pass reached a parameter before optimizer.step(). The "
                "first pass used and freed its gradient, so gradients cannot be accumulated: use larger batches, or "
                "do without release_gradients."
            )
        stepped.add(param)
        # looked up at every step: loading a state replaces the groups
        group = optimizer.param_groups[group_index]
        run(together(optimizer._group_steps(group, first_index, position)))
        param.grad = None

    handles: list[Any] = []
    first_index = 0
    for group_index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            if param.requires_grad:
                hook = functools.partial(step_one, group_index, first_index, position)
                handles.append(param.register_post_accumulate_grad_hook(hook))
        first_index += len(group["params"])
    handles.append(optimizer.register_step_post_hook(lambda *_: stepped.clear()))
    return GradientRelease(handles)


def _refuse(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, LeanOptimizer) or not optimizer._separable:
        separable = sorted(cls.__name__ for cls in LeanOptimizer.__subclasses__() if cls._separable)
        raise TypeError(
            f"release_gradients: {type(optimizer).__name__} cannot step parameters one by one; "
            f"expected one of {', '.join(separable)}"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "release_gradients: under DistributedDataParallel a gradient is complete only after its bucket was "
            "reduced, later than this hook. Use fully_shard with optimizer.step(), or one process."
        )
    of_model = {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        if group["nonfinite"] == "raise":
            raise ValueError("release_gradients: nonfinite='raise' must see all gradients first; use 'skip' or 'pass'")
        for param in group["params"]:
            if id(param) not in of_model:
                raise ValueError("release_gradients: the optimizer holds parameters that the model does not")
            if is_dtensor(param):
                raise ValueError(
                    "release_gradients: sharded parameters get their gradient after communication: use step()"
                )
