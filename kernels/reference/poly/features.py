"""All monomials of a vector up to a degree, as plain torch. Their inner products are Taylor sums of exp."""

from dataclasses import replace

import torch
from torch import Tensor

from leanstep.kernels.poly.tables import PolyTables


def poly_features(x: Tensor, tables: PolyTables) -> Tensor:
    """Features [n, k, c] of the columns of x [n, d, c]: ``f[0] = 1``, ``f[i] = weight[i] f[parent[i]] x[last[i]]``."""
    weight = tables.weight.to(x.dtype)[:, None]
    blocks = [torch.ones_like(x[:, :1])]
    for t in range(1, len(tables.starts) - 1):
        begin, end = tables.starts[t], tables.starts[t + 1]
        above = blocks[-1].index_select(1, tables.parent[begin:end] - tables.starts[t - 1])
        blocks.append(above.mul_(x.index_select(1, tables.last[begin:end])).mul_(weight[begin:end]))
    return torch.cat(blocks, dim=1)


def poly_features_backward(grad: Tensor, x: Tensor, tables: PolyTables) -> Tensor:
    """Gradient of x [n, d, c] from its features': ``dx[i] = sum_b lift[b, i] f[b] grad[up[b, i]]``."""
    lower, dim = tables.up.shape
    if not lower:
        return torch.zeros_like(x)
    below = _lower(tables)
    features = poly_features(x, below)
    terms = grad.index_select(1, tables.up.flatten()).unflatten(1, (lower, dim))
    terms.mul_(tables.lift.to(x.dtype)[:, :, None]).mul_(features[:, :, None])
    return terms.sum(dim=1)


def _lower(tables: PolyTables) -> PolyTables:
    """Cut the tables to the features below the highest degree, which come first."""
    size = tables.starts[-2]
    names = ("parent", "last", "weight", "degrees", "weight32")
    return replace(tables, starts=tables.starts[:-1], **{name: getattr(tables, name)[:size] for name in names})
