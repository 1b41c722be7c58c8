"""What N:M masks add to a training step of the nano LLaMA, by method and pattern.

    python benchmarks sparsity/train_step [--threads 2] [--rounds 15] [--only ste] [--recipe NAME] [--cpu-time]

Every candidate has its own copy of the recipe's model and its optimizer, and makes the same step of the recipe's batch
in every round, in shuffled order: forward and backward of each micro batch, and the optimizer's step with the masks.
The ratio is the median over the rounds of the step over the dense one of the same round; a second dense copy shows what
the measurement is good for. All 28 matrices of the decoder are sparse unless the row says otherwise. On a machine that
others use, ``--cpu-time`` counts this process's processor time instead of the clock's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import clock_of, command_line, interleaved_seconds, print_table, start

from leanstep.recipes.config.loader import find_recipe, load
from leanstep.recipes.config.schema import RunConfig, accumulation_steps
from leanstep.recipes.training.build import build_model, build_optimizer
from leanstep.sparsity import sparsify

VOCABULARY = 2048
PARSER = command_line(
    __doc__, recipe="llama-nano-sinkgd", threads=0, rounds=15, cpu_time=(False, "measure processor time"),
    only=("", "only candidates with this in their name, and the dense ones"),
)  # fmt: skip
DECAY = {"method": "mdgf-exponential", "schedule": 10_000}
# name -> (patterns, arguments of sparsify)
CANDIDATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dense": (None, {}),
    "dense again": (None, {}),
    "ste 2:4": ("2:4", {"method": "ste"}),
    "ste 1:8": ("1:8", {"method": "ste"}),
    "ste 1:32": ("1:32", {"method": "ste"}),
    "srste 1:8": ("1:8", {"method": "srste"}),
    "fixed 2:4": ("2:4", {"method": "fixed"}),
    "mdgf-exponential 1:16": ("1:16", DECAY),
    'mdgf-exponential 1:16, grad_flow="decay"': ("1:16", {**DECAY, "grad_flow": "decay"}),
    "mdgf-exponential 1:16, MLPs only": ({"*.mlp.*": "1:16"}, DECAY),
    "sdgf-stepwise 1:16": ("1:16", {"method": "sdgf-stepwise", "schedule": 10_000}),
    "sdgf-geometric 1:16": ("1:16", {"method": "sdgf-geometric", "schedule": 10_000}),
    "s-ste 2:4": ("2:4", {"method": "s-ste"}),
    "ste 1:8, a mask every 40 steps": ("1:8", {"method": "ste", "mask_every": 40}),
}


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


def main() -> None:
    """Print the table."""
    options = start(PARSER)
    config = load(find_recipe(options.recipe))
    steps = {
        name: make_step(config, *row)
        for name, row in CANDIDATES.items()
        if name.startswith("dense") or options.only in name
    }
    times = interleaved_seconds(steps, options.rounds, clock_of(options))
    print(f"{options.recipe}: {config.batch.tokens_per_step} tokens per step, {options.rounds} rounds\n")
    rows = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["dense"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append([name, f"{statistics.median(seconds) * 1e3:.0f}", f"{middle:.3f}", f"{low:.2f} to {high:.2f}"])
    print_table(["step", "median ms", "÷ dense", "quartiles"], rows)
