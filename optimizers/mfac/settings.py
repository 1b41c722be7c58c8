"""Checks of M-FAC's settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.common.checks import (
    check_choice,
    check_count,
    check_flags,
    check_number,
    describe,
    removed_from,
)
from leanstep.optimizers.mfac.window import STORAGES

SCALINGS = ("window", "count")
SCOPES = ("model", "group", "layer")
COMPRESSIONS = (None, "topk")
DECAYS = ("decoupled", "coupled")

# settings that must be equal in all groups of a scope
SHARED = (
    "scope", "window", "damping", "scaling", "shrinkage", "storage", "compression", "density", "nonfinite", "foreach",
)  # fmt: skip


def check_settings(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError if a setting is out of range or excludes another one."""
    window = group["window"]
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"MFAC: window must be an int, got {window!r}")
    check_count("MFAC", "window", window)
    for name in ("damping", "shrinkage", "density"):
        if isinstance(group[name], Tensor):
            raise TypeError(f"MFAC: {name} must be a number, got {group[name]!r}")
    _check_positive("damping", group["damping"], "a number greater than 0 (the Fisher matrix alone has no inverse)")
    check_number("MFAC", "shrinkage", group["shrinkage"], 0.0)
    check_choice("MFAC", "scaling", group["scaling"], SCALINGS)
    scope = group["scope"]
    if scope not in SCOPES and (isinstance(scope, bool) or not isinstance(scope, int) or scope < 1):
        raise ValueError(f"Invalid scope: {scope!r}; MFAC expects one of {SCOPES}, or an int: elements of a block")
    if instead := removed_from("MFAC", [f"storage={group['storage']!r:.80}"]):
        raise ValueError(f"MFAC: {instead}")
    check_choice("MFAC", "storage", group["storage"], (None, *STORAGES))
    check_choice("MFAC", "compression", group["compression"], COMPRESSIONS)
    check_number("MFAC", "density", group["density"], 0.0, 1.0)
    _check_positive("density", group["density"], "a fraction of entries in (0, 1]")
    check_number("MFAC", "momentum value", group["momentum"], 0.0, 1.0, open_high=True)
    check_choice("MFAC", "decay", group["decay"], DECAYS)
    check_flags("MFAC", group, ("sparse",))
    _check_joint(group)


def _check_positive(name: str, value: Any, expected: str) -> None:
    check_number("MFAC", name, value, 0.0)
    if value == 0:
        raise ValueError(f"Invalid {name}: 0; MFAC expects {expected}")


def _check_joint(group: dict[str, Any]) -> None:
    if group["compression"] and isinstance(group["scope"], int):
        raise ValueError(
            f"MFAC: scope={group['scope']} (blocks) is for uncompressed rows; with compression="
            f"{group['compression']!r} use one of {SCOPES}"
        )


def check_masks(group: dict[str, Any]) -> None:
    """Raise unless ``masks`` is None or has a boolean tensor (or None) of every parameter's shape."""
    masks = group["masks"]
    if masks is None:
        return
    if not isinstance(masks, (list, tuple)) or len(masks) != len(group["params"]):
        raise ValueError(f"MFAC: masks must be a list with one entry per parameter, got {masks!r:.80}")
    for position, (mask, param) in enumerate(zip(masks, group["params"], strict=True)):
        if mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == param.shape):
            continue
        got = f"{tuple(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"MFAC: the mask of {describe(group, position)} must be a bool tensor of its shape, False for excluded "
            f"weights; got {got}"
        )
