"""Masked weights with decay, and their gradient, one pass each.

Bytes: the forward pass reads weight and mask and writes the result. The backward pass reads gradient and mask and
writes the result; with an SR-STE term, it also reads the weight.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.nm.apply import GRAD_FLOWS
from leanstep.kernels.triton_impl._common import TL_DTYPE, load_tile, round_to, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import on_device, warps

# 16 elements per thread and tile: one 128-bit load of the mask
BLOCK, THREADS = 4096, 256
TILES = 2


@triton.jit
def _apply_tile(w_ptr, k_ptr, out_ptr, offs, mask, alpha):
    w = load_tile(w_ptr + offs, mask)
    kept = load_tile(k_ptr + offs, mask) != 0
    decayed = tl.where(alpha == 0.0, 0.0, to_float(w) * alpha)
    tl.store(out_ptr + offs, tl.where(kept, w, round_to(decayed, w.dtype)), mask=mask)


@triton.jit(do_not_specialize=["numel"])
def nm_apply_kernel(w_ptr, k_ptr, alpha_ptr, out_ptr, numel, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """TILES * BLOCK elements of a weight."""
    start = tl.program_id(0).to(tl.int64) * (TILES * BLOCK)
    count = tl.minimum(numel - start, TILES * BLOCK).to(tl.int32)
    alpha = tl.load(alpha_ptr)
    lane = tl.arange(0, BLOCK)
    whole = count // BLOCK
    for t in range(0, whole):
        _apply_tile(w_ptr + start, k_ptr + start, out_ptr + start, t * BLOCK + lane, None, alpha)
    if count % BLOCK != 0:
        offs = whole * BLOCK + lane
        _apply_tile(w_ptr + start, k_ptr + start, out_ptr + start, offs, offs < count, alpha)


@triton.jit
def _backward_tile(g_ptr, w_ptr, k_ptr, out_ptr, offs, mask, factor, flow, srste, SRSTE: tl.constexpr):
    g = to_float(load_tile(g_ptr + offs, mask))
    kept = load_tile(k_ptr + offs, mask) != 0
    # no product with zero, because an infinite gradient of a pruned weight would give NaN
    pruned = tl.where(flow == 2, 0.0, g * factor)
    if SRSTE:
        pruned = pruned + srste * to_float(load_tile(w_ptr + offs, mask))
    tl.store(out_ptr + offs, round_to(tl.where(kept, g, pruned), out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["flow", "srste", "numel"])
def nm_apply_backward_kernel(
    g_ptr, w_ptr, k_ptr, alpha_ptr, out_ptr, flow, srste, numel,
    SRSTE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES * BLOCK elements of a gradient; `flow` is an index of GRAD_FLOWS."""
    start = tl.program_id(0).to(tl.int64) * (TILES * BLOCK)
    count = tl.minimum(numel - start, TILES * BLOCK).to(tl.int32)
    factor = tl.where(flow == 1, tl.load(alpha_ptr), 1.0)
    lane = tl.arange(0, BLOCK)
    whole = count // BLOCK
    for t in range(0, whole):
        _backward_tile(
            g_ptr + start, w_ptr + start, k_ptr + start, out_ptr + start, t * BLOCK + lane, None, factor, flow, srste,
            SRSTE,
        )  # fmt: skip
    if count % BLOCK != 0:
        offs = whole * BLOCK + lane
        _backward_tile(
            g_ptr + start, w_ptr + start, k_ptr + start, out_ptr + start, offs, offs < count, factor, flow, srste,
            SRSTE,
        )  # fmt: skip


def nm_apply(weight: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    """The masked weight, for dense weight and mask of one layout. Equals the definition bit for bit."""
    out = torch.empty_like(weight, requires_grad=False)
    with on_device(weight.device):
        nm_apply_kernel[(triton.cdiv(weight.numel(), BLOCK * TILES),)](
            weight.detach(), mask.view(torch.int8), alpha.to(torch.float32), out, weight.numel(),
            BLOCK=BLOCK, TILES=TILES, num_warps=warps(THREADS), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def nm_apply_backward(
    grad: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, grad_flow: str, srste_lambda: float
) -> Tensor:
    """The gradient of the weight, for dense tensors of one layout and a gradient in the weight's dtype.

    Equals the definition bit for bit.
    """
    out = torch.empty_like(weight, requires_grad=False)
    with on_device(weight.device):
        nm_apply_backward_kernel[(triton.cdiv(weight.numel(), BLOCK * TILES),)](
            grad.detach(), weight.detach(), mask.view(torch.int8), alpha.to(torch.float32), out,
            GRAD_FLOWS.index(grad_flow), srste_lambda, weight.numel(), SRSTE=srste_lambda != 0, BLOCK=BLOCK,
            TILES=TILES, num_warps=warps(THREADS), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return what the kernels promise."""
    for dtype in TL_DTYPE:
        weight = torch.empty(2**31, dtype=dtype, device="meta")
        mask, alpha = torch.empty(2**31, dtype=torch.bool, device="meta"), torch.zeros((), device="meta")
        nm_apply(weight, mask, alpha)
        for srste_lambda in (0.0, 0.5):
            nm_apply_backward(weight, weight, mask, alpha, "ste", srste_lambda)
    return dict.fromkeys((nm_apply_kernel, nm_apply_backward_kernel), _promise)


def _promise(launch: Launch) -> dict[str, Any]:
    dtype, srste = launch.dtype("w_ptr"), launch.constants.get("SRSTE", False)
    return dict(
        label=f"w {dtype}{' srste' if srste else ''}".replace("torch.", ""),
        elements=BLOCK,
        read=dtype.itemsize + 1 + (dtype.itemsize if srste else 0),
        written=dtype.itemsize,
        wide=True,
        flat=True,
    )
