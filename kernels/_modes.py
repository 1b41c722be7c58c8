"""Dispatch modes: those who see every operation, and may keep what it returned or hand that out again later."""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def in_dispatch_mode() -> bool:
    """Whether one is on, outside torch.compile.

    Selective activation checkpointing is one. It keeps the very tensor that a product returned, and hands it out again
    when the pass is repeated; what had been added to it in place would be added twice.
    """
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def unseen(compute: Callable[[], Result]) -> Result:
    """What ``compute`` gives, out of sight of the user's dispatch modes.

    For what is computed in one pass and not in another: norms that are remembered, measurements. A mode that counts
    operations, to hand their results out again in their order, would come out of step.
    """
    modes = range(torch._C._len_torch_dispatch_stack()) if in_dispatch_mode() else ()
    # torch's own modes trace operations or stand in for them, and have to see all
    if not modes or any(torch._C._get_dispatch_stack_at(i).is_infra_mode() for i in modes):
        return compute()
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return compute()
