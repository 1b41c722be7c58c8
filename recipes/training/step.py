"""The computations of an optimizer step over a window of micro batches: loss, gradient norm, and their reduction."""

import math
import signal
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator

from leanstep._torch import whole_tensor
from leanstep.optimizers import GradientRelease
from leanstep.recipes.data.batches import Batch, count_targets


class StepResult(NamedTuple):
    """Result of a step, equal in all processes; ``norm`` is None with ``release_gradients``."""

    loss: float
    norm: float | None
    targets: int
    signal: int

    def finite(self) -> bool:
        """Whether loss and gradient norm are finite numbers."""
        return math.isfinite(self.loss) and (self.norm is None or math.isfinite(self.norm))


class NonFinite(Exception):
    """A non-finite loss, raised before backward, which would update the weights."""

    def __init__(self, loss: float) -> None:
        self.loss = loss
        super().__init__(f"loss {loss}")


def backward(
    accelerator: Accelerator,
    model: torch.nn.Module,
    window: list[Batch],
    *,
    release: GradientRelease | None = None,
    after_half: Callable[[float], None] = lambda fraction: None,
) -> tuple[torch.Tensor, int]:
    """Accumulate the gradient of the mean loss per target; return (this process's term of the loss, targets).

    Loss = sum of token losses / number of targets, over all micro batches and processes, as in one large batch.
    With ``release``, the last pass updates the weights, the others add their gradients to the momentum of parameters
    whose rule allows it, and a non-finite loss raises NonFinite before its backward. ``after_half`` is called after
    half of the micro batches, rounded down, with their fraction.
    """
    targets = count_targets(window)
    if accelerator.num_processes > 1:
        targets = accelerator.reduce(targets, reduction="sum")
    divisor = targets.clamp(min=1)
    # undoes Accelerate's division by the accumulation steps, and DDP's by the number of processes
    factor = accelerator.gradient_accumulation_steps * accelerator.num_processes
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(window, start=1):
        summing = nullcontext() if release is None or number == len(window) else release.accumulate(keep_others=True)
        with accelerator.accumulate(model), summing:
            loss = model(**batch, use_cache=False, num_items_in_batch=divisor).loss
            if release is not None and not torch.isfinite(loss):
                raise NonFinite(float(loss.detach()))
            accelerator.backward(loss * factor)
        total += loss.detach()
        if number == len(window) // 2:
            after_half(number / len(window))
    return total, int(targets)


def gradient_norm(accelerator: Accelerator, model: torch.nn.Module, limit: float | None) -> torch.Tensor:
    """Return the 2-norm of all gradients before clipping, and clip them to ``limit`` unless it is None."""
    if limit is not None:
        norm = accelerator.clip_grad_norm_(model.parameters(), limit)
    else:
        accelerator.unscale_gradients()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    return whole_tensor(norm)


def all_reduce_step_scalars(
    accelerator: Accelerator, loss: torch.Tensor, norm: torch.Tensor | None, received: int, late: bool
) -> tuple[float, float | None, int]:
    """Sum loss and signals over all processes in one collective call and one synchronisation.

    Signals other than SIGINT, and a run out of time (``late``), count as SIGTERM.
    """
    interrupted = received == signal.SIGINT
    terminated = late or received not in (0, signal.SIGINT)
    values = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    values[0] = loss
    if interrupted or terminated:
        values[1], values[2] = float(interrupted), float(terminated)
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, reduction="sum")
    if norm is not None:
        values = torch.cat([values, norm.double().reshape(1).to(values.device)])
    total, interrupts, terminations, *norms = values.tolist()
    number = signal.SIGTERM if terminations else signal.SIGINT if interrupts else 0
    return total, norms[0] if norms else None, int(number)


def describe_nonfinite(loss: float, norm: float | None) -> str:
    """``loss is nan`` or ``the gradient norm is inf (loss 3.4123)``."""
    if not math.isfinite(loss):
        return f"loss is {loss}"
    return f"the gradient norm is {norm} (loss {loss:.4f})"
