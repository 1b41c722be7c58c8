"""DoRA's norms: the norm of each row of a weight plus its adapter."""

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.op import PRODUCTS, declare, is_traced, triton_module
from leanstep.kernels.reference.lora import norms as reference

declare("lora_norms", PRODUCTS)


@torch.no_grad()
def lora_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float, squares: Tensor) -> Tensor:
    """Norm of every row of ``W + s B A``, without forming ``B A``.

    With s the scale::

        norm_j^2 = |W_j|^2 + (2 s (W A^T)_j + s^2 (B (A A^T))_j) . B_j

    Args:
        weight: [m, n], floating. a: [r, n], b: [m, r], floating.
        scale: s.
        squares: [m], ``|W_j|^2`` in the dtype of the result.

    Returns:
        [m], in fp64 if one of the matrices is fp64, else in fp32.

    Raises:
        ValueError: for shapes that do not match, or squares of another dtype.
        BackendError: the requested backend cannot run here.

    Notes:
        ``2 m n r`` operations. The Triton kernel reads a 16-bit weight once. It splits A into three parts of 8 bits.
        Their products with the weight are exact, so tensor cores give the result of fp32. In all other cases the BLAS
        runs on 2048 widened rows at a time: on other backends, for fp32 or transposed weights, for ranks above 64, and
        for rows whose length is not a multiple of 64.
    """
    dtype = torch.float64 if torch.float64 in (weight.dtype, a.dtype, b.dtype) else torch.float32
    (m, n), r = weight.shape, len(a)
    if a.shape != (r, n) or b.shape != (m, r) or squares.shape != (m,):
        shapes = ", ".join(str(tuple(t.shape)) for t in (weight, a, b, squares))
        raise ValueError(f"lora_norms: expected [m, n], [r, n], [m, r] and [m], got {shapes}")
    if squares.dtype != dtype:
        raise ValueError(f"lora_norms: expected squares of {dtype}, got {squares.dtype}")
    wide_a, wide_b = a.to(dtype), b.to(dtype)
    mix = torch.mm(wide_b, torch.mm(wide_a, wide_a.t()).mul_(scale * scale))
    arguments = (weight, wide_a, wide_b, mix, scale, squares)
    if is_traced(weight) or not weight.numel() or choose("lora_norms", weight.device, dtype).backend != "triton":
        return reference.lora_norms(*arguments)
    return triton_module(__name__).lora_norms(*arguments)
