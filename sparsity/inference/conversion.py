"""Names of stored weights in a model of transformers, and operations that build weights while it loads a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from leanstep._files import one_line
from leanstep.kernels import bitmask_pack
from leanstep.sparsity.inference.linear import SparseLinear
from leanstep.sparsity.inference.matrices import Form, decompress, part_name

# every ending that a stored form may have
PARTS = ("values", "mask", "offsets", "scales", "nm_values", "nm_indices")


def has_another_head(model: nn.Module) -> bool:
    """Whether a model is a base model without a head, or of another class than config.json names."""
    if getattr(model, "base_model", None) is model:
        return True
    architectures: list[str] = getattr(getattr(model, "config", None), "architectures", None) or []
    return bool(architectures) and type(model).__name__ not in architectures


class Names:
    """Names of stored weights in a model, by the renamings that transformers has for its architecture."""

    def __init__(self, model: nn.Module) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        # a buffer that files have may be a matrix of zeros, such as BART's final_logits_bias
        self.tensors = model.state_dict(keep_vars=True)
        self._prefix = getattr(model, "base_model_prefix", "")
        self._has_another_head = has_another_head(model)

    def renamed(self, name: str) -> str:
        """The name before the prefix of the base model is added or removed."""
        return rename_source_key(name, self._renamings, [])[0]

    def target(self, name: str) -> tuple[str, str | None]:
        """The parameter or buffer of a stored tensor; if it is merged from several, also the pattern of its name.

        Raises:
            ValueError: for a weight that the model does not have.
        """
        target, pattern = self._renamed(name)
        if target not in self.tensors:
            raise ValueError(f"the weights do not fit config.json: its model has no weight {one_line(name)}")
        return target, pattern

    def located(self, name: str) -> str:
        """The parameter of a stored weight, whether or not the model has it."""
        return self._renamed(name)[0]

    def lacks(self, name: str) -> bool:
        """Whether the model has no parameter or buffer for a stored weight."""
        return self._renamed(name)[0] not in self.tensors

    def is_of_head(self, name: str) -> bool:
        """Whether a stored weight belongs to the head of another model, of which this is the base or has the same."""
        return self._has_another_head and self.lacks(name) and not name.startswith(f"{self._prefix}.")

    def _renamed(self, name: str) -> tuple[str, str | None]:
        return rename_source_key(name, self._renamings, self._converters, self._prefix, self.tensors)

    def merged(self, names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
        """Parameter -> pattern -> the stored weights that are merged into it, in the order of loading."""
        groups: dict[str, dict[str, list[str]]] = {}
        for name in sorted(names, key=dot_natural_key):
            target, pattern = self._renamed(name)
            if pattern is not None:
                groups.setdefault(target, {}).setdefault(pattern, []).append(name)
        return groups


class _Operation(ConversionOps):
    """An operation on uncast tensors that transformers may copy."""

    supports_many_to_many = True
    # transformers casts no input of an operation that has this attribute
    hf_quantizer = True

    def __deepcopy__(self, memo: Any) -> _Operation:
        return self


class Restore(_Operation):
    """Builds the dense parameter, or the buffers of a compressed layer, from the parts of one stored weight.

    Args:
        name: of the stored weight; added to ``restored`` when it is built.
        form: how it is stored.
        layer: the compressed layer; None for a dense parameter.
    """

    def __init__(
        self, name: str, form: Form, dtype: torch.dtype, layer: SparseLinear | None, restored: set[str]
    ) -> None:
        self.name, self.form, self.dtype, self.layer, self.restored = name, form, dtype, layer, restored

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The tensors of ``target_patterns``: the weight, or values, mask and offsets."""
        parts = [input_dict[pattern][0] for pattern in source_patterns]
        weight = _dense(self.form, dict(zip(self.form.parts, parts, strict=True)))
        self.restored.add(self.name)
        if self.layer is None:
            return {target_patterns[0]: weight.to(self.dtype)}
        layer = self.layer
        if weight.is_meta:
            buffers = (layer.weight_values, layer.weight_mask, layer.weight_offsets)
        else:  # packed as stored: in another dtype some values may be zero
            values, mask, offsets = bitmask_pack(weight)
            buffers = values.to(self.dtype), mask, offsets
        return dict(zip(target_patterns, buffers, strict=True))


class RestoreMerged(_Operation):
    """Builds the stored weights that the model's next operations merge, such as those of experts.

    Args:
        forms: stored weight -> form; the others are stored dense.
        groups: see :meth:`Names.merged`.
        patterns: those of the model's converter; the converter of this operation has the names of parts behind them.
        dtypes: parameter -> dtype.
        restored: gets the names that are built.
    """

    def __init__(
        self,
        forms: Mapping[str, Form],
        groups: Mapping[str, Mapping[str, list[str]]],
        patterns: Collection[str],
        dtypes: Mapping[str, torch.dtype],
        restored: set[str],
    ) -> None:
        self.forms, self.groups, self.patterns, self.dtypes, self.restored = forms, groups, patterns, dtypes, restored

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The dense weights of each of the model's patterns, in the order of their names."""
        waiting = {pattern: iter(tensors) for pattern, tensors in input_dict.items()}
        outputs: dict[str, list[Tensor]] = defaultdict(list)
        for pattern, names in self.groups[full_layer_name].items():
            for name in names:
                form = self.forms.get(name)
                if form is None:
                    weight = next(waiting[pattern])
                else:
                    weight = _dense(form, {part: next(waiting[part_name(pattern, part)]) for part in form.parts})
                    self.restored.add(name)
                outputs[pattern].append(weight.to(self.dtypes[full_layer_name]))
        return dict(outputs)

    @staticmethod
    def extended(patterns: Iterable[str]) -> list[str]:
        """Patterns of whole weights, and behind them those of their parts."""
        patterns = list(patterns)
        return patterns + [part_name(pattern, part) for pattern in patterns for part in PARTS]


def _dense(form: Form, parts: dict[str, Tensor]) -> Tensor:
    if any(part.is_meta for part in parts.values()):
        return torch.empty(form.shape, device="meta")
    return decompress(form, parts)
