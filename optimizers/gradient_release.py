"""Step every parameter inside the backward pass and free its gradient at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from leanstep._torch import is_dtensor
from leanstep.optimizers.common.base import LeanOptimizer


class GradientRelease:
    """Handle of :func:`release_gradients`: ``remove()`` (or leaving the ``with`` block) ends it."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks away; the optimizer steps as usual again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def release_gradients(model: nn.Module, optimizer: LeanOptimizer) -> GradientRelease:
    """Update each parameter in the backward pass, as soon as its gradient is complete, and free the gradient.

    Memory: gradients of the whole model never exist together; the peak is about one parameter's. The update equals
    ``optimizer.step()`` after the backward pass bit for bit, as the rule treats every parameter alone (AdamW tensors
    with a non-finite gradient are skipped one by one here, and together there).
    ``optimizer.step()`` becomes a check that nothing is left to do, ``zero_grad()`` stays harmless, and learning-rate
    schedulers work as before.

    Args:
        model: its parameters must be the optimizer's. A single backward pass per step: gradient accumulation would
            need the sum of several, and is refused (a second backward pass before ``step()`` raises).
        optimizer: :class:`Lion` or :class:`SinkGD`.

    Returns:
        A handle with ``remove()``; also a context manager.

    Raises:
        TypeError: an optimizer whose rule needs several gradients together.
        ValueError: parameters of the optimizer that are not the model's; nonfinite="raise" (it must see all gradients
            before it changes anything); a sharded or DistributedDataParallel model (gradients there are complete only
            after communication).
        RuntimeError: from ``backward()``, for a second pass before ``step()``.

    Notes:
        Clipping by global norm needs all gradients at once and cannot be used: after ``backward()`` there is nothing
        left to clip, and ``clip_grad_norm_`` finds no gradient. Nor can ``GradScaler``: the hook would step on scaled
        gradients. SinkGD does not need it: its update does not change with the gradient's size.
    """
    _refuse(model, optimizer)
    stepped: set[Tensor] = set()
    handles: list[Any] = []
    first_index = 0
    for number, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            if not param.requires_grad:
                continue
            hook = _hook(optimizer, number, first_index, position, stepped)
            handles.append(param.register_post_accumulate_grad_hook(hook))
        first_index += len(group["params"])

    def finish(_: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        stepped.clear()

    handles.append(optimizer.register_step_post_hook(finish))
    return GradientRelease(handles)


def _hook(
    optimizer: LeanOptimizer, number: int, first_index: int, position: int, stepped: set[Tensor]
) -> Callable[[Tensor], None]:
    def step_one(param: Tensor) -> None:
        if param in stepped:
            raise RuntimeError(
                "release_gradients: a second backward pass reached a parameter before optimizer.step(). Gradients are "
                "used and freed in the pass that makes them, so they cannot be accumulated: take larger batches, or "
                "do without release_gradients."
            )
        stepped.add(param)
        # looked up at every step: loading a state replaces the groups
        optimizer._step_one(optimizer.param_groups[number], first_index, position)
        param.grad = None

    return step_one


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
