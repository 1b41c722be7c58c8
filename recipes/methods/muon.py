"""torch's Muon for hidden matrices and AdamW for the other parameters, as one optimizer, to compare with."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class MuonAdamW(torch.optim.Optimizer):
    """Steps groups with ``algorithm`` ``"muon"`` by :class:`torch.optim.Muon`, the others by fused AdamW.

    Both do what torch's classes do. They share the rate, so that Muon's update is brought to the size of AdamW's by
    default: ``adjust_lr_fn="match_rms_adamw"`` multiplies it by ``0.2 sqrt(max(rows, columns))``.

    Args:
        params: Groups; one without ``algorithm`` is stepped by AdamW. Muon takes matrices only.
        lr, weight_decay: Of both; decoupled decay.
        momentum, nesterov, ns_steps, adjust_lr_fn: As :class:`torch.optim.Muon` has them.
        betas: Of AdamW.

    State: ``momentum_buffer`` for Muon's parameters, ``exp_avg``, ``exp_avg_sq`` and ``step`` for AdamW's.

    Raises:
        ValueError: What torch's classes raise for an argument out of range or a group of Muon's with other than
            matrices, at construction.

    References:
        K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the factor 0.2 is from
        J. Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982.
    """

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
        muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        # each of torch's classes reads its own keys of a group
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **muon, "betas": betas, "fused": True})
        self._parts()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises ValueError for an algorithm that is neither ``muon`` nor ``adamw``."""
        algorithm = param_group.setdefault("algorithm", "adamw")
        if algorithm not in ("muon", "adamw"):
            raise ValueError(f"MuonAdamW: expected algorithm 'muon' or 'adamw', got {algorithm!r}")
        super().add_param_group(param_group)

    def _parts(self) -> list[torch.optim.Optimizer]:
        """torch's optimizers over the groups as they are now, with this object's state; they keep nothing."""
        parts: list[torch.optim.Optimizer] = []
        for algorithm, cls in (("muon", torch.optim.Muon), ("adamw", torch.optim.AdamW)):
            groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            if groups:
                parts.append(cls(groups))
                parts[-1].state = self.state
        return parts

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step. ``closure``, if given, is called first with gradients enabled; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._parts():
            optimizer.step()
        return loss
