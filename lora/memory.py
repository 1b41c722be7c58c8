"""How many bytes autograd keeps between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward in a forward pass.

    Args:
        forward: runs the pass; its result is kept alive until the count is made.
        parameters: tensors that exist anyway and do not count, such as ``model.parameters()``.

    Returns:
        The size of all distinct storages among the saved tensors: a tensor that is kept twice counts once, a view
        counts as the whole of its base.
    """
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    storages: dict[int, torch.UntypedStorage] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            # kept alive, so that no other storage gets its address during the count
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total
