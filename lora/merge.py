"""Merges adapters into the base weights and takes them out again; reports the rounding errors.

A merge unties parameters that it would change in only one of their modules; unmerge ties them again.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leanstep._torch import is_dtensor, plain_name, unwrapped
from leanstep.lora.apply import adapted_experts, adapted_layers, token_layers
from leanstep.lora.layers.embedding import LoRAEmbeddingLayer
from leanstep.lora.layers.experts import LoRAExpertsLayer
from leanstep.lora.layers.frozen import dequantizer, quantized_kind
from leanstep.lora.layers.linear import Adapter, LoRALayer, LoRALinearLayer
from leanstep.lora.layers.pissa import start_factors
from leanstep.lora.layers.rule import dora_factor
from leanstep.lora.layers.tokens import TokenLayer, check_tokens, merge_tokens, unmerge_tokens
from leanstep.lora.ties import Holder, retie, untie, untied_models

# smaller DoRA factors leave too few digits of a row to divide them out again
SMALL_FACTOR = 2.0**-8


@dataclass
class MergeReport:
    """The rounding errors of a :func:`merge` or :func:`unmerge`.

    Attributes:
        layers: layer name -> drift. For :func:`merge`, the rounding error: the largest difference between the stored
            weight and the exact sum (fp32, or fp64 for fp64 weights). For :func:`unmerge`, 0 with a backup; without
            one, an estimate: the spacing of the dtype at the weight's largest entry.
        masked: layer name -> number of zeros that stay, with ``keep_mask``.
        untied: name of each parameter that the merge untied -> its other names.
    """

    layers: dict[str, float] = field(default_factory=dict)
    masked: dict[str, int] = field(default_factory=dict)
    untied: dict[str, list[str]] = field(default_factory=dict)

    @property
    def drift(self) -> float:
        """The largest drift of any layer."""
        return max(self.layers.values(), default=0.0)

    def __str__(self) -> str:
        worst = max(self.layers, key=self.layers.__getitem__, default="none")
        masked = f", {sum(self.masked.values()):,} zeros kept" if self.masked else ""
        untied = f", {len(self.untied)} untied" if self.untied else ""
        return f"{len(self.layers)} layers, largest drift {self.drift:.3g} (layer {worst}){masked}{untied}"


@dataclass
class _Undo:
    """The state that :func:`unmerge` needs for one layer.

    Attributes:
        backup, bias: copies of the base weight and of a bias that the merge changes, with ``backup=True``.
        factor: DoRA's factors, shaped to multiply the base weight.
        mask: True at nonzero base weights, if zeros stay zero.
        small: indices of the outputs whose factor is too small to divide out, and their base weights.
    """

    backup: Tensor | None
    factor: Tensor | None
    mask: Tensor | None
    small: tuple[Tensor, Tensor] | None
    bias: Tensor | None = None


@torch.no_grad()
def merge(model: nn.Module, *, keep_mask: bool = False, backup: bool = False) -> MergeReport:
    """Merge every adapter into its base weight: ``W + scale B A``; DoRA scales the rows by ``magnitude / norm``.

    Computes the sum in fp32 (fp64 for fp64 weights) and rounds it once to the weight's dtype. The factors stay for
    :func:`unmerge`; :func:`leanstep.lora.remove_lora` removes them and leaves a plain model.

    Args:
        model: an adapted, unmerged model; its weights are changed in place.
        keep_mask: keep zeros of the base weight zero, so that a pruned model stays pruned. This changes the output of
            the layer, unless :func:`leanstep.lora.keep_zeros` was called before training; such layers keep their zeros
            in any case.
        backup: store a copy of every changed weight and bias for an exact :func:`unmerge`.

    Returns:
        The :class:`MergeReport`.

    Raises:
        ValueError: for a model without adapters or with merged ones, a NaN or infinity in a merged weight or bias,
            also one that only its dtype makes infinite, a quantised or parametrized base weight, a sharded tied one, or
            a bias on B without a bias in the base. No weight is changed.

    Notes:
        Unties adapted weights that are tied, such as those of an embedding and an output head, with a warning. If no
        ties remain in a transformers model, its config gets ``tie_word_embeddings=False``. :func:`unmerge` ties them
        again.
    """
    model = unwrapped(model)
    layers, places = dict(adapted_layers(model)), _places(model)
    if not places:
        raise ValueError("merge: the model has no adapters")
    for place in places:
        if place.adapter.merged:
            raise ValueError(f"merge: {place.name} is merged already")
        if place.is_layer:
            if keep_mask and start_factors(place.module) is not None:
                raise ValueError(
                    f"merge: {place.name} began with PiSSA, so its base weight has no zeros to keep; unset keep_mask"
                )
            _check_mergeable(place.name, place.module)
            if (kind := quantized_kind(place.module)) is not None:
                raise ValueError(
                    f"merge: {place.name} is a {kind}, to be quantised again after a merge; load the base in 16 bits, "
                    "or save merged_state_dict(model)"
                )
        # checks one weight at a time before any change, without a copy of the model
        _check_finite(f"the merged weight of {place.name}", place.merged(keep_mask), place.weight)
    for name, layer in layers.items():
        if _has_bias_on_b(layer):
            _check_finite(f"the merged bias of {name}", _bias(layer) + _bias_shift(layer), _bias(layer))
    tokens = dict(token_layers(model))
    for name, trained in tokens.items():
        check_tokens(name, trained)
    report = MergeReport()
    if groups := tied_groups(model):
        model.lora_ties = untie(model, groups)  # type: ignore[assignment]
        report.untied = {
            holder.name: [other.name for other in group if other is not holder]
            for group in groups
            for holder in group
            if holder.changed
        }
    for place in places:
        adapter, weight, exact = place.adapter, place.weight, place.merged(keep_mask)
        mask = weight != 0 if keep_mask or adapter.keep_zeros else None
        original = weight.detach().clone() if backup and place.parameter not in report.untied else None
        factor = _dora_factors(place.module) if place.is_layer else None
        small = None if original is not None or factor is None else _small_rows(weight.detach(), factor)
        adapter.undo = _Undo(original, factor, mask, small)
        weight.copy_(exact)
        report.layers[place.name] = float((weight.to(exact.dtype) - exact).abs().max()) if exact.numel() else 0.0
        if mask is not None:
            report.masked[place.name] = int((~mask).sum())
        adapter.merged, adapter.norms = True, None
    for name, layer in layers.items():
        if _has_bias_on_b(layer):
            keeps_bias = backup and f"{name}.bias" not in report.untied
            layer.lora.undo.bias = _bias(layer).detach().clone() if keeps_bias else None
            _bias(layer).add_(_bias_shift(layer))
    for name, trained in tokens.items():
        report.layers[name] = merge_tokens(trained, keep_mask)
        if keep_mask and trained.tokens.undo is not None:
            report.masked[name] = int((trained.tokens.undo == 0).sum())
    return report


class _Place(NamedTuple):
    """A base weight under an adapter: of a layer, or the parameter of experts that ``attribute`` names."""

    name: str
    module: Any
    attribute: str = "weight"

    @property
    def is_layer(self) -> bool:
        return isinstance(self.module, LoRALayer)

    @property
    def adapter(self) -> Adapter:
        return self.module.lora if self.is_layer else self.module.lora[self.attribute]

    @property
    def parameter(self) -> str:
        return f"{self.name}.weight" if self.is_layer else self.name

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.attribute)

    def merged(self, keep_mask: bool = False) -> Tensor:
        """The merged weight, in fp32 or fp64."""
        if self.is_layer:
            return merged_weight(self.module, keep_mask)
        exact = self.module.summed(self.attribute).to(torch.promote_types(self.weight.dtype, torch.float32))
        return torch.where(self.weight != 0, exact, 0.0) if keep_mask else exact

    def without_update(self, exact: Tensor) -> Tensor:
        """A merged weight, after division by DoRA's factors, without the product of the factors."""
        # of experts: the sum with the opposite sign
        return exact - _update(self.module) if self.is_layer else 2 * exact - self.merged()


def _places(model: nn.Module) -> list[_Place]:
    places = [_Place(name, layer) for name, layer in adapted_layers(model)]
    experts = (module for _, module in adapted_experts(model))
    return places + [_Place(adapter.name, module, leaf) for module in experts for leaf, adapter in module.lora.items()]


def _check_finite(what: str, exact: Tensor, stored: Tensor) -> None:
    if not torch.isfinite(exact.to(stored.dtype)).all():
        raise ValueError(f"merge: {what} holds NaN or infinity in {stored.dtype}; nothing was merged")


def _check_mergeable(name: str, layer: LoRALayer) -> None:
    if _has_bias_on_b(layer) and layer.bias is None:
        raise ValueError(f"merge: {name} has a bias on B, but its base layer has none to add it to")
    weight = getattr(layer, "weight", None)
    if weight is not None and type(weight).__module__.startswith("leanstep."):
        raise ValueError(
            f"merge: the weight of {name} is a {type(weight).__name__}, which cannot be changed; merge into the dense "
            "model"
        )
    if not isinstance(weight, nn.Parameter):
        raise ValueError(f"merge: the weight of {name} is made by a parametrization; remove that first")


@torch.no_grad()
def unmerge(model: nn.Module) -> MergeReport:
    """Take every adapter out of its base weight again.

    Args:
        model: a model that :func:`merge` merged; its weights are changed in place.

    Returns:
        The :class:`MergeReport`.

    Raises:
        ValueError: for a model that is not merged.

    Notes:
        Without a backup, 16-bit weights come back with rounding errors. Rows that a DoRA magnitude near 0 scaled away
        come back exactly, because :func:`merge` stores them.
    """
    model = unwrapped(model)
    places = _places(model)
    if not places or not all(place.adapter.merged for place in places):
        raise ValueError("unmerge: expected a model with merged adapters")
    report = MergeReport()
    restored = retie(model)
    for place in places:
        undo, weight = place.adapter.undo, place.weight
        report.layers[place.name] = 0.0
        if undo.backup is not None:
            weight.copy_(undo.backup)
        elif place.parameter not in restored:
            largest = weight.abs().max() if weight.numel() else weight.new_zeros(())
            report.layers[place.name] = float(largest) * torch.finfo(weight.dtype).eps
            exact = _widened(weight)
            if undo.factor is not None:
                exact = exact / torch.where(undo.factor == 0, 1.0, undo.factor)
            exact = place.without_update(exact)
            weight.copy_(exact if undo.mask is None else torch.where(undo.mask, exact, 0.0))
            if undo.small is not None:
                weight.index_copy_(_output_dim(undo.factor), *undo.small)
    for name, layer in adapted_layers(model):
        if f"{name}.bias" not in restored and _has_bias_on_b(layer):
            _bias(layer).copy_(base_bias(layer))
    for place in places:
        place.adapter.merged, place.adapter.undo, place.adapter.norms = False, None, None
    for name, trained in token_layers(model):
        unmerge_tokens(trained)
        report.layers[name] = 0.0
    return report


def merged_weight(layer: LoRALayer, keep_mask: bool = False) -> Tensor:
    """The merged weight of one layer, dequantised where the base is quantised, in fp32 or fp64."""
    weight, factor = _base_weight(layer), _dora_factors(layer)
    exact = _widened(weight) + _update(layer)
    exact = exact if factor is None else exact * factor
    return torch.where(weight != 0, exact, 0.0) if keep_mask or layer.lora.keep_zeros else exact


@torch.no_grad()
def merged_state_dict(model: nn.Module, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The ``state_dict`` of the base model with the adapter merged, without changing the model.

    Copies the weights of adapted layers. With ``device``, every tensor goes there as soon as it is merged, so that the
    model's own device holds one more matrix at a time. Lists parameters tied to one of them under every name; save the
    model inside :func:`config_of_merged`, so that its config matches. Quantised layers, adapted or not, have the dense
    matrices that their products use: the state takes the memory of the dense model. Raises ValueError for parametrized
    bases.
    """
    model = unwrapped(model)
    # a module may have several names, such as the embeddings of a T5 whose vocabulary was resized
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    untied = {(holder.module, holder.key) for group in tied_groups(model) for holder in group}
    for name, layer in adapted_layers(model):
        if not layer.lora.merged:
            _check_mergeable(name, layer)
    # by those rows: tied modules have one
    with_rows: dict[int, Tensor] = {}
    merged: dict[tuple[nn.Module | str, str], Tensor] = {}
    owned = tuple(
        f"{name}.lora_" if name else "lora_"
        for name, module in modules.items()
        if isinstance(module, LoRALayer | LoRAExpertsLayer | TokenLayer)
    )
    quantized = {name: module for name, module in modules.items() if quantized_kind(module) is not None}
    # the scales and tables of bitsandbytes
    owned += tuple(f"{name}.{key}" for name in quantized for key in ("weight.", "SCB", "weight_format"))
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith(owned):
            continue
        owner, _, key = name.rpartition(".")
        module = modules.get(owner)  # wrappers may leave themselves out of the names
        owner_and_key = (owner if module is None else module), key
        if key == "weight" and owner in quantized:
            value = _base_weight(quantized[owner])
        earlier = merged.get(owner_and_key)
        tensor = _merged_tensor(owner, module, key, value, with_rows) if earlier is None else earlier
        # a copy, so that the file stores tied parameters under every name
        repeated = owner_and_key in untied and (tensor is value or tensor is earlier)
        tensor = tensor if device is None else tensor.to(device)
        merged[owner_and_key], state[name] = tensor, tensor.clone() if repeated else tensor
    return state


def _merged_tensor(name: str, module: Any, key: str, value: Tensor, with_rows: dict[int, Tensor]) -> Tensor:
    """A tensor of a module as after a merge: ``value`` itself if the adapter does not change it."""
    if isinstance(module, LoRALayer) and not module.lora.merged:
        if key == "weight":
            return merged_weight(module).to(value.dtype)
        return value + _bias_shift(module) if key == "bias" and _has_bias_on_b(module) else value
    if isinstance(module, LoRAExpertsLayer) and key in module.lora and not module.lora[key].merged:
        return _Place(name, module, key).merged().to(value.dtype)
    if isinstance(module, TokenLayer) and not module.tokens.merged and key == "weight":
        check_tokens(name, module)
        rows = id(module.lora_token_rows)
        if rows not in with_rows:
            with_rows[rows] = module.replaced(value)
        return with_rows[rows]
    return value


def _base_weight(layer: Any) -> Tensor:
    """The dense matrix of a layer without its adapter."""
    weight: Tensor = layer.weight.detach()
    dense = dequantizer(layer)
    return weight if dense is None else dense(layer.weight).detach()


def _widened(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _outputs_last(layer: LoRALayer) -> bool:
    """Whether the last dimension of the base weight is that of the outputs."""
    return layer.lora.transposed or isinstance(layer, LoRAEmbeddingLayer)


def _update(layer: LoRALayer) -> Tensor:
    """``scale B A`` in the layout of the base weight, in fp32 or fp64."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    a, b = (factor.detach().to(dtype) for factor in layer.factors())
    update = (b @ a).mul_(layer.lora.scale)
    return update.t() if _outputs_last(layer) else update


def _dora_factors(layer: LoRALayer) -> Tensor | None:
    """DoRA's factor of every output, shaped to multiply the base weight; None without DoRA."""
    if layer.lora_magnitude_vector is None:
        return None
    c = dora_factor(layer.lora_magnitude_vector.detach(), layer.norms())
    return c if _outputs_last(layer) else c.unsqueeze(1)


def _output_dim(factor: Tensor | None) -> int:
    """The output dimension of a base weight, from the shape of :func:`_dora_factors`."""
    return 0 if factor is not None and factor.dim() == 2 else 1


def _small_rows(weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor] | None:
    """The indices of outputs with a small factor, and their weights; None if no factor is small."""
    small = factor.flatten().abs() < SMALL_FACTOR
    if not bool(small.any()):
        return None
    indices = small.nonzero().flatten()
    return indices, weight.index_select(_output_dim(factor), indices)


def _has_bias_on_b(layer: LoRALayer) -> bool:
    return isinstance(layer, LoRALinearLayer) and layer.lora_B.bias is not None


def _bias_shift(layer: Any) -> Tensor:
    """The change of the layer's bias by B's bias, in its dtype."""
    shift = layer.lora_B.bias.detach() * layer.lora.scale
    factor = layer.lora.undo.factor if layer.lora.merged else _dora_factors(layer)
    return (shift if factor is None else shift * factor.flatten()).to(layer.bias.dtype)


def _bias(layer: Any) -> Tensor:
    bias: Tensor = layer.bias
    return bias


def base_bias(layer: Any) -> Tensor:
    """The layer's bias without B's: of a merged layer from its backup, or up to rounding."""
    bias: Tensor = layer.bias.detach()
    if not layer.lora.merged or not _has_bias_on_b(layer):
        return bias
    backup: Tensor | None = layer.lora.undo.bias
    return bias - _bias_shift(layer) if backup is None else backup


def tied_groups(model: nn.Module) -> list[list[Holder]]:
    """Group the holders of every tied parameter that a merge changes in at least one holder."""
    holders: dict[Any, list[Holder]] = defaultdict(list)
    layers = {name: layer for name, layer in adapted_layers(model) if not layer.lora.merged}
    for owner, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            changed = owner in layers and (key == "weight" or (key == "bias" and _has_bias_on_b(layers[owner])))
            holder = Holder(f"{owner}.{key}" if owner else key, module, key, changed)
            holders[_memory(parameter)].append(holder)
    return [group for group in holders.values() if len(group) > 1 and any(holder.changed for holder in group)]


def _memory(parameter: Tensor) -> Any:
    """A key that tied parameters share: their memory address, or their identity if they have none."""
    if is_dtensor(parameter) or parameter.device.type == "meta" or not parameter.numel():
        return id(parameter)
    return parameter.device, parameter.data_ptr()


@contextlib.contextmanager
def config_of_merged(model: nn.Module) -> Iterator[None]:
    """Context manager for ``save_pretrained`` with :func:`merged_state_dict`.

    Inside, ``config.tie_word_embeddings`` of a transformers model describes the merged model.
    """
    model = unwrapped(model)
    models = untied_models(model, tied_groups(model))
    for module in models:
        module.config.tie_word_embeddings = False
    try:
        yield
    finally:
        for module in models:
            module.config.tie_word_embeddings = True
