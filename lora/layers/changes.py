"""Outputs that other code changes in place between forward and backward, as ``nn.SiLU(inplace=True)`` does.

The saved Y of a layer is its output, which other code sees. torch counts its in-place changes, and refuses to return a
changed tensor in backward. A layer can recompute its Z instead. So Y is saved without its count of changes, and the
count is kept beside it, without the memory of Y, which hooks of saved tensors may move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ADVICE = (
    "An input of an adapted layer, or the output of one with DoRA and a frozen A, was changed in place after it was "
    "computed, as nn.ReLU(inplace=True) does; change a copy, or let DoRA keep its products with "
    'LoraConfig(save="full")'
)


class _Count(NamedTuple):
    """A tensor without memory that shares a tensor's count of in-place changes, and the count in forward."""

    counter: Tensor
    version: int


def watched(ctx: Any, saved: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The saved (H, Z, Y) of every layer in one list, with Y in a form that may be changed; fills ``ctx.counts``."""
    tensors = list(saved)
    for i in range(2, len(tensors), 3):
        y = tensors[i]
        # a compiled program has no changes in place, and subclasses, such as fake tensors, do not reveal them
        if y is not None and not torch.compiler.is_compiling() and type(y) is Tensor and not y.is_inference():
            counter = y.detach()
            counter.data = torch.empty(0, dtype=y.dtype, device=y.device)
            ctx.counts[i], tensors[i] = _Count(counter, counter._version), y.data
    return tensors


def without_changed(ctx: Any, saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """``saved`` with None for every Y that was changed since :func:`watched`."""
    counts: dict[int, _Count] = ctx.counts
    changed = {i for i, (counter, version) in counts.items() if counter._version != version}
    return [None if i in changed else tensor for i, tensor in enumerate(saved)] if changed else saved
