"""Weights under a mask with decay, and the gradient behind them, one pass each.

Bytes: the forward pass reads weight and mask and writes the result; the backward pass reads gradient and mask, and the
weight where there is an SR-STE term, and writes the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.triton_impl._common import TL_DTYPE, load_tile, round_to, to_float
from leanstep.kernels.triton_impl._compile import AuditCase, pointer
from leanstep.kernels.triton_impl._multi_tensor import on_device, warps

# 16 elements per thread and tile: one 128-bit load of the mask
BLOCK, THREADS = 4096, 256
TILES = 2
FLOWS = {"ste": 0, "decay": 1, "fixed": 2}


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
    # not times zero: infinite gradients of pruned weights must not turn into NaN
    pruned = tl.where(flow == 2, 0.0, g * factor)
    if SRSTE:
        pruned = pruned + srste * to_float(load_tile(w_ptr + offs, mask))
    tl.store(out_ptr + offs, round_to(tl.where(kept, g, pruned), out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["flow", "srste", "numel"])
def nm_apply_backward_kernel(
    g_ptr, w_ptr, k_ptr, alpha_ptr, out_ptr, flow, srste, numel,
    SRSTE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES * BLOCK elements of a gradient; `flow` is one of FLOWS."""
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
    """The masked weight; weight and mask dense and of one layout. Equal to the definition bit for bit."""
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
    """The gradient of the weight; all tensors dense and of one layout, the gradient of the weight's dtype.

    Equal to the definition bit for bit.
    """
    out = torch.empty_like(weight, requires_grad=False)
    with on_device(weight.device):
        nm_apply_backward_kernel[(triton.cdiv(weight.numel(), BLOCK * TILES),)](
            grad.detach(), weight.detach(), mask.view(torch.int8), alpha.to(torch.float32), out, FLOWS[grad_flow],
            srste_lambda, weight.numel(), SRSTE=srste_lambda != 0, BLOCK=BLOCK, TILES=TILES,
            num_warps=warps(THREADS), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def audit_cases() -> list[AuditCase]:
    """Every configuration that the launchers above can pick."""
    return [
        *(_apply_case(w) for w in TL_DTYPE),
        *(_backward_case(w, srste) for w in TL_DTYPE for srste in (False, True)),
    ]


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _apply_case(w: torch.dtype) -> AuditCase:
    return AuditCase(
        kernel=nm_apply_kernel,
        label=f"w {w}".replace("torch.", ""),
        arguments=dict(
            w_ptr=pointer(_NAMES[w]), k_ptr=pointer("i8"), alpha_ptr=pointer("fp32"), out_ptr=pointer(_NAMES[w]),
            numel="i64",
        ),
        constants=dict(BLOCK=BLOCK, TILES=TILES),
        threads=THREADS,
        fp_fusion=False,
        elements=BLOCK,
        read=w.itemsize + 1,
        written=w.itemsize,
        wide=True,
        flat=True,
    )  # fmt: skip


def _backward_case(w: torch.dtype, srste: bool) -> AuditCase:
    return AuditCase(
        kernel=nm_apply_backward_kernel,
        label=f"w {w}{' srste' if srste else ''}".replace("torch.", ""),
        arguments=dict(
            g_ptr=pointer(_NAMES[w]), w_ptr=pointer(_NAMES[w]), k_ptr=pointer("i8"), alpha_ptr=pointer("fp32"),
            out_ptr=pointer(_NAMES[w]), flow="i32", srste="fp32", numel="i64",
        ),
        constants=dict(SRSTE=srste, BLOCK=BLOCK, TILES=TILES),
        threads=THREADS,
        fp_fusion=False,
        elements=BLOCK,
        read=w.itemsize + 1 + (w.itemsize if srste else 0),
        written=w.itemsize,
        wide=True,
        flat=True,
    )  # fmt: skip
