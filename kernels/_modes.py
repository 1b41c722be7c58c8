"""Dispatch modes: those who see every operation, and may keep what it returned or hand that out again later."""

import torch


def in_dispatch_mode() -> bool:
    """Whether one is on, outside torch.compile.

    Selective activation checkpointing is one. It keeps the very tensor that a product returned, and hands it out again
    when the pass is repeated; what had been added to it in place would be added twice.
    """
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def in_foreign_mode() -> bool:
    """Whether every mode that is on is one of the user's: none of torch's own, which trace or fake operations."""
    modes = range(torch._C._len_torch_dispatch_stack()) if in_dispatch_mode() else ()
    return bool(modes) and not any(torch._C._get_dispatch_stack_at(i).is_infra_mode() for i in modes)
