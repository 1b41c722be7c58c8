"""How many bytes autograd keeps between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward in a forward pass.

    Args:
        forward: runs the pass; what it returns stays alive until the count is made.
        parameters: tensors that are there anyway and do not count, such as ``model.parameters()``.

    Returns:
        The size of all distinct storages among the saved tensors: a tensor that is kept twice counts once, a view
        counts as what it is a view of.
    """
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    found: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            # held, so that no other storage takes its place in memory while the count goes on
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in found.values())
    del result
    return total
