"""Tied parameters: what a merge, or training one of the modules whole, gives parameters of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from leanstep._torch import is_dtensor


class Holder(NamedTuple):
    """A module that holds a tied parameter, and whether merging its adapter changes that parameter.

    ``name`` is the parameter's full name, ``key`` its name in the module.
    """

    name: str
    module: nn.Module
    key: str
    changed: bool


@dataclass
class Ties:
    """The changes of :func:`untie`: each holder's original parameter, and each config's tied keys."""

    parameters: list[tuple[Holder, nn.Parameter]] = field(default_factory=list)
    configs: list[tuple[Any, dict[str, str]]] = field(default_factory=list)


def untie(model: nn.Module, groups: list[list[Holder]]) -> Ties:
    """Give every holder in ``groups`` its own parameter. The first one that a merge does not change keeps the old one.

    If this removes all ties of a transformers model, its config gets ``tie_word_embeddings=False``, so that a saved
    merged model loads with both weights.

    Raises:
        ValueError: for a sharded parameter, which cannot be untied; nothing is changed.
    """
    for first, *others in groups:
        if is_dtensor(getattr(first.module, first.key)):
            raise ValueError(
                f"merge: {first.name} and {others[0].name} are one parameter, which is sharded; load the base with "
                "tie_word_embeddings=False, or merge before it is sharded"
            )
    ties = Ties()
    for group in groups:
        unchanged = next((holder for holder in group if not holder.changed), None)
        for holder in group:
            shared = getattr(holder.module, holder.key)
            ties.parameters.append((holder, shared))
            if holder is not unchanged:
                copy = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
                setattr(holder.module, holder.key, copy)
    for module in untied_models(model, groups):
        ties.configs.append((module, module.all_tied_weights_keys))
        module.config.tie_word_embeddings, module.all_tied_weights_keys = False, {}
    names = "; ".join(" and ".join(holder.name for holder in group) for group in groups)
    config = ", and config.tie_word_embeddings is False" if ties.configs else ""
    warnings.warn(
        f"merge: {names} were one parameter, and only one of them is adapted; until unmerge, each has its own "
        f"parameter{config}",
        stacklevel=3,
    )
    return ties


def retie(model: nn.Module) -> set[str]:
    """Undo :func:`untie`, if it was called; returns the names of the restored parameters."""
    ties: Ties | None = getattr(model, "lora_ties", None)
    if ties is None:
        return set()
    for holder, parameter in ties.parameters:
        setattr(holder.module, holder.key, parameter)
    for module, keys in ties.configs:
        module.config.tie_word_embeddings, module.all_tied_weights_keys = True, keys
    del model.lora_ties
    return {holder.name for holder, _ in ties.parameters}


def untied_models(model: nn.Module, groups: list[list[Holder]]) -> list[Any]:
    """The transformers models in ``model`` that have no ties outside ``groups``."""
    names = {holder.name for group in groups for holder in group}
    return [
        module
        for start, module in _models_with_ties(model)
        if all(
            start + target in names or start + source in names
            for target, source in module.all_tied_weights_keys.items()
        )
    ]


def forget_ties(model: nn.Module) -> None:
    """Remove parameters that are no longer one from what transformers' models know of their ties.

    A model without any tie left gets ``config.tie_word_embeddings=False``: ``tie_weights`` would tie them again, and
    other programs would read one weight for both.
    """
    for _, module in _models_with_ties(model):
        # by all names, also those of modules that have several
        parameters = dict(module.named_parameters(remove_duplicate=False))
        keys = module.all_tied_weights_keys
        left = {a: b for a, b in keys.items() if parameters.get(a) is parameters.get(b)}
        if len(left) < len(keys):
            module.all_tied_weights_keys = left
            module.config.tie_word_embeddings = bool(left)


def _models_with_ties(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The transformers models in ``model`` that tie parameters, each after the start of its names."""
    for prefix, module in model.named_modules():
        keys: Any = getattr(module, "all_tied_weights_keys", None)
        if keys and getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            yield f"{prefix}." if prefix else "", module
