"""Mark the halves of a step's micro batches, for LANTON with noise="halves"."""

from pathlib import Path
from typing import Any

import torch

from leanstep.recipes.training.parts import Part


class Halves(Part):
    """Tells the optimizer that half, or all, of a step's micro batches are done, if a group has ``noise="halves"``.

    The optimizer has ``mark_half(fraction, averaged=, loss_scale=)`` and ``mark_whole(loss_scale=)``, as in
    :class:`leanstep.optimizers.LANTON`.
    """

    _optimizer: Any = None

    def begin(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path | None) -> None:
        """Look for such a group, also in what a checkpoint has loaded.

        Raises ValueError for a step of one micro batch, or with FSDP2, whose gradients exist only at the end of a step.
        """
        if not hasattr(optimizer, "mark_half") or not halved_groups(optimizer):
            return
        accelerator = self.run.accelerator
        if accelerator.gradient_accumulation_steps < 2:
            raise ValueError(
                "optimizer.args.noise: 'halves' compares two halves of a step's micro batches, and a step has one; "
                "lower batch.micro_batch_size, or take noise: previous"
            )
        if accelerator.distributed_type == "FSDP":
            raise ValueError(
                "optimizer.args.noise: 'halves' needs gradients after half of a step's micro batches, which "
                "distributed.strategy fsdp2 has at the end only; take strategy ddp, or noise: previous"
            )
        self._optimizer = optimizer

    def after_half(self, fraction: float) -> None:
        """Mark the end of this fraction of the micro batches."""
        if self._optimizer is not None:
            # processes exchange gradients in the last micro batch only
            averaged = None if self.run.accelerator.num_processes == 1 else False
            self._optimizer.mark_half(fraction, averaged=averaged, loss_scale=self._scale())

    def after_backward(self) -> None:
        """Mark the end of all micro batches, before gradients are clipped or masked."""
        if self._optimizer is not None:
            self._optimizer.mark_whole(loss_scale=self._scale())

    def _scale(self) -> float:
        scaler = self.run.accelerator.scaler
        return 1.0 if scaler is None else scaler.get_scale()


def halved_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The groups of an optimizer with ``mark_half`` that have ``noise="halves"``."""
    return [
        group
        for group in optimizer.param_groups
        if group.get("noise") == "halves" and group.get("noise_adaptive", True)
    ]
