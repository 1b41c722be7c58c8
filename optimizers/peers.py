"""Optimizers of others, to compare with: torch's Muon with AdamW as one optimizer, NorMuon and SCALE."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import newton_schulz
from leanstep.optimizers.common.checks import check_number

TINY = 1e-8


def check_rates(owner: str, lr: Any, weight_decay: Any) -> None:
    """Raise for a learning rate or a decay that is no number from 0 on."""
    for name, value in (("learning rate", lr), ("weight decay", weight_decay)):
        check_number(owner, name, value, 0.0)


class MuonAdamW(torch.optim.Optimizer):
    """Steps groups with ``algorithm`` ``"muon"`` by :class:`torch.optim.Muon`, the others by fused AdamW.

    Both share the learning rate. By default, ``adjust_lr_fn="match_rms_adamw"`` multiplies Muon's update by
    ``0.2 sqrt(max(rows, columns))``, which brings it to the size of AdamW's.

    Args:
        params: groups; ``algorithm`` defaults to "adamw". Muon takes matrices only.
        lr, weight_decay: of both; decoupled decay.
        momentum, nesterov, ns_steps, adjust_lr_fn: as in :class:`torch.optim.Muon`.
        betas: of AdamW.

    State: ``momentum_buffer`` for Muon's parameters, ``exp_avg``, ``exp_avg_sq`` and ``step`` for AdamW's.

    Raises:
        ValueError: from torch's classes, for an argument out of range or a non-matrix in a group of Muon.

    References:
        K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the factor 0.2 is from
        J. Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982.
    """

    algorithms = ("muon",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        check_rates("MuonAdamW", lr, weight_decay)
        check_number("MuonAdamW", "momentum", momentum, 0.0, 1.0, open_high=True)
        muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        # each of torch's classes reads its own keys of a group
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **muon, "betas": betas, "fused": True})
        self._optimizers()  # checks the arguments

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group.

        Raises:
            ValueError: for an algorithm that is neither ``muon`` nor ``adamw``, or for a group of Muon with
                ``transposed`` and an ``adjust_lr_fn`` other than "match_rms_adamw".
        """
        algorithm = param_group.setdefault("algorithm", "adamw")
        if algorithm not in ("muon", "adamw"):
            raise ValueError(f"MuonAdamW: expected algorithm 'muon' or 'adamw', got {algorithm!r}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if algorithm == "muon" and group.get("transposed") and group["adjust_lr_fn"] != "match_rms_adamw":
            raise ValueError(
                f"MuonAdamW: adjust_lr_fn={group['adjust_lr_fn']!r} depends on which side of a matrix is the output, "
                "and torch's Muon takes it from the shape, which is (in, out) in groups with transposed, such as "
                "GPT-2's; take adjust_lr_fn='match_rms_adamw'"
            )

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers: list[torch.optim.Optimizer] = []
        for algorithm, cls in (("muon", torch.optim.Muon), ("adamw", torch.optim.AdamW)):
            groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            if groups:
                optimizers.append(cls(groups))
                optimizers[-1].state = self.state
        return optimizers

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step. ``closure``, if given, is called first with gradients enabled; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._optimizers():
            optimizer.step()
        return loss


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
        check_rates("SCALE", lr, weight_decay)
        check_number("SCALE", "momentum", momentum, 0.0, 1.0, open_high=True)
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
        check_rates("NorMuon", lr, weight_decay)
        for key, value in (("momentum", momentum), ("beta2", beta2)):
            check_number("NorMuon", key, value, 0.0, 1.0, open_high=True)
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


def peer_algorithm(name: str, group: Mapping[str, Any], head: Any) -> str | None:
    """The ``algorithm`` of a group of :func:`leanstep.optimizers.param_groups` under "muon", "normuon" or "scale"; else
    None.

    ``head`` is the model's output head or None; a group with its weight has SCALE's rule of heads.
    """
    role, algorithm = group["name"], group.get("algorithm", "adamw")
    if name in ("muon", "normuon"):  # "sinkgd" is what param_groups calls the rule of matrices
        return name if algorithm == "sinkgd" else algorithm
    if name != "scale":
        return None
    if role in ("norm", "bias", "other"):
        return "adamw"
    if head is not None and any(parameter is head.weight for _, parameter in group["params"]):
        return "head"
    return {"embedding": "columns", "position": "columns", "head": "head"}.get(role, "rows")
