"""Train a pruned model and keep its zeros: masks, their memory, and sparsity files."""

import json
from pathlib import Path
from typing import Any

import torch

from leanstep._checkpoint.files import TensorFile, read_json
from leanstep.lora import keep_zeros
from leanstep.lora.layers.linear import LoRALinearLayer
from leanstep.pruning import MaskKeeper, keep_masks
from leanstep.pruning.score.targets import prunable_names
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.training.parts import Part
from leanstep.sparsity.verify import PATTERNS_FILE


class Masks(Part):
    """Keeps the zeros of a pruned model (``pruning.keep_masks``), and writes the sparsity beside its weights."""

    keeper: MaskKeeper

    def prepared(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make the masks. They are the zeros of ``model.init_from``, so a checkpoint is loaded later."""
        config = self.run.config
        names = masked_names(config, model)
        try:
            self.keeper = keep_masks(model, optimizer, include=names)
        except ValueError as error:
            raise ValueError(f"pruning.keep_masks: {error} (model.init_from {config.model.init_from})") from None
        masks = len(self.keeper.masks)
        self.run.say(f"pruning     {self.keeper.sparsity():.2%} of {masks} matrices are zero and stay zero")

    def after_backward(self) -> None:
        """Mask the gradients."""
        self.keeper.mask_gradients()

    def export(self, model: torch.nn.Module, path: Path) -> None:
        """Write the sparsity of each matrix."""
        write_sparsity(list(self.keeper.parameters), str(self.run.config.model.init_from), path)


def masked_names(config: RunConfig, model: torch.nn.Module) -> list[str]:
    """Names of the parameters to mask; none without ``pruning.keep_masks``.

    Raises ValueError for wildcards without a match, or a model without matrices to mask.
    """
    pruning = config.pruning
    if not pruning.keep_masks:
        return []
    adapters = [name for name, _ in model.named_parameters() if ".lora_" in name]
    exclude = [*pruning.exclude, *(["*.lora_*"] if adapters else [])]
    try:
        return prunable_names(model, include=pruning.include, exclude=exclude)
    except ValueError as error:
        raise ValueError(f"pruning.keep_masks: {error} (model.init_from {config.model.init_from})") from None


def mask_adapters(config: RunConfig, model: torch.nn.Module) -> None:
    """With ``pruning.keep_masks``, mask the adapters' products where their base weight is zero."""
    names = {name.rpartition(".")[0] for name in masked_names(config, model)}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinearLayer)}
    # a matrix on the meta device counts as one with zeros
    zeros = [n for n, layer in layers.items() if n in names and (layer.weight.is_meta or not bool(layer.weight.all()))]
    keep_zeros(model, zeros)


def pruned_start_warning(config: RunConfig) -> str:
    """Warning for a run that starts from a pruned model and does not keep its zeros; else ""."""
    source = config.model.init_from
    if config.pruning.keep_masks or config.sparsity.patterns or not source:
        return ""
    if not (Path(source).expanduser() / PATTERNS_FILE).is_file():
        return ""
    return (
        f"{source} is pruned, as its {PATTERNS_FILE} says, and training fills its zeros; pruning.keep_masks=true keeps "
        "them"
    )


def zeros_of(folder: Path, names: list[str]) -> dict[str, tuple[int, int]]:
    """Name -> (zeros, elements) of these tensors in a folder's safetensors files."""
    counts = {}
    for file in sorted(folder.glob("*.safetensors")):
        with TensorFile(file) as weights:
            for name in set(names) & set(weights.names):
                tensor = weights.tensor(name)
                counts[name] = (tensor.numel() - int(tensor.count_nonzero()), tensor.numel())
    return {name: counts[name] for name in names if name in counts}


def write_sparsity(names: list[str], source: str, path: Path) -> None:
    """Count zeros in the files of the folder ``path`` and write the sparsity of each pruned matrix there.

    Copies N:M patterns from ``source``, the pruned model that the run began with.
    """
    rows: dict[str, dict[str, Any]] = {}
    counts = zeros_of(path, names)
    patterns = _patterns(Path(source).expanduser())
    for name, (zeros, numel) in counts.items():
        rows[name] = {"sparsity": zeros / numel, **patterns.get(name, {})}
    if rows:
        total = sum(numel for _, numel in counts.values())
        content = {"source": source, "sparsity": sum(zeros for zeros, _ in counts.values()) / total, "tensors": rows}
        (path / PATTERNS_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _patterns(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> pattern and dimension from a folder's sparsity file; empty without one."""
    try:
        content = read_json(folder / PATTERNS_FILE)
        entries = content.get("tensors", content).items()
        return {name: {key: row[key] for key in ("pattern", "dim")} for name, row in entries if row.get("pattern")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
