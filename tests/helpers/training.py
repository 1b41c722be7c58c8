"""Real training processes for the tests of recipes: forked from one server that has imported everything already.

A process costs a fraction of a second instead of the seconds that the imports take, and can be killed like any other.
"""

import atexit
import json
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from forked import CONTEXT, preload, start_server

preload(
    "leanstep.recipes.training.train",
    "leanstep.recipes.report.report",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.generation.utils",
    "transformers.generation.continuous_batching",
    "warm_process",
)

_WORDS = [
    "the", "union", "state", "congress", "people", "war", "peace", "government", "law", "nation", "great", "public",
    "year", "country", "world", "men", "power", "treasury", "act", "states", "united", "constitution", "citizens",
    "of", "and", "to", "in", "a", "that", "for", "our", "which", "has", "been", "be", "it",
]  # fmt: skip

_RECIPE = """\
recipe: pretrain
steps: 24
model:
  family: gpt2
  config: {n_embd: 32, n_layer: 2, n_head: 2, n_positions: 32, resid_pdrop: 0.0, attn_pdrop: 0.0, embd_pdrop: 0.0}
data: {source: text, path: %s, tokenizer: "train:300", seq_len: 32, val_tokens: 300}
batch: {tokens_per_step: 256, micro_batch_size: 4}
optimizer: {name: adamw, lr: 1e-3, weight_decay: 0.1}
precision: fp32
eval: {every: 6}
checkpoint: {every: 3}
log: {every: 1, trackers: []}
"""


def write_text(path: Path, words: int = 1000, seed: int = 0) -> Path:
    """Documents of made-up sentences; 1,000 words are about 85 sequences of 32 tokens at 300 BPE entries."""
    chance = random.Random(seed)
    path.write_text(" ".join(chance.choice(_WORDS) for _ in range(words)))
    return path


def write_recipe(folder: Path, text: str = _RECIPE) -> Path:
    """A tiny GPT-2 recipe over a text made beside it: 8 sequences of 32 tokens a step in passes of 4, no dropout."""
    corpus = write_text(folder / "text.txt")
    recipe = folder / "tiny.yaml"
    recipe.write_text(text % corpus)
    return recipe


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Training:
    """The processes of one run, started at once; ``prepare`` runs in each before training, to inject a fault."""

    def __init__(
        self,
        recipe: Path,
        overrides: Sequence[str],
        out: Path,
        *,
        world: int = 1,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self.out = out
        self.console = out.parent / f"{out.name}.console"
        arguments = [str(recipe), f"out={out}", *overrides]
        port = free_port() if world > 1 else 0
        self.processes = []
        start_server()
        for rank in range(world):
            environment = {}
            if world > 1:
                environment = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            process = CONTEXT.Process(target=_train, args=(arguments, environment, self.console, prepare))
            process.start()
            self.processes.append(process)
        # a failed test leaves no endless run behind
        atexit.register(self.kill)

    def wait(self, timeout: float = 600) -> list[int]:
        """Wait for all and return their exit codes."""
        for process in self.processes:
            process.join(timeout)
            if process.is_alive():
                self.kill()
                raise AssertionError(f"still running after {timeout} s:\n{self.text()}")
        return [process.exitcode for process in self.processes]

    def wait_for(self, seen: Callable[["Training"], bool], timeout: float = 300) -> None:
        """Wait until ``seen(self)`` while the run goes on."""
        deadline = time.monotonic() + timeout
        while not seen(self):
            alive = all(process.is_alive() for process in self.processes)
            assert alive and time.monotonic() < deadline, f"it never happened:\n{self.text()}"
            time.sleep(0.001)

    def kill(self, rank: int | None = None) -> None:
        """``kill -9`` one process, or all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            process.kill()

    def text(self) -> str:
        """What all processes printed."""
        return self.console.read_text() if self.console.exists() else ""

    def last_step(self) -> int:
        """The newest step in log.jsonl, 0 when there is none."""
        return max((entry["step"] for entry in read_log(self.out)), default=0)


def run(recipe: Path, overrides: Sequence[str], out: Path, **options) -> Training:
    """Start a run and wait for its end."""
    training = Training(recipe, overrides, out, **options)
    training.codes = training.wait()
    return training


def read_log(out: Path) -> list[dict]:
    """The whole lines of log.jsonl."""
    path = out / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def numbers(out: Path) -> list[tuple]:
    """What must not depend on interruptions: every loss, norm and rate, and every validation result, in order."""
    keys = ("kind", "step", "loss", "lr", "grad_norm", "tokens", "perplexity", "text")
    return [tuple(entry.get(key) for key in keys) for entry in read_log(out)]


def status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


def _train(
    arguments: list[str], environment: dict[str, str], console: Path, prepare: Callable[[], object] | None
) -> None:
    os.environ.update(environment)
    descriptor = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # what the forking left of the parent's streams writes elsewhere
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if prepare is not None:
        prepare()
    from leanstep.recipes.training.train import main

    sys.exit(main(arguments))
