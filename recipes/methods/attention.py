"""Attention layers of a run: where each head stands, and whether a layer may run low-rank."""

from pathlib import Path

import torch

from leanstep.lora import LowRankGate, NormMonitor
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.training.checkpoint import CheckpointError

__all__ = ["build_gate", "build_monitor", "read_gate", "write_gate"]


def build_monitor(model: torch.nn.Module) -> NormMonitor:
    """Watch the attention of ``model``, as it is trained, at log steps (``log.attention_norms``).

    Raises ValueError for a model whose attention cannot be watched.
    """
    try:
        return NormMonitor(model)
    except ValueError as error:
        raise ValueError(f"log.attention_norms: {error}") from None


def build_gate(config: RunConfig, model: torch.nn.Module) -> LowRankGate:
    """Let the attention of ``model`` run low-rank where that is close and pays (``lora.attention: auto``).

    Raises ValueError for a model whose attention cannot be reached.
    """
    try:
        return LowRankGate(model, config.lora.attention, tolerance=config.lora.attention_tolerance, seed=config.seed)
    except ValueError as error:
        raise ValueError(f"lora.attention: {error}") from None


def write_gate(gate: LowRankGate, trainer: Path, rank: int) -> None:
    """Write what a process's gate decided into ``trainer/`` of a checkpoint."""
    torch.save(gate.state_dict(), trainer / f"gate_{rank}.pt")


def read_gate(gate: LowRankGate, trainer: Path, rank: int, world: int) -> str | None:
    """Let the gate go on from what :func:`write_gate` wrote in as many processes.

    Returns:
        None, or why it cannot: then layers are judged anew, which is sound and not bit for bit the same.

    Raises CheckpointError for decisions about other layers.
    """
    written = len(list(trainer.glob("gate_*.pt")))
    if written != world:
        return (
            f"{trainer.parent} has the gate's decisions of {written} processes, not of {world}: layers are judged anew"
        )
    file = trainer / f"gate_{rank}.pt"
    try:
        gate.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return None
