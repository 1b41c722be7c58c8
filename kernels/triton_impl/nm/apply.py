"""Masked weights with decay: reads weight and mask and writes the result, one pass."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.triton_impl._common import TL_DTYPE, load_tile, round_to, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import on_device, warps

# 16 elements per thread and tile: one 128-bit load of the mask
BLOCK, THREADS = 4096, 256
TILES = 2


@triton.jit
def _apply_tile(w_ptr, k_ptr, out_ptr, offs, mask, alpha):
    w = load_tile(w_ptr + offs, mask)
    unpruned = load_tile(k_ptr + offs, mask) != 0
    decayed = tl.where(alpha == 0.0, 0.0, to_float(w) * alpha)
    tl.store(out_ptr + offs, tl.where(unpruned, w, round_to(decayed, w.dtype)), mask=mask)


@triton.jit(do_not_specialize=["numel"])
def nm_apply_kernel(w_ptr, k_ptr, alpha_ptr, out_ptr, numel: tl.int64, BLOCK: tl.constexpr, TILES: tl.constexpr):
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


def nm_apply(weight: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    """The masked weight, for dense weight and mask of one layout. Equals the definition bit for bit."""
    out = torch.empty_like(weight, requires_grad=False)
    with on_device(weight.device):
        nm_apply_kernel[(triton.cdiv(weight.numel(), BLOCK * TILES),)](
            weight.detach(), mask.view(torch.int8), alpha.to(torch.float32), out, weight.numel(),
            BLOCK=BLOCK, TILES=TILES, num_warps=warps(THREADS), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def audit_launches() -> Promises:
    """Launch every configuration that the launcher above can choose, and return their promises."""
    for dtype in TL_DTYPE:
        weight = torch.empty(2**31, dtype=dtype, device="meta")
        mask, alpha = torch.empty(2**31, dtype=torch.bool, device="meta"), torch.zeros((), device="meta")
        nm_apply(weight, mask, alpha)
    return {nm_apply_kernel: _promise}


def _promise(launch: Launch) -> dict[str, Any]:
    dtype = launch.dtype("w_ptr")
    return dict(
        label=f"w {dtype}".replace("torch.", ""),
        elements=BLOCK,
        read=dtype.itemsize + 1,
        written=dtype.itemsize,
        wide=True,
        flat=True,
    )
