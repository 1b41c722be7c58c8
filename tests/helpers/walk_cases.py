"""The walks of docs/walks.md: what to run for each, where it ends, and how many files it may visit."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from lora_models import LLAMA_TARGETS, tiny_llama, tokens
from pruned_models import make_llama, save_model
from texts import sentences
from training import write_recipe
from walks import walk

from leanstep.cli import main
from leanstep.lora import LoraConfig, apply_lora
from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD, param_groups


class Case(NamedTuple):
    """A walk: ``run`` gets an empty folder and returns (file, function) in order.

    Attributes:
        listed: the most files that the page may name.
        visited: the most counted files that the call may visit.
        counted: how the paths of counted files begin: folders and single files.
    """

    run: Callable[[Path], list[tuple[str, str]]]
    listed: int
    visited: int
    counted: tuple[str, ...]


def _step(make: Callable[[torch.nn.Module], torch.optim.Optimizer]) -> Callable[[Path], list[tuple[str, str]]]:
    """The walk of an optimizer's fourth step: by then state is there and kernels are built."""

    def run(_: Path) -> list[tuple[str, str]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
        optimizer = make(model)
        for last in (False, False, False, True):
            optimizer.zero_grad()
            model(torch.randn(4, 16)).square().mean().backward()
            if not last:
                optimizer.step()
        return walk(optimizer.step)

    return run


def _lora(_: Path) -> list[tuple[str, str]]:
    model = tiny_llama()
    ids = tokens()

    def adapt_and_differentiate() -> None:
        apply_lora(model, LoraConfig(r=4, target_modules=LLAMA_TARGETS))
        model(ids, labels=ids).loss.backward()

    return walk(adapt_and_differentiate)


def _prune(folder: Path) -> list[tuple[str, str]]:
    save_model(make_llama(2), folder / "model")
    (folder / "text.txt").write_text(sentences(60))
    small = ["--samples", "6", "--curve-samples", "3", "--held-out", "2", "--seq-len", "24", "--levels", "0.4,0.6,0.8"]
    command = ["prune", str(folder / "model"), "--out", str(folder / "out"), "--data", str(folder / "text.txt"), *small]
    return walk(lambda: main([*command, "--sparsity", "0.6"]), until=ALLOCATION, closed=MEASUREMENT)


def _train(folder: Path) -> list[tuple[str, str]]:
    recipe = write_recipe(folder)
    return walk(lambda: main(["train", str(recipe), f"out={folder / 'run'}", "log.trackers=[]"]), until=LOOP)


ALLOCATION = "pruning/allocate/knapsack.py:solve_knapsack"
# what pruning each matrix does is measured before the allocation is solved: a walk of its own
MEASUREMENT = ("pruning/measure/measure.py:measure_curves",)
LOOP = "recipes/training/run.py:Run.loop"
EVERYTHING = ("kernels/", "leanstep/", "lora/", "optimizers/", "pruning/", "recipes/", "sparsity/")
# the commands, without the helpers of one call in leanstep/_*.py
COMMANDS = ("leanstep/cli.py", "recipes/")
CASES = {
    "Lion.step": Case(_step(lambda model: Lion(model.parameters(), lr=1e-3)), 9, 9, EVERYTHING),
    "SinkGD.step": Case(_step(lambda model: SinkGD(param_groups(model), lr=1e-2)), 16, 16, EVERYTHING),
    "LANTON.step": Case(_step(lambda model: LANTON(param_groups(model), lr=1e-2)), 9, 9, ("optimizers/",)),
    "MFAC.step": Case(_step(lambda model: MFAC(model.parameters(), lr=1e-2, window=8)), 9, 9, ("optimizers/",)),
    "apply_lora to backward": Case(_lora, 9, 9, ("lora/",)),
    "leanstep prune to the allocation": Case(_prune, 24, 24, ("pruning/", *COMMANDS)),
    "leanstep train to the loop": Case(_train, visited=19, listed=17, counted=COMMANDS),
}
