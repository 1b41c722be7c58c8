"""What a run writes down while it goes: its lines, log.jsonl, trackers, status.json, its optimizer's own numbers."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from leanstep._files import write_text
from leanstep.recipes.config.loader import dump
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.methods.sparse import report
from leanstep.recipes.training.checkpoint import TrainState
from leanstep.recipes.training.flops import FORMULA, peak_flops
from leanstep.recipes.training.folder import RunFolder, environment
from leanstep.recipes.training.progress import Clock, Progress, flat_scalars, format_line
from leanstep.recipes.training.step import StepResult
from leanstep.recipes.training.validation import EvalResult
from leanstep.recipes.training.world import describe_world, device_name

__all__ = ["Journal"]

OPTIMIZER_REPORT = "optimizer_report.json"
SPARSITY_REPORT = "sparsity_report.json"
ATTENTION_REPORT = "attention_report.json"
GATE_REPORT = "gate_report.json"


class Journal:
    """Writes in the first process. The others call it all the same: an optimizer may have to ask all of them.

    An optimizer reports on itself by two methods, both optional and called in every process:

    * ``diagnostics()``: a flat dict of numbers, read at log steps only. They go into ``log.jsonl`` as ``optimizer``, to
      trackers as ``optimizer/KEY``, and into the report, where the keys ``A/x`` and ``A/y`` are lines of one chart A.
    * ``noise_report()``: a list of dicts, read at the end, written to ``optimizer_report.json`` and shown as a table.

    A run with sparse weights has a controller with a ``diagnostics()`` of its own, logged as ``sparsity``, and one that
    watches its attention a monitor, logged as ``attention``.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, folder: RunFolder, progress: Progress) -> None:
        self.config, self.accelerator, self.folder, self.progress = config, accelerator, folder, progress
        self.main, self.say = accelerator.is_main_process, progress.say
        self.clock = Clock()
        self.flops_per_token = 0
        self.tflops: float | None = None
        peak = peak_flops(device_name(accelerator.device), config.precision)
        self._peak = None if peak is None else peak * accelerator.num_processes

    def begin(self, state: TrainState, resumed_from: Path | None, parameters: int, flops_per_token: int) -> None:
        """Write the files that describe the run, start the trackers and the clock."""
        config, accelerator = self.config, self.accelerator
        self.clock, self.flops_per_token = Clock(state.elapsed_s), flops_per_token
        if self.main:
            self.folder.rewind_log(-1 if resumed_from is None else state.step)
            facts = environment(
                seed=config.seed,
                world_size=accelerator.num_processes,
                world=describe_world(accelerator),
                device=device_name(accelerator.device),
                parameters=parameters,
                flops_per_token=flops_per_token,
                flops_formula=FORMULA,
                resumed_from=None if resumed_from is None else str(resumed_from),
            )
            self.folder.describe(dump(config), facts)
        self.status("running", state)
        if config.log.trackers:
            accelerator.init_trackers("leanstep", config=flat_scalars(dataclasses.asdict(config)))

    def step(
        self,
        state: TrainState,
        result: StepResult,
        rate: float,
        optimizer: Any,
        notes: Sequence[str] = (),
        *,
        sections: Mapping[str, Any] | None = None,
    ) -> None:
        """Show the step; write log.jsonl, train.log and trackers where :meth:`is_logged`.

        ``sections`` are further objects with a ``diagnostics()``, or None, by the name that their numbers have in the
        log.
        """
        config, wanted = self.config, self.is_logged(state.step)
        asked = {"optimizer": optimizer, **(sections or {})} if wanted else {}
        reported = {name: numbers for name, one in asked.items() if (numbers := _diagnostics(one))}
        if not self.main:
            return
        first_here = self.clock.rate_now is None
        if wanted or first_here:
            self._measure()
        entry = {
            "step": state.step,
            "kind": "train",
            "loss": result.loss,
            "lr": rate,
            "grad_norm": result.norm,
            "tokens_per_s": self.clock.rate_now,
            "tokens": state.tokens,
            "elapsed_s": round(self.clock.elapsed_s, 3),
            "nonfinite": state.nonfinite + (_left_out(optimizer) if wanted else 0),
            "tflops": self.tflops,
        }
        if self._peak is not None and self.tflops is not None:
            entry["mfu"] = round(1e12 * self.tflops / self._peak, 4)
        if self.accelerator.device.type == "cuda":
            entry["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        if wanted:
            self.folder.log({**entry, **reported})
            numbers = {key: value for key, value in entry.items() if key not in ("step", "kind")}
            for name, found in reported.items():
                numbers |= {f"{name}/{key}": value for key, value in found.items()}
            self._track(numbers, state.step)
        line = format_line(entry, config.steps, self._eta(state.step), list(notes))
        self.progress.line(state.step, line, wanted or first_here)

    def is_logged(self, step: int) -> bool:
        """Whether a step has a line in log.jsonl: the first, the last, and every ``log.every``."""
        return step == 1 or step % self.config.log.every == 0 or step == self.config.steps

    def evaluation(self, state: TrainState, found: EvalResult) -> None:
        """Write and show what a validation found."""
        numbers = dataclasses.asdict(found)
        if self.main:
            self.folder.log({"step": state.step, "kind": "eval", **numbers})
            self._track({f"val_{key}": value for key, value in numbers.items()}, state.step)
            per_byte = "" if found.bits_per_byte is None else f"  bits/byte {found.bits_per_byte:.4f}"
            self.say(
                f"step {state.step}/{self.config.steps}  validation loss {found.loss:.4f}  perplexity "
                f"{found.perplexity:.2f}{per_byte}  ({found.tokens:,} targets)"
            )
        self.status("running", state)

    def status(self, status: str, state: TrainState, *, any_process: bool = False) -> None:
        """Write status.json, from the first process or, for a failure of one process, from that one."""
        if self.main or any_process:
            self.folder.status(
                status,
                step=state.step,
                steps=self.config.steps,
                val_loss=state.val_loss,
                best_loss=state.best_loss,
                best_step=state.best_step,
                tokens=state.tokens,
                tflops=self.tflops,
            )

    def optimizer_report(self, optimizer: Any) -> None:
        """Write the rows of the optimizer's ``noise_report()``, if it has one, to ``optimizer_report.json``."""
        report = getattr(optimizer, "noise_report", None)
        rows = report() if callable(report) else []
        if rows:
            self._write_report(OPTIMIZER_REPORT, rows)

    def sparsity_report(self, controller: Any) -> None:
        """Write how sparse each layer is, and the operations of the run, to ``sparsity_report.json``."""
        if controller is not None:
            self._write_report(SPARSITY_REPORT, report(self.config, controller, self.flops_per_token))

    def attention_report(self, monitor: Any) -> None:
        """Write where each head stood when it was last measured to ``attention_report.json``."""
        if monitor is not None:
            self._write_report(ATTENTION_REPORT, monitor.rows_of_report())

    def gate_report(self, gate: Any) -> None:
        """Write which attention layers ran low-rank, why or why not, and the errors, to ``gate_report.json``."""
        if gate is not None:
            rows = [dataclasses.asdict(row) for row in gate.report()]
            self._write_report(GATE_REPORT, rows)
            ran = sum(row["low_rank_calls"] > 0 for row in rows)
            worst = max((row["largest_error"] for row in rows), default=0.0)
            error = f", with an error of at most {worst:.1e}" if ran else f"; {rows[0]['reason']}" if rows else ""
            self.say(f"attention   {ran} of {len(rows)} layers ran low-rank{error}")

    def _write_report(self, name: str, content: Any) -> None:
        if not self.main:
            return
        try:
            text = json.dumps(content, indent=1, default=lambda x: x.tolist() if _is_array(x) else str(x))
            write_text(self.folder.root / name, text + "\n")
        except OSError as error:
            self.say(f"WARNING: {name} could not be written: {error}")

    def _measure(self) -> None:
        """End the clock's window: tokens per second, and the model's operations per second of all processes."""
        self.clock.measure()
        if self.clock.step_s:
            # the operations are spent on every position, also on those that are no target
            done = self.flops_per_token * self.config.batch.tokens_per_step
            self.tflops = float(f"{done / self.clock.step_s / 1e12:.4g}")

    def _track(self, numbers: dict[str, Any], step: int) -> None:
        if self.config.log.trackers:
            self.accelerator.log({key: value for key, value in numbers.items() if value is not None}, step=step)

    def _eta(self, step: int) -> float | None:
        """Seconds to the end by the measured cost of steps, evaluations and saves."""
        left = self.config.steps - step
        evals, saves = (
            left // every if every else 1 for every in (self.config.eval.every, self.config.checkpoint.every)
        )
        return self.clock.eta(left, evals, saves)


def _diagnostics(optimizer: Any) -> dict[str, float]:
    read = getattr(optimizer, "diagnostics", None)
    return {str(key): float(value) for key, value in read().items()} if callable(read) else {}


def _left_out(optimizer: Any) -> int:
    """How often the optimizer itself left a tensor out because its gradient was not finite (Lion, SinkGD)."""
    count = getattr(optimizer, "nonfinite_count", None)
    return 0 if count is None else int(count())


def _is_array(value: Any) -> bool:
    return hasattr(value, "tolist")
