"""Merges adapters into the base weights and takes them out again; reports the rounding errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leanstep.lora.apply import adapted_layers
from leanstep.lora.layers.embedding import LoRAEmbeddingLayer
from leanstep.lora.layers.frozen import quantized_kind
from leanstep.lora.layers.linear import LoRALayer, LoRALinearLayer
from leanstep.lora.layers.rule import dora_factor
from leanstep.lora.ties import other_names, retie, tied_groups, untie

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
        return f"{len(self.layers)} layers, largest drift {self.drift:.3g} ({worst}){masked}{untied}"


@dataclass
class _Undo:
    """The state that :func:`unmerge` needs for one layer.

    Attributes:
        backup: a copy of the base weight, with ``backup=True``.
        factor: DoRA's factors, shaped to multiply the base weight.
        mask: True at nonzero base weights, if zeros stay zero.
        small: indices of the outputs whose factor is too small to divide out, and their base weights.
    """

    backup: Tensor | None
    factor: Tensor | None
    mask: Tensor | None
    small: tuple[Tensor, Tensor] | None


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
        backup: store a copy of every adapted weight for an exact :func:`unmerge`.

    Returns:
        The :class:`MergeReport`.

    Raises:
        ValueError: for a model without adapters or with merged ones, a NaN or infinity in a merged weight, a quantised
            base (which would need a second quantisation), or a bias on B without a bias in the base. No weight is
            changed.

    Notes:
        Unties adapted weights that are tied, such as those of an embedding and an output head, with a warning. The
        config of a transformers model then has ``tie_word_embeddings=False``. :func:`unmerge` ties them again.
    """
    layers = dict(adapted_layers(model))
    if not layers:
        raise ValueError("merge: the model has no adapters")
    for name, layer in layers.items():
        if layer.lora.merged:
            raise ValueError(f"merge: {name} is merged already")
        _check_mergeable(name, layer)
        # checks one layer at a time before any change, without a copy of the model
        if not torch.isfinite(merged_weight(layer, keep_mask)).all():
            raise ValueError(f"merge: the merged weight of {name} holds NaN or infinity; nothing was merged")
    report = MergeReport()
    if groups := tied_groups(model):
        model.lora_ties = untie(model, groups)  # type: ignore[assignment]
        report.untied = other_names(groups, layers)
    for name, layer in layers.items():
        exact = merged_weight(layer, keep_mask)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        mask = weight != 0 if keep_mask or layer.lora.keep_zeros else None
        original = weight.detach().clone() if backup and f"{name}.weight" not in report.untied else None
        factor = _dora_factors(layer)
        small = None if original is not None or factor is None else _small_rows(weight.detach(), factor)
        layer.lora.undo = _Undo(original, factor, mask, small)
        weight.copy_(exact)
        report.layers[name] = float((weight.to(exact.dtype) - exact).abs().max()) if exact.numel() else 0.0
        if mask is not None:
            report.masked[name] = int((~mask).sum())
        layer.lora.merged = True
        _add_to_bias(layer, 1)
        layer.lora.norms = None
    return report


def _check_mergeable(name: str, layer: LoRALayer) -> None:
    kind = quantized_kind(layer)
    if kind is not None:
        raise ValueError(f"merge: {name} is a {kind}, to be quantised again after a merge; load it in 16 bits")
    if isinstance(layer, LoRALinearLayer) and layer.lora_B.bias is not None and layer.bias is None:
        raise ValueError(f"merge: {name} has a bias on B and none of its own to add it to")
    if not isinstance(getattr(layer, "weight", None), nn.Parameter):
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
    layers = dict(adapted_layers(model))
    if not layers or not all(layer.lora.merged for layer in layers.values()):
        raise ValueError("unmerge: expected a model with merged adapters")
    report = MergeReport()
    restored = retie(model)
    for name, layer in layers.items():
        undo: _Undo = layer.lora.undo
        weight = layer.weight
        assert isinstance(weight, Tensor)
        report.layers[name] = 0.0
        if undo.backup is not None:
            weight.copy_(undo.backup)
        elif f"{name}.weight" not in restored:
            largest = weight.abs().max() if weight.numel() else weight.new_zeros(())
            report.layers[name] = float(largest) * torch.finfo(weight.dtype).eps
            exact = _widened(weight)
            if undo.factor is not None:
                exact = exact / torch.where(undo.factor == 0, 1.0, undo.factor)
            exact = exact - _update(layer)
            weight.copy_(exact if undo.mask is None else torch.where(undo.mask, exact, 0.0))
            if undo.small is not None:
                weight.index_copy_(_output_dim(undo.factor), *undo.small)
        if f"{name}.bias" not in restored:
            _add_to_bias(layer, -1)
        layer.lora.merged, layer.lora.undo = False, None
        layer.lora.norms = None
    return report


def merged_weight(layer: LoRALayer, keep_mask: bool = False) -> Tensor:
    """The merged weight of one layer, in fp32 or fp64."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    exact = _widened(weight) + _update(layer)
    factor = _dora_factors(layer)
    if factor is not None:
        exact = exact * factor
    return torch.where(weight != 0, exact, 0.0) if keep_mask or layer.lora.keep_zeros else exact


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of the base model with the adapter merged, without changing the model.

    Copies the weights of adapted layers. Lists parameters tied to one of them under every name; save the model inside
    :func:`leanstep.lora.ties.config_of_merged`, so that its config matches. Raises ValueError for quantised or
    parametrised bases.
    """
    layers = dict(adapted_layers(model))
    untied = {holder.name for group in tied_groups(model) for holder in group}
    state = {}
    for name, value in model.state_dict().items():
        owner, _, end = name.rpartition(".")
        layer = layers.get(owner)
        if "lora_" in name:
            continue
        if layer is not None and not layer.lora.merged and end == "weight":
            _check_mergeable(owner, layer)
            value = merged_weight(layer).to(value.dtype)
        elif layer is not None and not layer.lora.merged and end == "bias":
            value = value + _bias_shift(layer)
        elif name in untied:
            # a copy, so that the file stores tied parameters under every name
            value = value.clone()
        state[name] = value
    return state


def _widened(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _outputs_last(layer: LoRALayer) -> bool:
    """Whether the last dimension of the base weight is that of the outputs."""
    return layer.lora.transposed or isinstance(layer, LoRAEmbeddingLayer)


def _update(layer: Any) -> Tensor:
    """``scale B A`` in the layout of the base weight, in fp32 or fp64."""
    if isinstance(layer, LoRAEmbeddingLayer):
        a, b = layer.lora_embedding_A, layer.lora_embedding_B
    else:
        a, b = layer.lora_A.weight, layer.lora_B.weight
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    update = (b.detach().to(dtype) @ a.detach().to(dtype)).mul_(layer.lora.scale)
    return update.t() if _outputs_last(layer) else update


def _dora_factors(layer: LoRALayer) -> Tensor | None:
    """DoRA's factor of every output, shaped to multiply the base weight; None without DoRA."""
    assert isinstance(layer, (LoRALinearLayer, LoRAEmbeddingLayer))
    magnitude = layer.lora_magnitude_vector
    if magnitude is None:
        return None
    c = dora_factor(magnitude.detach(), layer.norms())
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


def _bias_shift(layer: Any) -> Tensor:
    """The change of the layer's bias by B's bias, in its dtype; 0 without a bias on B."""
    if layer.lora_B.bias is None:
        return torch.zeros_like(layer.bias)
    bias: Tensor = layer.lora_B.bias
    shift = bias.detach() * layer.lora.scale
    factor = layer.lora.undo.factor if layer.lora.merged else _dora_factors(layer)
    return (shift if factor is None else shift * factor.flatten()).to(layer.bias.dtype)


def _add_to_bias(layer: Any, sign: int) -> None:
    linear = not isinstance(layer, LoRAEmbeddingLayer)
    if linear and layer.lora_B.bias is not None and layer.bias is not None:
        layer.bias.add_(_bias_shift(layer), alpha=sign)
