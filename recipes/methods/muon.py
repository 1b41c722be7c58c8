"""torch's Muon for hidden matrices and torch's AdamW for other parameters, as one optimizer, for comparisons."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


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
