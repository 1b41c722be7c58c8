"""Masked weights with decay."""

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import TYPES, call, same_layout
from leanstep.kernels.op import EVERYWHERE, declare, is_traced, triton_module
from leanstep.kernels.reference.nm import apply as reference

declare("nm_apply", EVERYWHERE)


def nm_apply(weight: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    """``weight * (mask + (1 - mask) * alpha)``, elementwise.

    Linear in the weight, so the same function gives the weight's gradient from the gradient of the result.

    Args:
        weight: any shape and floating dtype; not written.
        mask: bool, same shape; True where a weight is kept.
        alpha: 0-d floating tensor on the same device, the factor of pruned weights.

    Returns:
        A new tensor like ``weight``. With alpha = 0 pruned entries are +0; with alpha = 1 it is the weight bit for
        bit.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match.
        BackendError: the requested backend cannot run here.

    Notes:
        Computes in fp32 and rounds once. Reads weight and mask and writes the result once: 9 bytes per fp32 element.
        All backends agree bit for bit. Plain torch runs under torch.compile, which fuses it, and for a weight that
        requires a gradient, which only plain torch provides.
    """
    _check(weight, mask, alpha, "nm_apply")
    differentiable = torch.is_grad_enabled() and weight.requires_grad
    if is_traced(weight) or differentiable or not weight.numel():
        return reference.nm_apply(weight, mask, alpha)
    return _run(weight, mask, alpha)


@torch.no_grad()
def _run(weight: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    backend = choose("nm_apply", weight.device, weight.dtype).backend
    if backend != "reference" and weight.stride() != mask.stride():
        mask = torch.empty_like(weight, dtype=torch.bool, requires_grad=False).copy_(mask)
    if backend == "reference" or not same_layout([weight, mask]):
        return reference.nm_apply(weight, mask, alpha)
    if backend == "triton":
        return triton_module(__name__).nm_apply(weight, mask, alpha)
    out = torch.empty_like(weight, requires_grad=False)
    call("nm/apply", "nm_apply", {"WEIGHT": TYPES[weight.dtype]}, weight.numel(), weight, mask, float(alpha), out)
    return out


def _check(weight: Tensor, mask: Tensor, alpha: Tensor, name: str) -> None:
    if not weight.is_floating_point():
        raise ValueError(f"{name}: expected a weight of floating dtype, got {weight.dtype}")
    if mask.shape != weight.shape or mask.dtype != torch.bool or mask.device != weight.device:
        raise ValueError(
            f"{name}: expected a mask of shape {tuple(weight.shape)}, torch.bool, on {weight.device}; got "
            f"{tuple(mask.shape)} of {mask.dtype} on {mask.device}"
        )
    if alpha.dim() or not alpha.is_floating_point() or alpha.device != weight.device:
        raise ValueError(
            f"{name}: expected alpha as a 0-d floating tensor on {weight.device}, got shape {tuple(alpha.shape)} of "
            f"{alpha.dtype} on {alpha.device}"
        )
