"""What N:M masks add to a training step of the nano LLaMA, by method and pattern.

    python benchmarks/nm_train_step.py [--threads 2] [--rounds 15] [--only ste] [--recipe NAME] [--cpu-time]

Every candidate has its own copy of the recipe's model and its optimizer, and makes the same step of the recipe's batch
in every round, in shuffled order: forward and backward of each micro batch, and the optimizer's step with the masks.
The ratio is the median over the rounds of the step over the dense one of the same round; a second dense copy shows what
the measurement is good for. All 28 matrices of the decoder are sparse unless the row says otherwise. On a machine that
others use, ``--cpu-time`` counts this process's processor time instead of the clock's.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from optimizer_step import machine

from leanstep.recipes.config.loader import find_recipe, load
from leanstep.recipes.config.schema import RunConfig, accumulation_steps
from leanstep.recipes.training.build import build_model, build_optimizer
from leanstep.sparsity import sparsify

VOCABULARY = 2048
# name -> (patterns, what sparsify is told besides)
CANDIDATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dense": (None, {}),
    "dense again": (None, {}),
    "ste 2:4": ("2:4", {"method": "ste"}),
    "ste 1:8": ("1:8", {"method": "ste"}),
    "ste 1:32": ("1:32", {"method": "ste"}),
    "srste 1:8": ("1:8", {"method": "srste"}),
    "fixed 2:4": ("2:4", {"method": "fixed"}),
    "mdgf-exponential 1:16": ("1:16", {"method": "mdgf-exponential", "schedule": 10_000}),
    'mdgf-exponential 1:16, grad_flow="decay"': (
        "1:16", {"method": "mdgf-exponential", "schedule": 10_000, "grad_flow": "decay"}),
    "mdgf-exponential 1:16, MLPs only": (
        {"*.mlp.*": "1:16"}, {"method": "mdgf-exponential", "schedule": 10_000}),
    "sdgf-stepwise 1:16": ("1:16", {"method": "sdgf-stepwise", "schedule": 10_000}),
    "sdgf-geometric 1:16": ("1:16", {"method": "sdgf-geometric", "schedule": 10_000}),
    "s-ste 2:4": ("2:4", {"method": "s-ste"}),
    "ste 1:8, a mask every 40 steps": ("1:8", {"method": "ste", "mask_every": 40}),
}  # fmt: skip


def make_step(config: RunConfig, patterns: Any, options: dict[str, Any]) -> Callable[[], None]:
    """A training step on one batch of random tokens."""
    torch.manual_seed(0)
    model = build_model(config.model, VOCABULARY)
    optimizer = build_optimizer(config.optimizer, model)
    if patterns is not None:
        sparsify(model, patterns, **options).attach(optimizer)
    model.train()
    shape = (config.batch.micro_batch_size, config.data.seq_len)
    batches = [torch.randint(VOCABULARY, shape) for _ in range(accumulation_steps(config))]

    def step() -> None:
        for tokens in batches:
            loss = model(input_ids=tokens, labels=tokens).loss
            (loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(steps: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every candidate's step in every round, after one step that is not counted."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            begin = clock()
            steps[name]()
            times[name].append(clock() - begin)
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="llama-nano-sinkgd")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="only candidates with this in their name, and the dense ones")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load(find_recipe(arguments.recipe))
    chosen = {name: row for name, row in CANDIDATES.items() if name.startswith("dense") or arguments.only in name}
    steps = {name: make_step(config, *row) for name, row in chosen.items()}
    times = measure(steps, arguments.rounds, time.process_time if arguments.cpu_time else time.perf_counter)
    print(machine())
    print(f"{arguments.recipe}: {config.batch.tokens_per_step} tokens per step, {arguments.rounds} rounds\n")
    print("| step | median ms | ÷ dense | quartiles |\n| --- | ---: | ---: | ---: |")
    for name, seconds in times.items():
        ratios = [own / dense for own, dense in zip(seconds, times["dense"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {statistics.median(seconds) * 1e3:.0f} | {middle:.3f} | {low:.2f} to {high:.2f} |")


if __name__ == "__main__":
    main()
