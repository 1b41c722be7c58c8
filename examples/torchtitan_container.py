"""torchtitan's optimizer container over leanstep's optimizers: one per model part, state by parameter names.

torchtitan shards the parts by FSDP2 first. Every part of a pipeline has its own optimizer, as SinkGD and Lion allow.
"""

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from leanstep.optimizers import create

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class LeanOptimizersContainer:
    """The methods that torchtitan's trainer and checkpointer call."""

    def __init__(self, model_parts: list[torch.nn.Module], **options: Any) -> None:
        self.model_parts = model_parts
        self.optimizers = [create(part, **options) for part in model_parts]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        pairs = zip(self.model_parts, self.optimizers, strict=True)
        return {key: value for pair in pairs for key, value in get_optimizer_state_dict(*pair, options=FLAT).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for pair in zip(self.model_parts, self.optimizers, strict=True):
            set_optimizer_state_dict(*pair, optim_state_dict=state_dict, options=FLAT)
