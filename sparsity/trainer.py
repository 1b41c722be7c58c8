"""N:M sparsity in transformers' Trainer: a callback that attaches a controller and logs what it knows."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from leanstep.sparsity.controller import Controller

__all__ = ["SparsityCallback"]


class SparsityCallback(TrainerCallback):
    """Moves a controller's masks along with a Trainer's optimizer.

    ``trainer.save_model`` and the Trainer's checkpoints hold dense weights and masks, from which training goes on
    exactly; :func:`leanstep.sparsity.squash` the trained model before saving it for others.

    Args:
        controller: what :func:`leanstep.sparsity.sparsify` returned for the Trainer's model. Give it ``measure_every``
            as the Trainer's ``logging_steps`` to find flip rates in the log.

    Raises:
        ValueError: when a checkpoint is resumed whose sparsity state is of another step than the Trainer's.

    Example:
        >>> controller = sparsify(model, {"*.mlp.*": NM(1, 8)}, schedule=1000, method="srste")  # doctest: +SKIP
        >>> Trainer(model, arguments, callbacks=[SparsityCallback(controller)], ...).train()  # doctest: +SKIP
    """

    def __init__(self, controller: Controller) -> None:
        self.controller = controller

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Attach to the optimizer, which exists by now; the checkpoint is loaded already."""
        if self.controller.step_count != state.global_step:
            raise ValueError(
                f"SparsityCallback: the Trainer begins at step {state.global_step}, the masks are those of step "
                f"{self.controller.step_count}; resume from a checkpoint of the sparse model, or make it sparse anew"
            )
        self.controller.detach()
        self.controller.attach(objects["optimizer"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **objects: Any) -> None:
        """Add the controller's numbers, as ``sparse/WHAT/LAYER``, to what is logged of training and to its history."""
        if logs is None or "loss" not in logs:
            return
        found = {f"sparse/{key}": value for key, value in self.controller.diagnostics().items()}
        logs.update(found)
        if state.log_history:
            # the Trainer has taken its copy already
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Let go of the optimizer."""
        self.controller.detach()
