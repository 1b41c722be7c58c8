"""Checks of M-FAC's settings and of a state that is to be loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.common.checks import check_choice, check_flags, check_number, describe
from leanstep.optimizers.mfac.damping import check_schedule
from leanstep.optimizers.mfac.scopes import STRUCTURAL
from leanstep.optimizers.mfac.window import STORAGES

SCALINGS = ("window", "count")
SCOPES = ("model", "group", "layer")
COMPRESSIONS = (None, "topk", "lowrank")
MOMENTUM_ON = ("update", "gradient")
DECAYS = ("decoupled", "coupled")
PRECONDITIONED = ("row", "gradient")


def check_settings(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError for settings of a group that are out of range or exclude each other."""
    for name in ("window", "precondition_every", "window_every", "rank"):
        _check_count(name, group[name], least=1)
    _check_count("warmup_steps", group["warmup_steps"], least=0)
    check_number("MFAC", "damping", group["damping"], 0.0)
    if isinstance(group["damping"], Tensor):
        raise TypeError(f"MFAC: damping must be a number, got {group['damping']!r}")
    if group["damping"] == 0:
        raise ValueError("Invalid damping: 0; MFAC needs it greater than 0 (the Fisher matrix alone has no inverse)")
    check_schedule(group["damping_schedule"])
    check_choice("MFAC", "scaling", group["scaling"], SCALINGS)
    _check_scope(group["scope"])
    check_choice("MFAC", "storage", group["storage"], (None, *STORAGES))
    check_choice("MFAC", "compression", group["compression"], COMPRESSIONS)
    check_number("MFAC", "density", group["density"], 0.0, 1.0)
    if group["density"] == 0:
        raise ValueError("Invalid density: 0; MFAC expects the fraction of entries kept in (0, 1]")
    check_number("MFAC", "momentum value", group["momentum"], 0.0, 1.0, open_high=True)
    check_choice("MFAC", "momentum_on", group["momentum_on"], MOMENTUM_ON)
    check_choice("MFAC", "decay", group["decay"], DECAYS)
    check_choice("MFAC", "precondition", group["precondition"], PRECONDITIONED)
    if group["max_update_norm"] is not None:
        check_number("MFAC", "max_update_norm", group["max_update_norm"], 0.0)
        if group["max_update_norm"] == 0:
            raise ValueError("Invalid max_update_norm: 0; MFAC expects a length greater than 0, or None")
    check_flags("MFAC", group, ("sparse", "shard_window"))
    _check_joint(group)


def _check_count(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"MFAC: {name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"Invalid {name}: {value}; MFAC expects at least {least}")


def _check_scope(scope: Any) -> None:
    if isinstance(scope, int) and not isinstance(scope, bool) and scope >= 1:
        return
    if scope not in SCOPES:
        raise ValueError(f"Invalid scope: {scope!r}; MFAC expects one of {SCOPES}, or an int: elements of a block")


def _check_joint(group: dict[str, Any]) -> None:
    """Settings that exclude each other."""
    if group["warmup_steps"] > group["window"]:
        raise ValueError(
            f"Invalid warmup_steps: {group['warmup_steps']}; the window never holds more than {group['window']} rows"
        )
    if group["compression"] and group["storage"] == "fp16":
        raise ValueError("MFAC: storage='fp16' is for whole rows; with a compression use 'bf16' or 'fp32'")
    if group["compression"] and isinstance(group["scope"], int):
        raise ValueError(
            f"MFAC: scope={group['scope']} (blocks) is for whole rows; with compression={group['compression']!r} use "
            f"one of {SCOPES}"
        )
    if group["momentum_on"] == "gradient" and group["momentum"]:
        for name in ("window_every", "precondition_every"):
            if group[name] != 1:
                raise ValueError(
                    f"MFAC: momentum_on='gradient' averages the rows of the window and needs {name}=1, "
                    f"got {group[name]}; use momentum_on='update'"
                )
        if group["precondition"] == "gradient":
            raise ValueError("MFAC: momentum_on='gradient' preconditions rows of the window; use precondition='row'")
    if group["shard_window"] and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "MFAC: shard_window=True spreads the window over the processes of torch.distributed, which is not "
            "initialized; call init_process_group first, or leave it False"
        )
    if group["shard_window"] and group["compression"] == "lowrank":
        raise ValueError("MFAC: compression='lowrank' takes whole matrices and excludes shard_window=True")


def check_masks(group: dict[str, Any]) -> None:
    """Raise unless ``masks`` is None or has a boolean tensor (or None) of every parameter's shape."""
    masks = group["masks"]
    if masks is None:
        return
    if not isinstance(masks, (list, tuple)) or len(masks) != len(group["params"]):
        raise ValueError(f"MFAC: masks must be a list with one entry per parameter, got {masks!r:.80}")
    for position, (mask, param) in enumerate(zip(masks, group["params"], strict=True)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != param.shape):
            raise ValueError(
                f"MFAC: the mask of {describe(group, position)} must be a bool tensor of its shape, True where a "
                f"weight is kept; got {tuple(mask.shape)} of {mask.dtype}"
            )


def check_loaded(own: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Raise ValueError where a saved window does not fit: another m or form, other parameters, or another order."""
    groups = state_dict["param_groups"]
    if len(groups) != len(own):
        return  # torch says so
    advice = "nothing was changed. Build MFAC as it was when the state was saved, or start without it."
    for group, saved in zip(own, groups, strict=True):
        for key in STRUCTURAL:
            if key in saved and saved[key] != group[key]:
                raise ValueError(
                    f"MFAC: the state was saved with {key}={saved[key]!r}, here it is {group[key]!r}; {advice}"
                )
        names, saved_names = group.get("param_names"), saved.get("param_names")
        if names and saved_names and names != saved_names:
            pairs = zip(saved_names, names, strict=False)
            place = next(
                (f"{a!r} where {b!r} is here" for a, b in pairs if a != b), f"{len(saved_names)} of {len(names)}"
            )
            raise ValueError(f"MFAC: the saved window has its parameters in another order ({place}); {advice}")
        for position, number in enumerate(saved["params"]):
            if position < len(group["params"]):
                _check_window(group, position, state_dict["state"].get(number, {}), advice)


def _check_window(group: dict[str, Any], position: int, state: dict[str, Any], advice: str) -> None:
    """One parameter's window against its shape."""
    window = state.get("window", state.get("error"))
    if window is None:
        return
    shape = tuple(window.shape[1:] if "window" in state else window.shape)
    if shape != tuple(group["params"][position].shape):
        raise ValueError(
            f"MFAC: the saved window of {describe(group, position)} is of a parameter of shape {shape}: the parameters "
            f"come in another order, or are others; {advice}"
        )
