"""The norms of attention, measured at log steps (``log.attention_norms``)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from leanstep.lora import NormMonitor
from leanstep.recipes.training.parts import Part


class Norms(Part):
    """The monitor of a run. ``attention_report.json``: the last measurement of each head."""

    name = "attention"
    source: NormMonitor

    def begin(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path | None) -> None:
        """Watch the attention layers."""
        self.source = build_monitor(model)

    def before_step(self) -> None:
        """Measure at log steps."""
        if self.run.logger.is_logged(self.run.state.step + 1):
            self.source.arm()

    def close(self) -> None:
        """Stop watching."""
        self.source.close()

    def report(self) -> Iterator[tuple[str, Any]]:
        """The rows of the monitor."""
        yield "attention_report.json", self.source.rows_of_report()


def build_monitor(model: torch.nn.Module) -> NormMonitor:
    """Measure the attention norms of ``model``. Raises ValueError for a model with unsupported attention."""
    try:
        return NormMonitor(model)
    except ValueError as error:
        raise ValueError(f"log.attention_norms: {error}") from None
