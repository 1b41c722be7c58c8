"""Optional parts of a run: one file of :mod:`leanstep.recipes.methods` each, and one row of :data:`PARTS`.

A part has the methods of :class:`Part` that it needs, and :class:`~leanstep.recipes.training.run.Run` calls them on all
parts, so the loop names none. Their settings and rules are in ``config/``, which is read without torch.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.data.batches import Batch
from leanstep.recipes.training.checkpoint import TrainState
from leanstep.recipes.training.folder import RunFolder
from leanstep.recipes.training.step import StepResult

# module:class -> the key that gives a recipe this part, by any value but its default; in the order of the calls
PARTS = {
    "spikes:Spikes": "stop.on_spike",
    "sparse:Sparsity": "sparsity.patterns",
    "halves:Halves": "optimizer.name",
    "pruned:Masks": "pruning.keep_masks",
    "norms:Norms": "log.attention_norms",
    "gate:Gate": "lora.attention",
    "ema:Averages": "ema.decay",
    "qk_clip:Clip": "qk_clip.threshold",
}


class Training(Protocol):
    """What a part sees of its :class:`~leanstep.recipes.training.run.Run`."""

    config: RunConfig
    accelerator: Accelerator
    folder: RunFolder
    state: TrainState
    say: Callable[..., None]
    # their modules import methods, so their types would be circles
    logger: Any
    saver: Any
    parts: "list[Part]"
    flops_per_token: int

    def drop_gradients(self, *, unscaled: bool) -> None:
        """Free the gradients."""

    def open_windows(self) -> None:
        """Read the data from the position of ``state`` on."""

    def save(self) -> None:
        """Write a checkpoint."""

    def failure(self, window: list[Batch], result: StepResult, what: str, reason: str, advice: Any = ()) -> Exception:
        """Return the failure to raise."""


class Part:
    """One optional part of a run. The methods are in the order in which they are called; each may be left out.

    ``model`` and ``optimizer`` are those of the recipe, without Accelerate's wrappers. ``source`` has
    ``diagnostics()``, numbers that log lines show under ``name``.
    """

    name = ""
    source: Any = None
    # a context with other weights, which are evaluated and written beside the trained ones
    applied: Callable[[], AbstractContextManager[None]] | None = None

    def __init__(self, run: Training) -> None:
        self.run = run

    def build(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Change the model before it is sharded. Raises ValueError, as ``prepared`` and ``begin`` do, if it cannot."""

    def prepared(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make state that a checkpoint loads."""

    def begin(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path | None) -> None:
        """Begin at the weights of ``checkpoint``, which is loaded, or at step 0."""

    def before_step(self) -> None:
        """Act before the first micro batch of a step."""

    def after_half(self, fraction: float) -> None:
        """Act after this fraction of the micro batches, about half."""

    def after_backward(self) -> None:
        """Act on the gradients of a step, before they are clipped."""

    def judge(self, window: list[Batch], result: StepResult, sound: bool) -> bool | None:
        """Whether the step may be applied; ``sound``: loss and gradient are finite.

        None: the run has returned to a checkpoint, and the step does not count. May raise the run's failure.
        """
        return sound

    def after_step(self, applied: bool, finite: bool) -> None:
        """Act after a step, which was left out unless ``applied``; the last part is called first."""

    def rolled_back(self, checkpoint: Path) -> None:
        """Load what :meth:`save` wrote into a checkpoint to which the run returns."""

    def state_dict(self) -> dict[str, Any]:
        """State that an evaluation changes; an interrupted one is taken back by :meth:`load_state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of :meth:`state_dict`."""

    def tensors(self) -> Iterable[torch.Tensor]:
        """What a checkpoint holds besides weights and optimizer state, for its size."""
        return ()

    def save(self, trainer: Path) -> None:
        """Write into ``trainer/`` of a checkpoint; every process calls it."""

    def export(self, model: torch.nn.Module, path: Path) -> None:
        """Write beside the model in ``path``; the first process calls it."""

    def close(self) -> None:
        """Take hooks off the model, at the end of training."""

    def report(self) -> Iterator[tuple[str, Any]]:
        """Yield name and content of each report; every process calls it."""
        yield from ()


def build_parts(run: Training) -> list[Part]:
    """The parts that the recipe of ``run`` has, in the order of :data:`PARTS`."""
    default, parts = RunConfig(), []
    for row, key in PARTS.items():
        if attrgetter(key)(run.config) != attrgetter(key)(default):
            module, _, name = row.partition(":")
            kind: type[Part] = getattr(import_module(f"leanstep.recipes.methods.{module}"), name)
            parts.append(kind(run))
    return parts
