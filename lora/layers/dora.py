"""DoRA's norms, computed without forming ``B A``.

The norm of row j of ``W + s B A`` comes from products r wide::

    norm_j^2 = |W_j|^2 + 2 s (W A^T)_j . B_j + s^2 (B (A A^T))_j . B_j

A frozen W needs ``|W_j|^2`` only once. The rest costs ``2 m n r`` operations, as many as r rows of input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels import lora_norms

# rows of the weight to convert to ``dtype`` at a time
ROWS = 2048


@torch.no_grad()
def row_squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared norm of every row of a matrix (m, n), in ``dtype``."""
    return torch.cat([rows.to(dtype).square().sum(1) for rows in weight.split(ROWS)])


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float, squares: Tensor | None = None) -> Tensor:
    """Norm of every row of ``weight + scale * b a``.

    Args:
        weight, a, b: (m, n), (r, n) and (m, r), floating.
        scale: s.
        squares: :func:`row_squares` of the weight, if known.

    Returns:
        (m,), fp32, or fp64 if the weight or a factor is fp64.
    """
    dtype = _norm_dtype(weight, a, b)
    return lora_norms(weight, a, b, scale, row_squares(weight, dtype) if squares is None else squares)


def _norm_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _version(tensor: Tensor) -> tuple[object, ...]:
    """Identify a tensor's memory and its in-place changes, which inference tensors do not count."""
    changes = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), changes, tensor.shape, tensor.dtype


class NormCache:
    """Caches the norms of one layer.

    Training recomputes the norms at every call, because optimizers may write through ``.data``, which torch does not
    count; it caches only the squares of the frozen weight. Evaluation caches the norms until the memory or the change
    count of a tensor differs. A training pass drops them; so do ``eval()``, and ``train()`` after an evaluation, of
    leanstep's own layers.
    """

    def __init__(self) -> None:
        # versions -> numbers; the aliases of the tensors keep other tensors from getting their memory
        self._squares: tuple[object, Tensor, Tensor] | None = None
        self._norms: tuple[object, Tensor, list[Tensor]] | None = None

    def __deepcopy__(self, memo: object) -> NormCache:
        return NormCache()

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        return NormCache, ()

    def norms(self, source: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, training: bool) -> Tensor:
        """:func:`row_norms` of ``weight``. The cache watches ``source``, the parameter behind ``weight``."""
        if training:
            self._norms = None
        if torch.compiler.is_compiling() or type(source) not in (Tensor, torch.nn.Parameter):
            # tensor subclasses, such as fake tensors, do not reveal changes
            return row_norms(weight, a, b, scale)
        version = (*map(_version, (source, a, b)), scale)
        if not training and self._norms is not None and self._norms[0] == version:
            return self._norms[1]
        dtype = _norm_dtype(weight, a, b)
        # a later pass may need gradients, and autograd saves no tensor made in inference mode
        with torch.inference_mode(False):
            if self._squares is None or self._squares[0] != (version[0], dtype):
                self._squares = ((version[0], dtype), row_squares(weight, dtype), source.detach())
            norms = row_norms(weight, a, b, scale, self._squares[1])
        if not training:
            self._norms = (version, norms, [tensor.detach() for tensor in (source, a, b)])
        return norms
