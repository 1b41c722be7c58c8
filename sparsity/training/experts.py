"""Fused experts: modules with one tensor for the matrices of all experts of a mixture."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from leanstep._torch import expert_tensors

# caches of the passes that run now
_caches: list[AbstractContextManager[None]] = []


def flat_experts(model: nn.Module) -> list[str]:
    """Names of tensors that hold the rows of all experts in one matrix, as DBRX's do: their layout is not known."""
    return [
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if "expert" in type(module).__name__.lower() and not isinstance(module, (nn.Linear, nn.Embedding))
        for leaf, tensor in expert_tensors(name, module)
        if tensor.dim() == 2 and 1 not in tensor.shape and "bias" not in leaf
    ]


def cache_in_forward(module: nn.Module) -> None:
    """Compute each sparse weight of a module once per forward pass: loops over experts read it once for each."""
    if _begin not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_begin)
        # also after an exception, by which checkpointing ends a recomputation early
        module.register_forward_hook(_end, always_call=True)


def stop_caching(module: nn.Module) -> None:
    """Undo :func:`cache_in_forward`."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_begin, _end)]:
            hooks.pop(key)
            module._forward_hooks_always_called.pop(key, None)


def _begin(module: nn.Module, inputs: Any) -> None:
    while _caches:  # of a pass that KeyboardInterrupt ended: hooks run after an Exception alone
        _end(module, inputs, None)
    cache = parametrize.cached()
    cache.__enter__()
    _caches.append(cache)


def _end(module: nn.Module, inputs: Any, output: Any) -> None:
    if _caches:
        _caches.pop().__exit__(None, None, None)
