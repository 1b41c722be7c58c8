"""Launchers of poly_features.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import address, library
from leanstep.kernels.poly.tables import PolyTables

LANES = 64


def poly_features(x: Tensor, tables: PolyTables) -> Tensor:
    """Features [n, k, c] of x [n, d, c], fp32."""
    x = x.contiguous()
    n, dim, columns = x.shape
    features = len(tables.parent)
    out = x.new_empty(n, features, columns)
    library("poly/features", {}).poly_features(
        *map(address, (x, tables.parent, tables.last, tables.weight32, out)),
        *map(ctypes.c_int64, (n, dim, features, columns)),
        torch.get_num_threads(),
    )
    return out


def poly_features_backward(grad: Tensor, x: Tensor, tables: PolyTables) -> Tensor:
    """The gradient of x [n, d, c], fp32."""
    grad, x = grad.contiguous(), x.contiguous()
    n, dim, columns = x.shape
    lower, threads = len(tables.up), torch.get_num_threads()
    out = torch.empty_like(x)
    scratch = x.new_empty(threads, lower, LANES)
    library("poly/features", {}).poly_features_backward(
        *map(
            address,
            (grad, x, tables.parent, tables.last, tables.weight32, tables.up, tables.lift32, scratch, out),
        ),
        *map(ctypes.c_int64, (n, dim, len(tables.parent), lower, columns)),
        threads,
    )
    return out
