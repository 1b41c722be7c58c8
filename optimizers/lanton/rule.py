"""LANTON's rule: one function per line of the formula in :class:`leanstep.optimizers.LANTON`, in its order.

The functions take tensors of any floating dtype, float64 included. :mod:`leanstep.optimizers.lanton.step` calls them
for all layers of a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import StepOptions, scaled_step
from leanstep.kernels.matrices.newton_schulz import newton_schulz, nuclear_norm
from leanstep.kernels.steps.common import compute_dtype, constant, decay_factor, pack

# lower bound of alpha="auto": without noise the median is 0
_SMALLEST_ALPHA = 1e-30

# Newton-Schulz iterations of a polar factor, as in Muon
POLAR_STEPS = 5

# NorMuon's beta2 and epsilon (arXiv 2510.05491)
_ROW_BETA, _ROW_EPS = 0.95, 1e-8

# ---- B = beta1 * B + (1 - beta1) * G


def momentum(buffer: Tensor, gradient: Tensor, beta1: float, *, in_place: bool = False) -> Tensor:
    """Return the new B in the old B's dtype, rounded once."""
    weight = 1.0 - beta1
    if buffer.dtype == gradient.dtype:
        return buffer.lerp_(gradient, weight) if in_place else buffer.lerp(gradient, weight)  # computes in fp32 inside
    wide = torch.promote_types(buffer.dtype, gradient.dtype)
    new = buffer.to(wide).lerp(gradient.to(wide), weight).to(buffer.dtype)
    return buffer.copy_(new) if in_place else new


def nesterov(new_momentum: Tensor, gradient: Tensor, beta1: float) -> Tensor:
    """Return beta1 * B + (1 - beta1) * G with the new B, which replaces B in O."""
    return momentum(new_momentum, gradient, beta1)


# ---- O = argmax of <B, O> over the unit ball of the layer's norm


def dual_norm_scale(norm: str, shape: tuple[int, ...], scaling: str = "scion") -> float:
    """Return the factor that the dual norm and O share; it depends only on the shape.

    "rms" with shape (m, n) = (out, in): sqrt(m / n) ("scion") or 0.2 * sqrt(max(m, n)) ("muon"). "vector" with d
    entries: sqrt(d). "sign": 1.
    """
    if norm == "rms":
        m, n = shape
        return math.sqrt(m / n) if scaling == "scion" else 0.2 * math.sqrt(max(m, n))
    return math.sqrt(math.prod(shape)) if norm == "vector" else 1.0


def polar_factors(momenta: Sequence[Tensor], coefficients: str = "jordan", *, steps: int = POLAR_STEPS) -> list[Tensor]:
    """Return U V^T of matrices [m, n] or stacks [e, m, n]. O of norm "rms" is U V^T times :func:`dual_norm_scale`."""
    return newton_schulz(momenta, steps=steps, coefficients=coefficients)


def row_variance(variance: Tensor, mean_squares: Tensor) -> Tensor:
    """Return the new v = 0.95 v + 0.05 * mean of O^2 over each row, for variance="rows"."""
    return variance.lerp(mean_squares, 1.0 - _ROW_BETA)


def row_scales(variance: Tensor, mean_squares: Tensor) -> Tensor:
    """Return s with O[i, :] = s[i] * O[i, :], for variance="rows": 1 / sqrt(v) times the factor that keeps ||O||_F.

    Args:
        variance: v after its update, [m] or [e, m].
        mean_squares: the mean of O^2 over each row, of the same shape.
    """
    inverse = 1.0 / (variance.sqrt() + _ROW_EPS)
    before, after = (sums.sum(dim=-1, keepdim=True) for sums in (mean_squares, mean_squares * inverse.square()))
    return inverse * torch.where(after > 0, (before / after).sqrt(), 0.0)


def sign_direction(momentum: Tensor) -> Tensor:
    """Return O of norm "sign"."""
    return momentum.sign()


def vector_direction(momentum: Tensor, square: Tensor, scale: float) -> Tensor:
    """Return O of norm "vector", B / RMS(B) = ``scale * B / sqrt(square)``; 0 for B = 0.

    ``square`` is the vector's sum of squares, ``scale`` its :func:`dual_norm_scale`. Computes in the dtype of
    ``square``, because the inverse norm of a tiny vector can overflow fp32.
    """
    inverse = torch.where(square > 0, scale / square.sqrt(), 0.0).to(momentum.device)
    return (momentum.to(inverse.dtype) * inverse).to(compute_dtype(momentum.dtype))


# ---- H = beta2 * H + (1 - beta2) * dual_norm(G - G')^2


def nuclear_norms(differences: Sequence[Tensor], estimator: str = "auto") -> Tensor:
    """Return nuclear norms, one per matrix. The dual norm of "rms" is this times :func:`dual_norm_scale`."""
    return nuclear_norm(differences, estimator=estimator)


def partial_dual_norm(difference: Tensor, norm: str, dtype: torch.dtype) -> Tensor:
    """Return the sum of absolute values ("sign") or of squares ("vector"), to be summed over a layer's shards."""
    if norm == "sign":
        return torch.linalg.vector_norm(difference, 1, dtype=compute_dtype(difference.dtype)).to(dtype)
    return torch.linalg.vector_norm(difference, dtype=dtype).square()


def noise_scale(noise: str, fraction: float = 0.5) -> float:
    """Return the factor that gives the stored difference the variance of G - G', with G' an independent gradient.

    "previous" stores G - G'; the factor is 1. "halves" stores h - w G. Here w is the fraction of the batch in the
    first half, G = w g_a + (1 - w) g_b, and h = w g_a. Hence h - w G = w (1 - w) (g_a - g_b), whose variance is
    w (1 - w) Var(G). G - G' has variance 2 Var(G).
    """
    return 1.0 if noise == "previous" else math.sqrt(2.0 / (fraction * (1.0 - fraction)))


def noise_estimate(noise: Tensor, dual_norms: Tensor, beta2: Tensor | float) -> Tensor:
    """Return the new H."""
    return beta2 * noise + (1.0 - beta2) * dual_norms.square()


# ---- a = alpha / sqrt(alpha^2 + H),  f = sqrt(a / a_max)


def automatic_alpha(noise: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the median of sqrt(H) over layers that share a maximum, for alpha="auto". Ignores NaN (no estimate).

    ``weights``: how much each entry counts: the blocks of a matrix count as one matrix together. Between two middle
    entries the median is the lower one.
    """
    if weights is None:
        return noise.nanmedian().sqrt().clamp_min(_SMALLEST_ALPHA)
    ordered, order = noise.sort()  # NaN comes last
    total = torch.where(noise.isnan(), 0.0, weights)[order].cumsum(0)
    # a little below the half, because three thirds may sum to less than one
    first = torch.searchsorted(total, total[-1:] * (0.5 - 1e-9))
    return ordered.gather(0, first).squeeze(0).sqrt().clamp_min(_SMALLEST_ALPHA)


def inverse_rates(noise: Tensor, alpha: Tensor | float) -> Tensor:
    """Return 1 / a = hypot(1, sqrt(H) / alpha), which does not square alpha."""
    return torch.hypot(torch.ones_like(noise), noise.sqrt() / alpha)


def factors(inverse_rates: Tensor, measured: Tensor) -> Tensor:
    """Return f of layers that share one maximum.

    A layer without an estimate has f = 1 and does not enter the maximum. H = 0 in place of an estimate would make it
    the least noisy layer, and slow down all others.
    """
    smallest = torch.where(measured, inverse_rates, float("inf")).amin()
    return torch.where(measured, (smallest / inverse_rates).sqrt(), 1.0)


# ---- p = p * (1 - lr * weight_decay) - lr * f * radius * O


def update(
    params: list[Tensor],
    directions: Sequence[Tensor],
    scales: Sequence[Tensor],
    lr: float | Tensor,
    weight_decay: float = 0.0,
    *,
    cautious_decay: bool = False,
    skipped: Sequence[Tensor] = (),
    rounding_states: Sequence[Tensor] = (),
    **options: Any,
) -> Tensor:
    """Update matrices of one device and dtype in place.

    Args:
        params: matrices [m, n] or stacks [e, m, n].
        directions: O of the same shapes, or O without its :func:`dual_norm_scale`.
        scales: ``f * radius``, times :func:`dual_norm_scale` if O lacks it: [1] for a matrix, [e] for a stack.
        lr, weight_decay: as in the formula.
        cautious_decay: no decay for entries whose O and p differ in sign.
        skipped: empty, or a 0-d bool per parameter on its device, true to leave the parameter unchanged.
        rounding_states: as for :func:`leanstep.kernels.scaled_step`.
        options: fields of :class:`leanstep.kernels.StepOptions`, such as ``rounding`` and ``skip_nonfinite``.

    Returns:
        int32, one per parameter: 1 if it was left unchanged.
    """
    device, dtype = params[0].device, compute_dtype(params[0].dtype)
    counts = [scale.numel() for scale in scales]
    matrix_scales = torch.cat([scale.to(device) for scale in scales]).to(dtype)
    ones = torch.ones_like(matrix_scales)
    if skipped:
        skips = torch.cat([skip.expand(count) for skip, count in zip(skipped, counts, strict=True)])
        ones = ones.masked_fill_(skips, float("nan"))  # the kernel skips matrices with NaN in column scales
    return scaled_step(
        params,
        [_in_common_dtype(d, p) for d, p in zip(directions, params, strict=True)],
        _repeated(matrix_scales, params, counts, -2),
        _repeated(ones, params, counts, -1),
        list(rounding_states),
        StepOptions(
            pack([lr, decay_factor(lr, weight_decay)], device, dtype), decay_where_aligned=cautious_decay, **options
        ),
    )


def _repeated(values: Tensor, params: Sequence[Tensor], counts: Sequence[int], dim: int) -> list[Tensor]:
    """Repeat one value per matrix along a dimension of the matrices, to [m] or [e, m]; views of one buffer."""
    sizes = [p.shape[dim] for p, count in zip(params, counts, strict=True) for _ in range(count)]
    flat = values.repeat_interleave(constant(sizes, values.device, torch.int64), output_size=sum(sizes))
    parts = flat.split([count * p.shape[dim] for p, count in zip(params, counts, strict=True)])
    return [part.view(*p.shape[:-2], p.shape[dim]) for part, p in zip(parts, params, strict=True)]


def _in_common_dtype(direction: Tensor, param: Tensor) -> Tensor:
    """Cast the direction to fp32 if direction and parameter mix fp16 and bf16, which the kernels do not support."""
    both = {direction.dtype, param.dtype}
    return direction.float() if both == {torch.float16, torch.bfloat16} else direction
