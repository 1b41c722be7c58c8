"""Which tensors of a list have a non-finite entry."""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels._backend import choose, group_by_dtypes, is_dense


@torch.no_grad()
def nonfinite_flags(tensors: list[Tensor]) -> Tensor:
    """int32 [len(tensors)]: 1 where a tensor has an infinite or NaN entry.

    Args:
        tensors: floating tensors of one device, any shape and strides.

    Raises:
        BackendError: when a backend was asked for that cannot run here.

    Notes:
        Reads every tensor once. No wait for the device.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.int32)
    if torch.compiler.is_compiling():
        return _reference(tensors)
    if choose("nonfinite_flags", tensors[0].device, *dict.fromkeys(t.dtype for t in tensors)).backend != "cpp":
        return _reference(tensors)
    from leanstep.kernels.cpp_impl.steps import nonfinite_flags as cpp

    flags = torch.zeros(len(tensors), dtype=torch.int32)
    dense = [is_dense(t) for t in tensors]
    for members in group_by_dtypes([tensors], dense):
        flags[members] = cpp.nonfinite_flags([tensors[i] for i in members])
    rest = [i for i, fits in enumerate(dense) if not fits]
    if rest:
        flags[rest] = _reference([tensors[i] for i in rest])
    return flags


def _reference(tensors: list[Tensor]) -> Tensor:
    return torch.stack([~torch.isfinite(t).all() for t in tensors]).to(torch.int32)
