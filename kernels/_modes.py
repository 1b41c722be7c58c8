"""torch's dispatch modes, which see every operation, and may keep its result or return that again later."""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def in_dispatch_mode() -> bool:
    """Whether a dispatch mode is on, outside torch.compile.

    Selective activation checkpointing is one. It keeps the very tensor that a product returned, and returns it again
    when the pass is repeated; in-place additions to that tensor would then be made twice.
    """
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def outside_dispatch_modes(compute: Callable[[], Result]) -> Result:
    """Call ``compute`` without the user's dispatch modes, and return its result.

    For work that one pass does and its repetition does not: cached norms, measurements. A mode that keeps results to
    return them in order would get out of step.
    """
    modes = range(torch._C._len_torch_dispatch_stack()) if in_dispatch_mode() else ()
    # torch's own modes trace operations or replace them, and have to see all
    if not modes or any(torch._C._get_dispatch_stack_at(i).is_infra_mode() for i in modes):
        return compute()
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return compute()
