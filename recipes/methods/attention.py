"""Attention in a run: the monitor of its norms, QK-clip, and the gate that chooses low-rank attention per layer."""

from pathlib import Path

import torch

from leanstep.lora import LowRankGate, NormMonitor, QKClip
from leanstep.recipes.config.schema import QKClipConfig, RunConfig
from leanstep.recipes.training.checkpoint import reading


def build_monitor(model: torch.nn.Module) -> NormMonitor:
    """Measure the attention norms of ``model`` at log steps (``log.attention_norms``).

    Raises ValueError for a model with unsupported attention.
    """
    try:
        return NormMonitor(model)
    except ValueError as error:
        raise ValueError(f"log.attention_norms: {error}") from None


def build_clip(
    config: QKClipConfig, model: torch.nn.Module, optimizer: torch.optim.Optimizer, monitor: NormMonitor | None
) -> QKClip:
    """Clip queries and keys on the measurements of ``monitor``, or of one of its own (``qk_clip``).

    Raises ValueError for a model with unsupported attention.
    """
    assert config.threshold is not None
    try:
        return QKClip(monitor or NormMonitor(model), optimizer, threshold=config.threshold, alpha=config.alpha)
    except ValueError as error:
        raise ValueError(f"qk_clip: {error}") from None


def build_gate(config: RunConfig, model: torch.nn.Module) -> LowRankGate:
    """Run attention layers low-rank where the error is small and the cost lower (``lora.attention: auto``).

    Raises ValueError for a model with unsupported attention.
    """
    try:
        return LowRankGate(model, config.lora.attention, tolerance=config.lora.attention_tolerance, seed=config.seed)
    except ValueError as error:
        raise ValueError(f"lora.attention: {error}") from None


def write_gate(gate: LowRankGate, trainer: Path, rank: int) -> None:
    """Write the decisions of this process's gate into ``trainer/`` of a checkpoint."""
    torch.save(gate.state_dict(), trainer / f"gate_{rank}.pt")


def read_gate(gate: LowRankGate, trainer: Path, rank: int, world: int) -> str | None:
    """Load the decisions that :func:`write_gate` wrote.

    Returns a warning if another number of processes wrote them, else None. The gate then decides anew: the run is
    correct, but not bit for bit the same. Raises CheckpointError for decisions about other layers.
    """
    written = len(list(trainer.glob("gate_*.pt")))
    if written != world:
        return (
            f"{trainer.parent} has the gate's decisions of {written} processes, not of {world}: layers are judged anew"
        )
    file = trainer / f"gate_{rank}.pt"
    with reading(file):
        gate.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return None
