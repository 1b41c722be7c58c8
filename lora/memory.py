"""The memory that autograd holds between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd saves for backward in a forward pass.

    Args:
        forward: runs the pass; its result stays alive until the count is done.
        parameters: tensors to ignore, such as ``model.parameters()``.

    Returns:
        Total size of the distinct storages of all saved tensors. A tensor saved twice counts once; a view counts with
        its whole storage.
    """
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    storages: dict[int, torch.UntypedStorage] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            # holds a reference, so that no other storage gets the same address during the count
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total
