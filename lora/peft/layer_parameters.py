"""Layers that a file names by their weights: ``mlp.down_proj.weight`` in ``target_parameters``.

In mixtures of experts, PEFT replaces some ends of ``target_modules`` by the fused experts (``names_read_as_experts``).
It leaves ``target_parameters`` as they are, and adapts a matrix named there by the same product, under the same keys.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import nn

from leanstep.lora.apply import adapted_layers
from leanstep.lora.config import LoraConfig
from leanstep.lora.targets import by_pattern, fits_end, matches, select_parameters

_PATTERNS = (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))


def why_not_parameters(model: nn.Module, settings: dict[str, Any], layers: list[str]) -> str | None:
    """The reason why PEFT cannot adapt these layers by the names of their weights; None if it can."""
    for field in ("use_dora", "lora_bias", "fan_in_fan_out"):
        if settings.get(field):
            return f"{field} is set"
    if settings["init_lora_weights"] not in (True, False, "gaussian"):
        return f"init_lora_weights is {settings['init_lora_weights']!r}"
    weights = {name: model.get_parameter(f"{name}.weight") for name in layers}
    packed = [name for name, weight in weights.items() if weight.dim() != 2 or not weight.is_floating_point()]
    return f"{packed[0]} is quantised" if packed else None


def name_by_weights(model: nn.Module, settings: dict[str, Any], layers: list[str]) -> None:
    """Move layers from ``target_modules`` to ``target_parameters`` in the contents of ``adapter_config.json``.

    PEFT allows no dropout with ``target_parameters``, also where nothing is trained.
    """
    settings["lora_dropout"] = 0.0
    settings["target_modules"] = sorted(name for name, _ in adapted_layers(model) if name not in layers)
    weights = [f"{name}.weight" for name in layers]
    settings["target_parameters"] = sorted({*(settings.get("target_parameters") or ()), *weights})
    for field, common in _PATTERNS:
        patterns, default = settings[field], settings[common]
        values = {name: by_pattern(patterns, name, default) for name in layers}
        moved = {n: value for n, value in values.items() if value != by_pattern(patterns, f"{n}.weight", default)}
        settings[field] = {re.escape(f"{name}.weight"): value for name, value in moved.items()} | patterns


def name_by_layers(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Move linear layers back to ``target_modules``, with the ranks and alphas that PEFT gives their weights.

    Raises:
        ValueError: for an entry of ``target_parameters`` that fits no parameter.
    """
    if not config.target_parameters or config.target_modules == "all-linear":
        return config
    parameters = select_parameters(model, config)
    layers = [path for path, leaf in parameters.values() if leaf == "weight" and _is_matrix(model.get_submodule(path))]
    if not layers:
        return config
    rest = [name for name, (path, _) in parameters.items() if path not in layers]
    changes: dict[str, Any] = {"target_modules": [*_modules(model, config), *layers], "target_parameters": rest or None}
    if _are_filtered(config):
        changes |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    names = [*(name for name, _ in model.named_modules()), *rest]
    for field, common in _PATTERNS:
        patterns, default = getattr(config, field), getattr(config, common)
        values = {name: by_pattern(patterns, f"{name}.weight", default) for name in layers}
        of_weights = {key for key in patterns if any(fits_end(key, f"{name}.weight") for name in layers)}
        others = {k: v for k, v in patterns.items() if k not in of_weights or any(fits_end(k, name) for name in names)}
        moved = {name: value for name, value in values.items() if value != by_pattern(others, name, default)}
        changes[field] = {re.escape(name): value for name, value in moved.items()} | others
    return dataclasses.replace(config, **changes)


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module is a layer whose weight is (out, in), the layout that PEFT reads in a matrix."""
    return isinstance(module, nn.Linear)


def _are_filtered(config: LoraConfig) -> bool:
    """Whether a configuration selects fewer modules than ``target_modules`` names; parameters are not filtered so."""
    return (
        isinstance(config.target_modules, str) or bool(config.exclude_modules) or config.layers_to_transform is not None
    )


def _modules(model: nn.Module, config: LoraConfig) -> list[str]:
    if _are_filtered(config):
        return [name for name, _ in model.named_modules() if name and matches(config, name)]
    return list(config.target_modules or ())
