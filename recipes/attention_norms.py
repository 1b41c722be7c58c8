"""Norms of the attention layers of a run: where each head stands, in the log and in the report."""

import torch

from leanstep.lora import NormMonitor
from leanstep.recipes.config import RunConfig

__all__ = ["build_monitor"]


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
