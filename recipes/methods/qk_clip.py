"""QK-clip: scale down the queries and keys of heads whose largest logit passes a threshold (``qk_clip``)."""

from pathlib import Path

import torch

from leanstep.lora import NormMonitor, QKClip
from leanstep.recipes.methods.norms import Norms
from leanstep.recipes.training.parts import Part


class Clip(Part):
    """Clips after the optimizer's step, on the measurements of the run's monitor, or of one of its own."""

    name = "qk_clip"
    source: QKClip

    def begin(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path | None) -> None:
        """Find queries and keys. Raises ValueError for a model with unsupported attention."""
        section = self.run.config.qk_clip
        assert section.threshold is not None
        shared = next((part.source for part in self.run.parts if isinstance(part, Norms)), None)
        try:
            monitor = shared or NormMonitor(model)
            self.source = QKClip(monitor, optimizer, threshold=section.threshold, alpha=section.alpha)
        except ValueError as error:
            raise ValueError(f"qk_clip: {error}") from None

    def before_step(self) -> None:
        """Measure every ``qk_clip.every`` steps."""
        step = self.run.state.step
        if (step + 1) % self.run.config.qk_clip.every == 0:
            # the sample of a resumed run is that of an uninterrupted one
            self.source.arm(step)

    def after_step(self, applied: bool, finite: bool) -> None:
        """Clip."""
        if applied:
            self.source.step()

    def close(self) -> None:
        """Stop measuring."""
        self.source.monitor.close()
