"""Train one run in this process, on tokens that stay loaded, and time the steps of all methods side by side."""

from __future__ import annotations

import hashlib
import math
import platform
import statistics
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from common import commit, interleaved, peak_memory, processor_name, reset_peak_memory
from torch.utils.data import Subset
from transformers.utils.logging import disable_progress_bar

from comparison.methods import METHODS
from comparison.protocol import MIXTURE, ComparisonError, Protocol, Run
from leanstep import __version__
from leanstep._process import end_with_parent
from leanstep.recipes.check.costs import optimizer_state_bytes, unique_bytes
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.data.batches import Windows
from leanstep.recipes.data.sequences import LoadedData, load_data
from leanstep.recipes.training.build import build_accelerator, build_run_model, build_schedule, seed_process
from leanstep.recipes.training.step import backward, gradient_norm
from leanstep.recipes.training.validation import evaluate


def start_worker(parent: int | None, threads: int) -> None:
    """Prepare a process that trains: it ends with its parent."""
    if parent is not None:
        end_with_parent(parent)
    torch.set_num_threads(threads)
    disable_progress_bar()


@lru_cache(1)
def _data(protocol: Protocol) -> LoadedData:
    return load_data(protocol.config.data, seed=protocol.tune_seed)


def held_out(protocol: Protocol, kind: str) -> Subset:
    """The held-out sequences that tune, or those that judge: the older ones and the newer ones."""
    validation = _data(protocol).validation
    boundary = round(protocol.tune_fraction * len(validation))
    if not 0 < boundary < len(validation):
        raise ComparisonError(
            f"{len(validation)} held-out sequences cannot be split into {protocol.tune_fraction:g} to tune and the "
            "rest to judge; raise data.val_tokens"
        )
    return Subset(validation, range(boundary) if kind == "tune" else range(boundary, len(validation)))


def build_mixture(config: RunConfig, data: LoadedData) -> transformers.PreTrainedModel:
    """A Mixtral in the sizes of a recipe of LLaMA."""
    sizes = {"num_key_value_heads": config.model.config["num_attention_heads"], **config.model.config, **MIXTURE}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=data.vocabulary, **sizes))


class Training:
    """Model, optimizer, schedule and batches of one run."""

    def __init__(self, protocol: Protocol, run: Run) -> None:
        schedule = replace(protocol.config.schedule, warmup_fraction=run.warmup, warmup_steps=None)
        self.config = config = replace(protocol.config, device="cpu", schedule=schedule, seed=run.seed)
        data, steps = _data(protocol), run.steps(protocol)
        self.accelerator = build_accelerator(config)
        # as leanstep.recipes.training.train does
        seed_process(run.seed)
        # the accelerator is the same for all runs of a process, and holds on to what it prepares
        self.accelerator.free_memory()
        model = (
            build_mixture(config, data)
            if protocol.is_mixture
            else build_run_model(config, data.tokenizer, data.vocabulary)
        )
        self.optimizer = METHODS[run.method].build(model, run)
        self.model = self.accelerator.prepare(model)
        self.schedule = build_schedule(schedule, self.optimizer, steps)
        seed_process(run.seed, 0, 0)
        self.model.train()
        self.windows = iter(
            Windows(self.accelerator, data, seed=run.seed, micro_batch_size=config.batch.micro_batch_size,
                    accumulation=self.accelerator.gradient_accumulation_steps, start=0, count=steps)
        )  # fmt: skip

    def backward(self) -> tuple[float, int]:
        """Compute the gradient of the next batch; return loss and targets."""
        loss, targets = backward(self.accelerator, self.model, next(self.windows))
        if self.config.max_grad_norm is not None:
            gradient_norm(self.accelerator, self.model, self.config.max_grad_norm)
        return float(loss), targets

    def update(self) -> None:
        """Make a step of the optimizer and of the schedule."""
        self.optimizer.step()
        self.schedule.step()

    def bytes(self) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer state, after a step."""
        params = list(self.model.parameters())
        return {
            "weights": unique_bytes(params),
            "gradients": unique_bytes(p.grad for p in params if p.grad is not None),
            "state": optimizer_state_bytes(self.optimizer),
        }


def train(protocol: Protocol, run: Run) -> dict[str, Any]:
    """Train and evaluate. Returns status, losses at evaluations as (step, tokens, loss), bytes, seconds."""
    reset_peak_memory()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    training, validation = Training(protocol, run), held_out(protocol, run.kind)
    steps, every = run.steps(protocol), protocol.eval_every if run.kind == "judge" else run.steps(protocol)
    result: dict[str, Any] = {"status": "done", "losses": [], "bytes": {}}
    tokens = 0
    for step in range(1, steps + 1):
        loss, targets = training.backward()
        training.update()
        tokens += targets
        if step == 1:
            result["bytes"] = training.bytes()
        training.optimizer.zero_grad()
        if math.isfinite(loss) and (step % every == 0 or step == steps):
            size = protocol.config.batch.micro_batch_size
            loss = evaluate(training.model, validation, micro_batch_size=size).loss
            result["losses"].append([step, tokens, round(loss, 5)])
        if not math.isfinite(loss):
            result |= {"status": f"diverged at step {step}", "losses": result["losses"][: (step - 1) // every]}
            break
    seconds = {"wall": time.perf_counter() - begin, "processor": time.process_time() - cpu_begin}
    return {**result, "seconds": {key: round(value, 1) for key, value in seconds.items()}, "peak_bytes": peak_memory()}


def time_steps(protocol: Protocol, runs: list[Run], rounds: int = 8) -> dict[str, Any]:
    """Processor seconds of a step of each run, interleaved in this process, while nothing else of ours works.

    Forward and backward are the same work for all: their median over all runs. The optimizer's step: median of its
    rounds. ``other_load`` is the share of the machine's processors that other processes used meanwhile.
    """
    long = replace(protocol, judge_steps=rounds + 2)
    trainings = {run.method: Training(long, replace(run, kind="judge")) for run in runs}

    def one(training: Training) -> tuple[float, float]:
        begin = time.process_time()
        training.backward()
        middle = time.process_time()
        training.update()
        end = time.process_time()
        training.optimizer.zero_grad()
        return middle - begin, end - middle

    before, wall, used = _busy(), time.perf_counter(), time.process_time()
    times = interleaved({name: lambda t=t: one(t) for name, t in trainings.items()}, rounds, warmup=2)
    wall, used = time.perf_counter() - wall, time.process_time() - used
    return {
        "model": round(statistics.median(model for pairs in times.values() for model, _ in pairs), 5),
        "optimizers": {name: round(statistics.median(o for _, o in pairs), 5) for name, pairs in times.items()},
        "rounds": rounds,
        "other_load": round(max(0.0, _busy() - before - used) / wall / (psutil.cpu_count() or 1), 3),
    }


def _busy() -> float:
    """Seconds in which the machine's processors were busy."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def environment(protocol: Protocol) -> dict[str, str]:
    """Versions, processor and commit of a result, and the hash of the text where it is a file."""
    text = {}
    if (path := protocol.config.data.path) and Path(path).is_file():
        with Path(path).open("rb") as file:
            text["text"] = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return text | {
        "processor": processor_name(),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "leanstep": __version__,
        "python": platform.python_version(),
    }
