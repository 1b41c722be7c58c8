"""Checks of LANTON's saved states, and the form that its estimates have in a file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.common.checks import check_choice, check_flags, check_number, check_saved_count, describe
from leanstep.optimizers.common.loading import Loaded


def check_entries(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError if an entry of a saved group that is no setting is out of range."""
    check_saved_count("LANTON", "noise_clock", group)
    check_choice("LANTON", "half_content", group["half_content"], ("none", "gradient", "difference"))
    check_number("LANTON", "half_fraction", group["half_fraction"], 0.0, 1.0, open_high=True)
    if group["half_fraction"] == 0:
        raise ValueError("Invalid half_fraction: 0; LANTON expects a fraction in (0, 1)")
    check_flags("LANTON", group, ("half_marked",))


def check_half_gradients(entries: list[Loaded]) -> None:
    """Raise ValueError for a saved half of a gradient whose group does not say what it holds."""
    for group, position, state in ((e.group, e.position, e.state) for e in entries):
        if "half_grad" in state and group["noise"] == "halves" and group["half_content"] == "none":
            raise ValueError(
                f"LANTON: the saved state of {describe(group, position)} has a half_grad, but its group has "
                "half_content='none'; nothing was changed. Load a state that this optimizer saved."
            )


def reshaped_estimates(states: dict[Any, Any], old: tuple[int, ...], new: tuple[int, ...]) -> dict[Any, Any]:
    """Return the states with noise estimates of shape ``old`` reshaped to ``new``."""

    def reshaped(key: Any, value: Any) -> Any:
        estimate = key in ("noise", "noise_steps") and isinstance(value, Tensor) and value.layout is torch.strided
        return value.reshape(new) if estimate and not value.is_nested and value.shape == old else value

    return {
        param: {key: reshaped(key, value) for key, value in state.items()} if isinstance(state, dict) else state
        for param, state in states.items()
    }
