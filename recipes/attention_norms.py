"""Attention layers of a run: where each head stands, and whether a layer may run low-rank."""

import torch

from leanstep.lora import LowRankGate, NormMonitor
from leanstep.recipes.config import RunConfig

__all__ = ["build_gate", "build_monitor"]


def build_monitor(config: RunConfig, model: torch.nn.Module) -> NormMonitor | None:
    """Watch the attention of ``model``, as it is trained, at log steps; None unless ``log.attention_norms`` is set.

    Raises ValueError for a model whose attention cannot be watched.
    """
    if not config.log.attention_norms:
        return None
    try:
        return NormMonitor(model)
    except ValueError as error:
        raise ValueError(f"log.attention_norms: {error}") from None


def build_gate(config: RunConfig, model: torch.nn.Module) -> LowRankGate | None:
    """Let the attention of ``model`` run low-rank where that is close and pays; None for ``lora.attention: exact``.

    Raises ValueError for a model whose attention cannot be reached.
    """
    if config.lora.attention == "exact":
        return None
    try:
        return LowRankGate(model, config.lora.attention, tolerance=config.lora.attention_tolerance, seed=config.seed)
    except ValueError as error:
        raise ValueError(f"lora.attention: {error}") from None
