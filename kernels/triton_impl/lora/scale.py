"""DoRA's factor on columns, and its gradient, one pass each.

Bytes: the forward pass reads and writes the output. The backward pass reads gradient and output and writes one tensor.
Factors and sums have the length of a row and hardly matter.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanstep.kernels.triton_impl._common import TL_DTYPE, round_to, to_float
from leanstep.kernels.triton_impl._compile import Launch, Promises
from leanstep.kernels.triton_impl._multi_tensor import MOST_PROGRAMS, on_device, warps

# rows and columns of a tile, and the number of tiles, one below the other, in a sum
BLOCK_M, BLOCK_N, THREADS = 16, 128, 256
TILES = 16


@triton.jit(do_not_specialize=["rows", "columns"])
def lora_scale_kernel(
    y_ptr, c_ptr, bias_ptr, rows, columns, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A tile of y, in place."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_n < columns
    mask = (offs_m < rows)[:, None] & inside[None, :]
    at = offs_m.to(tl.int64)[:, None] * columns + offs_n[None, :]
    y = to_float(tl.load(y_ptr + at, mask=mask, other=0.0))
    y *= tl.load(c_ptr + offs_n, mask=inside, other=0.0)[None, :]
    if HAS_BIAS:
        y += to_float(tl.load(bias_ptr + offs_n, mask=inside, other=0.0))[None, :]
    tl.store(y_ptr + at, round_to(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "columns"])
def lora_scale_backward_kernel(
    g_ptr, y_ptr, c_ptr, inner_ptr, sums_ptr, rows, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES tiles, one below the other, and their row of sums."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < columns
    c = tl.load(c_ptr + offs_n, mask=inside, other=0.0)[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for t in range(0, TILES):
        offs_m = (tl.program_id(1) * TILES + t) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m < rows)[:, None] & inside[None, :]
        at = offs_m.to(tl.int64)[:, None] * columns + offs_n[None, :]
        g = to_float(tl.load(g_ptr + at, mask=mask, other=0.0))
        sums += g * to_float(tl.load(y_ptr + at, mask=mask, other=0.0))
        tl.store(inner_ptr + at, round_to(g * c, inner_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * columns + offs_n, tl.sum(sums, 0), mask=inside)


def lora_scale_(y: Tensor, c: Tensor, bias: Tensor | None) -> None:
    """`y = y * c + bias`, in place; y row-major."""
    columns = y.shape[1]
    with on_device(y.device):
        for part in y.split(MOST_PROGRAMS * BLOCK_M):
            lora_scale_kernel[(triton.cdiv(columns, BLOCK_N), triton.cdiv(len(part), BLOCK_M))](
                part, c, c if bias is None else bias, len(part), columns, HAS_BIAS=bias is not None,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps(THREADS), enable_fp_fusion=True,
            )  # fmt: skip


def lora_scale_backward(g: Tensor, y: Tensor | None, c: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """`g * c` in `inner`, which may be g, and the sum of `g * y` over the rows, in fp32; matrices row-major."""
    rows, columns = g.shape
    sums = g.new_empty(triton.cdiv(rows, BLOCK_M * TILES), columns, dtype=torch.float32)
    matrices = (t.split(MOST_PROGRAMS * BLOCK_M * TILES) for t in (g, g if y is None else y, inner))
    with on_device(g.device):
        for of_g, of_y, of_inner, of_sums in zip(*matrices, sums.split(MOST_PROGRAMS), strict=True):
            lora_scale_backward_kernel[(triton.cdiv(columns, BLOCK_N), len(of_sums))](
                of_g, of_y, c, of_inner, of_sums, len(of_g), columns,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, TILES=TILES, num_warps=warps(THREADS), enable_fp_fusion=True,
            )  # fmt: skip
    return inner, sums.sum(0)


def audit_launches() -> Promises:
    """Launch every configuration that the launchers above can choose, and return their promises."""
    for dtype in TL_DTYPE:
        y, other, c = torch.zeros(BLOCK_M + 1, 8, dtype=dtype), torch.zeros(BLOCK_M + 1, 8, dtype=dtype), torch.zeros(8)
        lora_scale_(y, c, None)
        lora_scale_(y, c, other[0])
        lora_scale_backward(y, other, c, torch.zeros_like(y))
    return {lora_scale_kernel: _promise, lora_scale_backward_kernel: _backward_promise}


def _promise(launch: Launch) -> dict[str, Any]:
    size, has_bias = launch.dtype("y_ptr").itemsize, launch.constants["HAS_BIAS"]
    return dict(
        label=f"{launch.arguments['y_ptr'].strip('*')}{' bias' if has_bias else ''}",
        elements=BLOCK_M * BLOCK_N,
        read=size,
        written=size,
        # every row of threads reads the factors and the bias
        cached=4.0 + (size if has_bias else 0),
    )


def _backward_promise(launch: Launch) -> dict[str, Any]:
    size = launch.dtype("g_ptr").itemsize
    return dict(
        label=launch.arguments["g_ptr"].strip("*"),
        elements=BLOCK_M * BLOCK_N,
        read=2 * size,
        # counts a row of sums per tile, though a program writes it once per TILES tiles
        written=size + 4 / BLOCK_M,
        cached=4.0,
    )
