"""The state and the report of one layer under :class:`leanstep.lora.LowRankGate`, and how they are saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["GateReport", "LayerState", "Plan", "check_state"]


@dataclass(frozen=True)
class GateReport:
    """What the gate does in one layer.

    Attributes:
        layer: its name.
        low_rank: whether its last call ran low-rank; reason: why, or why not.
        error: relative error of the output on sampled queries when last measured, of low-rank attention, whether it was
            used or not; None before the first measurement.
        largest_error: the largest such error among the calls that ran low-rank.
        logit: the largest sampled logit of the last judgement.
        cost: predicted cost relative to exact attention, at the length of the last call.
        calls, low_rank_calls, fallbacks: the number of all calls, of those that ran low-rank, and of those that were
            computed exactly because a check failed.
        gradient_errors: relative errors of O, dQ, dK and dV of one head at the last spot check; empty before.
    """

    layer: str
    low_rank: bool
    reason: str
    error: float | None
    largest_error: float
    logit: float | None
    cost: float | None
    calls: int
    low_rank_calls: int
    fallbacks: int
    gradient_errors: dict[str, float]


class Plan(NamedTuple):
    """A decision, kept for the pass that activation checkpointing repeats."""

    low_rank: bool
    center: Tensor | None


@dataclass
class LayerState:
    """The gate's state of one layer; most of it as in :class:`GateReport`.

    Attributes:
        on: whether the layer may run low-rank; ``good`` counts the judgements in a row that were in favour.
        center: the running mean of keys [H, d].
        plan: the decision for the last call.
    """

    name: str
    on: bool = False
    good: int = 0
    calls: int = 0
    low_rank_calls: int = 0
    fallbacks: int = 0
    reason: str = "not called yet"
    error: float | None = None
    largest_error: float = 0.0
    logit: float | None = None
    cost: float | None = None
    center: Tensor | None = None
    plan: Plan = Plan(False, None)
    gradient_errors: dict[str, float] = field(default_factory=dict)

    def report(self) -> GateReport:
        """The user's view of the state."""
        return GateReport(
            self.name, self.plan.low_rank, self.reason, self.error, self.largest_error, self.logit, self.cost,
            self.calls, self.low_rank_calls, self.fallbacks, dict(self.gradient_errors),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Everything but the name: numbers, strings, and the center as a copy."""
        state = {key: getattr(self, key) for key in _SAVED}
        state["center"] = None if self.center is None else self.center.clone()
        return state | {"gradient_errors": dict(self.gradient_errors), "low_rank": self.plan.low_rank}

    def restore(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Take over a state of :meth:`to_dict`, with the center as a copy on ``device``."""
        for key in _SAVED:
            setattr(self, key, saved[key])
        center = saved["center"]
        self.center = None if center is None else center.to(device, copy=True)
        self.gradient_errors = dict(saved["gradient_errors"])
        # repeated passes belong to calls of this process; until there is one, the plan only reports
        self.plan = Plan(saved["low_rank"], self.center)


_SAVED = tuple(item.name for item in fields(LayerState) if item.name not in ("name", "plan"))


def check_state(state: Any, layers: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Check that a gate with these layers and settings can take over a saved state.

    Raises:
        ValueError: for anything but a gate's state, a state of other layers, or one made with other settings.
    """
    wanted = {"settings", "generator", "speeds", "layers"}
    if not isinstance(state, Mapping) or wanted - state.keys():
        raise ValueError(f"LowRankGate: expected a state with {', '.join(sorted(wanted))}, as state_dict() gives it")
    names = list(layers)
    missing = [name for name in names if name not in state["layers"]]
    foreign = [name for name in state["layers"] if name not in names]
    if missing or foreign:
        raise ValueError(
            f"LowRankGate: the state is of other attention layers: it lacks {_few(missing)}, and the model lacks "
            f"{_few(foreign)}"
        )
    differ = [
        f"{key} was {state['settings'].get(key)}, is {value}"
        for key, value in settings.items()
        if state["settings"].get(key) != value
    ]
    if differ:
        raise ValueError(
            f"LowRankGate: the state's decisions were made with other settings: {'; '.join(differ)}; take the same, or "
            "do not load it, and the layers are judged anew"
        )
    keys = {"low_rank", *_SAVED}
    broken = [name for name, saved in state["layers"].items() if keys - saved.keys()]
    if broken:
        raise ValueError(f"LowRankGate: the state of {_few(broken)} lacks some of {', '.join(sorted(keys))}")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "no layer") + more
