"""Optimizers for transformers' Trainer, TRL's and axolotl's: by their arguments, and LANTON's halves in them."""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from leanstep.optimizers.common.base import LeanOptimizer
from leanstep.optimizers.create import class_named, create
from leanstep.optimizers.lanton.halves import HalvesMarker

__all__ = ["MarkHalves", "optimizer_of"]


def optimizer_of(
    arguments: TrainingArguments, name: str, **options: Any
) -> tuple[Callable[[], Callable[..., LeanOptimizer]], dict[str, Any]]:
    """Return the ``optimizer_cls_and_kwargs`` of a Trainer, with the rates of its arguments.

    ``learning_rate``, ``weight_decay`` and ``optim_args`` ("key=value,key=value") become options of
    :func:`leanstep.optimizers.create`, which the Trainer calls after it has wrapped the model. ``optim`` has no effect.

    Args:
        arguments: the Trainer's.
        name: "lanton", "lion", "mfac" or "sinkgd".
        **options: further options of ``create``, in place of those of the same name in ``optim_args``.
            ``like_adamw=True``, there or here, says that learning rate and weight decay are AdamW's.

    Raises:
        ValueError: for an unknown name, and a part of ``optim_args`` without "=".

    Example:
        >>> Trainer(model, arguments, optimizer_cls_and_kwargs=optimizer_of(arguments, "sinkgd"))  # doctest: +SKIP
    """
    class_named(name, "optimizer_of")
    for pair in filter(None, (arguments.optim_args or "").split(",")):
        key, equals, text = map(str.strip, pair.partition("="))
        if not equals:
            raise ValueError(f"optim_args: expected key=value,key=value, got {pair!r:.80}")
        options.setdefault(key, _value(text))
    rates: dict[str, Any] = {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay}
    if options.pop("like_adamw", False):
        rates = {"like_adamw": rates}
    if arguments.process_index != 0:
        rates["say"] = None
    return (lambda: _create), {"name": name, **rates, **options}


def _create(model: Any, *arguments: Any, **options: Any) -> LeanOptimizer:
    return create(model, **options)  # axolotl also gives the arguments


def _value(text: str) -> Any:
    with suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


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
