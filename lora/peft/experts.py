"""Layers of mixtures of experts that PEFT reads as something else."""

from __future__ import annotations

from torch import nn

# the renaming of PEFT 0.21 with transformers 5, by the kind of checkpoint: older checkpoints call experts so
_NAMES = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}


def names_read_as_experts(model: nn.Module) -> frozenset[str]:
    """The ends of ``target_modules`` that PEFT replaces by ``target_parameters`` of experts and routers.

    PEFT does so wherever such a layer is, also for MLPs without experts. Empty for models without such a renaming.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str):
        return frozenset()
    try:
        from transformers import conversion_mapping
    except ImportError:  # older versions, without fused experts
        return frozenset()
    kinds = {**getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}
    return _NAMES.get(str(kinds.get(model_type)), frozenset())
