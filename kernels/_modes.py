"""Where kernels must not run: tensors without memory of their own, graphs, transforms, and dispatch modes."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether no kernel can run on a tensor: a graph is recorded, torch.func transforms it, or it is a fake tensor."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return in_transform() or type(tensor) not in (torch.Tensor, torch.nn.Parameter)


def in_transform() -> bool:
    """Whether a transform of torch.func, such as vmap, is on, outside torch.compile: its tensors have no memory."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def in_dispatch_mode() -> bool:
    """Whether a dispatch mode is on, outside torch.compile.

    A mode may keep a result and return the same tensor later, as selective activation checkpointing does in a repeated
    pass. An in-place addition to that tensor would then be made twice.
    """
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def without_autocast(compute: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate the ``compute(x, ...)`` of an op that fixes the precision of its products: autocast would lower it."""

    @functools.wraps(compute)
    def run(x: torch.Tensor, *others: Any) -> Result:
        if not torch.is_autocast_enabled(x.device.type):
            return compute(x, *others)
        with torch.autocast(x.device.type, enabled=False):
            return compute(x, *others)

    return run


def outside_dispatch_modes(compute: Callable[[], Result]) -> Result:
    """Call ``compute`` without the user's dispatch modes, and return its result.

    Use it for work that a repeated pass skips, such as cached norms and measurements. Otherwise a mode that returns the
    results of the first pass in order would get out of step.
    """
    modes = range(torch._C._len_torch_dispatch_stack()) if in_dispatch_mode() else ()
    # torch's own modes trace or replace operations, so they have to see all of them
    if not modes or any(torch._C._get_dispatch_stack_at(i).is_infra_mode() for i in modes):
        return compute()
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return compute()


def vmap_over_rows(operation: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, int]]:
    """The rule of torch.func.vmap for an operation on the rows [n, in] of its first argument.

    A batch of first arguments becomes more rows of one call. Where another argument is batched, too, each example gets
    a call.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[torch.Tensor, int]:
        rows, *others = arguments
        if all(dim is None for dim in in_dims[1:]):
            rows = rows.movedim(in_dims[0], 0)
            return operation(rows.flatten(0, 1), *others).unflatten(0, rows.shape[:2]), 0
        examples = (
            [part if dim is None else part.select(dim, i) for part, dim in zip(arguments, in_dims, strict=True)]
            for i in range(info.batch_size)
        )
        return torch.stack([operation(*example) for example in examples]), 0

    return rule
