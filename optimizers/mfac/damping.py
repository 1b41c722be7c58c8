"""How M-FAC's damping moves over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from leanstep.optimizers.common.checks import check_choice, check_number


def _sigmoid(t: float) -> float:
    """A logistic curve over [-6, 6], brought to 0 and 1 at its ends."""
    low, high, here = (1 / (1 + math.exp(-x)) for x in (-6.0, 6.0, 12.0 * t - 6.0))
    return (here - low) / (high - low)


# share of the way from the first damping to the last, at share t of the steps
CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "quadratic": lambda t: t * t,
    "circular": lambda t: 1.0 - math.sqrt(1.0 - t * t),
    "sigmoid": _sigmoid,
}
SCHEDULES = (*CURVES, "exponential", "lr")


def check_schedule(schedule: Any) -> None:
    """Raise unless a schedule is None, (curve, steps, last) or ("lr", reference rate)."""
    if schedule is None:
        return
    if not isinstance(schedule, (tuple, list)) or not schedule or len(schedule) != (2 if schedule[0] == "lr" else 3):
        raise ValueError(
            f"Invalid damping_schedule: {schedule!r}; MFAC expects None, (curve, steps, last damping) with a curve of "
            f"{SCHEDULES[:-1]}, or ('lr', reference learning rate)"
        )
    check_choice("MFAC", "damping_schedule", schedule[0], SCHEDULES)
    for name, value in zip(("number of steps or rate", "last damping"), schedule[1:], strict=False):
        check_number("MFAC", f"damping_schedule: {name}", value, 0.0)
        if value == 0:
            raise ValueError(f"Invalid damping_schedule: {schedule!r}; MFAC expects the {name} to be greater than 0")


def damping_at(settings: dict[str, Any], step: int, rate: float | Tensor) -> float:
    """The damping of a step, counted from 0: ``damping`` itself without a schedule."""
    first, schedule = settings["damping"], settings["damping_schedule"]
    if schedule is None:
        return first
    if schedule[0] == "lr":
        # a rate of 0, at the start of a warm-up, would leave no damping at all
        return first * max(float(rate) / schedule[1], 1e-6)
    name, steps, last = schedule
    share = min(step / steps, 1.0)
    if name == "exponential":
        return first * (last / first) ** share
    return first + (last - first) * CURVES[name](share)
