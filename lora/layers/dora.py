"""DoRA's norms, without the matrix ``B A``.

The norm of row j of ``W + s B A`` comes from products r wide::

    norm_j^2 = |W_j|^2 + 2 s (W A^T)_j . B_j + s^2 (B (A A^T))_j . B_j

``|W_j|^2`` is computed once for a frozen W. The rest costs ``2 m n r`` operations, as many as r rows of input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leanstep.kernels import lora_norms

# rows of the weight that are widened at a time
ROWS = 2048


@torch.no_grad()
def row_squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared norm of every row of a matrix (m, n), in ``dtype``."""
    return torch.cat([part.to(dtype).square().sum(1) for part in weight.split(ROWS)])


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float, squares: Tensor | None = None) -> Tensor:
    """Norm of every row of ``weight + scale * b a``.

    Args:
        weight: (m, n), floating. a: (r, n). b: (m, r). squares: what :func:`row_squares` gives of the weight.

    Returns:
        (m,), fp32, or fp64 where the weight or the factors are.
    """
    dtype = norm_dtype(weight, a, b)
    return lora_norms(weight, a, b, scale, row_squares(weight, dtype) if squares is None else squares)


def norm_dtype(*tensors: Tensor) -> torch.dtype:
    """What norms of these matrices are computed in: fp64 where one of them is, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class _Key(NamedTuple):
    """What tells that a tensor is as it was: the memory, kept alive by the alias, and the count of its changes."""

    alias: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Key:
        return cls(tensor.detach(), _changes(tensor))

    def holds(self, tensor: Tensor) -> bool:
        return (
            self.alias.data_ptr() == tensor.data_ptr()
            and self.version == _changes(tensor)
            and self.alias.shape == tensor.shape
            and self.alias.dtype == tensor.dtype
        )


def _changes(tensor: Tensor) -> int:
    """How often a tensor was written in place; tensors of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


class NormCache:
    """The norms of one layer, computed when they are not known.

    In training they are computed at every call: optimizers may write through ``.data``, which nothing counts. The
    squares of the frozen weight are kept, and in evaluation the norms are too, until a tensor's memory or its count of
    changes differs or :meth:`clear` is called (``eval()`` does, and the ``train()`` that ends an evaluation).
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._squares: tuple[_Key, Tensor] | None = None
        self._norms: tuple[tuple[_Key, ...], float, Tensor] | None = None

    def __deepcopy__(self, memo: object) -> NormCache:
        return NormCache()

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.clear()

    def norms(self, source: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, training: bool) -> Tensor:
        """:func:`row_norms` of ``weight``; ``source`` is the parameter it was made from, which is watched instead."""
        if torch.compiler.is_compiling() or type(source) not in (Tensor, torch.nn.Parameter):
            # no memory to tell by, as in fake tensors
            return row_norms(weight, a, b, scale)
        if not training and self._norms is not None:
            keys, for_scale, norms = self._norms
            if scale == for_scale and all(key.holds(t) for key, t in zip(keys, (source, a, b), strict=True)):
                return norms
        dtype = norm_dtype(weight, a, b)
        if self._squares is None or not self._squares[0].holds(source) or self._squares[1].dtype != dtype:
            self._squares = (_Key.of(source), row_squares(weight, dtype))
        norms = row_norms(weight, a, b, scale, self._squares[1])
        if not training:
            self._norms = (tuple(map(_Key.of, (source, a, b))), scale, norms)
        return norms
