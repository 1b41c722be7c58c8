"""Converts a model that trains sparse to plain modules with exact zeros and the original names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from leanstep._torch import is_dtensor
from leanstep.sparsity.training.modules import (
    SparseLayer,
    SparseWeight,
    original_key,
    remove,
    sparse_layers,
    stop_sparing,
)

Model = TypeVar("Model", bound=nn.Module)


def squash(model: Model, *, unfinished: str = "refuse") -> Model:
    """Replace the dense weights of a sparse model by the masked ones, and remove the parametrizations, in place.

    Restores the class of every module and the name of every weight; weights stay the same Parameter objects, with exact
    zeros (+0) where pruned. Outputs are the same bit for bit, and ``state_dict`` has the keys of the dense model. The
    model's controller raises at its next step, which would fill the zeros; detach it to train without masks.

    Args:
        model: a model that :func:`sparsify` changed.
        unfinished: treatment of layers that have not reached their target pattern with alpha 0: "refuse", or "keep" the
            weights that the model currently computes with, which are not N:M.

    Returns:
        The model.

    Raises:
        ValueError: for a model without sparse weights, an unfinished one, or a sharded one (save its
            :func:`plain_state_dict` instead). The model is unchanged.
    """
    if unfinished not in ("refuse", "keep"):
        raise ValueError(f"squash: unfinished must be 'refuse' or 'keep', got {unfinished!r}")
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(f"squash: {type(model).__name__} has no sparse weights; sparsify makes them")
    if unfinished == "refuse":
        check_finished(layers, "squash")
    sharded = [layer.name for layer in layers if is_dtensor(layer.weight)]
    if sharded:
        raise ValueError(
            f"squash: {sharded[0]!r} is sharded, and FSDP would lose its weight; save plain_state_dict(model, "
            "state_dict) of the gathered state dict, and load it into a plain model"
        )
    stop_sparing(model)
    for layer in layers:
        weight = layer.weight
        value = layer.transform.effective(weight.detach())
        for module, attribute in layer.uses:
            remove(module, attribute)
        with torch.no_grad():
            weight.copy_(value)
    return model


def plain_state_dict(model: nn.Module, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Compute the state dict of ``squash(model, unfinished="keep")`` without changing the model.

    Args:
        model: a model that :func:`sparsify` changed; any other model gives its own state dict.
        state: the state dict to convert, with whole tensors (gather a sharded model's first); its own masks and alphas
            apply where it has them. None: the model's.

    Returns:
        Plain name -> tensor: masked weights as new tensors (one for all names of a tied weight), and all other entries
        of ``state`` unchanged.

    Raises:
        ValueError: for a state of another model or of other patterns, or sharded tensors.
    """
    entries = dict(model.state_dict() if state is None else state)
    renamed: dict[str, str] = {}
    values: dict[str, Tensor] = {}
    for layer in sparse_layers(model):
        keys = [original_key(name) for name in layer.names]
        missing = [key for key in keys if key not in entries]
        if len(missing) == len(keys):
            raise ValueError(f"plain_state_dict: the state has no {keys[0]!r}; it is of another model")
        weight = entries[next(key for key in keys if key in entries)]
        if is_dtensor(weight):
            raise ValueError(f"plain_state_dict: {keys[0]!r} is sharded; give the gathered state dict")
        value = (layer.transform if state is None else _transform_in(entries, layer)).effective(weight.detach())
        renamed |= dict(zip(keys, layer.names, strict=True))
        values |= dict.fromkeys(keys, value)
    plain = {}
    for key, tensor in entries.items():
        if key in renamed:
            plain[renamed[key]] = values[key]
        elif not (".parametrizations." in key and key.endswith("_extra_state")):
            plain[key] = tensor
    return plain


def _transform_in(entries: Mapping[str, Any], layer: SparseLayer) -> SparseWeight:
    """The parametrization with the mask and alpha of a state dict; the layer's own where the state has none."""
    keys = [original_key(name).removesuffix("original") + "0._extra_state" for name in layer.names]
    packed = next((entries[key] for key in keys if key in entries), None)
    if packed is None:
        return layer.transform
    transform = copy.deepcopy(layer.transform)
    try:
        transform.set_extra_state(packed)
    except ValueError as error:
        raise ValueError(f"plain_state_dict: {layer.name!r}: {error}") from None
    return transform


def sparse_state(model: nn.Module) -> dict[str, Tensor]:
    """The entries of ``model.state_dict()`` that :func:`plain_state_dict` omits: dense weights and masks.

    ``model.load_state_dict(plain | sparse, strict=False)`` restores the whole state from both.
    """
    modules = [name.rpartition(".")[0] for layer in sparse_layers(model) for name in layer.names]
    prefixes = tuple(f"{module}.parametrizations.".lstrip(".") for module in modules)
    return {key: value for key, value in model.state_dict().items() if key.startswith(prefixes)}


def check_finished(layers: list[SparseLayer], caller: str, advice: str = "take unfinished='keep'") -> None:
    """Raise ValueError, in the name of ``caller``, for a layer that has not reached its target with alpha 0."""
    for layer in layers:
        transform = layer.transform
        if float(transform.alpha) != 0 or transform.pattern != layer.target:
            raise ValueError(
                f"{caller}: layer {layer.name!r} is on its way to {layer.target}: after step {transform.steps} it has "
                f"the pattern {transform.pattern} and alpha {float(transform.alpha):.3g}, so its weights are not "
                f"{layer.target} yet; train to the end of the schedule, or {advice}"
            )
