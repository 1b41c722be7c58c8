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
    return torch.cat([rows.to(dtype).square().sum(1) for rows in weight.split(ROWS)])


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float, squares: Tensor | None = None) -> Tensor:
    """Norm of every row of ``weight + scale * b a``.

    Args:
        weight: (m, n), floating. a: (r, n). b: (m, r). squares: :func:`row_squares` of the weight, if known.

    Returns:
        (m,), fp32, or fp64 where the weight or a factor is.
    """
    dtype = _norm_dtype(weight, a, b)
    return lora_norms(weight, a, b, scale, row_squares(weight, dtype) if squares is None else squares)


def _norm_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class _Version(NamedTuple):
    """A tensor's memory, kept alive by the alias, and the count of its in-place changes."""

    alias: Tensor
    changes: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Version:
        return cls(tensor.detach(), _change_count(tensor))

    def is_current(self, tensor: Tensor) -> bool:
        return (
            self.alias.data_ptr() == tensor.data_ptr()
            and self.changes == _change_count(tensor)
            and self.alias.shape == tensor.shape
            and self.alias.dtype == tensor.dtype
        )


def _change_count(tensor: Tensor) -> int:
    """How often a tensor was changed in place; tensors of inference mode do not count that."""
    return -1 if tensor.is_inference() else tensor._version


class NormCache:
    """The norms of one layer, computed again when a tensor that they depend on has changed.

    In training, norms are computed at every call, since optimizers may write through ``.data``, which is not counted;
    only the squares of the frozen weight are kept. In evaluation, norms are kept until a tensor's memory or change
    count differs. ``eval()``, and ``train()`` after an evaluation, drop the whole cache.
    """

    def __init__(self) -> None:
        self._squares: tuple[_Version, Tensor] | None = None
        self._norms: tuple[tuple[_Version, ...], float, Tensor] | None = None

    def __deepcopy__(self, memo: object) -> NormCache:
        return NormCache()

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        return NormCache, ()

    def norms(self, source: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, training: bool) -> Tensor:
        """:func:`row_norms` of ``weight``; ``source`` is the parameter that it comes from, whose changes count."""
        if torch.compiler.is_compiling() or type(source) not in (Tensor, torch.nn.Parameter):
            # changes cannot be told, as of fake tensors
            return row_norms(weight, a, b, scale)
        if not training and self._norms is not None:
            versions, for_scale, norms = self._norms
            if scale == for_scale and all(v.is_current(t) for v, t in zip(versions, (source, a, b), strict=True)):
                return norms
        dtype = _norm_dtype(weight, a, b)
        if self._squares is None or not self._squares[0].is_current(source) or self._squares[1].dtype != dtype:
            self._squares = (_Version.of(source), row_squares(weight, dtype))
        norms = row_norms(weight, a, b, scale, self._squares[1])
        if not training:
            self._norms = (tuple(map(_Version.of, (source, a, b))), scale, norms)
        return norms
