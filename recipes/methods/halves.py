"""Mark the two halves of a step's micro batches, for LANTON with noise="halves"."""

from typing import Any

from accelerate import Accelerator


class Halves:
    """Tells the optimizer when half of the micro batches are done, and when all are, before gradients are clipped.

    The optimizer has ``mark_half(fraction, averaged=, loss_scale=)`` and ``mark_whole(loss_scale=)``, as
    :class:`leanstep.optimizers.LANTON` has them.
    """

    def __init__(self, optimizer: Any, accelerator: Accelerator) -> None:
        self._optimizer, self._accelerator = optimizer, accelerator

    def half(self, fraction: float) -> None:
        """Mark that this fraction of the step's micro batches is done."""
        # processes exchange gradients in the last micro batch only
        averaged = None if self._accelerator.num_processes == 1 else False
        self._optimizer.mark_half(fraction, averaged=averaged, loss_scale=self._scale())

    def whole(self) -> None:
        """Mark that all micro batches are done; call it before gradients are clipped or masked."""
        self._optimizer.mark_whole(loss_scale=self._scale())

    def _scale(self) -> float:
        scaler = self._accelerator.scaler
        return 1.0 if scaler is None else scaler.get_scale()


def find_halves(optimizer: Any, accelerator: Accelerator) -> Halves | None:
    """The marker of halves if a group of ``optimizer`` has ``noise="halves"``, else None.

    Raises ValueError where a step has no halves: one micro batch, or sharded gradients that exist at its end only.
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
    """The groups of ``optimizer`` that compare the halves of a step."""
    groups = optimizer.param_groups if hasattr(optimizer, "mark_half") else []
    return [group for group in groups if group.get("noise") == "halves" and group.get("noise_adaptive", True)]
