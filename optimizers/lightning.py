"""A callback for Lightning that marks the halves of a step for LANTON's noise="halves"."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from leanstep.optimizers.lanton.halves import HalvesMarker

__all__ = ["MarkHalves"]


class MarkHalves(Callback):
    """Calls ``mark_half`` and ``mark_whole`` of a LANTON with noise="halves" in Lightning's accumulation.

    Set the Trainer's ``accumulate_grad_batches`` to 2 or more, or Lightning's ``GradientAccumulationScheduler`` to 2 or
    more in every epoch. Lightning clips after the halves are compared, so
    ``gradient_clip_val`` may be set. One optimizer, with automatic optimization, in fp32 or bf16.

    Raises:
        TypeError, ValueError: when training begins: there are several optimizers, or one that is not LANTON with
            noise="halves"; fewer than two micro-batches, also in a later epoch; gradients with a loss scale
            ("16-mixed").

    Example:
        >>> Trainer(accumulate_grad_batches=4, callbacks=[MarkHalves()])  # doctest: +SKIP
    """

    marker: HalvesMarker | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the settings."""
        self.marker = None
        if len(trainer.optimizers) != 1:
            raise ValueError(f"MarkHalves: expected one optimizer, got {len(trainer.optimizers)}")
        if trainer.precision == "16-mixed":
            raise ValueError("MarkHalves: expected gradients without a loss scale, got 16-mixed; take bf16-mixed")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take the number of micro-batches, which may change from one epoch to the next."""
        count = trainer.accumulate_grad_batches
        if self.marker is None or self.marker.count != count:
            # between the steps of accumulation, Lightning averages nothing over processes
            self.marker = HalvesMarker(trainer.optimizers[0], count, averaged=False)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Count a micro-batch."""
        assert self.marker is not None
        self.marker.after_micro_batch()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Compare the halves."""
        assert self.marker is not None
        self.marker.before_step()
