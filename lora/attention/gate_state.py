"""State and report of one layer under :class:`leanstep.lora.LowRankGate`, and their saved form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class GateReport:
    """The gate's decisions and measurements for one layer.

    Attributes:
        layer: name of the attention layer.
        low_rank: whether the last call ran low-rank.
        reason: the reason for that decision.
        error: last measured relative error of low-rank attention on sampled queries, whether its output was used or
            not; None before the first measurement.
        largest_error: largest error among the calls that ran low-rank.
        logit: largest sampled logit of the last judgement.
        cost: predicted cost relative to exact attention, at the length of the last call.
        calls, low_rank_calls: number of all calls, and of the calls that ran low-rank.
        fallbacks: number of calls computed exactly because a check failed.
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
    """The decision for one call, which the recomputation of activation checkpointing follows."""

    low_rank: bool
    center: Tensor | None


@dataclass
class LayerState:
    """The gate's state for one layer. :class:`GateReport` describes the attributes not listed here.

    Attributes:
        on: whether the layer may run low-rank.
        good: number of consecutive favourable judgements.
        center: running mean of the keys, [H, d].
        plan: decision for the last call.
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
        """The state as the user sees it."""
        return GateReport(
            self.name, self.plan.low_rank, self.reason, self.error, self.largest_error, self.logit, self.cost,
            self.calls, self.low_rank_calls, self.fallbacks, dict(self.gradient_errors),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Everything but the name: numbers, strings, and a copy of the center."""
        state = {key: getattr(self, key) for key in _SAVED}
        state["center"] = None if self.center is None else self.center.clone()
        return state | {"gradient_errors": dict(self.gradient_errors), "low_rank": self.plan.low_rank}

    def restore(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Load a result of :meth:`to_dict`, copying the center to ``device``."""
        for key in _SAVED:
            setattr(self, key, saved[key])
        center = saved["center"]
        self.center = None if center is None else center.to(device, copy=True)
        self.gradient_errors = dict(saved["gradient_errors"])
        # only for the report: recomputation never follows a call of another process
        self.plan = Plan(saved["low_rank"], self.center)


_SAVED = tuple(item.name for item in fields(LayerState) if item.name not in ("name", "plan"))


def check_state(state: Any, layers: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Check that a gate with these layers and settings can load a saved state.

    Raises:
        ValueError: for anything but a gate's state, or a state of other layers or settings.
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
            f"LowRankGate: the state was saved with other settings: {'; '.join(differ)}; use those settings, or start "
            "without the state to judge every layer again"
        )
    keys = {"low_rank", *_SAVED}
    broken = [name for name, saved in state["layers"].items() if keys - saved.keys()]
    if broken:
        raise ValueError(f"LowRankGate: the state of {_few(broken)} lacks some of {', '.join(sorted(keys))}")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "no layer") + more
