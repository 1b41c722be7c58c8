"""LANTON's rule, a function for each line of the formula in :class:`leanstep.optimizers.LANTON`, in its order.

They need no optimizer and take tensors of any floating dtype, float64 included. A step of the optimizer calls them for
all layers of a model (:mod:`leanstep.optimizers.lanton.step`).
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

# the smallest alpha that alpha="auto" finds: gradients without noise have a median of 0
_SMALLEST_ALPHA = 1e-30

# ---- B = beta1 * B + (1 - beta1) * G


def momentum(buffer: Tensor, gradient: Tensor, beta1: float, *, in_place: bool = False) -> Tensor:
    """The new B, in the dtype of the old one, rounded once."""
    weight = 1.0 - beta1
    if buffer.dtype == gradient.dtype:
        return buffer.lerp_(gradient, weight) if in_place else buffer.lerp(gradient, weight)  # computes in fp32 inside
    wide = torch.promote_types(buffer.dtype, gradient.dtype)
    new = buffer.to(wide).lerp(gradient.to(wide), weight).to(buffer.dtype)
    return buffer.copy_(new) if in_place else new


def nesterov(new_momentum: Tensor, gradient: Tensor, beta1: float) -> Tensor:
    """The tensor whose direction Nesterov's variant takes in place of the new B."""
    return momentum(new_momentum, gradient, beta1)


# ---- O = argmax of <B, O> over the unit ball of the layer's norm


def dual_norm_scale(norm: str, shape: tuple[int, ...], scaling: str = "scion") -> float:
    """The common factor of the dual norm and of O, which depends on the shape alone.

    For "rms" and shape (m, n) = (out, in), it is sqrt(m / n) with "scion" and 0.2 * sqrt(max(m, n)) with "muon"; for
    "vector" sqrt(d) with d entries; for "sign" 1.
    """
    if norm == "rms":
        m, n = shape
        return math.sqrt(m / n) if scaling == "scion" else 0.2 * math.sqrt(max(m, n))
    return math.sqrt(math.prod(shape)) if norm == "vector" else 1.0


def polar_factors(
    momenta: Sequence[Tensor], steps: int = 5, coefficients: str = "jordan", dtype: torch.dtype | None = None
) -> list[Tensor]:
    """U V^T of matrices [m, n] or stacks [e, m, n]. Times the :func:`dual_norm_scale`, this is O of norm "rms"."""
    return newton_schulz(momenta, steps=steps, coefficients=coefficients, dtype=dtype)


def sign_direction(momentum: Tensor) -> Tensor:
    """O of norm "sign"."""
    return momentum.sign()


def vector_direction(momentum: Tensor, square: Tensor, scale: float) -> Tensor:
    """O of norm "vector", B / RMS(B): ``scale * B / sqrt(square)``, and 0 for B = 0.

    ``square`` is the sum of squares of the whole vector, ``scale`` its :func:`dual_norm_scale`. The product is computed
    in the dtype of ``square``: the inverse norm of a tiny vector can exceed the range of fp32.
    """
    inverse = torch.where(square > 0, scale / square.sqrt(), 0.0).to(momentum.device)
    return (momentum.to(inverse.dtype) * inverse).to(compute_dtype(momentum.dtype))


# ---- H = beta2 * H + (1 - beta2) * dual_norm(G - G')^2


def nuclear_norms(differences: Sequence[Tensor], estimator: str = "polar", dtype: torch.dtype | None = None) -> Tensor:
    """Nuclear norms of matrices or stacks, one per matrix: times :func:`dual_norm_scale`, dual norms of "rms"."""
    return nuclear_norm(differences, estimator=estimator, dtype=dtype)


def partial_dual_norm(difference: Tensor, norm: str, dtype: torch.dtype) -> Tensor:
    """Sum of absolute values for "sign", sum of squares for "vector": they add up over the parts of a layer."""
    if norm == "sign":
        return torch.linalg.vector_norm(difference, 1, dtype=compute_dtype(difference.dtype)).to(dtype)
    return torch.linalg.vector_norm(difference, dtype=dtype).square()


def noise_scale(noise: str, fraction: float = 0.5) -> float:
    """The factor by which the kept difference has the variance of G - G', where G' is an independent gradient.

    "previous" keeps G - G' itself. "halves" keeps h - w G: the first part of the batch, of fraction w, contributes
    h = w g_a to G = w g_a + (1 - w) g_b. The difference is w (1 - w) (g_a - g_b), of variance w (1 - w) Var(G), whereas
    G - G' has variance 2 Var(G).
    """
    return 1.0 if noise == "previous" else math.sqrt(2.0 / (fraction * (1.0 - fraction)))


def noise_estimate(noise: Tensor, dual_norms: Tensor, beta2: Tensor | float) -> Tensor:
    """The new H."""
    return beta2 * noise + (1.0 - beta2) * dual_norms.square()


# ---- a = alpha / sqrt(alpha^2 + H),  f = sqrt(a / a_max)


def automatic_alpha(noise: Tensor) -> Tensor:
    """alpha="auto": the median of sqrt(H) over the layers that share a maximum. NaN stands for no estimate."""
    return noise.nanmedian().sqrt().clamp_min(_SMALLEST_ALPHA)


def inverse_rates(noise: Tensor, alpha: Tensor | float) -> Tensor:
    """1 / a, which neither a large nor a small alpha overflows."""
    return torch.hypot(torch.ones_like(noise), noise.sqrt() / alpha)


def factors(inverse_rates: Tensor, measured: Tensor) -> Tensor:
    """f of layers that share one maximum.

    A layer without an estimate has f = 1 and does not enter the maximum. With H = 0 in place of an estimate, it would
    be the least noisy layer and slow down all others.
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
    skipped: Sequence[Tensor] = (),
    rounding_states: Sequence[Tensor] = (),
    **options: Any,
) -> Tensor:
    """The last line, for matrices of one device and dtype at once; in place.

    Args:
        params: matrices [m, n] or stacks [e, m, n].
        directions: O of the same shapes, or O without its :func:`dual_norm_scale`.
        scales: ``f * radius``, times what O lacks: [1] for a matrix, [e] for a stack.
        lr, weight_decay: as in the formula.
        skipped: empty, or a 0-d bool per parameter on its device, true where nothing is to be written.
        rounding_states: as for :func:`leanstep.kernels.scaled_step`.
        options: ``rounding``, ``skip_nonfinite``, ``seeds`` and ``offsets`` of :class:`leanstep.kernels.StepOptions`.

    Returns:
        int32, one per parameter: 1 where nothing was written.
    """
    device, dtype = params[0].device, compute_dtype(params[0].dtype)
    counts = [scale.numel() for scale in scales]
    matrix_scales = torch.cat([scale.to(device) for scale in scales]).to(dtype)
    ones = torch.ones_like(matrix_scales)
    if skipped:
        skips = torch.cat([skip.expand(count) for skip, count in zip(skipped, counts, strict=True)])
        ones = torch.where(skips, float("nan"), ones)  # the kernel leaves a matrix with such column scales alone
    return scaled_step(
        params,
        [_in_common_dtype(d, p) for d, p in zip(directions, params, strict=True)],
        _repeated(matrix_scales, params, counts, -2),
        _repeated(ones, params, counts, -1),
        list(rounding_states),
        StepOptions(pack([lr, decay_factor(lr, weight_decay)], device, dtype), **options),
    )


def _repeated(values: Tensor, params: Sequence[Tensor], counts: Sequence[int], dim: int) -> list[Tensor]:
    """One value per matrix, repeated along a dimension of the matrices: [m] or [e, m], cut from one buffer."""
    sizes = [p.shape[dim] for p, count in zip(params, counts, strict=True) for _ in range(count)]
    flat = values.repeat_interleave(constant(sizes, values.device, torch.int64), output_size=sum(sizes))
    parts = flat.split([count * p.shape[dim] for p, count in zip(params, counts, strict=True)])
    return [part.view(*p.shape[:-2], p.shape[dim]) for part, p in zip(parts, params, strict=True)]


def _in_common_dtype(direction: Tensor, param: Tensor) -> Tensor:
    """The direction, in fp32 if one of the two is fp16 and the other bf16: the kernels have no loop over both."""
    both = {direction.dtype, param.dtype}
    return direction.float() if both == {torch.float16, torch.bfloat16} else direction
