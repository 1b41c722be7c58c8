"""Mark the halves of a step's micro batches, for LANTON with noise="halves"."""

from typing import Any

from accelerate import Accelerator


class Halves:
    """Tells the optimizer that half, or all, of a step's micro batches are done.

    The optimizer has ``mark_half(fraction, averaged=, loss_scale=)`` and ``mark_whole(loss_scale=)``, as in
    :class:`leanstep.optimizers.LANTON`.
    """

    def __init__(self, optimizer: Any, accelerator: Accelerator) -> None:
        self._optimizer, self._accelerator = optimizer, accelerator

    def half(self, fraction: float) -> None:
        """Mark the end of this fraction of the micro batches."""
        # processes exchange gradients in the last micro batch only
        averaged = None if self._accelerator.num_processes == 1 else False
        self._optimizer.mark_half(fraction, averaged=averaged, loss_scale=self._scale())

    def whole(self) -> None:
        """Mark the end of all micro batches. Call it before clipping or masking gradients."""
        self._optimizer.mark_whole(loss_scale=self._scale())

    def _scale(self) -> float:
        scaler = self._accelerator.scaler
        return 1.0 if scaler is None else scaler.get_scale()


def find_halves(optimizer: Any, accelerator: Accelerator) -> Halves | None:
    """Return :class:`Halves` if a group of ``optimizer`` has ``noise="halves"``, else None.

    Raises ValueError for a step of one micro batch, or with FSDP2, whose gradients exist only at the end of a step.
    """
    if not halved_groups(optimizer):
        return None
    if accelerator.gradient_accumulation_steps < 2:
        raise ValueError(
            "optimizer.args.noise: 'halves' compares two halves of a step's micro batches, and a step has one; lower "
            "batch.micro_batch_size, or take noise: previous"
        )
    if accelerator.distributed_type == "FSDP":
        raise ValueError(
            "optimizer.args.noise: 'halves' needs gradients after half of a step's micro batches, which "
            "distributed.strategy fsdp2 has at the end only; take strategy ddp, or noise: previous"
        )
    return Halves(optimizer, accelerator)


def halved_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The groups of an optimizer with ``mark_half`` that have ``noise="halves"``."""
    return [
        group
        for group in optimizer.param_groups
        if group.get("noise") == "halves" and group.get("noise_adaptive", True)
    ]
