"""One start of a run: the objects of the recipe, and the training loop.

Read :class:`Run` from top to bottom: ``begin`` builds the objects and loads a checkpoint, ``loop`` steps, evaluates and
saves, ``finish`` writes the model and the reports.
"""

import math
import shlex
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from leanstep import __version__
from leanstep._checkpoint.card import write_card
from leanstep._process import EXIT_CODES, InterruptibleStart, StopFlag, lacks_memory, processor_name
from leanstep._torch import weight_count
from leanstep.recipes.check.costs import MemoryEstimate, check_layers, check_room, estimate, flops_per_token
from leanstep.recipes.config.schema import RunConfig, targets_note
from leanstep.recipes.config.values import recorded
from leanstep.recipes.data.batches import Batch, Windows
from leanstep.recipes.data.sequences import load_data
from leanstep.recipes.methods.lora import describe_adapters
from leanstep.recipes.methods.pruned import pruned_start_warning
from leanstep.recipes.report.formatting import card_facts
from leanstep.recipes.training.build import (
    build_optimizer,
    build_run_model,
    build_schedule,
    describe_groups,
    describe_world,
    maximum,
    on_main_process,
    optimizer_section,
    release_gradients,
    seed_process,
)
from leanstep.recipes.training.checkpoint import (
    TrainState,
    check_data,
    choose_start,
    how_to_continue,
    read_state,
    reading,
    rename_skipped,
)
from leanstep.recipes.training.failures import EXIT_DONE, EXIT_NAN, RunFailure, dump_step, nonfinite_message, refuse
from leanstep.recipes.training.folder import RunFolder
from leanstep.recipes.training.initial import check_initial_folder
from leanstep.recipes.training.logger import Progress, RunLogger
from leanstep.recipes.training.parts import build_parts
from leanstep.recipes.training.saver import Saver, show_result, write_final, write_report
from leanstep.recipes.training.step import (
    NonFinite,
    StepResult,
    all_reduce_step_scalars,
    backward,
    describe_nonfinite,
    gradient_norm,
)
from leanstep.recipes.training.validation import Interrupted, evaluate

# torchrun kills workers 30 seconds after SIGTERM, so warn about a save that takes longer than this
_SLOW_SAVE_S = 20.0


class Run:
    """One start of a run. The methods are in the order in which they run."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, folder: RunFolder, progress: Progress) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.say, self.busy = progress.say, progress.busy
        self.logger = RunLogger(config, accelerator, folder, progress)
        self.state = TrainState()
        self.parts = build_parts(self)
        self.stop = StopFlag(enabled=False)
        self.memory: MemoryEstimate | None = None
        self.begun = self.written = False

    def go(self) -> int:
        """Begin, train, finish; returns the exit code."""
        try:
            # libraries may swallow Ctrl-C
            with InterruptibleStart():
                if not self.begin():
                    return EXIT_DONE
        except (ValueError, ImportError, OSError) as error:
            if lacks_memory(error):
                raise
            return refuse(error)
        self.stop = StopFlag(self.config.checkpoint.on_signal, leaving=self.leave)
        with self.stop:
            number = self.loop()
            if number:
                return self.interrupted(number)
            self.finish()
        self.logger.end()
        return EXIT_DONE

    def leave(self) -> None:
        """Write the last status of a run that is left at once."""
        self.logger.status("done" if self.written else "interrupted", self.state)

    def begin(self) -> bool:
        """Claim the folder, build the run's objects, load the checkpoint. Returns False if the run is already done.

        Raises ValueError, ImportError or OSError if the run cannot begin or resume.
        """
        config, accelerator = self.config, self.accelerator
        start = on_main_process(accelerator, lambda: choose_start(config, self.folder))
        self.say(
            f"leanstep {__version__}: {config.name}, {describe_world(accelerator)}, precision {config.precision}, "
            f"{accelerator.gradient_accumulation_steps} x {config.batch.micro_batch_size} sequences of "
            f"{config.data.seq_len} per process and step"
        )
        for line in (f"output in {self.folder.root}", *start.notes, *config.notes):
            self.say(line)
        if start.checkpoint is not None:
            self.state = read_state(start.checkpoint)
        if self.state.step >= config.steps and self.folder.read_status().get("status") == "done":
            self.say(
                f"this run is done (step {self.state.step}); to run it again, take out=ANOTHER_FOLDER or remove "
                f"{self.folder.root}"
            )
            # the run may have been killed before it wrote it
            if accelerator.is_main_process and not (self.folder.root / "report.html").exists():
                write_report(self.folder, self.say)
            return False
        if self.logger.progress.live:  # somebody is there who can
            root = self.folder.root
            self.say(f"watch: leanstep board {shlex.quote(str(root.parent if root.parent.name else root))}")
        if config.model.init_from:
            check_initial_folder(config.model.init_from, config.source_file)
        check_layers(config)
        self.load_data()
        if start.checkpoint is not None:
            check_data(self.state, self.data, start.checkpoint)
        self.build_model_and_optimizer()
        self.resume(start.checkpoint)
        for note in on_main_process(accelerator, lambda: rename_skipped(start)):
            self.say(note)
        if start.checkpoint is not None and accelerator.is_main_process:
            # the process that wrote it may have been killed before it had
            self.saver.update_links(start.checkpoint, self.state)
        self.begun = True
        self.logger.begin(self.state, start.checkpoint, self.parameters, self.flops_per_token)
        return True

    def load_data(self) -> None:
        """Read and tokenise the text; check memory and disk space."""
        config, accelerator = self.config, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        self.busy("reading the text; a new one is tokenised once", plain=True)
        self.data = load_data(config.data, seed=config.seed, rank=rank, world_size=world)
        self.say(self.data.summary())
        self.say(f"targets     {targets_note(config.data)}")
        self.memory_unknown = ""
        if self.state.step < config.steps:
            try:
                self.memory = estimate(config, self.data.vocabulary, world_size=world, device=accelerator.device.type)
            except Exception as error:  # an estimate must not end a run
                self.memory_unknown = str(error) or type(error).__name__
            warning = on_main_process(accelerator, lambda: check_room(config, self.folder, self.memory, world))
            if warning:
                self.say(warning)

    def build_model_and_optimizer(self) -> None:
        """Build model, optimizer and schedule; apply the sparsity, adapters and masks of the recipe."""
        config, accelerator = self.config, self.accelerator
        self.busy("building model and optimizer")
        # the same weights in every process; resume() seeds each process differently
        seed_process(config.seed)
        model = build_run_model(config, self.data.tokenizer, self.data.vocabulary)
        self.parameters = sum(map(weight_count, model.parameters()))
        self.flops_per_token = flops_per_token(model, config.data.seq_len)
        optimizer = build_optimizer(optimizer_section(config), model)
        self.say(f"model       {type(model).__name__}, {self.parameters:,} parameters")
        if config.lora.target_modules:
            self.say(f"adapters    {describe_adapters(model)}")
        self.say(f"optimizer   {type(optimizer).__name__}: {describe_groups(optimizer)}")
        for part in self.parts:
            part.build(model, optimizer)
        if self.memory_unknown:
            # printed late: errors of the build explain the same problem better
            reason = self.memory_unknown
            self.say(f"WARNING: memory and disk could not be compared with what the run needs: {reason}")
        # both in one call: sharding also replaces the optimizer's parameters
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.model.train()
        bare_model, bare_optimizer = accelerator.unwrap_model(self.model), self.optimizer.optimizer
        for part in self.parts:
            part.prepared(bare_model, bare_optimizer)
        if config.model.init_from and (warning := pruned_start_warning(config)):
            self.say(f"WARNING: {warning}")
        self.schedule = accelerator.prepare(build_schedule(config.schedule, bare_optimizer, config.steps))

    def resume(self, checkpoint: Path | None) -> None:
        """Load the checkpoint, if any, and set up the objects that need the loaded weights or step."""
        config, accelerator, state = self.config, self.accelerator, self.state
        rank, world = accelerator.process_index, accelerator.num_processes
        model, optimizer = accelerator.unwrap_model(self.model), self.optimizer.optimizer
        self.saver = Saver(
            accelerator, self.folder, config.checkpoint, self.model, self.data.tokenizer, self.say, self.parts
        )
        # the step is in the seed, for a run that resumes with another number of processes
        seed_process(config.seed, rank, state.step)
        self.saver.card = self.card
        stream = None if checkpoint is None else self.saver.load(checkpoint, state.world_size)
        if checkpoint is not None and stream is not None:
            with reading(checkpoint / "trainer"):
                self.data.train.load_state_dict(stream)
        if checkpoint is not None and state.world_size != world:
            self.say(f"WARNING: {world} processes go on where {state.world_size} stopped: not bit for bit the same")
        state.config, state.world_size, state.data = recorded(config), world, self.data.identity
        self.release = release_gradients(accelerator, model, optimizer) if config.release_gradients else None
        for part in self.parts:
            part.begin(model, optimizer, checkpoint)

    def open_windows(self) -> None:
        """Read the data from the position of ``state`` on; replaces the loader of an earlier call."""
        config, state, accelerator = self.config, self.state, self.accelerator
        accelerator._dataloaders.clear()
        self.windows = Windows(
            accelerator,
            self.data,
            seed=config.seed,
            micro_batch_size=config.batch.micro_batch_size,
            accumulation=accelerator.gradient_accumulation_steps,
            start=state.step + state.spikes.windows_ahead,
            count=config.steps - state.step,
        )
        self.next_windows = iter(self.windows)

    def loop(self) -> int:
        """Train to the last step. Returns the signal that ended the loop early, after a save, or 0."""
        config, state = self.config, self.state
        self.busy("the first step, which compiles kernels that are new here", plain=True)
        self.open_windows()
        if state.eval_pending or (config.eval.at_start and state.step == 0):
            number = self.evaluate()
            if number:
                self.save()
                return number
        while state.step < config.steps:
            made = state.step
            number = self.step(next(self.next_windows))
            if state.step <= made:
                # a rollback, which saved: the checkpoint's evaluation is done
                if number:
                    return number
                continue
            improved = False
            if self.due(config.eval.every):
                before = state.best_loss
                number = self.evaluate() or number
                improved = config.checkpoint.keep_best and state.best_loss != before
            if number or improved or self.due(config.checkpoint.every):
                self.save()
            if number and (state.step < config.steps or state.eval_pending):
                return number
        return 0

    def due(self, every: int) -> bool:
        """Whether an action for every ``every`` steps and the last step is due now."""
        step = self.state.step
        return step == self.config.steps or (every > 0 and step % every == 0)

    def step(self, window: list[Batch]) -> int:
        """One optimizer step: backward over the window, checks, update, log. Returns a received signal, or 0.

        A rollback takes the place of update and log, and lowers ``state.step`` to that of the checkpoint.
        """
        config, accelerator = self.config, self.accelerator
        for part in self.parts:
            part.before_step()
        try:
            loss_part, targets = backward(
                accelerator, self.model, window, release=self.release, after_half=self.after_half
            )
        except NonFinite as error:
            raise self.failure(window, StepResult(error.loss, None, 0, 0), f"loss is {error.loss}", "nan") from None
        for part in self.parts:
            part.after_backward()
        norm = None
        if not config.release_gradients:
            norm = gradient_norm(accelerator, self.model, config.max_grad_norm)
        loss, norm_value, number = all_reduce_step_scalars(
            accelerator, loss_part, norm, self.stop.received, self.out_of_time()
        )
        result = StepResult(loss, norm_value, targets, number)
        rate = self.schedule.get_last_lr()[0]
        apply = self.check(window, result)
        for part in self.parts:
            verdict = part.judge(window, result, apply)
            if verdict is None:
                return number
            apply = verdict
        self.update(apply=apply, finite=result.finite())
        self.state.step += 1
        self.state.tokens += targets
        self.logger.clock.stepped(targets)
        optimizer = self.optimizer.optimizer
        sources = {"optimizer": optimizer, **{part.name: part.source for part in self.parts if part.name}}
        self.logger.step(self.state, result, rate, sources, note=self.saver.trouble)
        return number

    def after_half(self, fraction: float) -> None:
        """Tell the parts that this fraction of the micro batches is done."""
        for part in self.parts:
            part.after_half(fraction)

    def check(self, window: list[Batch], result: StepResult) -> bool:
        """Return whether the step may be applied: whether loss and gradient are finite.

        Raises RunFailure by ``stop.nan`` or ``stop.loss_above``.
        """
        stop = self.config.stop
        # the gradient scaler skips a step with non-finite fp16 gradients and lowers its scale
        scaled = self.accelerator.scaler is not None and math.isfinite(result.loss)
        sound = result.finite() or scaled
        if not sound and stop.nan:
            raise self.failure(window, result, describe_nonfinite(result.loss, result.norm), "nan")
        if stop.loss_above is not None and result.loss > stop.loss_above:
            what = f"loss {result.loss:.4f} is above stop.loss_above {stop.loss_above:g}"
            raise self.failure(window, result, what, "loss_above")
        self.state.nonfinite += not result.finite()
        return sound

    def update(self, *, apply: bool, finite: bool) -> None:
        """Update the weights, or drop the gradients if not ``apply``; advance the schedules in any case."""
        if apply:
            # with release_gradients the weights are already updated, and this only ends the step
            self.optimizer.step()
        for part in reversed(self.parts):
            part.after_step(apply, finite)
        self.schedule.step()
        self.drop_gradients(unscaled=not apply)

    def drop_gradients(self, *, unscaled: bool) -> None:
        """Free the gradients; ``unscaled``: no optimizer step has used them."""
        if unscaled and self.accelerator.scaler is not None:
            # ends the scaler's step, which it refuses to unscale twice
            self.accelerator.scaler.update()
        self.optimizer.zero_grad()

    def failure(
        self, window: list[Batch], result: StepResult, what: str, reason: str, advice: Sequence[str] = ()
    ) -> RunFailure:
        """Write nan_dump/ and return the failure to raise; every process calls it."""
        step = self.state.step + 1
        facts = {
            "step": step,
            "what": what,
            "loss": result.loss,
            "grad_norm": result.norm,
            "lr": self.schedule.get_last_lr(),
            "sequences": self.windows.positions(self.state.step + self.state.spikes.windows_ahead),
        }
        try:
            dump_step(self.accelerator, self.folder.root, self.model, facts, window)
        except OSError as error:
            self.say(f"WARNING: nan_dump could not be written: {error}")
        updated = self.config.release_gradients and reason != "nan"
        message = nonfinite_message(self.config, self.folder.root, step, what, updated=updated, advice=advice)
        return RunFailure(reason, EXIT_NAN, message)

    def evaluate(self) -> int:
        """Validate and log. Returns the signal that interrupted it, 0 without one."""
        state, config = self.state, self.config
        if len(self.data.validation) == 0:
            return 0
        before = [part.state_dict() for part in self.parts]

        self.busy("evaluating", plain=True)

        def stop_on_signal(done: int, rounds: int) -> None:
            self.busy(f"{state.step}/{config.steps}  evaluating, batch {done + 1}/{rounds}")
            if number := maximum(self.accelerator, int(self.stop.received)):
                raise Interrupted(number)

        measure = partial(
            evaluate,
            self.model,
            self.data.validation,
            micro_batch_size=config.batch.micro_batch_size,
            device=self.accelerator.device,
            bytes_per_token=self.data.bytes_per_token,
            batches=config.eval.batches,
            accelerator=self.accelerator,
            before_round=stop_on_signal,
        )
        averaged = None
        with self.logger.clock.pause("eval"):
            try:
                result = measure()
                for applied in filter(None, (part.applied for part in self.parts)):
                    with applied():
                        averaged = measure()
            except Interrupted as interruption:
                # the resumed run repeats the whole evaluation
                state.eval_pending = True
                for part, known in zip(self.parts, before, strict=True):
                    part.load_state_dict(known)
                return interruption.signal
        state.eval_pending = False
        state.val_loss, state.val_stderr, state.bits_per_byte = result.loss, result.stderr, result.bits_per_byte
        state.ema_loss = averaged.loss if averaged else None
        if state.best_loss is None or math.isnan(state.best_loss) or result.loss < state.best_loss:
            state.best_loss, state.best_step = result.loss, state.step
        self.logger.evaluation(state, result, averaged)
        return 0

    def save(self) -> None:
        """Write a checkpoint of this step. A full disk is a warning."""
        clock = self.logger.clock
        self.state.elapsed_s = clock.elapsed_s
        self.busy(f"{self.state.step}/{self.config.steps}  saving a checkpoint")
        with clock.pause("save") as spent:
            saved = self.saver.save(self.state, self.windows)
        if saved:
            advice = (
                "; under torchrun a save after SIGTERM has 30 s: signal the workers themselves (Slurm: "
                "--signal=TERM@300), or raise TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
            )
            slow = advice if spent() > _SLOW_SAVE_S else ""
            self.say(f"step {self.state.step}/{self.config.steps}  checkpoint saved in {spent():.1f} s{slow}")

    def finish(self) -> None:
        """Write the final model, samples of it and all reports. A signal cuts the samples alone."""
        for part in self.parts:
            part.close()
        self.busy("writing the final model")
        write_final(self.accelerator, self.folder, self.saver)
        self.written, self.stop.lost = True, f"the model is complete in {self.folder.final}, its report may be missing"
        show_result(self.config, self.folder, self.state, self.data, self.accelerator.device, self.logger, self.stop)
        self.logger.reports(self.optimizer.optimizer, self.parts)
        self.logger.status("done", self.state)
        if self.accelerator.is_main_process:
            self.busy("writing the report")
            write_report(self.folder, self.say)

    def card(self, folder: Path, **options: Any) -> None:
        """Write the card of the model of this step, or its adapter, into its folder."""
        device = self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
        facts = card_facts(self.config, self.state, self.logger.clock.rate_now, name)
        shown = recorded(self.config)
        base = None if "${" in str(shown["model"]["init_from"]) else self.config.model.init_from
        write_card(folder, Path(shown["out"]).name, facts, base=base, **options)

    def interrupted(self, number: int) -> int:
        """Print how to continue; return the exit code of the signal."""
        self.logger.status("interrupted", self.state)
        why = signal.Signals(self.stop.received or number).name
        if self.out_of_time():
            why = f"stop.max_hours ({self.config.stop.max_hours:g})"
        outcome = self.saver.trouble or f"saved; {how_to_continue(self.config)}"
        self.say(f"stopped by {why} after step {self.state.step}: {outcome}")
        self.logger.end()
        return EXIT_CODES[signal.Signals(number)]

    def out_of_time(self) -> bool:
        """Whether this start of the run has lasted longer than ``stop.max_hours``."""
        hours = self.config.stop.max_hours
        return hours is not None and self.logger.clock.here_s > 3600 * hours
