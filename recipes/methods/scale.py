"""SCALE, a baseline for comparisons, and what it shares with others: AdamW for parameters without a matrix rule."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

TINY = 1e-8


class WithAdamW(torch.optim.Optimizer):
    """Steps groups with ``algorithm`` "adamw" by torch's fused AdamW, the others by :meth:`update`.

    A group with ``transposed`` has matrices (in, out); :meth:`update` gets them as (out, in).
    """

    algorithms: tuple[str, ...] = ()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises ValueError for an unknown algorithm, or a vector in a group of a matrix rule."""
        algorithm = param_group.setdefault("algorithm", "adamw")
        if algorithm not in (*self.algorithms, "adamw"):
            raise ValueError(f"expected an algorithm of {(*self.algorithms, 'adamw')}, got {algorithm!r}")
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
                updates = self.update(group, [self.state[p] for p in params], grads)
                for view, update in zip(views, updates, strict=True):
                    view.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        return loss

    def update(self, group: dict[str, Any], states: list[dict[str, Any]], grads: list[Tensor]) -> list[Tensor]:
        """Directions of a group's matrices (out, in), to be multiplied by the learning rate; updates their states."""
        raise NotImplementedError


def scale_algorithm(role: str) -> str:
    """SCALE's algorithm for a role of :func:`leanstep.optimizers.param_groups`; a tied head has the role "head"."""
    if role in ("norm", "bias", "other"):
        return "adamw"
    return {"embedding": "columns", "position": "columns", "head": "head"}.get(role, "rows")


class SCALE(WithAdamW):
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

    algorithms = ("rows", "columns", "head")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas})

    def update(self, group: dict[str, Any], states: list[dict[str, Any]], grads: list[Tensor]) -> list[Tensor]:
        """Normalized gradients, or for "head" the normalized momentum."""
        updates = []
        for state, grad in zip(states, grads, strict=True):
            if group["algorithm"] == "head":
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                grad = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
            dim = 0 if group["algorithm"] == "columns" else 1
            updates.append(grad / grad.square().mean(dim=dim, keepdim=True).sqrt().clamp_min(TINY))
        return updates
