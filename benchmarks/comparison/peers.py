"""Peers of this comparison, which files of results name as classes of this module.

SCALE and NorMuon are leanstep's; the rules of the others are here, with AdamW on the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import newton_schulz
from leanstep.optimizers.peers import SCALE, TINY, NorMuon, WithAdamW

__all__ = ["RMNP", "SCALE", "LionMuon", "MuonEq", "NorMuon"]


class _Momentum(WithAdamW):
    """Rules of M = momentum * M + (1 - momentum) * G, read as N = momentum * M + (1 - momentum) * G."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95,
                 betas: tuple[float, float] = (0.9, 0.95)) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas})

    def update(self, group: dict[str, Any], states: list[dict[str, Any]], grads: list[Tensor]) -> list[Tensor]:
        """The directions of N."""
        averages = []
        for state, grad in zip(states, grads, strict=True):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
            averages.append(grad.lerp(momentum, group["momentum"]))
        return self.directions(averages)

    def directions(self, averages: list[Tensor]) -> list[Tensor]:
        """What the rule makes of N."""
        raise NotImplementedError


class RMNP(_Momentum):
    """Momentum with rows of norm 1, times sqrt(max(1, m / n)): O(m n) for a matrix (m, n).

    References:
        Deng et al., "RMNP: Row-Momentum Normalized Preconditioning for Scalable Matrix-Based Optimization", arXiv
        2603.20527; the factor is that of the authors' code.
    """

    algorithms = ("rmnp",)

    def directions(self, averages: list[Tensor]) -> list[Tensor]:
        """Rows of norm 1, scaled."""
        return [_unit_rows(average) * max(1.0, average.shape[0] / average.shape[1]) ** 0.5 for average in averages]


class MuonEq(_Momentum):
    """Muon of a momentum whose rows have norm 1 (form R, the paper's default), times 0.2 sqrt(max(m, n)).

    References:
        Chang et al., "MuonEq: Balancing Before Orthogonalization with Lightweight Equilibration", arXiv 2603.28254.
    """

    algorithms = ("muoneq",)

    def directions(self, averages: list[Tensor]) -> list[Tensor]:
        """Orthogonalized unit rows, scaled."""
        return _scaled_polar([_unit_rows(average) for average in averages])


class LionMuon(WithAdamW):
    """Muon's step and Lion's in turn, from one momentum.

    For a matrix with gradient G::

        N = beta1 * M + (1 - beta1) * G;  M = beta2 * M + (1 - beta2) * G
        X = 0.2 sqrt(max(m, n)) * newton_schulz(N)     in steps 1, 3, ...
        X = 0.05 * sign(N)                             in steps 2, 4, ...

    The paper gives the two steps rates of their own. Their ratio is that of the authors' runs with a GPT-2 on FineWeb.

    References:
        Bolatov et al., "LionMuon: Alternating Spectral and Sign Descent for Efficient Training", arXiv 2605.19811.
    """

    algorithms = ("lionmuon",)

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0,
                 momentum_betas: tuple[float, float] = (0.9, 0.99),
                 betas: tuple[float, float] = (0.9, 0.95)) -> None:  # fmt: skip
        rates = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, {**rates, "momentum_betas": momentum_betas, "betas": betas})

    def update(self, group: dict[str, Any], states: list[dict[str, Any]], grads: list[Tensor]) -> list[Tensor]:
        """Orthogonalized averages, or their signs."""
        beta1, beta2 = group["momentum_betas"]
        group["sign"] = not group.get("sign", True)
        averages = []
        for state, grad in zip(states, grads, strict=True):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            averages.append(grad.lerp(state["momentum_buffer"], beta1))
            state["momentum_buffer"].lerp_(grad, 1 - beta2)
        return [0.05 * average.sign() for average in averages] if group["sign"] else _scaled_polar(averages)


def _unit_rows(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm(dim=1, keepdim=True).clamp_min(TINY)


def _scaled_polar(matrices: list[Tensor]) -> list[Tensor]:
    polars = newton_schulz(matrices, eps=1e-7)
    return [p.to(m.dtype) * (0.2 * max(m.shape) ** 0.5) for p, m in zip(polars, matrices, strict=True)]
