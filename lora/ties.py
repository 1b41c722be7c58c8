"""Unties parameters that a merge would change in only one of their modules, and ties them again for unmerge."""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from leanstep._torch import is_dtensor
from leanstep.lora.apply import adapted_layers


class Holder(NamedTuple):
    """A module that holds a tied parameter: the full name, the module, and the attribute's name."""

    name: str
    module: nn.Module
    end: str


@dataclass
class Ties:
    """The changes of :func:`untie`: each holder's original parameter, and each config's tied keys."""

    parameters: list[tuple[Holder, nn.Parameter]] = field(default_factory=list)
    configs: list[tuple[Any, dict[str, str]]] = field(default_factory=list)


def tied_groups(model: nn.Module) -> list[list[Holder]]:
    """Group the holders of every tied parameter that a merge changes in at least one holder."""
    holders: dict[Any, list[Holder]] = defaultdict(list)
    for owner, module in model.named_modules():
        for end, parameter in module.named_parameters(recurse=False):
            holders[_memory(parameter)].append(Holder(f"{owner}.{end}" if owner else end, module, end))
    layers = _unmerged(model)
    groups = (group for group in holders.values() if len(group) > 1)
    return [group for group in groups if any(_is_changed(holder, layers) for holder in group)]


def other_names(groups: list[list[Holder]], layers: Container[str]) -> dict[str, list[str]]:
    """Map each tied parameter of ``layers`` to its other names."""
    return {
        holder.name: [other.name for other in group if other is not holder]
        for group in groups
        for holder in group
        if holder.name.rpartition(".")[0] in layers
    }


def _memory(parameter: Tensor) -> Any:
    """A key that tied parameters share: their memory address, or their identity if they have none."""
    if is_dtensor(parameter) or parameter.device.type == "meta" or not parameter.numel():
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def _unmerged(model: nn.Module) -> set[str]:
    return {name for name, layer in adapted_layers(model) if not layer.lora.merged}


def _is_changed(holder: Holder, layers: set[str]) -> bool:
    """Whether merging the adapters of ``layers`` changes a holder's parameter."""
    if holder.name.rpartition(".")[0] not in layers:
        return False
    layer: Any = holder.module
    return holder.end == "weight" or (holder.end == "bias" and layer.lora_B.bias is not None)


def untie(model: nn.Module, groups: list[list[Holder]]) -> Ties:
    """Give every holder in ``groups`` its own parameter. The first one that a merge does not change keeps the old one.

    If this removes all ties of a transformers model, its config gets ``tie_word_embeddings=False``, so that a saved
    merged model loads with both weights.

    Raises:
        ValueError: for a sharded parameter, which cannot be untied; nothing is changed.
    """
    for first, *others in groups:
        if is_dtensor(getattr(first.module, first.end)):
            raise ValueError(
                f"merge: {first.name} and {others[0].name} are one parameter, which is sharded; load the base with "
                "tie_word_embeddings=False, or merge before it is sharded"
            )
    ties = Ties()
    layers = _unmerged(model)
    for group in groups:
        unchanged = next((holder for holder in group if not _is_changed(holder, layers)), None)
        for holder in group:
            shared = getattr(holder.module, holder.end)
            ties.parameters.append((holder, shared))
            if holder is not unchanged:
                copy = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
                setattr(holder.module, holder.end, copy)
    for module in _untied_models(model, groups):
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
        setattr(holder.module, holder.end, parameter)
    for module, keys in ties.configs:
        module.config.tie_word_embeddings, module.all_tied_weights_keys = True, keys
    del model.lora_ties
    return {holder.name for holder, _ in ties.parameters}


def _untied_models(model: nn.Module, groups: list[list[Holder]]) -> list[Any]:
    """The transformers models in ``model`` that have no ties outside ``groups``."""
    names = {holder.name for group in groups for holder in group}
    models = []
    for prefix, module in model.named_modules():
        keys: Any = getattr(module, "all_tied_weights_keys", None)
        if not keys or not getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            continue
        start = f"{prefix}." if prefix else ""
        if all(start + target in names or start + source in names for target, source in keys.items()):
            models.append(module)
    return models


@contextlib.contextmanager
def config_of_merged(model: nn.Module) -> Iterator[None]:
    """Context manager for ``save_pretrained`` with :func:`leanstep.lora.merge.merged_state_dict`.

    Inside, ``config.tie_word_embeddings`` of a transformers model describes the merged model.
    """
    models = _untied_models(model, tied_groups(model))
    for module in models:
        module.config.tie_word_embeddings = False
    try:
        yield
    finally:
        for module in models:
            module.config.tie_word_embeddings = True
