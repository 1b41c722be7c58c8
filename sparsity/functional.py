"""The forward and backward rules of every method, as differentiable functions that the parametrization calls.

:func:`sparse_weight` has the gradients of STE, MDGF and SDGF. SR-STE adds :func:`srste_term`, which the controller does
once per step. ``kernels/reference/nm/apply.py`` holds the elementwise definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep.kernels._backend import on_remembered_backend, remember_backend
from leanstep.kernels.nm.apply import nm_apply
from leanstep.kernels.nm.mask import nm_mask
from leanstep.sparsity.patterns import NM, as_pattern

GRAD_FLOWS = ("ste", "decay", "fixed")


def sparse_weight(weight: Tensor, mask: Tensor, *, alpha: Tensor | float = 0.0, grad_flow: str = "ste") -> Tensor:
    """``weight * (mask + (1 - mask) * alpha)``, with the gradient of a method of N:M training.

    With g the gradient of the result and P the mask, the weight's gradient is

    ==========  ==============================
    grad_flow   gradient
    ==========  ==============================
    "ste"       ``g``
    "decay"     ``g * (P + (1 - P) * alpha)``
    "fixed"     ``g * P``
    ==========  ==============================

    STE is ``alpha=0, grad_flow="ste"``. SR-STE adds :func:`srste_term`. MDGF shrinks alpha
    (:class:`leanstep.sparsity.Schedule`). SDGF changes the pattern of the mask. One-shot pruning is
    ``grad_flow="fixed"``. The methods combine.

    Args:
        weight: any shape and floating dtype; not written.
        mask: bool, same shape, False for pruned weights; a constant for autograd.
        alpha: factor of pruned weights, in [0, 1]; a constant for autograd. A 0-d tensor on the weight's device can
            change from step to step without recompilation by torch.compile.
        grad_flow: "ste", "decay" or "fixed".

    Returns:
        A new tensor like ``weight``. Pruned entries are +0 for alpha 0, and the weight bit for bit for alpha 1.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match, or another ``grad_flow``.

    Notes:
        Saves references to the mask and alpha for the backward pass, and nothing for "ste". The text of the MDGF
        paper says that decay restricts the flow of gradients to pruned weights: "decay", the derivative of the product.
        Its published code returns g unscaled: "ste".

    References:
        Bengio, Leonard, Courville, arXiv 1308.3432 (straight-through estimator); Zhou et al., arXiv 2102.04010
        (SR-STE); Bambhaniya et al., arXiv 2402.04744 (MDGF, SDGF).
    """
    if grad_flow not in GRAD_FLOWS:
        raise ValueError(f"sparse_weight: grad_flow must be one of {', '.join(GRAD_FLOWS)}, got {grad_flow!r}")
    if not isinstance(alpha, Tensor):
        alpha = torch.full((), alpha, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    return _SparseWeight.apply(weight, mask, alpha, grad_flow)


def srste_term(weight: Tensor, mask: Tensor, srste_lambda: Tensor | float) -> Tensor:
    """SR-STE's gradient term ``srste_lambda * (1 - P) * weight``, as a new tensor like ``weight``."""
    return (weight * srste_lambda).masked_fill_(mask, 0)


class _SparseWeight(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, mask: Tensor, alpha: Tensor, grad_flow: str) -> Tensor:
        return nm_apply(weight, mask, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask, alpha, ctx.grad_flow = inputs
        if ctx.grad_flow != "ste":
            ctx.save_for_backward(mask, alpha)
        remember_backend(ctx)

    @staticmethod
    @on_remembered_backend
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_flow != "ste":
            mask, alpha = ctx.saved_tensors
            grad = nm_apply(grad, mask, alpha if ctx.grad_flow == "decay" else torch.zeros_like(alpha))
        return grad, None, None, None


def s_ste_weight(weight: Tensor, pattern: NM | str, *, beta: Tensor | float = 1.0, dim: int = -1) -> Tensor:
    """S-STE: a sparse weight that is a continuous function of the dense weight.

    Computes ``beta * S(weight)`` with ``S(w) = sign(w) * max(|w| - t, 0)``, where t is the (M-N)-th smallest magnitude
    of the group. So weights shrink to zero before they are pruned. The gradient passes straight through.

    Args:
        weight: floating; its size along ``dim`` must be a multiple of M.
        pattern: N:M. The paper's is 2:4, with t the second smallest of four.
        beta: scale that compensates for the shrinkage (:func:`s_ste_scale`); a 0-d tensor or a number.
        dim: dimension along which groups lie.

    Returns:
        A new tensor like ``weight`` with at most N nonzeros in every group.

    Raises:
        ValueError: if M does not divide the size.

    References:
        Hu, Zhu, Chen, "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training", arXiv 2409.09099.
    """
    return _StraightThrough.apply(weight, beta * soft_threshold(weight.detach(), pattern, dim=dim))


class _StraightThrough(torch.autograd.Function):
    """Returns the second tensor, and passes its gradient to the first."""

    @staticmethod
    def forward(weight: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


def soft_threshold(weight: Tensor, pattern: NM | str, *, dim: int = -1) -> Tensor:
    """S of :func:`s_ste_weight`: subtracts the group's (M-N)-th smallest magnitude from all magnitudes, down to 0.

    Raises:
        ValueError: if M does not divide the size along ``dim``.
    """
    pattern = as_pattern(pattern)
    if weight.shape[dim] % pattern.m:
        raise ValueError(
            f"soft_threshold: {weight.shape[dim]} entries along dimension {dim} of {tuple(weight.shape)} do not fill "
            f"groups of {pattern.m}"
        )
    if pattern.is_dense:
        return weight.clone()
    dim %= weight.dim()
    (mask,) = nm_mask([weight.detach()], pattern.n, pattern.m, dim=dim)
    # the threshold is the largest pruned magnitude, which is cheaper than sorting the group
    pruned = weight.abs().masked_fill(mask, 0).unflatten(dim, (-1, pattern.m))
    groups, threshold = weight.unflatten(dim, (-1, pattern.m)), pruned.amax(dim=dim + 1, keepdim=True)
    return (groups.sign() * (groups.abs() - threshold).clamp_min(0)).flatten(dim, dim + 1)


def s_ste_scale(weight: Tensor, pattern: NM | str, *, dim: int = -1) -> Tensor:
    """The beta that minimises ``||W - beta * S(W)||``: ``<W, S(W)> / <S(W), S(W)>``; 1 if S(W) is zero.

    S-STE computes it once, from the initial weights. Returns a 0-d tensor, fp32, or fp64 for an fp64 weight. Raises
    ValueError if M does not divide the size along ``dim``.
    """
    shrunk = soft_threshold(weight.detach(), pattern, dim=dim)
    wide = torch.promote_types(weight.dtype, torch.float32)
    square = shrunk.to(wide).square().sum()
    product = (weight.detach().to(wide) * shrunk.to(wide)).sum()
    return torch.where(square > 0, product / square, torch.ones_like(square))
