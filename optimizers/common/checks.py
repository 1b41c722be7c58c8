"""Checks of settings, with the messages of torch's optimizers, and how messages name a parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.reference.rounding import ROUNDINGS


def describe(group: dict[str, Any], position: int) -> str:
    """Name of a parameter for messages: its own name, if the group knows it, and its shape."""
    names = group.get("param_names")
    name = names[position] if names else f"parameter {position} of group {group.get('name', '(unnamed)')!r}"
    return f"{name} {tuple(group['params'][position].shape)}"


def holds_factors(group: dict[str, Any]) -> bool:
    """Whether a group is one of low-rank factors, as :func:`leanstep.lora.lora_groups` names them: all are matrices."""
    return group.get("name") in ("lora_A", "lora_B")


def check_number(
    owner: str, name: str, value: Any, low: float, high: float = math.inf, *, open_high: bool = False
) -> None:
    """Raise unless low <= value <= high (< high, if open). Tensors of one element are numbers."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            label = "Tensor lr" if name == "learning rate" else f"{name} as a tensor"
            raise ValueError(f"{label} must be 1-element; {owner} got shape {tuple(value.shape)}")
        if value.device.type not in ("cpu", "meta"):
            return  # reading it would wait for the device
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    open_high = open_high or high == math.inf
    if not (low <= value <= high) or (open_high and value == high) or math.isnan(value):
        end = ")" if open_high else "]"
        raise ValueError(f"Invalid {name}: {value}; {owner} expects it in [{low}, {high}{end}")


def check_flags(owner: str, group: dict[str, Any], flags: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raise unless the named settings are True or False (or None, for the optional ones)."""
    for name in (*flags, *optional):
        if not isinstance(group[name], bool) and not (name in optional and group[name] is None):
            expected = "True, False or None" if name in optional else "True or False"
            raise TypeError(f"{owner}: {name} must be {expected}, got {group[name]!r}")


def check_choice(owner: str, name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise unless the value is one of the choices."""
    if value not in tuple(choices):
        raise ValueError(f"Invalid {name}: {value!r}; {owner} expects one of {tuple(choices)}")


def check_dtype(owner: str, name: str, dtype: Any) -> None:
    """Raise unless the value is a floating dtype, the name of one, or None."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise TypeError(f"{owner}: {name} must be a floating torch.dtype or None, got {dtype!r}")


def check_betas(owner: str, betas: Any) -> None:
    """Raise unless betas are two numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r}; {owner} expects two numbers in [0, 1)")
    for i, beta in enumerate(betas):
        check_number(owner, f"beta parameter at index {i}", beta, 0.0, 1.0, open_high=True)


def check_rounding(owner: str, group: dict[str, Any]) -> None:
    """Raise unless ``rounding`` and ``seed`` of a group are valid."""
    check_choice(owner, "rounding", group["rounding"], ROUNDINGS)
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"Invalid seed: {seed!r}; {owner} expects an int in [0, 2**32)")
