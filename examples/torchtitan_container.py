"""leanstep's optimizers in torchtitan: its container of optimizers, with one of them for each part of the model.

Written for torchtitan 0.2.2 as of commit b5bcd76c (August 2026). The trainer builds the container after it has sharded
the parts. Steps, hooks, schedulers and checkpoints by parameter names are torchtitan's. In a ``config_registry.py``:

    def llama3_8b_sinkgd() -> Trainer.Config:
        config = llama3_8b()
        config.optimizer = LeanOptimizersContainer.Config(name="sinkgd", options={"lr": 2e-2})
        return config
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torchtitan.components.optimizer import OptimizersContainer

from leanstep.optimizers import create


class LeanOptimizersContainer(OptimizersContainer):
    """One optimizer of :func:`leanstep.create` for each part of the model."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """The arguments of :func:`leanstep.create`; those of the base class are not read."""

        name: str = "sinkgd"
        options: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config, *, model_parts: list[torch.nn.Module]) -> None:
        self.model_parts = model_parts
        self.optimizers = [create(part, config.name, **config.options) for part in model_parts]
        parameters = [p for part in model_parts for p in part.parameters() if p.requires_grad]
        self._post_init(parameters)  # what torch.optim.Optimizer needs for hooks
