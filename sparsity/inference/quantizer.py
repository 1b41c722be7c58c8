"""Loads sparse checkpoints by transformers' quantizer interface, weights compressed in memory.

``from_pretrained`` of a folder whose config.json has ``quant_method: leanstep`` calls :class:`SparseQuantizer`. Before
loading it checks the files and puts a :class:`~leanstep.sparsity.inference.linear.SparseLinear` where the model has a
linear layer with a sparse weight. Other sparse weights (embeddings, tied heads, experts, convolutions) become dense.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from leanstep._files import one_line
from leanstep.sparsity.inference.conversion import Names, Restore, RestoreMerged, has_another_head
from leanstep.sparsity.inference.dense import to_few_token_linear
from leanstep.sparsity.inference.export import QUANT_METHOD
from leanstep.sparsity.inference.linear import SparseLinear
from leanstep.sparsity.inference.manifest import Manifest
from leanstep.sparsity.inference.matrices import DTYPES, Form, nonzero_bits, part_name
from leanstep.sparsity.inference.reader import SparseFiles


class SparseConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a sparse checkpoint; the manifest in the weight files says the rest."""

    def __init__(self, quant_method: str = QUANT_METHOD, **unknown: Any) -> None:
        if unknown:
            raise ValueError(
                f"quantization_config of {QUANT_METHOD} has the entry {one_line(next(iter(unknown)))!r}, expected "
                "quant_method alone: the folder was written by another version"
            )
        self.quant_method = quant_method


class SparseQuantizer(HfQuantizer):
    """Replaces linear layers by compressed ones, and restores other weights."""

    requires_calibration = True
    quantization_config: SparseConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.manifest = Manifest()
        # stored names of the weights that were built so far
        self.restored: set[str] = set()
        # stored name -> compressed layer; stored name -> parameter; parameter -> dtype
        self.layers: dict[str, SparseLinear] = {}
        self.targets: dict[str, str] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        # parameter -> the parameter that it is tied to
        self.tied: dict[str, str] = {}
        self.merged: dict[str, dict[str, list[str]]] = {}
        self.converters: list[WeightConverter] = []

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if not checkpoint_files:
            raise ValueError(f"a model of quant_method {QUANT_METHOD} loads from its folder, not from a state dict")
        ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        names = Names(model)
        self.dtypes = {name: tensor.dtype for name, tensor in names.tensors.items()}
        with SparseFiles(map(Path, checkpoint_files)) as files:
            files.check_content()
            self.manifest = files.manifest
            tied = files.manifest.tied
            # a base model has the embedding, and not the head under whose name both may be stored
            stands_for = {name: alias for alias, name in tied.items() if names.lacks(name) and not names.lacks(alias)}
            self.tied = {
                names.located(alias): names.located(stands_for.get(name, name)) for alias, name in tied.items()
            }
            stored = {*self.manifest.matrices, *files.dense_names()}
            self.merged = names.merged(stored)
            located = {names.located(stands_for.get(name, name)) for name in stored} | self.tied.keys()
            missing = _missing(model, located)
            _check_dense(model, names, files)
            for name in stands_for.keys() - self.manifest.matrices.keys():
                self.converters.append(
                    WeightRenaming(f"^{re.escape(names.renamed(name))}$", names.located(stands_for[name]))
                )
            for name, form in self.manifest.matrices.items():
                if name not in stands_for and names.is_of_head(name):
                    continue
                target, pattern = names.target(stands_for.get(name, name))
                self.targets[name] = target
                if pattern is not None:
                    continue
                layer = None
                owner = target.rpartition(".")[0]
                linear: Any = model.get_submodule(owner)
                _check_shape(name, form.shape, names.tensors[target])
                constant = target not in {*ties.keys(), *ties.values()} and not _is_rescaled(model, target)
                if _is_plain_linear(linear) and constant:
                    layer = self.layers[name] = _empty(linear, form, _nonzeros(files, name, form))
                    _set_module(model, owner, layer)
                if layer is None or form.pattern is not None:
                    self.converters.append(self._converter(names, name, stands_for.get(name, name), layer))
        if missing:
            where = ", ".join(map(one_line, checkpoint_files))
            raise ValueError(
                f"{where}: the files lack the weight {one_line(missing[0])} of the model in config.json, "
                f"{len(missing)} in all; copy the folder again, or export it again"
            )
        return model

    def _converter(self, names: Names, name: str, to: str, layer: SparseLinear | None) -> WeightConverter:
        """The converter of the stored weight ``name`` to the model's weight that is stored as ``to``."""
        form, stem = self.manifest.matrices[name], names.located(to)
        sources = [f"^{names.renamed(part_name(name, part))}" for part in form.parts]
        targets = [stem] if layer is None else [part_name(stem, part) for part in ("values", "mask", "offsets")]
        operation = Restore(name, form, self.dtypes[self.targets[name]], layer, self.restored)
        return WeightConverter(sources, targets, [operation])

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Add the converters of stored weights, and let those of the model merge such weights."""
        merged_patterns = {pattern for group in self.merged.values() for pattern in group}
        updated = []
        for converter in weight_conversions:
            if isinstance(converter, WeightConverter) and merged_patterns & set(converter.source_patterns):
                patterns = list(converter._original_source_patterns)
                operation = RestoreMerged(self.manifest.matrices, self.merged, patterns, self.dtypes, self.restored)
                operations = [operation, *converter.operations]
                targets = list(converter._original_target_patterns)
                converter = converter.copy(RestoreMerged.extended(patterns), targets, operations=operations)
            updated.append(converter)
        return [*self.converters, *updated]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        ours = {id(converter) for converter in self.converters}
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [conversion for conversion in conversions if id(conversion) not in ours]  # type: ignore[assignment]
        lost = sorted(self.targets.keys() - self.layers.keys() - self.restored)
        lost += [name for name, layer in self.layers.items() if not _is_loaded(layer)]
        if lost:
            raise ValueError(f"the weight {one_line(lost[0])} was not loaded: this architecture renames it")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for alias, name in self.tied.items():
            # a base model may lack the head
            if alias in parameters and parameters[alias] is not parameters.get(name):
                raise ValueError(
                    f"{one_line(alias)} is stored as tied to {one_line(name)}, and the model of config.json does not "
                    "tie them; export the dense folder again"
                )
        to_few_token_linear(model)
        _compress_conv1d(model, [self.targets[name] for name in self.restored - self.layers.keys()])
        # the model holds this object: what only loading needs is no part of a copy or a pickle
        self.manifest, self.converters, self.merged, self.layers = Manifest(), [], {}, {}
        return model

    def is_serializable(self) -> bool:
        """Whether save_pretrained can write the model."""
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to save, and their manifest. Raises ValueError for an architecture that renames weights."""
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        if getattr(model, "_weight_conversions", None):
            raise ValueError(
                "save_pretrained: this architecture renames its weights on loading, which a sparse folder cannot "
                "record; copy the folder that it was loaded from"
            )
        state = remove_tied_weights_from_state_dict(model.state_dict(), model)
        manifest = Manifest()
        for name, module in model.named_modules():
            if isinstance(module, SparseLinear):
                manifest.matrices[f"{name}.weight"] = module.form()
                if module.is_transposed:
                    state |= {f"{name}.weight_{part}": tensor for part, tensor in module.stored_parts().items()}
        manifest.add({name: tensor.cpu() for name, tensor in state.items()})
        return state, manifest.to_metadata()

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top; the compressed weights cannot."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True lets transformers' Trainer train adapters of leanstep on top, which it does not know."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile traces the model."""
        return True


def _missing(model: nn.Module, located: set[str]) -> list[str]:
    """The weights that are not in the files, which transformers would initialise at random, with a warning.

    Not those of a head that is to be trained, such as a classifier on a language model.
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    missing = model.state_dict().keys() - located
    missing -= {name for pair in ties.items() if not located.isdisjoint(pair) for name in pair}
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing -= {name for name in missing if any(re.search(pattern, name) for pattern in optional)}
    base: Any = model.base_model
    if base is not model and has_another_head(model):
        missing = {name for name in missing if name.startswith(f"{model.base_model_prefix}.")}
    return sorted(missing)


def _check_dense(model: nn.Module, names: Names, files: SparseFiles) -> None:
    """Compare dtypes and shapes of the weights that are stored as they are with the model's.

    Shapes of a head may differ: with ``ignore_mismatched_sizes``, transformers makes a new one.
    """
    base: Any = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    for name in sorted(files.dense_names()):
        if names.lacks(name):
            continue
        target, pattern = names.target(name)
        stored = files.manifest.tensors[name]
        if names.tensors[target].is_floating_point() and not DTYPES[stored.dtype].is_floating_point:
            raise ValueError(f"{one_line(name)} is of dtype {stored.dtype}: expected floating-point weights")
        if pattern is None and target.startswith(prefix):
            _check_shape(name, stored.shape, names.tensors[target])


def _check_shape(name: str, shape: tuple[int, ...], parameter: Tensor) -> None:
    expected = tuple(parameter.shape)
    if shape != expected:
        raise ValueError(f"the weights do not fit config.json: {one_line(name)} is {shape}, expected {expected}")


def _nonzeros(files: SparseFiles, name: str, form: Form) -> int:
    if form.pattern is None:
        return form.most_values(files.manifest.tensors[part_name(name, "values")].shape[0])
    return int(nonzero_bits(files.part(name, "nm_values")).count_nonzero())


def _empty(linear: nn.Linear, form: Form, nnz: int) -> SparseLinear:
    """A compressed layer in place of a linear one, without values yet."""
    dtype = linear.weight.dtype
    shapes = form._replace(pattern=None).part_shapes(nnz)
    with torch.device("meta"):
        parts = {part: torch.empty(shape, dtype=DTYPES[name]) for part, (name, shape) in shapes.items()}
        if not form.codes:
            parts["values"] = parts["values"].to(dtype)
    return SparseLinear(linear.in_features, linear.out_features, parts=parts, dtype=dtype, bias=linear.bias)


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b and nothing else."""
    falcon = type(module).__name__ == "FalconLinear" and type(module).__module__.startswith("transformers.")
    return type(module) is nn.Linear or falcon


def _is_rescaled(model: nn.Module, weight: str) -> bool:
    """Whether the model changes a weight in place: RWKV divides those of two layers before it generates."""
    ends = ("attention.output.weight", "feed_forward.value.weight")
    return hasattr(model.base_model, "_rescale_layers") and weight.endswith(ends)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _is_loaded(layer: SparseLinear) -> bool:
    """Whether a layer's offsets and mask are those of its values; they are not where memory was never written."""
    try:
        layer.validate()
    except ValueError:
        return False
    return True


def _compress_conv1d(model: nn.Module, weights: Iterable[str]) -> None:
    """Replace transformers' Conv1D layers, whose weights were restored, by compressed ones."""
    owners = [name.rpartition(".")[0] for name in weights]
    for name in [owner for owner in owners if type(model.get_submodule(owner)) is Conv1D]:
        layer: Any = model.get_submodule(name)
        if not layer.weight.is_meta:
            _set_module(model, name, SparseLinear.from_conv1d(layer.weight, layer.bias))
