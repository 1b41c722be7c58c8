"""Selects the modules to adapt, their ranks and scales, by PEFT's rules."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from leanstep._torch import expert_weights, input_embedding, output_head
from leanstep.lora.config import HEADS, TASK_HEADS, LoraConfig
from leanstep.lora.layers.frozen import is_linear, why_no_tensor, widths
from leanstep.lora.peft.experts import names_read_as_experts


def select(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Select the modules to adapt; returns them by name, in the model's order.

    Raises:
        ValueError: without ``target_modules``, for an entry that selects nothing (the message suggests similar names),
            or for a pattern of ranks or alphas that fits no selected module.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if not config.target_modules and config.target_parameters:
        return {}
    if config.target_modules is None:
        targets = [n for n, m in modules.items() if type(m) is nn.Embedding or is_linear(m)]
        ends = sorted({name.rsplit(".", 1)[-1] for name in targets})
        raise ValueError(
            f"apply_lora: target_modules is not set; this model has {', '.join(ends)}; or take 'all-linear'"
        )
    _warn_of_exclusions(modules, config)
    if config.target_modules == "all-linear":
        selected = _all_linear(model, modules, config)
    else:
        selected = {name: module for name, module in modules.items() if matches(config, name)}
        for rule in _rules(config.target_modules):
            if not any(_fits(rule, name) for name in selected):
                raise ValueError(_why_nothing(rule, modules))
    for patterns in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, patterns):
            if not any(fits_end(key, name) for name in [*selected, *select_parameters(model, config)]):
                raise ValueError(f"apply_lora: {patterns} {key!r} fits none of the {len(selected)} adapted layers")
    return selected


def select_parameters(model: nn.Module, config: LoraConfig) -> dict[str, tuple[str, str]]:
    """The parameters that ``target_parameters`` selects: name -> the name of its module and its attribute.

    Raises:
        ValueError: for an entry that fits no parameter (the message suggests similar names).
    """
    targets = config.target_parameters or []
    names = {name: (path, leaf) for name, _ in model.named_parameters() for path, _, leaf in [name.rpartition(".")]}
    selected = {name: place for name, place in names.items() if targets and _fits(targets, name)}
    for target in targets:
        if not any(_fits([target], name) for name in selected):
            ends = {".".join(name.split(".")[-length:]) for name in names for length in (1, 2, 3)}
            similar = difflib.get_close_matches(target, sorted(ends), n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""
            raise ValueError(f"apply_lora: target_parameters {target!r} fits no parameter of the model{hint}")
    return selected


def matches(config: LoraConfig, name: str) -> bool:
    """Whether ``target_modules``, ``exclude_modules`` and ``layers_to_transform`` select the module called ``name``."""
    if _fits(config.exclude_modules, name) or _is_saved(config, name) or not _fits(config.target_modules, name):
        return False
    if config.layers_to_transform is None or isinstance(config.target_modules, str):
        return True
    layers = config.layers_to_transform
    index = _layer_index(config, name)
    return index is not None and (index == layers if isinstance(layers, int) else index in layers)


def rank_of(config: LoraConfig, name: str) -> int:
    """r of one layer."""
    return int(by_pattern(config.rank_pattern, name, config.r))


def scale_of(config: LoraConfig, name: str) -> float:
    """``alpha / r`` of one layer, or ``alpha / sqrt(r)`` for rank-stabilised LoRA."""
    rank, alpha = rank_of(config, name), by_pattern(config.alpha_pattern, name, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def with_heads(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Add the model's head to ``modules_to_save`` if the task has one."""
    names = [name for name, _ in model.named_modules()]
    saved = config.modules_to_save or []
    of_task = TASK_HEADS.get(config.task_type or "", ())
    heads = [head for head in of_task if head not in saved and any(name.endswith(head) for name in names)]
    return config if not heads else dataclasses.replace(config, modules_to_save=[*saved, *heads])


def without_foreign_names(model: nn.Module, config: LoraConfig, where: str) -> LoraConfig:
    """Remove the names in a file's configuration that select nothing in this model.

    PEFT writes names of layers that it then leaves out, and heads that the model lacks. If the configuration selects
    any layer, warns about names and patterns that fit no module at all.
    """
    names = [name for name, _ in model.named_modules() if name]
    if config.modules_to_save and config.task_type in TASK_HEADS:
        saved = [n for n in config.modules_to_save if n not in HEADS or any(name.endswith(n) for name in names)]
        config = dataclasses.replace(config, modules_to_save=saved)
    selected = [name for name in names if matches(config, name)]
    if not selected:
        return config
    parameters = [name for name, _ in model.named_parameters() if _fits(config.target_parameters, name)]
    changes: dict[str, Any] = {}
    foreign: list[str] = []
    if isinstance(config.target_modules, list):
        changes["target_modules"] = [t for t in config.target_modules if any(_fits([t], name) for name in selected)]
        foreign += [f"target_modules {t!r}" for t in config.target_modules if not any(_fits([t], n) for n in names)]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field)
        changes[field] = {
            key: value for key, value in patterns.items() if any(fits_end(key, n) for n in [*selected, *parameters])
        }
        foreign += [f"{field} {key!r}" for key in patterns if not any(fits_end(key, n) for n in [*names, *parameters])]
    if foreign:
        warnings.warn(f"load_adapter: {where}: {', '.join(foreign)} fits nothing in this model", stacklevel=3)
    return dataclasses.replace(config, **changes)


def why_not_adaptable(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """The reason why a layer's adapter would never run or has no tensor to add to, or None."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.MultiheadAttention) and type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "it is never called: nn.MultiheadAttention reads its weight"
    return None if isinstance(module, nn.Embedding) else why_no_tensor(module, widths(module)[0])


def _why_read_directly(model: nn.Module, name: str) -> str | None:
    """The reason why the mixer of a state-space model would skip a layer's adapter, or None."""
    path, _, leaf = name.rpartition(".")
    owner = type(model.get_submodule(path))
    if not hasattr(model.get_submodule(path), "A_log"):
        return None
    if f"self.{leaf}.weight" not in _source(owner):  # type: ignore[arg-type]  # mypy takes Module's hash for the class's
        return None
    return f"{owner.__name__} multiplies by its weight itself, at least in its kernels, which would skip the adapter"


@functools.cache
def _source(cls: type[object]) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # a class without a file
        return ""


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, nn.Module]:
    head = output_head(model)
    selected: dict[str, nn.Module] = {}
    narrow: list[str] = []
    for name, module in modules.items():
        if not is_linear(module) or module is head or _fits(config.exclude_modules, name) or _is_saved(config, name):
            continue
        reason = why_not_adaptable(model, name, module) or _why_read_directly(model, name)
        if reason is not None:
            warnings.warn(f"apply_lora: 'all-linear' leaves out {name}: {reason}", stacklevel=5)
        elif rank_of(config, name) > min(widths(module)):
            narrow.append(name)
        else:
            selected[name] = module
    if narrow:
        names = ", ".join(narrow[:4]) + (f" and {len(narrow) - 4} more" if len(narrow) > 4 else "")
        warnings.warn(f"apply_lora: 'all-linear' leaves out {names}: narrower than the rank", stacklevel=5)
    _warn_of_experts(model, config)
    _warn_of_frozen_head(model, config)
    if not selected:
        raise ValueError(
            "apply_lora: target_modules 'all-linear' selects nothing; the model has no suitable linear layer"
        )
    return selected


def _warn_of_experts(model: nn.Module, config: LoraConfig) -> None:
    """Warn about tensors of all experts, which "all-linear" leaves out and ``target_parameters`` does not name."""
    tensors = {
        f"{name}.{leaf}": getattr(module, leaf)
        for name, module in model.named_modules()
        if not is_linear(module)
        for leaf in expert_weights(name, module)
        if not _fits(config.target_parameters, f"{name}.{leaf}")
    }
    if not tensors:
        return
    more = f" and {len(tensors) - 2} more" if len(tensors) > 2 else ""
    share = sum(t.numel() for t in tensors.values()) / sum(p.numel() for p in model.parameters())
    renamed = sorted(names_read_as_experts(model))
    peft = f"; PEFT adapts them and the routers, and no other layer called {', '.join(renamed)}" if renamed else ""
    warnings.warn(
        f"apply_lora: 'all-linear' leaves out {', '.join(list(tensors)[:2])}{more} ({share:.0%} of the weights): "
        f"name fused experts in target_parameters, as {sorted({_last_two(name) for name in tensors})}{peft}",
        stacklevel=6,
    )


def _last_two(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _warn_of_frozen_head(model: nn.Module, config: LoraConfig) -> None:
    """Warn about a head of a task that gets an adapter, and keeps the weights of its initialisation below it."""
    heads = [head for head in HEADS if isinstance(getattr(model, head, None), nn.Module)]
    frozen = [head for head in heads if not _is_saved(config, head) and not _fits(config.exclude_modules, head)]
    if type(model).__name__.endswith(("Classification", "QuestionAnswering")) and frozen:
        task = next(task for task, heads in TASK_HEADS.items() if frozen[0] in heads)
        warnings.warn(
            f"apply_lora: {frozen[0]} keeps its weights under an adapter; if it is new, train it whole by "
            f"task_type={task!r} or modules_to_save=[{frozen[0]!r}]",
            stacklevel=6,
        )


def _warn_of_exclusions(modules: Iterable[str], config: LoraConfig) -> None:
    unused = [rule for rule in _rules(config.exclude_modules or []) if not any(_fits(rule, name) for name in modules)]
    if unused:
        names = ", ".join(repr(rule if isinstance(rule, str) else rule[0]) for rule in unused)
        warnings.warn(f"apply_lora: exclude_modules {names} fits no module of the model", stacklevel=5)


def _rules(rules: list[str] | str) -> list[list[str] | str]:
    """Split a list of names into one rule per name; a regular expression stays one rule."""
    return [rules] if isinstance(rules, str) else [[rule] for rule in rules]


def _fits(rule: list[str] | str | None, name: str) -> bool:
    """Whether a list of names or a regular expression fits a module's name."""
    if not rule:
        return False
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return name in rule or any(name.endswith(f".{end}") for end in rule)


def fits_end(pattern: str, name: str) -> bool:
    """Whether a regular expression fits a module's whole name or its end after a dot."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that fits the end of ``name``."""
    return next((value for key, value in patterns.items() if fits_end(key, name)), default)


class Rows(NamedTuple):
    """A module with trained rows, its tokens, and the name of the module whose rows it shares; "" for its own."""

    module: nn.Module
    tokens: list[int]
    shares: str


def select_tokens(model: nn.Module, config: LoraConfig) -> dict[str, Rows]:
    """The modules of ``trainable_token_indices`` by name, each before those that have its weight.

    Raises:
        ValueError: for a name that fits no module, a model without an input embedding, or two lists for one weight.
    """
    indices = config.trainable_token_indices
    if not indices:
        return {}
    modules = dict(model.named_modules())
    if isinstance(indices, Mapping):
        owners = {n: tokens for end, tokens in indices.items() for n in modules if n == end or n.endswith(f".{end}")}
        if absent := [end for end in indices if not any(n == end or n.endswith(f".{end}") for n in modules)]:
            raise ValueError(f"apply_lora: trainable_token_indices names {absent[0]!r}, which fits no module")
    else:
        embedding = input_embedding(model)
        if embedding is None:
            raise ValueError(
                "apply_lora: trainable_token_indices is a list, and the model has no input embedding; give a "
                "dictionary of module names and lists"
            )
        owners = {next(n for n, module in modules.items() if module is embedding): indices}
    chosen: dict[str, Rows] = {}
    for name, tokens in owners.items():
        weight = getattr(modules[name], "weight", None)
        first = next((n for n in chosen if getattr(modules[n], "weight", None) is weight), "")
        if not first:
            chosen[name] = Rows(modules[name], list(tokens), "")
        elif chosen[first].tokens != tokens:
            raise ValueError(
                f"apply_lora: {first} and {name} have one weight, and trainable_token_indices gives them different "
                "tokens; give both the same"
            )
    tied = {
        n: Rows(module, rows.tokens, first)
        for first, rows in chosen.items()
        for n, module in modules.items()
        if n not in chosen and isinstance(module, (nn.Embedding, nn.Linear)) and module.weight is rows.module.weight
    }
    return chosen | tied


def _is_saved(config: LoraConfig, name: str) -> bool:
    """Whether a module is one of ``modules_to_save`` or inside one."""
    return any(f"{saved}." in f"{name}." for saved in config.modules_to_save or ())


def _layer_index(config: LoraConfig, name: str) -> int | None:
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name)
        if match:
            return int(match.group("index"))
    return None


def _why_nothing(rule: list[str] | str, modules: Mapping[str, nn.Module]) -> str:
    """The error message for an entry of ``target_modules`` that selects nothing, with the reason or similar names."""
    entry = rule if isinstance(rule, str) else rule[0]
    excluded = [name for name in modules if _fits(rule, name)]
    if excluded:
        return (
            f"apply_lora: target_modules {entry!r} fits {len(excluded)} modules, such as {excluded[0]!r}, all of which "
            "exclude_modules, modules_to_save or layers_to_transform leave out"
        )
    if re.sub(r"[^a-z]", "", entry.lower()) == "alllinear":
        return (
            f"apply_lora: target_modules {entry!r} fits no module of the model; did you mean 'all-linear', as a text?"
        )
    if isinstance(rule, str) and any(_fits([rule], name) for name in modules):
        return (
            f"apply_lora: target_modules {entry!r} is a text, a regular expression for the whole name, and fits no "
            f"module; for the layers whose names end so, write [{entry!r}]"
        )
    ends = {name.rsplit(".", 1)[-1] for name in modules} | set(modules)
    similar = difflib.get_close_matches(entry, sorted(ends), n=4, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""
    return f"apply_lora: target_modules {entry!r} fits no module of the model{hint}"
