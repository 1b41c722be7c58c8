"""A callback for transformers' Trainer that attaches a controller and logs its statistics."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from leanstep.sparsity.training.controller import Controller

__all__ = ["SparsityCallback"]


class SparsityCallback(TrainerCallback):
    """Updates a controller's masks at every step of a Trainer's optimizer.

    ``trainer.save_model`` and the Trainer's checkpoints hold dense weights and masks, so training resumes exactly. Call
    :func:`leanstep.sparsity.squash` on the trained model before saving it for inference.

    Args:
        controller: the controller that :func:`leanstep.sparsity.sparsify` returned for the Trainer's model. Set its
            ``measure_every`` to the Trainer's ``logging_steps`` to log flip rates.

    Raises:
        ValueError: on resuming, if the step of the sparsity state differs from the Trainer's step.

    Example:
        >>> controller = sparsify(model, {"*.mlp.*": NM(1, 8)}, schedule=1000, method="srste")  # doctest: +SKIP
        >>> Trainer(model, arguments, callbacks=[SparsityCallback(controller)], ...).train()  # doctest: +SKIP
    """

    def __init__(self, controller: Controller) -> None:
        self.controller = controller

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Attach to the optimizer; the Trainer has built it and loaded the checkpoint by now."""
        if self.controller.step_count != state.global_step:
            raise ValueError(
                f"SparsityCallback: the Trainer begins at step {state.global_step}, the masks are those of step "
                f"{self.controller.step_count}; resume from a checkpoint of the sparse model, or call sparsify again"
            )
        self.controller.detach()
        self.controller.attach(objects["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Count a step that a gradient scaler skipped: the Trainer counts it."""
        while self.controller.step_count < state.global_step:
            self.controller.skip()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **objects: Any) -> None:
        """Add the controller's numbers, as ``sparse/KEY/LAYER``, to the training log and its history."""
        if logs is None or "loss" not in logs:
            return
        numbers = {f"sparse/{key}": value for key, value in self.controller.diagnostics().items()}
        logs.update(numbers)
        if state.log_history:
            # the Trainer has copied the log already
            state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Detach from the optimizer."""
        self.controller.detach()
