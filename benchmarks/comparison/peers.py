"""NorMuon and SCALE, written from their papers, because no package of the ``bench`` extra has them for a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import newton_schulz

_TINY = 1e-8


class _WithAdamW(torch.optim.Optimizer):
    """Steps groups with ``algorithm`` "adamw" by torch's fused AdamW, the others by :meth:`_update`.

    A group with ``transposed`` has matrices (in, out); :meth:`_update` gets them as (out, in).
    """

    _algorithms: tuple[str, ...] = ()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises ValueError for an unknown algorithm, or a vector in a group of a matrix rule."""
        algorithm = param_group.setdefault("algorithm", "adamw")
        if algorithm not in (*self._algorithms, "adamw"):
            raise ValueError(f"expected an algorithm of {(*self._algorithms, 'adamw')}, got {algorithm!r}")
        super().add_param_group(param_group)
        for param in param_group["params"]:
            if algorithm != "adamw" and param.dim() != 2:
                raise ValueError(f"algorithm {algorithm!r} takes matrices, got a tensor of shape {tuple(param.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; ``closure``, if given, is called first, and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rest = [group for group in self.param_groups if group["algorithm"] == "adamw"]
        if rest:
            adamw = torch.optim.AdamW(rest, fused=True)
            adamw.state = self.state
            adamw.step()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["algorithm"] != "adamw" and params:
                views = [p.mT if group.get("transposed") else p for p in params]
                grads = [p.grad.mT if group.get("transposed") else p.grad for p in params]
                updates = self._update(group, [self.state[p] for p in params], grads)
                for view, update in zip(views, updates, strict=True):
                    view.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        return loss

    def _update(self, group: dict[str, Any], states: list[dict[str, Any]], grads: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError


class NorMuon(_WithAdamW):
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

    _algorithms = ("normuon",)

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

    def _update(self, group: dict[str, Any], states: list[dict[str, Any]], grads: list[Tensor]) -> list[Tensor]:
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
            update = polar / (state["row_mean_sq"].sqrt() + _TINY)
            updates.append(update * (0.2 * update.numel() ** 0.5 / (update.norm() + _TINY)))
        return updates


class SCALE(_WithAdamW):
    """Gradients with every column normalized, and momentum on the output head alone.

    The columns of the paper's matrices (in, out) are the rows of torch's. For a matrix (m, n) with gradient G::

        U[i, :] = G[i, :] / rms(G[i, :])               algorithm "rows": hidden matrices
        U[:, j] = G[:, j] / rms(G[:, j])               algorithm "columns": embeddings
        M = momentum * M + (1 - momentum) * G          algorithm "head": then rows of M
        p = p * (1 - lr * weight_decay) - lr * U

    A head that is tied to the embedding is a head here; the paper's models have none. State: M of the head, and AdamW's
    moments for vectors.

    References:
        Glentis, Li, Han, Hong, "A Minimalist Optimizer Design for LLM Pretraining", arXiv 2506.16659; the root mean
        square in place of the norm is that of the authors' code.
    """

    _algorithms = ("rows", "columns", "head")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas})

    def _update(self, group: dict[str, Any], states: list[dict[str, Any]], grads: list[Tensor]) -> list[Tensor]:
        updates = []
        for state, grad in zip(states, grads, strict=True):
            if group["algorithm"] == "head":
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                grad = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
            dim = 0 if group["algorithm"] == "columns" else 1
            updates.append(grad / grad.square().mean(dim=dim, keepdim=True).sqrt().clamp_min(_TINY))
        return updates
