"""Which modules a configuration selects, with which rank and scale: PEFT's rules."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from leanstep.lora.config import HEAD_TASKS, HEADS, LoraConfig
from leanstep.lora.layers.frozen import why_no_tensor


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


def why_not_adaptable(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why an adapter on a linear layer or an embedding would never run, or has nothing to add to; None where it can."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.MultiheadAttention) and type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "it is never called: nn.MultiheadAttention reads its weight"
    return None if isinstance(module, nn.Embedding) else why_no_tensor(module, (_sides(module) or (1,))[0])


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
    return next((value for key, value in patterns.items() if _ends_as(key, name)), default)


def _ends_as(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


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
    _warn_of_exclusions(modules, config)
    if config.target_modules == "all-linear":
        return _all_linear(model, modules, config)
    chosen = {name: module for name, module in modules.items() if matches(config, name)}
    for rule in _entries(config.target_modules):
        if not any(_listed(rule, name) for name in chosen):
            raise ValueError(_nothing(rule, modules))
    for patterns in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, patterns):
            if not any(_ends_as(key, name) for name in chosen):
                raise ValueError(f"apply_lora: {patterns} {key!r} fits none of the {len(chosen)} adapted layers")
    return chosen


def _warn_of_exclusions(modules: Iterable[str], config: LoraConfig) -> None:
    rules = config.exclude_modules or []
    idle = [rule for rule in _entries(rules) if not any(_listed(rule, name) for name in modules)]
    if idle:
        names = ", ".join(repr(rule if isinstance(rule, str) else rule[0]) for rule in idle)
        warnings.warn(f"apply_lora: exclude_modules {names} fits no module of the model", stacklevel=5)


def _entries(rules: list[str] | str) -> list[list[str] | str]:
    """A rule of its own for every name of a list."""
    return [rules] if isinstance(rules, str) else [[rule] for rule in rules]


def with_heads(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The configuration with the model's classifier among ``modules_to_save`` where the task has one."""
    ends = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    saved = config.modules_to_save or []
    heads = [head for head in HEADS if head in ends and head not in saved]
    if config.task_type not in HEAD_TASKS or not heads:
        return config
    return dataclasses.replace(config, modules_to_save=[*saved, *heads])


def fitted(model: nn.Module, config: LoraConfig, where: str) -> LoraConfig:
    """A file's configuration without the names that say nothing about this model.

    PEFT writes down names of layers that it then leaves out, and heads that the model does not have. Layers and
    patterns that are not in the model at all are named in a warning, if any layer is.
    """
    names = [name for name, _ in model.named_modules() if name]
    if config.modules_to_save and config.task_type in HEAD_TASKS:
        saved = [n for n in config.modules_to_save if n not in HEADS or any(_listed([n], name) for name in names)]
        config = dataclasses.replace(config, modules_to_save=saved)
    chosen = [name for name in names if matches(config, name)]
    if not chosen:
        return config
    changes: dict[str, Any] = {}
    lost: list[str] = []
    if isinstance(config.target_modules, list):
        changes["target_modules"] = [t for t in config.target_modules if any(_listed([t], name) for name in chosen)]
        lost += [f"target_modules {t!r}" for t in config.target_modules if not any(_listed([t], n) for n in names)]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field)
        changes[field] = {key: value for key, value in patterns.items() if any(_ends_as(key, name) for name in chosen)}
        lost += [f"{field} {key!r}" for key in patterns if not any(_ends_as(key, name) for name in names)]
    if lost:
        warnings.warn(f"load_adapter: {where}: {', '.join(lost)} fits nothing in this model", stacklevel=3)
    return dataclasses.replace(config, **changes)


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
    useless = {name: reason for name in linear if (reason := why_not_adaptable(model, name, linear[name]))}
    for name, reason in useless.items():
        warnings.warn(f"apply_lora: 'all-linear' leaves out {name}: {reason}", stacklevel=5)
        del linear[name]
    narrow = [name for name, module in linear.items() if rank_of(config, name) > min(_sides(module), default=math.inf)]
    if narrow:
        names = ", ".join(narrow[:4]) + (f" and {len(narrow) - 4} more" if len(narrow) > 4 else "")
        warnings.warn(f"apply_lora: 'all-linear' leaves out {names}: narrower than the rank", stacklevel=5)
    linear = {name: module for name, module in linear.items() if name not in narrow}
    if not linear:
        raise ValueError(
            "apply_lora: target_modules 'all-linear' selects nothing; the model has no linear layer for it"
        )
    return linear


def _sides(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape) if isinstance(module.weight, Tensor) else ()


def _nothing(rule: list[str] | str, modules: Mapping[str, nn.Module]) -> str:
    """Why an entry of ``target_modules`` selects nothing, with names like it."""
    entry = rule if isinstance(rule, str) else rule[0]
    excluded = [name for name in modules if _listed(rule, name)]
    if excluded:
        return (
            f"apply_lora: target_modules {entry!r} fits {len(excluded)} modules, such as {excluded[0]!r}, all of which "
            "exclude_modules, modules_to_save or layers_to_transform leave out"
        )
    if re.sub(r"[^a-z]", "", entry.lower()) == "alllinear":
        return (
            f"apply_lora: target_modules {entry!r} fits no module of the model; did you mean 'all-linear', as a text?"
        )
    if isinstance(rule, str) and any(_listed([rule], name) for name in modules):
        return (
            f"apply_lora: target_modules {entry!r} is a text, a regular expression for the whole name, and fits no "
            f"module; for the layers whose names end so, write [{entry!r}]"
        )
    ends = {name.rsplit(".", 1)[-1] for name in modules} | set(modules)
    near = difflib.get_close_matches(entry, sorted(ends), n=4, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"apply_lora: target_modules {entry!r} fits no module of the model{hint}"
