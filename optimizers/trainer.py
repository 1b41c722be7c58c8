"""A callback for transformers' Trainer (and TRL's) that marks the halves of a step for LANTON's noise="halves"."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from leanstep.optimizers.lanton.halves import HalvesMarker

__all__ = ["MarkHalves"]


class MarkHalves(TrainerCallback):
    """Calls ``mark_half`` and ``mark_whole`` of a LANTON with noise="halves" in the Trainer's accumulation.

    Set ``gradient_accumulation_steps`` to 2 or more and ``max_grad_norm`` to 0: the Trainer clips before it calls
    callbacks, and clipping by norm hardly changes steps of a set length. Under FSDP2 the gradients of the first half
    exist only with ``accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}}``.

    Raises:
        TypeError, ValueError: when training begins: the optimizer is not LANTON with noise="halves"; fewer than two
            micro-batches; gradients are clipped, or scaled (fp16).

    Example:
        >>> Trainer(model, arguments, optimizers=(optimizer, None), callbacks=[MarkHalves()])  # doctest: +SKIP
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **objects: Any) -> None:
        """Check the settings; the Trainer has built and wrapped the optimizer by now."""
        if args.max_grad_norm:
            raise ValueError(
                f"MarkHalves: expected max_grad_norm=0, got {args.max_grad_norm}: the Trainer would clip the whole "
                "gradient before it is compared with its half. LANTON's steps have a set length without clipping"
            )
        if args.fp16:
            raise ValueError("MarkHalves: expected gradients without a loss scale, got fp16=True; take bf16=True")
        options = args.accelerator_config.gradient_accumulation_kwargs or {}
        # between the steps of accumulation, Accelerate averages nothing over processes unless told to
        averaged = bool(options.get("sync_each_batch", False))
        inner = getattr(optimizer, "optimizer", optimizer)
        self.marker = HalvesMarker(inner, args.gradient_accumulation_steps, averaged=averaged)

    def on_substep_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Count a micro-batch other than the last one of a step."""
        self.marker.after_micro_batch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Compare the halves; the Trainer does not tell of the last micro-batch by itself."""
        self.marker.done += 1
        self.marker.before_step()
