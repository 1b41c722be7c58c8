"""The formulas of LoRA and DoRA, one function each, in this order; :mod:`leanstep.lora.layers.autograd` calls them.

X (M, n) is the input, X' = dropout(X), W (m, n) the frozen weight, b its bias, A (r, n) and B (m, r) are the factors,
and s is the scale::

    H  = X' A^T                     hidden                  (M, r)
    Y  = X W^T + b + s H B^T        output                  (M, m)
    E  = dY B                       gradient_of_hidden      (M, r)
    dA = s E^T X'                   gradient_of_a           (r, n)
    dB = s dY^T H                   gradient_of_b           (m, r)
    dX = dY W + s dropout'(E A)     gradient_of_input       (M, n)

No gradient forms ``dY^T X``, which is as large as W. DoRA scales every output by c, with detached norms::

    norm_j = |row j of W + s B A|   leanstep.lora.layers.dora.row_norms
    c  = magnitude / norm           dora_factor
    Z  = X' W^T + s H B^T           dora_product
    Y  = (X - X') W^T + b + c Z     dora_rest, dora_output  c Z + b without dropout
    dZ = c dY                       gradient_of_product
    dmagnitude = sum over rows of dY Z / norm               gradient_of_magnitude
    dX = dY W + dropout'((dZ - dY) W + s E A)               gradient_of_input

E, dA and dB then use dZ in place of dY. ``w`` is the dense (m, n) weight, and may be a view. All tensors of a call have
one dtype, float64 included, except for c, the norms and the sums, which are at least fp32. Autograd records nothing.

References:
    Hu et al., "LoRA", arXiv 2106.09685; Hu, Su, Kuo, Song, Liu, "Computational Limits of LoRA Fine-Tuning", arXiv
    2406.03136; Liu et al., "DoRA", arXiv 2402.09353, with the norms detached as in its section 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels import (
    lora_down,
    lora_down_backward,
    lora_dropout,
    lora_scale_,
    lora_scale_backward,
    lora_up_,
    product,
)
from leanstep.kernels.op import in_dispatch_mode


def hidden(x: Tensor, a: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``H = dropout(X) A^T``; ``p`` and ``seed`` as in :func:`leanstep.kernels.lora_down`."""
    return lora_down(x, a, p, seed)


def output(x: Tensor, w: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """``Y = X W^T + b + s H B^T``."""
    return _add_product(product(x, w.t(), bias), h, b, scale)


def materialized_sum(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``W + s B A`` as a new matrix; one product with it gives Y, another one dX."""
    return torch.addmm(w, b, a, alpha=scale)


def gradient_of_hidden(dy: Tensor, b: Tensor) -> Tensor:
    """``E = dY B``; the gradient of H is s E."""
    return product(dy, b)


def gradient_of_a(
    x: Tensor,
    e: Tensor,
    scale: float,
    dtype: torch.dtype,
    p: float = 0.0,
    seed: Tensor | None = None,
    a: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``dA = s E^T dropout(X)`` in ``dtype``; if ``a`` is given, also H from the same pass over X."""
    unscaled, h = lora_down_backward(x, e, a, p, seed)
    return unscaled.to(dtype).mul_(scale), h


def gradient_of_b(dy: Tensor, h: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``dB = s dY^T H`` in ``dtype``."""
    # (H^T dY)^T: a product with few rows is faster than one with few columns
    return product(h.t(), dy).t().to(dtype, memory_format=torch.contiguous_format).mul(scale)


def gradient_of_input(
    dy: Tensor,
    w: Tensor,
    e: Tensor,
    a: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    dx: Tensor | None = None,
    masked_dy: Tensor | None = None,
) -> Tensor:
    """``dX = dY W + s dropout'(E A)``, added in place to ``dx`` if given.

    ``masked_dy`` (M, m) adds ``dropout'(masked_dy W)``; DoRA with dropout passes ``dZ - dY``.
    """
    dx = product(dy, w, dx)
    if masked_dy is not None:
        dx += lora_dropout(product(masked_dy, w), p, seed)
    return lora_up_(dx, e, a, scale, p, seed)


def dora_factor(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``c = magnitude / norm``; 1 where the norm is 0, as for a pruned row."""
    empty = norm == 0
    # torch.where also differentiates the quotient it does not select: avoid 0 times infinity
    return torch.where(empty, 1.0, magnitude.to(norm.dtype) / torch.where(empty, 1.0, norm))


def dora_product(base: Tensor, h: Tensor, b: Tensor, scale: float, b_bias: Tensor | None = None) -> Tensor:
    """``Z = X' W^T + s (H B^T + b_B)``, in the memory of ``base = X' W^T``; ``b_bias`` is B's bias b_B."""
    z = _add_product(base, h, b, scale)
    return z if b_bias is None else _add(z, b_bias, scale)


def dora_rest(x: Tensor, w: Tensor, bias: Tensor | None, base: Tensor) -> Tensor:
    """``(X - X') W^T + b`` for ``base = X' W^T``."""
    return _add(product(x, w.t(), bias), base, -1.0)


def dora_output(z: Tensor, c: Tensor, rest: Tensor | None, keep_z: bool = False) -> Tensor:
    """``Y = c Z + rest``; ``rest`` is b (m,) without dropout, and :func:`dora_rest` (M, m) with it.

    Reuses the memory of ``rest`` if that is a matrix, else of Z unless ``keep_z``.
    """
    if rest is None or rest.dim() == 1:
        return _scale_columns(z, c, rest, keep_z)
    return _add(rest, _scale_columns(z, c, None, keep_z))


def gradient_of_product(dy: Tensor, z: Tensor | None, c: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """``dZ = c dY`` and the sums over rows of ``dY z``, from one pass. The sums are valid only with ``z``."""
    return lora_scale_backward(dy, z, c, in_place)


def gradient_of_magnitude(sums: Tensor, divisor: Tensor, norm: Tensor) -> Tensor:
    """``dmagnitude = sum over rows of dY Z / norm``; 0 where the divisor or the norm is 0.

    Args:
        sums: sums over rows (m,) of ``dY Z`` or ``dY c Z``.
        divisor: (m,), the norm for sums of ``dY Z``; the magnitude, which is ``c norm``, for sums of ``dY c Z``.
        norm: (m,).
    """
    return torch.where((divisor == 0) | (norm == 0), 0.0, sums / divisor)


# In-place add and scale for freshly computed products; out of place under dispatch modes that may keep a reference.


def _add_product(y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.addmm(y, h, b.t(), alpha=scale) if in_dispatch_mode() else lora_up_(y, h, b.t(), scale)


def _add(y: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
    return torch.add(y, z, alpha=scale) if in_dispatch_mode() else y.add_(z, alpha=scale)


def _scale_columns(y: Tensor, c: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
    """``y c + bias``, computed in c's dtype and rounded once."""
    if in_dispatch_mode():
        scaled = y * c
        return (scaled if bias is None else scaled + bias).to(y.dtype)
    return lora_scale_(y.clone() if keep else y, c, bias)
