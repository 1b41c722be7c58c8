"""Masked weights with decay, and their gradient."""

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels._modes import is_traced
from leanstep.kernels.cpp_impl._build import TYPES, call, same_layout
from leanstep.kernels.reference.nm import apply as reference

GRAD_FLOWS = ("ste", "decay", "fixed")  # in the order of apply.cpp and of the Triton kernel


def nm_apply(weight: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    """``weight * (mask + (1 - mask) * alpha)``, elementwise.

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
        All backends agree bit for bit. Under torch.compile, plain torch runs, which the compiler fuses.
    """
    _check(weight, mask, alpha, "nm_apply")
    if is_traced(weight) or not weight.numel():
        return reference.nm_apply(weight, mask, alpha)
    return _run(weight, mask, alpha)


def nm_apply_backward(
    grad: Tensor,
    weight: Tensor,
    mask: Tensor,
    alpha: Tensor,
    *,
    grad_flow: str = "ste",
    srste_lambda: float = 0.0,
) -> Tensor:
    """Gradient of a weight from the gradient g of the masked weight.

    Kept entries get g. Pruned entries get, by ``grad_flow``::

        "ste":    g             (straight through)
        "decay":  alpha * g     (the derivative of nm_apply)
        "fixed":  0             (the mask never changes)

    plus ``srste_lambda * weight`` (SR-STE: Zhou, Ma, Zhu, Liu, Zhang, Yuan, Sun, Li, "Learning N:M Fine-grained
    Structured Sparse Neural Networks From Scratch", arXiv 2102.04010).

    Args:
        grad: gradient of the masked weight, same shape, any floating dtype; not written.
        weight, mask, alpha: as for :func:`nm_apply`.
        grad_flow: "ste", "decay" or "fixed".
        srste_lambda: factor of the SR-STE term, >= 0.

    Returns:
        A tensor like ``weight``; with "ste" and no SR-STE term, ``grad`` in the weight's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match, another ``grad_flow``, or a negative factor.
        BackendError: the requested backend cannot run here.

    Notes:
        Reads grad, mask and, for an SR-STE term, weight once. Writes the result once. All backends agree bit for bit.
    """
    _check(weight, mask, alpha, "nm_apply_backward")
    check_grad_flow(grad_flow, srste_lambda, "nm_apply_backward")
    if grad.shape != weight.shape:
        raise ValueError(
            f"nm_apply_backward: expected a gradient of shape {tuple(weight.shape)}, got {tuple(grad.shape)}"
        )
    if grad_flow == "ste" and not srste_lambda:
        return grad.to(weight.dtype)
    # a second derivative needs operations that autograd knows
    differentiable = torch.is_grad_enabled() and (grad.requires_grad or weight.requires_grad)
    if is_traced(weight) or differentiable or not weight.numel():
        return reference.nm_apply_backward(grad, weight, mask, alpha, grad_flow, srste_lambda)
    return _run_backward(grad, weight, mask, alpha, grad_flow, srste_lambda)


def check_grad_flow(grad_flow: str, srste_lambda: float, name: str) -> None:
    """Raise ValueError unless both are arguments that :func:`nm_apply_backward` takes."""
    if grad_flow not in GRAD_FLOWS:
        raise ValueError(f"{name}: grad_flow must be one of {', '.join(GRAD_FLOWS)}, got {grad_flow!r}")
    if not 0 <= srste_lambda < float("inf"):
        raise ValueError(f"{name}: srste_lambda must be >= 0, got {srste_lambda!r}")


@torch.no_grad()
def _run(weight: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    backend = choose("nm_apply", weight.device, weight.dtype).backend
    if backend != "reference" and same_layout([weight, mask]):
        if backend == "cpp":
            return _cpp_apply("nm_apply", (weight,), mask, alpha)
        from leanstep.kernels.triton_impl.nm import apply as triton_apply

        return triton_apply.nm_apply(weight, mask, alpha)
    return reference.nm_apply(weight, mask, alpha)


@torch.no_grad()
def _run_backward(
    grad: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, grad_flow: str, srste_lambda: float
) -> Tensor:
    backend = choose("nm_apply_backward", weight.device, weight.dtype, grad.dtype).backend
    fits = same_layout([weight, mask]) and (backend == "cpp" or grad.dtype == weight.dtype)
    if backend != "reference" and fits:
        if grad.stride() != weight.stride():
            grad = torch.empty_like(weight, dtype=grad.dtype, requires_grad=False).copy_(grad)
        if backend == "cpp":
            term = (GRAD_FLOWS.index(grad_flow), float(srste_lambda))
            return _cpp_apply("nm_apply_backward", (grad, weight), mask, alpha, *term)
        from leanstep.kernels.triton_impl.nm import apply as triton_apply

        return triton_apply.nm_apply_backward(grad, weight, mask, alpha, grad_flow, srste_lambda)
    return reference.nm_apply_backward(grad, weight, mask, alpha, grad_flow, srste_lambda)


def _cpp_apply(name: str, tensors: tuple[Tensor, ...], mask: Tensor, alpha: Tensor, *term: float) -> Tensor:
    """Call a function of apply.cpp on dense tensors of one layout, the weight last; the result is like the weight."""
    weight = tensors[-1]
    out = torch.empty_like(weight, requires_grad=False)
    macros = {"WEIGHT": TYPES[weight.dtype], "GRAD": TYPES[tensors[0].dtype]}
    call("nm/apply", name, macros, weight.numel(), *tensors, mask, float(alpha), *term, out)
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
