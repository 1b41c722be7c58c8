"""Parameters that several modules share, of which a merge changes one: each gets its own, until it is taken back."""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from leanstep.lora.apply import adapted_layers
from leanstep.lora.layers.layer import is_sharded

__all__ = ["Ties", "config_of_merged", "others_of", "retie", "tied_groups", "untie"]


class Holder(NamedTuple):
    """A place of a parameter: the module and the names."""

    name: str
    module: nn.Module
    end: str


@dataclass
class Ties:
    """What :func:`untie` took apart."""

    parameters: list[tuple[Holder, nn.Parameter]] = field(default_factory=list)
    configs: list[tuple[Any, dict[str, str]]] = field(default_factory=list)


def tied_groups(model: nn.Module) -> list[list[Holder]]:
    """The places of every parameter that a merge changes in one of them, and that is in others too."""
    places: dict[Any, list[Holder]] = defaultdict(list)
    for owner, module in model.named_modules():
        for end, parameter in module.named_parameters(recurse=False):
            places[_memory(parameter)].append(Holder(f"{owner}.{end}" if owner else end, module, end))
    changed = {name for name, layer in adapted_layers(model) if not layer.lora.merged}
    groups = (group for group in places.values() if len(group) > 1)
    return [group for group in groups if any(_is_changed(holder, changed) for holder in group)]


def others_of(groups: list[list[Holder]], layers: Container[str]) -> dict[str, list[str]]:
    """The places of parameters of ``layers`` by name, and the other places that each is in."""
    return {
        holder.name: [other.name for other in group if other is not holder]
        for group in groups
        for holder in group
        if holder.name.rpartition(".")[0] in layers
    }


def _memory(parameter: Tensor) -> Any:
    """What tells whether two parameters are one: the memory, where there is some to tell by."""
    if is_sharded(parameter) or parameter.device.type == "meta" or not parameter.numel():
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def _is_changed(holder: Holder, changed: set[str]) -> bool:
    if holder.name.rpartition(".")[0] not in changed:
        return False
    layer: Any = holder.module
    return holder.end == "weight" or (holder.end == "bias" and layer.lora_B.bias is not None)


def untie(model: nn.Module, groups: list[list[Holder]]) -> Ties:
    """Give every place in ``groups`` a parameter of its own, but the first one that keeps its values.

    Where these were all that a transformers model ties, its config says afterwards that it ties nothing: a folder with
    the model then opens as what it is.

    Raises:
        ValueError: for a parameter that is sharded, which cannot be taken apart any more; nothing is changed.
    """
    for first, *others in groups:
        if is_sharded(getattr(first.module, first.end)):
            raise ValueError(
                f"merge: {first.name} and {others[0].name} are one parameter, which is sharded; load the base with "
                "tie_word_embeddings=False, or merge before it is sharded"
            )
    ties = Ties()
    changed = {name for name, layer in adapted_layers(model) if not layer.lora.merged}
    for group in groups:
        keeps = next((holder for holder in group if not _is_changed(holder, changed)), None)
        for holder in group:
            shared = getattr(holder.module, holder.end)
            ties.parameters.append((holder, shared))
            if holder is not keeps:
                own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
                setattr(holder.module, holder.end, own)
    for module in _untied_owners(model, groups):
        ties.configs.append((module, module.all_tied_weights_keys))
        module.config.tie_word_embeddings, module.all_tied_weights_keys = False, {}
    names = "; ".join(" and ".join(holder.name for holder in group) for group in groups)
    config = ", and config.tie_word_embeddings is False" if ties.configs else ""
    warnings.warn(
        f"merge: {names} were one parameter, and an adapter is of one of these places only; each has one of its own "
        f"now{config}, until unmerge",
        stacklevel=3,
    )
    return ties


def retie(model: nn.Module) -> set[str]:
    """Undo :func:`untie`, if there is anything to undo; the names of the parameters that are what they were."""
    ties: Ties | None = getattr(model, "lora_ties", None)
    if ties is None:
        return set()
    for holder, parameter in ties.parameters:
        setattr(holder.module, holder.end, parameter)
    for module, pairs in ties.configs:
        module.config.tie_word_embeddings, module.all_tied_weights_keys = True, pairs
    del model.lora_ties
    return {holder.name for holder, _ in ties.parameters}


def _untied_owners(model: nn.Module, groups: list[list[Holder]]) -> list[Any]:
    """The transformers models in ``model`` all of whose ties are among ``groups``."""
    names = {holder.name for group in groups for holder in group}
    found = []
    for prefix, module in model.named_modules():
        pairs: Any = getattr(module, "all_tied_weights_keys", None)
        if not pairs or not getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            continue
        start = f"{prefix}." if prefix else ""
        if all(start + target in names or start + source in names for target, source in pairs.items()):
            found.append(module)
    return found


@contextlib.contextmanager
def config_of_merged(model: nn.Module) -> Iterator[None]:
    """Let the config of a transformers model say, for the time of a ``save_pretrained`` of
    :func:`leanstep.lora.merge.merged_state_dict`, whether the merged model ties its embeddings.
    """
    owners = _untied_owners(model, tied_groups(model))
    for module in owners:
        module.config.tie_word_embeddings = False
    try:
        yield
    finally:
        for module in owners:
            module.config.tie_word_embeddings = True
