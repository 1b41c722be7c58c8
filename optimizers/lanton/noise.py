"""LANTON's noise estimates and the factors that they give to layers: arithmetic on one number per matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels._hyper import constant
from leanstep.optimizers.common.base import local
from leanstep.optimizers.lanton.routing import is_stack, matrix_count

# the smallest alpha that alpha="auto" may find: gradients without noise have a median of 0
_TINY = 1e-30


class Layer(NamedTuple):
    """The estimates of a parameter: one, or one for each matrix of a stack."""

    group: dict[str, Any]
    param: Tensor
    state: dict[str, Any]
    norm: str  # "rms", "sign" or "vector"
    key: str  # layers of one key share a maximum


def estimate_dtype(device: torch.device) -> torch.dtype:
    """Of the estimates, squares of sums over whole matrices: fp64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def init_noise(state: dict[str, Any], group: dict[str, Any], norm: str, param: Tensor) -> None:
    """Create ``noise`` (H) and ``noise_steps``: 0-d, or [e] for a stack; whole on every process.

    ``noise_steps`` counts the estimates that H averages; -1 says that no gradient is kept yet that the next could be
    compared with.
    """
    if "noise" in state:
        return
    device = local(param).device
    shape = (param.shape[0],) if is_stack(group, norm, param.dim()) else ()
    state["noise"] = torch.zeros(shape, dtype=estimate_dtype(device), device=device)
    start = -1.0 if group["noise"] == "previous" else 0.0
    state["noise_steps"] = torch.full(shape, start, dtype=torch.float32, device=device)


def joined(states: Sequence[dict[str, Any]], name: str, device: torch.device) -> Tensor:
    """One state of all layers as a flat vector, in fp64 (see :func:`estimate_dtype`)."""
    return torch.cat([s[name].reshape(-1).to(device) for s in states]).to(estimate_dtype(device))


def write_back(states: Sequence[dict[str, Any]], name: str, values: Tensor) -> None:
    """The opposite of :func:`joined`."""
    kept = [s[name] for s in states]
    for state, part in zip(kept, values.split([k.numel() for k in kept]), strict=True):
        state.copy_(part.view(state.shape))


def new_estimates(
    noise: Tensor, counts: Tensor, dual_norms: Tensor, beta2: Tensor, measured: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """H <- beta2 * H + (1 - beta2) * dual_norm^2 where ``measured``; (noise, counts) of all matrices.

    A difference whose square is not finite is not taken. ``kept``: this gradient will be there at the next step.
    """
    squares = dual_norms.square()
    taken = measured & torch.isfinite(squares)
    new_noise = torch.where(taken, beta2 * noise + (1.0 - beta2) * squares, noise)
    new_counts = torch.where(taken, counts + 1, counts)
    return new_noise, torch.where(kept, new_counts.clamp_min(0), new_counts)


def layer_factors(layers: Sequence[Layer], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(f, H, counts) of all matrices of the layers, flat and in order::

        a = alpha / sqrt(alpha^2 + H)        f = sqrt(a / max of a over the layers of one key)

    A matrix without an estimate has f = 1 and no part in the maximum: to take its H for 0 would make it the least
    noisy one and slow all others down.
    """
    states = [layer.state for layer in layers]
    counts = joined(states, "noise_steps", device)
    noise = _corrected(layers, joined(states, "noise", device), counts)
    measured = counts >= 1
    members: dict[str, list[int]] = {}
    alphas: list[float] = []
    automatic: dict[str, list[int]] = {}
    for layer in layers:
        for _ in range(matrix_count(layer.group, layer.norm, layer.param)):
            if layer.group["alpha"] == "auto":
                automatic.setdefault(layer.key, []).append(len(alphas))
            members.setdefault(layer.key, []).append(len(alphas))
            alphas.append(1.0 if layer.group["alpha"] == "auto" else float(layer.group["alpha"]))
    alpha = constant(alphas, device, noise.dtype)
    for key, places in automatic.items():
        index = constant(members[key], device, torch.int64)
        found = torch.where(measured, noise, float("nan"))[index].nanmedian().sqrt().clamp_min(_TINY)
        alpha = alpha.index_put((constant(places, device, torch.int64),), found)
    # 1 / a: the form in which neither a large nor a small alpha overflows
    inverse = torch.hypot(torch.ones_like(noise), noise.sqrt() / alpha)
    factors = torch.ones_like(noise)
    for places in members.values():
        index = constant(places, device, torch.int64)
        least = torch.where(measured, inverse, float("inf"))[index].amin()
        factors = factors.index_put((index,), (least / inverse[index]).sqrt())
    return torch.where(measured, factors, 1.0), noise, counts


def _corrected(layers: Sequence[Layer], noise: Tensor, counts: Tensor) -> Tensor:
    """H, divided by 1 - beta2^steps in the groups that ask for it."""
    if not any(layer.group["bias_correction"] for layer in layers):
        return noise
    repeats = [matrix_count(layer.group, layer.norm, layer.param) for layer in layers]
    betas = [layer.group["betas"][1] if layer.group["bias_correction"] else 0.0 for layer in layers]
    beta2 = constant([b for b, n in zip(betas, repeats, strict=True) for _ in range(n)], noise.device, noise.dtype)
    return torch.where(counts >= 1, noise / (1.0 - beta2 ** counts.clamp_min(1)), noise)


def report(layers: Sequence[Layer], groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """See :meth:`leanstep.optimizers.LANTON.noise_report`."""
    if not layers:
        return []
    factors, noise, counts = (v.tolist() for v in layer_factors(layers, local(layers[0].param).device))
    names = {param: _name(group, i) for group in groups for i, param in enumerate(group["params"])}
    rows: list[dict[str, Any]] = []
    for layer in layers:
        for k in range(matrix_count(layer.group, layer.norm, layer.param)):
            at = len(rows)
            row = {
                "name": names[layer.param] + (f"[{k}]" if layer.state["noise"].dim() else ""),
                "group": layer.key,
                "norm": layer.norm,
                "H": noise[at] if counts[at] >= 1 else None,
                "factor": factors[at],
                "lr": float(layer.group["lr"]) * factors[at],
            }
            rows.append(row)
    return rows


def _name(group: dict[str, Any], position: int) -> str:
    names = group.get("param_names")
    return names[position] if names else f"{group.get('name', 'group')}.{position}"
