"""One start of a run, in the order of events: claim the folder, build, resume, step, log, evaluate, save, finish."""

import math
import os
import signal
import sys
from pathlib import Path

from accelerate import Accelerator

from leanstep._version import __version__
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.data.batches import Batch
from leanstep.recipes.methods.attention_norms import build_gate, build_monitor, read_gate
from leanstep.recipes.training.assemble import assemble
from leanstep.recipes.training.checkpoint import TrainState, read_state
from leanstep.recipes.training.failures import (
    EXIT_BAD_CONFIG,
    EXIT_DONE,
    EXIT_MEMORY,
    EXIT_NAN,
    RunFailure,
    is_out_of_memory,
    layer_norms,
    memory_message,
    nonfinite_message,
    write_nan_dump,
)
from leanstep.recipes.training.finish import finish, write_report
from leanstep.recipes.training.folder import RunFolder
from leanstep.recipes.training.journal import Journal
from leanstep.recipes.training.progress import Progress
from leanstep.recipes.training.signals import EXIT_CODES, StopFlag
from leanstep.recipes.training.start import choose_start, pass_over
from leanstep.recipes.training.step import NonFinite, StepResult, backward, describe_nonfinite, gradient_norm, share
from leanstep.recipes.training.validation import validate
from leanstep.recipes.training.world import describe_world, main_does, maximum

__all__ = ["Run", "refuse"]

# a save that takes longer may not fit into the 30 seconds that torchrun leaves a worker after SIGTERM
_SLOW_SAVE_S = 20.0


def refuse(error: Exception) -> int:
    """Say, once for all processes, why a run cannot start; returns the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_BAD_CONFIG


class Run:
    """One start of a run; :meth:`go` is the order of events, the other methods what they do."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, folder: RunFolder, progress: Progress) -> None:
        self.config, self.accelerator, self.folder, self.progress = config, accelerator, folder, progress
        self.say, self.main = progress.say, accelerator.is_main_process
        self.journal = Journal(config, accelerator, folder, progress)
        self.state = TrainState()
        self.begun = False

    def go(self) -> int:
        """Begin, train, finish; returns the exit code."""
        try:
            checkpoint = self.choose()
            if self.nothing_left():
                return EXIT_DONE
            self.begin(checkpoint)
        except (ValueError, ImportError, OSError) as error:
            return refuse(error)
        left = lambda: self.journal.status("interrupted", self.state)  # noqa: E731
        with StopFlag(self.config.checkpoint.on_signal, leaving=left) as self.stop:
            try:
                number = self.loop()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                rows = self.parts.memory.rows() if self.parts.memory else ()
                message = memory_message(self.config, self.folder.root, self.state.step + 1, rows)
                raise RunFailure("out of memory", EXIT_MEMORY, message) from error
            if number:
                return self.interrupted(number)
            for watching in (self.norms, self.gate):
                if watching is not None:
                    watching.close()
            finish(self.config, self.accelerator, self.folder, self.parts.saver, self.state, self.say)
            self.journal.optimizer_report(self.parts.optimizer.optimizer)
            self.journal.sparsity_report(self.parts.sparsity)
            self.journal.attention_report(self.norms)
            self.journal.gate_report(self.gate)
        self.journal.status("done", self.state)
        if self.main:
            write_report(self.folder, self.say)
        self.accelerator.end_training()
        return EXIT_DONE

    def choose(self) -> Path | None:
        """Claim the folder, say who is here, and find the checkpoint to begin from; None for step 0."""
        config, accelerator = self.config, self.accelerator
        self.start = main_does(accelerator, lambda: choose_start(config, self.folder))
        accumulation = accelerator.gradient_accumulation_steps
        self.say(
            f"leanstep {__version__}: {config.name}, {describe_world(accelerator)}, precision {config.precision}, "
            f"{accumulation} x {config.batch.micro_batch_size} sequences of {config.data.seq_len} per process and step"
        )
        self.say(f"output in {self.folder.root}")
        for note in self.start.notes:
            self.say(note)
        chosen = self.start.checkpoint
        if chosen is not None:
            self.state = read_state(chosen)
        return chosen

    def nothing_left(self) -> bool:
        """Whether this run was finished by an earlier start."""
        if self.state.step < self.config.steps or self.folder.read_status().get("status") != "done":
            return False
        self.say(
            f"this run is done (step {self.state.step}); to run it again, take out=ANOTHER_FOLDER or remove "
            f"{self.folder.root}"
        )
        return True

    def begin(self, checkpoint: Path | None) -> None:
        """Build the run's parts from the recipe and the checkpoint if there is one, and describe it in its folder."""
        accelerator, folder = self.accelerator, self.folder
        self.parts = assemble(self.config, accelerator, folder, self.state, checkpoint, self.say)
        self.watch_attention(checkpoint)
        for note in main_does(accelerator, lambda: pass_over(self.start, folder)):
            self.say(note)
        self.begun = True
        self.journal.begin(self.state, checkpoint, self.parts.parameters, self.parts.flops_per_token)

    def watch_attention(self, checkpoint: Path | None) -> None:
        """Put in place what looks at attention layers, and what answers for them, which goes on from the checkpoint."""
        accelerator, saver = self.accelerator, self.parts.saver
        model = accelerator.unwrap_model(self.parts.model)
        self.norms = build_monitor(self.config, model)
        self.gate = saver.gate = build_gate(self.config, model)
        if self.gate is not None and checkpoint is not None:
            rank, world = accelerator.process_index, accelerator.num_processes
            problem = read_gate(self.gate, checkpoint / "trainer", rank, world)
            if problem:
                self.say(f"WARNING: {problem}")

    def loop(self) -> int:
        """Train to the last step. Returns the signal that ended it early, saved, or 0."""
        config, state = self.config, self.state
        number = 0
        if state.eval_pending or (config.eval.at_start and state.step == 0):
            number = self.evaluate()
            if number:
                self.save()
                return number
        for window in self.parts.windows:
            result = self.step(window)
            number = result.signal
            improved = False
            if self.due(config.eval.every):
                before = state.best_loss
                number = self.evaluate() or number
                improved = config.checkpoint.keep_best and state.best_loss != before
            if number or improved or self.due(config.checkpoint.every):
                self.save()
            if number and state.step < config.steps:
                return number
        return 0

    def due(self, every: int) -> bool:
        """Whether something done ``every`` so many steps, and at the last one, is due now."""
        step = self.state.step
        return step == self.config.steps or (every > 0 and step % every == 0)

    def step(self, window: list[Batch]) -> StepResult:
        """One optimizer step: backward over the window, checks, update, log."""
        config, accelerator, model, halves = self.config, self.accelerator, self.parts.model, self.parts.halves
        if self.norms is not None and self.journal.is_logged(self.state.step + 1):
            self.norms.arm()
        try:
            half = None if halves is None else halves.half
            part, targets = backward(accelerator, model, window, check=config.release_gradients, half=half)
        except NonFinite as error:
            raise self.failure(window, StepResult(error.loss, None, 0, 0), f"loss is {error.loss}", "nan") from None
        if halves is not None:
            halves.whole()
        if self.parts.masks is not None:
            self.parts.masks.mask_gradients()
        norm = None
        if not config.release_gradients:
            norm = gradient_norm(accelerator, model, config.max_grad_norm)
        loss, norm_value, number = share(accelerator, part, norm, self.stop.received, self.out_of_time())
        result = StepResult(loss, norm_value, targets, number)
        self.update(window, result)
        self.state.step += 1
        self.state.tokens += targets
        self.journal.clock.stepped(targets)
        saver, optimizer = self.parts.saver, self.parts.optimizer.optimizer
        notes = [saver.trouble] if saver.trouble else []
        sections = {"sparsity": self.parts.sparsity, "attention": self.norms, "gate": self.gate}
        self.journal.step(self.state, result, self.rate, optimizer, notes, sections=sections)
        return result

    def update(self, window: list[Batch], result: StepResult) -> None:
        """Update the weights, unless loss or gradient is not finite; advance the schedule either way.

        Raises RunFailure where the recipe stops at such a step (``stop.nan``, ``stop.loss_above``).
        """
        config = self.config
        # a gradient out of fp16's range is the scaler's business: it leaves the step out and lowers its scale
        scaled = self.accelerator.scaler is not None and math.isfinite(result.loss)
        sound = result.finite() or scaled
        if not sound and config.stop.nan:
            raise self.failure(window, result, describe_nonfinite(result.loss, result.norm), "nan")
        if config.stop.loss_above is not None and result.loss > config.stop.loss_above:
            what = f"loss {result.loss:.4f} is above stop.loss_above {config.stop.loss_above:g}"
            raise self.failure(window, result, what, "loss_above")
        self.rate = self.parts.schedule.get_last_lr()[0]
        self.state.nonfinite += not result.finite()
        if sound:
            # with released gradients the weights are updated already, and this ends the step
            self.parts.optimizer.step()
        self.parts.schedule.step()
        self.parts.optimizer.zero_grad()

    def failure(self, window: list[Batch], result: StepResult, what: str, reason: str) -> RunFailure:
        """Write nan_dump/ and make the failure that ends the run; every process comes through here."""
        step = self.state.step + 1
        norms = layer_norms(self.accelerator.unwrap_model(self.parts.model).named_parameters())
        if self.main:
            facts = {
                "step": step,
                "what": what,
                "loss": result.loss,
                "grad_norm": result.norm,
                "lr": self.parts.schedule.get_last_lr(),
                "sequences": self.parts.windows.positions(self.state.step),
                "layers": norms,
            }
            batches = {f"{key}.{index}": value for index, batch in enumerate(window) for key, value in batch.items()}
            try:
                write_nan_dump(self.folder.root, facts, batches)
            except OSError as error:
                self.say(f"WARNING: nan_dump could not be written: {error}")
        return RunFailure(reason, EXIT_NAN, nonfinite_message(self.config, self.folder.root, step, what))

    def evaluate(self) -> int:
        """Validate and log; returns the signal that interrupted it (then it is pending), else 0."""
        state, config, parts = self.state, self.config, self.parts
        if len(parts.data.validation) == 0:
            return 0
        interrupting = 0
        gate = None if self.gate is None else self.gate.state_dict()

        def interrupted() -> bool:
            nonlocal interrupting
            interrupting = maximum(self.accelerator, int(self.stop.received))
            return interrupting != 0

        with self.journal.clock.pause("eval"):
            found = validate(
                self.accelerator,
                parts.model,
                parts.data,
                micro_batch_size=config.batch.micro_batch_size,
                batches=config.eval.batches,
                interrupted=interrupted,
            )
        state.eval_pending = found is None
        if found is None:
            if self.gate is not None:
                # the evaluation is made again from its beginning
                self.gate.load_state_dict(gate)
            return interrupting
        state.val_loss = found.loss
        if state.best_loss is None or found.loss < state.best_loss:
            state.best_loss, state.best_step = found.loss, state.step
        self.journal.evaluation(state, found)
        return 0

    def save(self) -> None:
        """Write a checkpoint of this step; a full disk is said and survived."""
        clock = self.journal.clock
        self.state.elapsed_s = clock.elapsed_s
        with clock.pause("save") as spent:
            saved = self.parts.saver.save(self.state, self.parts.windows)
        if saved:
            slow = ""
            if spent() > _SLOW_SAVE_S:
                slow = (
                    "; under torchrun a save after SIGTERM has 30 s: signal the workers themselves (Slurm: "
                    "--signal=TERM@300), or raise TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
                )
            self.say(f"step {self.state.step}/{self.config.steps}  checkpoint saved in {spent():.1f} s{slow}")

    def interrupted(self, number: int) -> int:
        """Say how to continue; returns the exit code of the signal."""
        self.journal.status("interrupted", self.state)
        why = signal.Signals(self.stop.received or number).name
        if self.out_of_time():
            why = f"stop.max_hours ({self.config.stop.max_hours:g})"
        outcome = self.parts.saver.trouble or "saved. The same command continues it"
        self.say(f"stopped by {why} after step {self.state.step}: {outcome}")
        self.accelerator.end_training()
        return EXIT_CODES[signal.Signals(number)]

    def out_of_time(self) -> bool:
        """Whether this start of the run has lasted longer than ``stop.max_hours``."""
        hours = self.config.stop.max_hours
        return hours is not None and self.journal.clock.here_s > 3600 * hours
