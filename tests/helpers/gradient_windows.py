"""Rows and Gram rows of windows of gradients, as M-FAC makes them from its kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from leanstep.kernels import Coefficients, SparseLayout, row_dots, scatter, sparse_row_dots, window_coefficients


def gram_row(windows: Sequence[Tensor], index: int, *, groups: Sequence[int] | None = None) -> Tensor:
    """Row ``index`` of G G^T, from the rows as they are stored."""
    return row_dots(windows, [w[index] for w in windows], groups=groups)


def sparse_gram_row(
    values: Sequence[Tensor], indices: Sequence[Tensor], index: int, layouts: Sequence[SparseLayout]
) -> Tensor:
    """Row ``index`` of the Gram matrix of a sparse window."""
    triples = zip(values, indices, layouts, strict=True)
    wide = torch.promote_types(values[0].dtype, torch.float32)
    rows = [scatter(v[index], i[index], layout, dtype=wide) for v, i, layout in triples]
    return sparse_row_dots(values, indices, rows, layouts)


def woodbury_coefficients(gram: Tensor, dots: Tensor, damping: float, denominator: float) -> Coefficients:
    """The c with F^-1 x = x / damping + G^T c for any x, from dots = G x: Woodbury's identity."""
    solved = window_coefficients(gram, damping, denominator, dots)
    return Coefficients(solved.values / (-denominator * damping), solved.status)
