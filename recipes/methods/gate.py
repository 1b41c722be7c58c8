"""The gate that chooses low-rank attention per layer where its error is small (``lora.attention: auto``)."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from leanstep.lora import LowRankGate
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.training.checkpoint import reading
from leanstep.recipes.training.parts import Part


class Gate(Part):
    """The gate of a run. ``gate_report.json``: which layers ran low-rank, the reason, and the errors."""

    name = "gate"
    source: LowRankGate

    def begin(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path | None) -> None:
        """Decide as ``checkpoint`` says, or anew."""
        self.source = build_gate(self.run.config, model)
        if checkpoint is not None and (problem := self.load(checkpoint)):
            self.run.say(f"WARNING: {problem}")

    def rolled_back(self, checkpoint: Path) -> None:
        """Decide as the checkpoint says."""
        self.load(checkpoint)

    def load(self, checkpoint: Path) -> str | None:
        """Load the decisions of :meth:`save`.

        Returns a warning if another number of processes wrote them, else None. The gate then decides anew: the run is
        correct, but not bit for bit the same. Raises CheckpointError for decisions about other layers.
        """
        trainer, world = checkpoint / "trainer", self.run.accelerator.num_processes
        written = len(list(trainer.glob("gate_*.pt")))
        if written != world:
            return (
                f"{checkpoint} has the gate's decisions of {written} processes, not of {world}: layers are judged anew"
            )
        file = trainer / f"gate_{self.run.accelerator.process_index}.pt"
        with reading(file):
            self.source.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return None

    def state_dict(self) -> dict[str, Any]:
        """The decisions."""
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the decisions."""
        self.source.load_state_dict(state)

    def save(self, trainer: Path) -> None:
        """Write this process's decisions."""
        torch.save(self.source.state_dict(), trainer / f"gate_{self.run.accelerator.process_index}.pt")

    def close(self) -> None:
        """Take the hooks off the attention layers."""
        self.source.close()

    def report(self) -> Iterator[tuple[str, Any]]:
        """The decision of each layer, and a line that sums them up."""
        rows = [asdict(row) for row in self.source.report()]
        yield "gate_report.json", rows
        ran = sum(row["low_rank_calls"] > 0 for row in rows)
        worst = max((row["largest_error"] for row in rows), default=0.0)
        error = f", with an error of at most {worst:.1e}" if ran else f"; {rows[0]['reason']}" if rows else ""
        self.run.say(f"attention   {ran} of {len(rows)} layers ran low-rank{error}")


def build_gate(config: RunConfig, model: torch.nn.Module) -> LowRankGate:
    """Run attention layers low-rank where the error is small and the cost lower (``lora.attention: auto``).

    Raises ValueError for a model with unsupported attention.
    """
    try:
        return LowRankGate(model, config.lora.attention, tolerance=config.lora.attention_tolerance, seed=config.seed)
    except ValueError as error:
        raise ValueError(f"lora.attention: {error}") from None
