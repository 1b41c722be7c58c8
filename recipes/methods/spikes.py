"""Loss spikes: detect them, choose an action, and return to the last checkpoint (``stop.on_spike``).

The reduced loss and the losses in :class:`SpikeRecord` decide, so every process decides the same, and a resumed run
decides as the uninterrupted one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator

from leanstep.recipes.config.schema import StopConfig
from leanstep.recipes.data.batches import Batch
from leanstep.recipes.training.build import on_main_process
from leanstep.recipes.training.checkpoint import TrainState, newest, read_state
from leanstep.recipes.training.folder import RunFolder
from leanstep.recipes.training.logger import RunLogger
from leanstep.recipes.training.parts import Part
from leanstep.recipes.training.step import StepResult, describe_nonfinite

# standard deviation of a normal distribution / its median absolute deviation
_DEVIATION = 1.4826
# smallest spread, as a fraction of the median: losses may be equal
_SMALLEST_SPREAD = 0.01
_MOST_STEPS = 20


class Spikes(Part):
    """Judges the steps of a run, and returns to the last checkpoint where the recipe says so."""

    detector: "SpikeDetector"

    def begin(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path | None) -> None:
        """Judge from the first step on."""
        run = self.run
        self.detector = SpikeDetector(run.config.stop, run.accelerator, run.folder, run.logger)

    def judge(self, window: list[Batch], result: StepResult, sound: bool) -> bool | None:
        """Whether the step is applied: not at a spike; None after a rollback. Raises the failure of ``stop``."""
        spike = self.detector.judge(self.run.state, result, sound)
        if spike is None:
            return sound
        if spike.action == "stop":
            raise self.run.failure(window, result, spike.event, "spike", spike.advice)
        if spike.action == "rollback":
            self.roll_back(spike)
            return None
        return False

    def roll_back(self, spike: "Spike") -> None:
        """Return to the checkpoint of ``spike``, with the data after the spike next, and save that position."""
        run = self.run
        assert spike.checkpoint is not None
        with run.logger.clock.pause("rollback"):
            run.drop_gradients(unscaled=True)
            world = self.detector.restore(spike, run.state)
            # streams go on from where they are
            run.saver.load(spike.checkpoint, world)
            for part in run.parts:
                part.rolled_back(spike.checkpoint)
            run.open_windows()
        # a killed run continues from here, not from before the rollback
        run.save()
        self.detector.report_rollback(spike, run.state)

    def report(self) -> Iterator[tuple[str, Any]]:
        """A line with the counts, and no file."""
        self.run.say(f"spikes      {self.detector.summary(self.run.state)}")
        yield from ()


def spike_threshold(losses: Sequence[float], stop: StopConfig) -> float | None:
    """Largest loss that is no spike, or None for fewer than ``stop.spike_window`` losses.

    ``median + stop.spike_threshold * max(1.4826 * median(|loss - median|), 0.01 * median)``.
    """
    if len(losses) < stop.spike_window:
        return None
    middle = median(losses)
    spread = max(_DEVIATION * median(abs(loss - middle) for loss in losses), _SMALLEST_SPREAD * middle)
    return middle + stop.spike_threshold * spread


@dataclass(frozen=True)
class Spike:
    """A spike and the action: ``stop``, ``skip``, or ``rollback`` to ``checkpoint``.

    ``event`` describes it for messages, ``why`` adds the reason for the action.
    """

    step: int
    loss: float
    threshold: float | None
    event: str
    action: str
    why: str = ""
    checkpoint: Path | None = None
    advice: tuple[str, ...] = ()


class SpikeDetector:
    """Judges each step of a run and keeps its :class:`SpikeRecord`. Every process calls it."""

    def __init__(self, stop: StopConfig, accelerator: Accelerator, folder: RunFolder, logger: RunLogger) -> None:
        self._stop, self._accelerator, self._folder, self._logger = stop, accelerator, folder, logger

    def judge(self, state: TrainState, result: StepResult, sound: bool) -> Spike | None:
        """Return the spike of the step after ``state.step`` with the action to take, or None.

        ``sound``: whether loss and gradient are finite. Adds the loss of a step without a spike to the record, and
        counts and logs a skipped one. Raises CheckpointError if no checkpoint can be read.
        """
        record = state.spikes
        threshold = spike_threshold(record.losses[-self._stop.spike_window :], self._stop)
        if sound and (threshold is None or result.loss <= threshold):
            record.losses = [*record.losses, result.loss][-self._stop.spike_window :]
            record.in_row = 0
            return None
        spike = self._choose(state, result, threshold)
        record.steps = [*record.steps, spike.step][-_MOST_STEPS:]
        if spike.action == "skip":
            record.skipped += 1
            record.in_row += 1
        if spike.action != "rollback":
            self._log(spike, spike.step)
        if spike.action == "skip":
            self._logger.say(f"step {spike.step}: {spike.event}; step skipped{spike.why}")
        return spike

    def _choose(self, state: TrainState, result: StepResult, threshold: float | None) -> Spike:
        """Choose the action: that of the recipe, ``skip`` without a checkpoint, ``stop`` at the limit."""
        record, limit = state.spikes, self._stop.spike_limit
        # a gradient scaler's gradients may overflow in a spike
        if threshold is not None and threshold < result.loss < math.inf:
            event = f"loss {result.loss:.4f} is a spike, above {threshold:.4f}"
        else:
            event = f"{describe_nonfinite(result.loss, result.norm)}, a spike"
        action, checkpoint, why = str(self._stop.on_spike), None, ""
        advice: tuple[str, ...] = (
            "go on past the spike: stop.on_spike=skip or stop.on_spike=rollback, then the same command",
        )
        if action == "rollback":
            checkpoint = self._last_checkpoint()
            if checkpoint is None:
                action, why = "skip", ", because there is no checkpoint yet to roll back to"
            elif record.returned_to == _step_of(checkpoint) and record.rollbacks_here >= limit:
                action, advice = "stop", (f"go on: stop.spike_limit={2 * limit}, then the same command",)
                event += f", after {_count(limit, 'rollback')} to {checkpoint.name} (stop.spike_limit)"
        if action == "skip" and record.in_row >= limit:
            action, advice = "stop", (f"go on: stop.spike_limit={2 * limit}, then the same command",)
            event += f", after {_count(limit, 'skipped step')} in a row (stop.spike_limit)"
        return Spike(state.step + 1, result.loss, threshold, event, action, why, checkpoint, advice)

    def _last_checkpoint(self) -> Path | None:
        path, problems = on_main_process(self._accelerator, lambda: newest(self._folder.checkpoints))
        for problem in problems.values():
            self._logger.say(f"WARNING: {problem}; rolling back to an older checkpoint")
        return path

    def restore(self, spike: Spike, state: TrainState) -> int:
        """Set ``state`` to that of the checkpoint, and the data to the window after the spike; count the rollback.

        Removes the lines of the steps since the checkpoint from log.jsonl. Returns the number of processes that wrote
        the checkpoint. Raises CheckpointError.
        """
        assert spike.checkpoint is not None
        record, reached = state.spikes, state.step + state.spikes.windows_ahead + 1
        saved = read_state(spike.checkpoint)
        for item in fields(TrainState):
            if item.name not in ("spikes", "config", "world_size"):
                setattr(state, item.name, getattr(saved, item.name))
        record.losses = saved.spikes.losses
        record.in_row = 0
        record.rollbacks += 1
        record.rollbacks_here = record.rollbacks_here + 1 if record.returned_to == state.step else 1
        record.returned_to = state.step
        record.windows_ahead = reached - state.step
        if self._logger.main:
            self._folder.rewind_log(state.step)
        return saved.world_size

    def report_rollback(self, spike: Spike, state: TrainState) -> None:
        """Print and log a rollback that is done. Its line in log.jsonl has the step of the checkpoint."""
        record, steps = state.spikes, spike.step - state.step
        self._logger.say(
            f"step {spike.step}: {spike.event}; rolled back to step {state.step}, whose next data is that after the "
            f"spike ({_count(steps, 'step')} of data left out), rollback {record.rollbacks_here} of at most "
            f"{self._stop.spike_limit} to this checkpoint"
        )
        self._log(spike, state.step)
        self._logger.status("running", state)

    def summary(self, state: TrainState) -> str:
        """``3 steps skipped, 1 rollback (steps 12, 40, 41, 57)``, with the newest steps."""
        record = state.spikes
        counts = f"{_count(record.skipped, 'step')} skipped, {_count(record.rollbacks, 'rollback')}"
        if not record.steps:
            return counts
        older = "the newest at " if record.skipped + record.rollbacks > len(record.steps) else ""
        noun = "steps" if len(record.steps) > 1 else "step"
        return f"{counts} ({older}{noun} {', '.join(map(str, record.steps))})"

    def _log(self, spike: Spike, step: int) -> None:
        if self._logger.main:
            entry: dict[str, Any] = {"step": step, "kind": "spike", "action": spike.action, "spike_step": spike.step}
            self._folder.log(entry | {"loss": spike.loss, "threshold": spike.threshold})


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
