"""A callback for transformers' Trainer that clips queries and keys."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from leanstep.lora.attention.clip import QKClip
from leanstep.lora.attention.monitor import NormMonitor

__all__ = ["QKClipCallback"]


class QKClipCallback(TrainerCallback):
    """Runs :class:`leanstep.lora.QKClip` at the steps of a Trainer, and logs ``qk_clip/KEY``.

    Args:
        threshold, alpha: as for QKClip.
        every: measure and clip every ``every`` steps.

    Raises:
        ValueError: ``every`` is below 1; at the start of training, as QKClip and
            :class:`leanstep.lora.NormMonitor` do.

    Example:
        >>> Trainer(model, arguments, callbacks=[QKClipCallback(threshold=100.0)], ...).train()  # doctest: +SKIP
    """

    def __init__(self, threshold: float = 100.0, alpha: float = 0.5, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"QKClipCallback: expected every >= 1, got {every}")
        self.threshold, self.alpha, self.every = threshold, alpha, every
        self.clip: QKClip | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Tap the model's attention."""
        # an interrupted training has not ended
        self.on_train_end(args, state, control)
        monitor = NormMonitor(objects["model"])
        try:
            self.clip = QKClip(monitor, objects["optimizer"], threshold=self.threshold, alpha=self.alpha)
        except ValueError:
            monitor.close()
            raise

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Measure the first micro batch of the step."""
        if self.clip is not None and (state.global_step + 1) % self.every == 0:
            self.clip.arm(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Clip the updated weights."""
        if self.clip is not None:
            self.clip.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **objects: Any) -> None:
        """Add the numbers of the last clipping to the training log and its history."""
        if logs is None or "loss" not in logs or self.clip is None:
            return
        numbers = {f"qk_clip/{key}": value for key, value in self.clip.diagnostics().items()}
        logs.update(numbers)
        if state.log_history:
            # the Trainer has copied the log already
            state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Restore the model's attention."""
        if self.clip is not None:
            self.clip.monitor.close()
            self.clip = None
