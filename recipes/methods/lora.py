"""Low-rank adapters in a run: adapt the model, store the merged model and the adapter.

A saved model is the merged model, an ordinary Hugging Face folder, with ``adapter/`` in PEFT's format inside. A resumed
run loads the base from ``model.init_from`` and the adapter from the checkpoint.
"""

from dataclasses import asdict
from pathlib import Path

import torch

from leanstep.lora import LoraConfig, apply_lora, load_adapter
from leanstep.lora.apply import all_adapters
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.methods.pruned import mask_adapters
from leanstep.recipes.training.checkpoint import CheckpointError

ADAPTER = "adapter"


def adapt(config: RunConfig, model: torch.nn.Module) -> None:
    """Add the adapters of ``config.lora`` to the model. Raises ValueError for layers that cannot have one."""
    settings = asdict(config.lora)
    for name in ("attention", "attention_tolerance", "lr_ratio"):
        del settings[name]
    if settings["target_modules"] == ["all-linear"]:
        settings["target_modules"] = "all-linear"
    if next(model.parameters()).is_meta:
        # `leanstep check` counts sizes; PiSSA would decompose the weights
        settings["init_lora_weights"] = True
    settings["modules_to_save"] = settings["modules_to_save"] or None
    settings["target_parameters"] = settings["target_parameters"] or None
    try:
        lora = LoraConfig(**settings, task_type="CAUSAL_LM", base_model_name_or_path=config.model.init_from)
        apply_lora(model, lora)
    except ValueError as error:
        raise ValueError(f"lora: {error}") from None
    mask_adapters(config, model)


def describe_adapters(model: torch.nn.Module) -> str:
    """``14 layers, 98,304 of 1,164,800 parameters are trained``."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"{len(all_adapters(model))} layers, {trained:,} of {total:,} parameters are trained"


def load_adapters(model: torch.nn.Module, path: Path) -> None:
    """Load the adapter beside a merged model. Raises CheckpointError if it is missing or does not fit."""
    try:
        load_adapter(model, path / ADAPTER)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the adapter cannot be loaded: {error}") from error
