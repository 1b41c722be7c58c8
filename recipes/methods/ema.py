"""``ema`` of recipes: an exponential moving average of the trained weights, beside the weights themselves."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from leanstep.recipes.training.parts import Part


class Averages(Part):
    """The averaged weights of a run: evaluated beside the trained ones, and written to ``final-ema/``."""

    def prepared(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Begin at the initial weights; checkpoints hold the averages."""
        assert self.run.config.ema.decay is not None
        self.average = WeightAverage(model, self.run.config.ema.decay)
        self.applied = self.average.applied
        self.run.accelerator.register_for_checkpointing(self.average)

    def after_step(self, applied: bool, finite: bool) -> None:
        """Average over the new weights; a gradient scaler leaves them where the gradients are not finite."""
        if applied and finite:
            self.average.update()

    def tensors(self) -> Iterable[torch.Tensor]:
        """The averages."""
        return self.average.averages.values()


class WeightAverage:
    """Exponential moving average of the parameters of a model that require gradients, in fp32.

    Update n, counted from 0, is::

        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * parameter

    The average begins at the initial weights. The smaller d of the first updates lets them fade quickly.
    Tied weights have one average.

    Memory: 4 bytes per trained weight, and a copy of these weights inside :meth:`applied`.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()}
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Average over the weights of one more step."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        average = get_ema_multi_avg_fn(decay)
        for name, parameter in self._parameters.items():
            # one at a time: only one bf16 weight has a copy in fp32
            average([self.averages[name]], [parameter.detach().float()], self.updates)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averages, rounded to its dtype, in the block; afterwards its own weights, bit for bit."""
        weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._copy_to_model(self.averages)
            yield
        finally:
            self._copy_to_model(weights)

    @torch.no_grad()
    def _copy_to_model(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and the averages, without copies."""
        return {"updates": self.updates, "averages": dict(self.averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of :meth:`state_dict`. Raises ValueError, and changes nothing, if it is of another model."""
        updates, averages = state.get("updates"), state.get("averages")
        if type(updates) is not int or updates < 0:
            raise ValueError(f"ema: expected a number of updates, got {updates!r}")
        if not isinstance(averages, Mapping) or averages.keys() != self.averages.keys():
            raise ValueError("ema: its averages are not those of the trained weights of this model")
        for name, average in self.averages.items():
            loaded = averages[name]
            if not isinstance(loaded, torch.Tensor) or (loaded.shape, loaded.dtype) != (average.shape, average.dtype):
                raise ValueError(f"ema: {name} must be an fp32 tensor of shape {tuple(average.shape)}")
        for name, average in self.averages.items():
            average.copy_(averages[name])
        self.updates = updates
