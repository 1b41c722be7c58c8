"""SwiGLU and its gradient, one pass each.

Bytes: the forward pass reads two tensors and writes one, the backward pass reads three and writes three.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.triton_impl._common import TL_DTYPE, load_tile, round_to, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import on_device, warps

# 8 elements per thread: one 128-bit access of a 16-bit tensor
BLOCK, THREADS = 2048, 256


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)), written so that no exponential overflows."""
    t = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, t) / (1.0 + t)


@triton.jit
def _forward_tile(e_ptr, u_ptr, out_ptr, offs, mask):
    e, u = to_float(load_tile(e_ptr + offs, mask)), to_float(load_tile(u_ptr + offs, mask))
    tl.store(out_ptr + offs, round_to(e * _sigmoid(e) * u, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_tile(g_ptr, e_ptr, u_ptr, out_ptr, de_ptr, offs, mask):
    g, e = to_float(load_tile(g_ptr + offs, mask)), to_float(load_tile(e_ptr + offs, mask))
    u = to_float(load_tile(u_ptr + offs, mask))
    s = _sigmoid(e)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + offs, round_to(e * s * u, dtype), mask=mask)
    tl.store(de_ptr + offs, round_to(g * u * s * (1.0 + e * (1.0 - s)), dtype), mask=mask)
    tl.store(g_ptr + offs, round_to(g * (e * s), dtype), mask=mask)


@triton.jit(do_not_specialize=["numel"])
def swiglu_kernel(e_ptr, u_ptr, out_ptr, numel: tl.int64, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The product of BLOCK elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= numel:
        _forward_tile(e_ptr + start, u_ptr + start, out_ptr + start, tl.arange(0, BLOCK), None)
    else:
        count = (numel - start).to(tl.int32)
        for first in range(0, count, LANES):
            offs = first + tl.arange(0, LANES)
            _forward_tile(e_ptr + start, u_ptr + start, out_ptr + start, offs, offs < count)


@triton.jit(do_not_specialize=["numel"])
def swiglu_backward_kernel(
    g_ptr, e_ptr, u_ptr, out_ptr, de_ptr, numel: tl.int64, BLOCK: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The gradients of BLOCK elements; u's gradient overwrites the output's."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= numel:
        _backward_tile(
            g_ptr + start, e_ptr + start, u_ptr + start, out_ptr + start, de_ptr + start, tl.arange(0, BLOCK), None
        )
    else:
        # one element per thread: a masked tile would need more registers than a whole one, and fewer warps would fit
        count = (numel - start).to(tl.int32)
        for first in range(0, count, LANES):
            offs = first + tl.arange(0, LANES)
            _backward_tile(
                g_ptr + start, e_ptr + start, u_ptr + start, out_ptr + start, de_ptr + start, offs, offs < count
            )


def swiglu(e: Tensor, u: Tensor) -> Tensor:
    """`silu(e) * u`; both row-major."""
    out = torch.empty_like(e)
    with on_device(e.device):
        swiglu_kernel[(triton.cdiv(e.numel(), BLOCK),)](
            e, u, out, e.numel(), BLOCK=BLOCK, LANES=THREADS, num_warps=warps(THREADS), enable_fp_fusion=True
        )
    return out


def swiglu_backward_(grad: Tensor, e: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`silu(e) * u` and the gradients of e and u, the last in `grad`; all row-major."""
    out, de = torch.empty_like(e), torch.empty_like(e)
    with on_device(e.device):
        swiglu_backward_kernel[(triton.cdiv(e.numel(), BLOCK),)](
            grad, e, u, out, de, e.numel(), BLOCK=BLOCK, LANES=THREADS, num_warps=warps(THREADS), enable_fp_fusion=True
        )
    return out, de, grad


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return their promises."""
    for dtype in TL_DTYPE:
        x = torch.empty(2**31, dtype=dtype, device="meta")
        swiglu(x, x)
        swiglu_backward_(x, x, x)
    return dict.fromkeys((swiglu_kernel, swiglu_backward_kernel), _promise)


def _promise(launch: Launch) -> dict[str, Any]:
    dtype, (read, written) = launch.dtype("e_ptr"), (2, 1) if launch.kernel is swiglu_kernel else (3, 3)
    label = str(dtype).replace("torch.", "")
    return dict(label=label, elements=BLOCK, read=read * dtype.itemsize, written=written * dtype.itemsize)
