"""State and report of one layer under :class:`leanstep.lora.LowRankGate`, and their saved form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from leanstep._files import one_line


@dataclass
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
    low_rank: bool = False
    reason: str = "not called yet"
    error: float | None = None
    largest_error: float = 0.0
    logit: float | None = None
    cost: float | None = None
    calls: int = 0
    low_rank_calls: int = 0
    fallbacks: int = 0
    gradient_errors: dict[str, float] = field(default_factory=dict)


@dataclass
class LayerState(GateReport):
    """The gate's state for one layer: its report, and the values that later calls depend on.

    The gate replaces values and never changes them, so reports and saved states need no copies.

    Attributes:
        on: whether the layer may run low-rank.
        good: number of consecutive favourable judgements.
        center: running mean of the keys, [H, d].
        last_center: center of the last call, if that ran low-rank.
    """

    on: bool = False
    good: int = 0
    center: Tensor | None = None
    last_center: Tensor | None = None

    def report(self) -> GateReport:
        """Copy the fields of :class:`GateReport`."""
        return GateReport(**{item.name: getattr(self, item.name) for item in fields(GateReport)})

    def to_dict(self) -> dict[str, Any]:
        """All fields except ``layer`` and ``last_center``, for :meth:`restore`."""
        return {key: getattr(self, key) for key in _SAVED}

    def restore(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Load a result of :meth:`to_dict`, with the center on ``device``."""
        for key in _SAVED:
            setattr(self, key, saved[key])
        self.center = None if self.center is None else self.center.to(device)


_SAVED = tuple(item.name for item in fields(LayerState) if item.name not in ("layer", "last_center"))


def check_state(state: Any, layers: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Check that a gate with these layers and settings can load a saved state.

    Raises:
        ValueError: for anything but a gate's state, a state of other layers or settings, or values of other types.
    """
    required = {"settings", "generator", "speeds", "layers"}
    parts = [state.get(key) for key in ("settings", "speeds", "layers")] if isinstance(state, Mapping) else [None]
    if not all(isinstance(part, Mapping) for part in parts) or required - state.keys():
        raise ValueError(f"LowRankGate: expected a state with {', '.join(sorted(required))}, as state_dict() gives it")
    names = list(layers)
    missing = [name for name in names if name not in state["layers"]]
    foreign = [name for name in state["layers"] if name not in names]
    if missing or foreign:
        raise ValueError(
            f"LowRankGate: the state is of other attention layers: it lacks {_listed(missing)}, and the model lacks "
            f"{_listed(foreign)}"
        )
    differ = [
        f"{key} was {one_line(state['settings'].get(key))}, is {value}"
        for key, value in settings.items()
        if not _is_number(state["settings"].get(key)) or state["settings"][key] != value
    ]
    if differ:
        raise ValueError(
            f"LowRankGate: the state was saved with other settings: {'; '.join(differ)}; use those settings, or start "
            "without the state to judge every layer again"
        )
    broken = [n for n, saved in state["layers"].items() if not isinstance(saved, Mapping) or set(_SAVED) - saved.keys()]
    if broken:
        raise ValueError(f"LowRankGate: the state of {_listed(broken)} lacks some of {', '.join(sorted(_SAVED))}")
    for name, saved in state["layers"].items():
        wrong = [key for key in _SAVED if not _fits(key, saved[key])]
        if wrong:
            raise ValueError(f"LowRankGate: the state of {name} has a {wrong[0]} of another type or range")
    if not all(isinstance(key, str) and _is_number(speed) and speed > 0 for key, speed in state["speeds"].items()):
        raise ValueError("LowRankGate: expected speeds above 0 by name")
    try:
        torch.Generator().set_state(state["generator"].cpu())
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"LowRankGate: the state of the generator cannot be restored: {error}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _fits(key: str, value: Any) -> bool:
    """Whether a saved value has the type and range of its field in :class:`LayerState`."""
    if key in ("low_rank", "on"):
        return isinstance(value, bool)
    if key == "reason":
        return isinstance(value, str)
    if key in ("calls", "low_rank_calls", "fallbacks", "good"):
        return type(value) is int and 0 <= value < 2**63
    if key == "gradient_errors":
        return isinstance(value, dict) and all(isinstance(k, str) and _is_number(v) for k, v in value.items())
    if key == "center":
        return value is None or (
            isinstance(value, Tensor)
            and value.dim() == 2
            and value.is_floating_point()
            and bool(value.isfinite().all())
        )
    return _is_number(value) or (value is None and key != "largest_error")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (one_line(", ".join(map(str, names[:3]))) or "no layer") + more
