"""Polynomial features of columns, and their gradient, one launch each, fp32.

Bytes: the forward pass writes every feature once and reads x from the cache. The backward pass reads the gradient of a
feature once per variable of its monomial, the first time from memory.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.poly.tables import PolyTables, poly_tables
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import MOST_PROGRAMS, on_device, warps

THREADS = 128
# Features and columns of a tile in the forward pass, variables and columns of a tile in the backward pass. gfx942 has
# too few scalar registers for the masks of 16 variables.
BLOCK_F, BLOCK_I, BLOCK_C = 16, 8, 64


@triton.jit(do_not_specialize=["dim", "features", "columns", "degree"])
def poly_features_kernel(
    x_ptr, variables_ptr, norm_ptr, out_ptr, dim, features, columns, degree,
    BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_F features of BLOCK_C columns of one matrix."""
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    matrix = tl.program_id(2).to(tl.int64)
    mask_f, mask_c = offs_f < features, (offs_c < columns)[None, :]
    begin = x_ptr + matrix * dim * columns
    norm = tl.load(norm_ptr + offs_f, mask=mask_f, other=0.0)
    value = tl.zeros([BLOCK_F, BLOCK_C], dtype=tl.float32) + norm[:, None]
    for t in range(degree):
        i = tl.load(variables_ptr + offs_f.to(tl.int64) * degree + t, mask=mask_f, other=-1)[:, None]
        x = tl.load(begin + i.to(tl.int64) * columns + offs_c[None, :], mask=mask_c & (i >= 0), other=1.0)
        value *= x
    at = (matrix * features + offs_f)[:, None] * columns + offs_c[None, :]
    tl.store(out_ptr + at, value, mask=mask_f[:, None] & mask_c)


@triton.jit(do_not_specialize=["dim", "features", "lower", "columns", "degree"])
def poly_features_backward_kernel(
    g_ptr, x_ptr, variables_ptr, norm_ptr, up_ptr, lift_ptr, out_ptr, dim, features, lower, columns, degree,
    BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_I variables of BLOCK_C columns of one matrix."""
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    matrix = tl.program_id(2).to(tl.int64)
    mask_i, mask_c = offs_i < dim, offs_c < columns
    mask = mask_i[:, None] & mask_c[None, :]
    begin, begin_g = x_ptr + matrix * dim * columns, g_ptr + matrix * features * columns
    total = tl.zeros([BLOCK_I, BLOCK_C], dtype=tl.float32)
    # a block of equal pointers, because a mask needs a block
    of_b = variables_ptr + tl.zeros([BLOCK_C], dtype=tl.int32)
    up_b, lift_b = up_ptr + offs_i, lift_ptr + offs_i
    for b in range(lower):
        # a feature below the highest degree has no last variable
        f = tl.zeros([BLOCK_C], dtype=tl.float32) + tl.load(norm_ptr + b)
        for t in range(degree - 1):
            i = tl.load(of_b + t).to(tl.int64)
            f *= tl.load(begin + i * columns + offs_c, mask=mask_c & (i >= 0), other=1.0)
        up = tl.load(up_b, mask=mask_i, other=0).to(tl.int64)
        lift = tl.load(lift_b, mask=mask_i, other=0.0)
        g = tl.load(begin_g + up[:, None] * columns + offs_c[None, :], mask=mask, other=0.0)
        total += lift[:, None] * f[None, :] * g
        # advance to the next row of each table; its offset, a product with b, would overflow 32 bits
        of_b += degree
        up_b += dim
        lift_b += dim
    out = (matrix * dim + offs_i)[:, None] * columns + offs_c[None, :]
    tl.store(out_ptr + out, total, mask=mask)


@functools.lru_cache(maxsize=16)
def _monomials(tables: PolyTables) -> tuple[Tensor, Tensor]:
    """Variables of every feature [k, max(g, 1)], padded with -1, and its weight [k], fp32."""
    degree = len(tables.starts) - 2
    parent, last = tables.parent.long().cpu(), tables.last.cpu()
    variables = torch.full((len(parent), max(degree, 1)), -1, dtype=torch.int32, device="cpu")
    norm = tables.weight.cpu().clone()
    for t in range(1, degree + 1):
        rows = slice(tables.starts[t], tables.starts[t + 1])
        variables[rows] = variables[parent[rows]]
        variables[rows, t - 1] = last[rows]
        norm[rows] *= norm[parent[rows]]
    return variables.to(tables.parent.device), norm.float().to(tables.parent.device)


def poly_features(x: Tensor, tables: PolyTables) -> Tensor:
    """Features [n, k, c] of x [n, d, c], fp32 and not empty."""
    x = x.contiguous()
    n, dim, columns = x.shape
    variables, norm = _monomials(tables)
    features = len(norm)
    out = x.new_empty(n, features, columns)
    with on_device(x.device):
        for of_x, of_out in zip(x.split(MOST_PROGRAMS), out.split(MOST_PROGRAMS), strict=True):
            poly_features_kernel[(triton.cdiv(features, BLOCK_F), triton.cdiv(columns, BLOCK_C), len(of_x))](
                of_x, variables, norm, of_out, dim, features, columns, variables.shape[1],
                BLOCK_F=BLOCK_F, BLOCK_C=BLOCK_C, num_warps=warps(THREADS), enable_fp_fusion=False,
            )  # fmt: skip
    return out


def poly_features_backward(grad: Tensor, x: Tensor, tables: PolyTables) -> Tensor:
    """Gradient of x [n, d, c], fp32 and not empty, for a degree of at least 1."""
    grad, x = grad.contiguous(), x.contiguous()
    _, dim, columns = x.shape
    variables, norm = _monomials(tables)
    out = torch.empty_like(x)
    with on_device(x.device):
        for of_grad, of_x, of_out in zip(*(t.split(MOST_PROGRAMS) for t in (grad, x, out)), strict=True):
            poly_features_backward_kernel[(triton.cdiv(dim, BLOCK_I), triton.cdiv(columns, BLOCK_C), len(of_x))](
                of_grad, of_x, variables, norm, tables.up, tables.lift32, of_out, dim, len(norm), len(tables.up),
                columns, variables.shape[1], BLOCK_I=BLOCK_I, BLOCK_C=BLOCK_C, num_warps=warps(THREADS),
                enable_fp_fusion=True,
            )  # fmt: skip
    return out


def audit_launches() -> Promises:
    """Launch both kernels, which take the degree as a runtime argument, and return their promises."""
    x, tables = torch.zeros(2, 4, BLOCK_C + 1), poly_tables(4, 2, torch.device("cpu"))
    poly_features_backward(poly_features(x, tables), x, tables)
    return {poly_features_kernel: _promise, poly_features_backward_kernel: _backward_promise}


def _promise(launch: Launch) -> dict[str, Any]:
    # a turn of the loop reads one factor and its index
    return dict(label="fp32", elements=BLOCK_F * BLOCK_C, read=0, written=0, cached=4 + 4 / BLOCK_C)


def _backward_promise(launch: Launch) -> dict[str, Any]:
    # a turn also reads the index of a gradient's row and its factor, from the cache
    return dict(label="fp32", elements=BLOCK_I * BLOCK_C, read=4, written=0, cached=8 / BLOCK_C)
