"""NorMuon, written from its paper, because no package of the ``bench`` extra has it for a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import newton_schulz

# files of results name SCALE as a class of this module
from leanstep.optimizers.peers import SCALE, TINY, WithAdamW

__all__ = ["SCALE", "NorMuon"]


class NorMuon(WithAdamW):
    """Muon with rows of equal size on average.

    For a matrix (m, n) with gradient G::

        M = beta1 * M + (1 - beta1) * G
        O = newton_schulz(M)                        # with nesterov: of beta1 * M + (1 - beta1) * G
        v = beta2 * v + (1 - beta2) * mean of O^2 over each row
        O = O / (sqrt(v) + 1e-8)
        p = p * (1 - lr * weight_decay) - lr * 0.2 * sqrt(m * n) / ||O|| * O

    State: M, and v of one number per row. ``nesterov`` is in the authors' code, not in the paper's algorithm.

    References:
        Li, Liu, Liang, Chen, Zhao, "NorMuon: Making Muon more efficient and scalable", arXiv 2510.05491, Algorithm 1.
    """

    algorithms = ("normuon",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        rule = {"momentum": momentum, "beta2": beta2, "nesterov": nesterov}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **rule, "betas": betas})

    def update(self, group: dict[str, Any], states: list[dict[str, Any]], grads: list[Tensor]) -> list[Tensor]:
        """Orthogonalized momenta with rows of equal size on average."""
        beta1, directions = group["momentum"], []
        for state, grad in zip(states, grads, strict=True):
            if not state:
                state["momentum_buffer"], state["row_mean_sq"] = torch.zeros_like(grad), torch.zeros_like(grad[:, :1])
            state["momentum_buffer"].lerp_(grad, 1 - beta1)
            average = state["momentum_buffer"]
            directions.append(grad.lerp(average, beta1) if group["nesterov"] else average)
        updates = []
        for state, polar in zip(states, newton_schulz(directions, eps=1e-7), strict=True):
            polar = polar.to(state["row_mean_sq"].dtype)
            state["row_mean_sq"].lerp_(polar.square().mean(dim=1, keepdim=True), 1 - group["beta2"])
            update = polar / (state["row_mean_sq"].sqrt() + TINY)
            updates.append(update * (0.2 * update.numel() ** 0.5 / (update.norm() + TINY)))
        return updates
