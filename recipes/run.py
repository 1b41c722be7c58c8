"""One start of a run, in the order of events: claim the folder, build, resume, step, log, evaluate, save, finish."""

import dataclasses
import math
import os
import signal
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from leanstep._version import __version__
from leanstep.recipes.batches import Batch, Windows
from leanstep.recipes.build import (
    build_model,
    build_optimizer,
    build_schedule,
    check_positions,
    checkpoint_activations,
    describe_groups,
)
from leanstep.recipes.checkpoint import TrainState, read_state
from leanstep.recipes.config import RunConfig
from leanstep.recipes.data import LoadedData, load_data
from leanstep.recipes.failures import (
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
from leanstep.recipes.finish import finish, write_report
from leanstep.recipes.folder import RunFolder, environment
from leanstep.recipes.loader import dump
from leanstep.recipes.memory import MemoryEstimate, estimate
from leanstep.recipes.progress import Clock, Progress, flat_scalars, format_line
from leanstep.recipes.saver import Saver
from leanstep.recipes.signals import EXIT_CODES, StopFlag
from leanstep.recipes.start import check_room, choose_start, pass_over
from leanstep.recipes.step import NonFinite, StepResult, backward, describe_nonfinite, gradient_norm, share
from leanstep.recipes.validation import validate
from leanstep.recipes.vocabulary import vocabulary_size
from leanstep.recipes.world import describe_world, device_name, main_does, maximum, seed_process

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
        self.begun = False
        self.last_eval: dict[str, Any] = {}

    def go(self) -> int:
        """Begin, train, finish; returns the exit code."""
        try:
            checkpoint = self.choose()
            if self.nothing_left():
                return EXIT_DONE
            self.build(checkpoint)
        except (ValueError, ImportError, OSError) as error:
            return refuse(error)
        with StopFlag(self.config.checkpoint.on_signal) as self.stop:
            try:
                number = self.loop()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                rows = self.memory.rows() if self.memory else ()
                message = memory_message(self.config, self.folder.root, self.state.step + 1, rows)
                raise RunFailure("out of memory", EXIT_MEMORY, message) from error
            if number:
                return self.interrupted(number)
            finish(self.config, self.accelerator, self.folder, self.saver, self.state, self.say)
        self.write_status("done")
        if self.main:
            write_report(self.folder, self.say)
        self.accelerator.end_training()
        return EXIT_DONE

    @cached_property
    def memory(self) -> MemoryEstimate | None:
        """The memory of one process as ``leanstep check`` estimates it; None where that cannot be told."""
        config, accelerator = self.config, self.accelerator
        vocabulary = vocabulary_size(self.data.tokenizer)
        try:
            return estimate(config, vocabulary, world_size=accelerator.num_processes, device=accelerator.device.type)
        except Exception as error:
            # whatever keeps the estimate from being made, after an out-of-memory error too, must not end or hide a run
            self.say(f"WARNING: memory and disk could not be compared with what the run needs: {error}")
            return None

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
        self.state = TrainState() if chosen is None else read_state(chosen)
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

    def build(self, checkpoint: Path | None) -> None:
        """Data, model, optimizer, schedule and batches, from the recipe and the checkpoint if there is one."""
        config, accelerator = self.config, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        self.data: LoadedData = load_data(config.data, seed=config.seed, rank=rank, world_size=world)
        self.say(self.data.summary())
        if self.state.step < config.steps:
            warning = main_does(accelerator, lambda: check_room(config, self.folder, self.memory, world))
            if warning:
                self.say(warning)
        # the same weights in every process; later each one gets random numbers of its own
        seed_process(config.seed)
        dtype = torch.bfloat16 if config.precision == "bf16-pure" else torch.float32
        tokenizer = self.data.tokenizer
        model = build_model(config.model, vocabulary_size(tokenizer), dtype, tokenizer.eos_token_id)
        check_positions(model, config.data.seq_len)
        if config.activation_checkpointing:
            checkpoint_activations(model)
        if config.compile:
            model.compile()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        optimizer = build_optimizer(config.optimizer, model)
        self.say(f"model       {type(model).__name__}, {parameters:,} parameters")
        self.say(f"optimizer   {type(optimizer).__name__}: {describe_groups(optimizer)}")
        # both in one call: sharding replaces the parameters, in the optimizer too
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.model.train()
        self.schedule = accelerator.prepare(build_schedule(config.schedule, self.optimizer.optimizer, config.steps))
        self.saver = Saver(accelerator, self.folder, config.checkpoint, self.model, self.data.tokenizer, self.say)
        # the step is part of the seed for a run that goes on with another number of processes
        seed_process(config.seed, rank, self.state.step)
        stream = None if checkpoint is None else self.saver.load(checkpoint, self.state)
        if checkpoint is not None and self.state.world_size != world:
            self.say(
                f"WARNING: {world} processes go on where {self.state.world_size} stopped: not bit for bit the same"
            )
        self.windows = Windows(
            accelerator,
            self.data,
            seed=config.seed,
            micro_batch_size=config.batch.micro_batch_size,
            accumulation=accelerator.gradient_accumulation_steps,
            made=self.state.step,
            steps=config.steps,
            stream_state=stream,
        )
        self.state.config, self.state.world_size = dataclasses.asdict(config), world
        self.release_gradients()
        self.clock = Clock(self.state.elapsed_s)
        self.begin_folder(checkpoint, parameters)

    def release_gradients(self) -> None:
        """Let the optimizer step inside backward, when the recipe asks for it."""
        if not self.config.release_gradients:
            return
        if self.accelerator.num_processes > 1:
            raise ValueError(
                "release_gradients: it updates weights before the processes exchange their gradients, so it needs "
                f"one process and this run has {self.accelerator.num_processes}; set release_gradients=false"
            )
        from leanstep.optimizers import release_gradients

        try:
            release_gradients(self.accelerator.unwrap_model(self.model), self.optimizer.optimizer)
        except TypeError as error:
            raise ValueError(f"release_gradients: {error}") from None

    def begin_folder(self, checkpoint: Path | None, parameters: int) -> None:
        """Write the files that describe the run, and start the trackers."""
        config, accelerator = self.config, self.accelerator
        for note in main_does(accelerator, lambda: pass_over(self.start, self.folder)):
            self.say(note)
        self.begun = True
        if self.main:
            self.folder.rewind_log(-1 if checkpoint is None else self.state.step)
            facts = environment(
                seed=config.seed,
                world_size=accelerator.num_processes,
                world=describe_world(accelerator),
                device=device_name(accelerator.device),
                parameters=parameters,
                resumed_from=None if checkpoint is None else str(checkpoint),
            )
            self.folder.describe(dump(config), facts)
        self.write_status("running")
        if config.log.trackers:
            accelerator.init_trackers("leanstep", config=flat_scalars(dataclasses.asdict(config)))

    def loop(self) -> int:
        """Train to the last step. Returns the signal that ended it early, saved, or 0."""
        config, state = self.config, self.state
        number = 0
        if state.eval_pending or (config.eval.at_start and state.step == 0):
            number = self.evaluate()
            if number:
                self.save()
                return number
        for window in self.windows:
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
        config, accelerator = self.config, self.accelerator
        try:
            part, targets = backward(accelerator, self.model, window, check=config.release_gradients)
        except NonFinite as error:
            raise self.failure(window, StepResult(error.loss, None, 0, 0), f"loss is {error.loss}", "nan") from None
        norm = None
        if not config.release_gradients:
            norm = gradient_norm(accelerator, self.model, config.max_grad_norm)
        loss, norm_value, number = share(accelerator, part, norm, self.stop.received, self.out_of_time())
        result = StepResult(loss, norm_value, targets, number)
        self.update(window, result)
        self.state.step += 1
        self.state.tokens += targets
        self.clock.stepped(targets)
        self.log(result)
        return result

    def update(self, window: list[Batch], result: StepResult) -> None:
        """Check what the step brought, then update weights and schedule, or leave them as they are and say why."""
        config = self.config
        # a gradient out of fp16's range is the scaler's business: it leaves the step out and lowers its scale
        scaled = self.accelerator.scaler is not None and math.isfinite(result.loss)
        sound = result.finite() or scaled
        if not sound and config.stop.nan:
            raise self.failure(window, result, describe_nonfinite(result.loss, result.norm), "nan")
        if config.stop.loss_above is not None and result.loss > config.stop.loss_above:
            what = f"loss {result.loss:.4f} is above stop.loss_above {config.stop.loss_above:g}"
            raise self.failure(window, result, what, "loss_above")
        self.rate = self.schedule.get_last_lr()[0]
        self.state.nonfinite += not result.finite()
        if sound:
            # with released gradients the weights are updated already, and this ends the step
            self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def failure(self, window: list[Batch], result: StepResult, what: str, reason: str) -> RunFailure:
        """Write nan_dump/ and make the failure that ends the run; every process comes through here."""
        step = self.state.step + 1
        norms = layer_norms(self.accelerator.unwrap_model(self.model).named_parameters())
        if self.main:
            facts = {
                "step": step,
                "what": what,
                "loss": result.loss,
                "grad_norm": result.norm,
                "lr": self.schedule.get_last_lr(),
                "sequences": self.windows.positions(self.state.step),
                "layers": norms,
            }
            batches = {f"{key}.{index}": value for index, batch in enumerate(window) for key, value in batch.items()}
            try:
                write_nan_dump(self.folder.root, facts, batches)
            except OSError as error:
                self.say(f"WARNING: nan_dump could not be written: {error}")
        return RunFailure(reason, EXIT_NAN, nonfinite_message(self.config, self.folder.root, step, what))

    def log(self, result: StepResult) -> None:
        """Show the step; write log.jsonl, train.log and trackers at the first step and every ``log.every``."""
        state, config = self.state, self.config
        if not self.main:
            return
        wanted = state.step == 1 or state.step % config.log.every == 0 or state.step == config.steps
        first_here = self.clock.rate_now is None
        if wanted or first_here:
            self.clock.measure()
        entry = {
            "step": state.step,
            "kind": "train",
            "loss": result.loss,
            "lr": self.rate,
            "grad_norm": result.norm,
            "tokens_per_s": self.clock.rate_now,
            "tokens": state.tokens,
            "elapsed_s": round(self.clock.elapsed_s, 3),
            "nonfinite": state.nonfinite + self.left_out() if wanted else state.nonfinite,
        }
        if self.accelerator.device.type == "cuda":
            entry["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        if wanted:
            self.folder.log(entry)
            if config.log.trackers:
                numbers = {key: value for key, value in entry.items() if key not in ("step", "kind", None)}
                self.accelerator.log({k: v for k, v in numbers.items() if v is not None}, step=state.step)
        notes = [self.saver.trouble] if self.saver.trouble else []
        self.progress.line(state.step, format_line(entry, config.steps, self.eta(), notes), wanted or first_here)

    def left_out(self) -> int:
        """How often the optimizer itself left a tensor out because its gradient was not finite (Lion, SinkGD)."""
        count = getattr(self.optimizer.optimizer, "nonfinite_count", None)
        return 0 if count is None else int(count())

    def eta(self) -> float | None:
        """Seconds to the end by the measured cost of steps, evaluations and saves."""
        left = self.config.steps - self.state.step
        evals, saves = (
            left // every if every else 1 for every in (self.config.eval.every, self.config.checkpoint.every)
        )
        return self.clock.eta(left, evals, saves)

    def evaluate(self) -> int:
        """Validate and log; returns the signal that interrupted it (then it is pending), else 0."""
        state, config = self.state, self.config
        if len(self.data.validation) == 0:
            return 0
        interrupting = 0

        def interrupted() -> bool:
            nonlocal interrupting
            interrupting = maximum(self.accelerator, int(self.stop.received))
            return interrupting != 0

        with self.clock.pause("eval"):
            found = validate(
                self.accelerator,
                self.model,
                self.data,
                micro_batch_size=config.batch.micro_batch_size,
                batches=config.eval.batches,
                interrupted=interrupted,
            )
        state.eval_pending = found is None
        if found is None:
            return interrupting
        state.val_loss = found["loss"]
        if state.best_loss is None or found["loss"] < state.best_loss:
            state.best_loss, state.best_step = found["loss"], state.step
        if self.main:
            self.folder.log({"step": state.step, "kind": "eval", **found})
            if config.log.trackers:
                numbers = {f"val_{key}": value for key, value in found.items() if value is not None}
                self.accelerator.log(numbers, step=state.step)
            per_byte = "" if found["bits_per_byte"] is None else f"  bits/byte {found['bits_per_byte']:.4f}"
            self.say(
                f"step {state.step}/{config.steps}  validation loss {found['loss']:.4f}  perplexity "
                f"{found['perplexity']:.2f}{per_byte}  ({found['tokens']:,} tokens)"
            )
        self.write_status("running")
        return 0

    def save(self) -> None:
        """Write a checkpoint of this step; a full disk is said and survived."""
        self.state.elapsed_s = self.clock.elapsed_s
        with self.clock.pause("save") as spent:
            saved = self.saver.save(self.state, self.windows)
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
        self.write_status("interrupted")
        why = signal.Signals(self.stop.received or number).name
        if self.out_of_time():
            why = f"stop.max_hours ({self.config.stop.max_hours:g})"
        outcome = self.saver.trouble or "saved. The same command continues it"
        self.say(f"stopped by {why} after step {self.state.step}: {outcome}")
        self.accelerator.end_training()
        return EXIT_CODES[signal.Signals(number)]

    def out_of_time(self) -> bool:
        """Whether this start of the run has lasted longer than ``stop.max_hours``."""
        hours = self.config.stop.max_hours
        return hours is not None and self.clock.here_s > 3600 * hours

    def write_status(self, status: str, *, any_process: bool = False) -> None:
        """Write status.json, from the first process or, for a failure of one process, from that one."""
        if self.main or any_process:
            state = getattr(self, "state", TrainState())
            self.folder.status(
                status,
                step=state.step,
                steps=self.config.steps,
                val_loss=state.val_loss,
                best_loss=state.best_loss,
                best_step=state.best_step,
                tokens=state.tokens,
            )
