"""What an optimizer container inherits in torchtitan 0.2.2 (commit b5bcd76c), for tests where it is not installed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class OptimizersContainer(torch.optim.Optimizer):
    """Steps, saves and loads ``optimizers``, which a subclass makes; a configuration builds the class around it."""

    optimizers: list[torch.optim.Optimizer]
    model_parts: list[torch.nn.Module]

    @dataclass(kw_only=True, slots=True)
    class Config:
        """Settings of a container."""

        _owner: ClassVar[type | None] = None

        def build(self, **objects: Any) -> Any:
            return self._owner(config=self, **objects)

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls.Config._owner = cls

    def _post_init(self, parameters: list[torch.nn.Parameter]) -> None:
        torch.optim.Optimizer.__init__(self, parameters, {})

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    def __len__(self) -> int:
        return len(self.optimizers)

    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        pairs = zip(self.model_parts, self.optimizers, strict=True)
        return {key: value for pair in pairs for key, value in get_optimizer_state_dict(*pair, options=FLAT).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for pair in zip(self.model_parts, self.optimizers, strict=True):
            set_optimizer_state_dict(*pair, optim_state_dict=state_dict, options=FLAT)


def stand_in(monkeypatch) -> None:
    """Put this module where torchtitan has its own."""
    names = ("torchtitan", "torchtitan.components", "torchtitan.components.optimizer")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].OptimizersContainer = OptimizersContainer
