"""Which modules a configuration selects, with which rank and scale: PEFT's rules."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from leanstep.lora.config import LoraConfig


def matches(config: LoraConfig, name: str) -> bool:
    """Whether ``target_modules``, ``exclude_modules`` and ``layers_to_transform`` select the module called ``name``."""
    if _listed(config.exclude_modules, name):
        return False
    if _is_saved(config, name):
        return False
    if not _listed(config.target_modules, name):
        return False
    if config.layers_to_transform is None or isinstance(config.target_modules, str):
        return True
    wanted = config.layers_to_transform
    number = _layer_number(config, name)
    return number is not None and (number == wanted if isinstance(wanted, int) else number in wanted)


def _is_saved(config: LoraConfig, name: str) -> bool:
    """Whether a module is one of ``modules_to_save`` or in one."""
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save or ())


def why_never_called(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why an adapter on a module would never run; None where it would."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.MultiheadAttention) and type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "it is never called: nn.MultiheadAttention reads its weight"
    return None


def _listed(rule: list[str] | str | None, name: str) -> bool:
    if not rule:
        return False
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return name in rule or any(name.endswith(f".{end}") for end in rule)


def _layer_number(config: LoraConfig, name: str) -> int | None:
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if found:
            return int(found.group(1))
    return None


def by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that fits the end of ``name``."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def rank_of(config: LoraConfig, name: str) -> int:
    """r of one layer."""
    return int(by_pattern(config.rank_pattern, name, config.r))


def scale_of(config: LoraConfig, name: str) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA, of one layer."""
    rank, alpha = rank_of(config, name), by_pattern(config.alpha_pattern, name, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def select(model: nn.Module, config: LoraConfig, kinds: Iterable[str]) -> dict[str, nn.Module]:
    """The modules to adapt by name, in the model's order.

    Raises:
        ValueError: for no ``target_modules``, an entry that selects nothing (the nearest names are given), a pattern of
            ranks or alphas that selects nothing, or a module of a class that cannot be adapted.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if config.target_modules is None:
        ends = sorted({name.rsplit(".", 1)[-1] for name, module in modules.items() if type(module).__name__ in kinds})
        raise ValueError(
            f"apply_lora: target_modules is not set; this model has {', '.join(ends)}; or take 'all-linear'"
        )
    if config.target_modules == "all-linear":
        return _all_linear(model, modules, config)
    chosen = {name: module for name, module in modules.items() if matches(config, name)}
    entries = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    for entry in entries:
        hits = [n for n in chosen if _listed(entry if isinstance(config.target_modules, str) else [entry], n)]
        if not hits:
            raise ValueError(_nothing(entry, modules, config))
    for patterns in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, patterns):
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in chosen):
                raise ValueError(f"apply_lora: {patterns} {key!r} fits none of the {len(chosen)} adapted layers")
    return chosen


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, nn.Module]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {
        name: module
        for name, module in modules.items()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and module is not head
        and not _listed(config.exclude_modules, name)
        and not _is_saved(config, name)
    }
    never = {name: reason for name in linear if (reason := why_never_called(model, name, linear[name]))}
    for name, reason in never.items():
        warnings.warn(f"apply_lora: 'all-linear' leaves out {name}: {reason}", stacklevel=5)
        del linear[name]
    if not linear:
        raise ValueError("apply_lora: target_modules 'all-linear' selects nothing; the model has no linear layer")
    return linear


def _nothing(entry: str, modules: Mapping[str, nn.Module], config: LoraConfig) -> str:
    """Why an entry of ``target_modules`` selects nothing, with names like it."""
    excluded = [name for name in modules if _listed(entry if isinstance(config.target_modules, str) else [entry], name)]
    if excluded:
        return (
            f"apply_lora: target_modules {entry!r} fits {len(excluded)} modules, such as {excluded[0]!r}, all of which "
            "exclude_modules, modules_to_save or layers_to_transform leave out"
        )
    ends = {name.rsplit(".", 1)[-1] for name in modules} | set(modules)
    near = difflib.get_close_matches(entry, sorted(ends), n=4, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"apply_lora: target_modules {entry!r} fits no module of the model{hint}"
