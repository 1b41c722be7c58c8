"""Optimizer steps beside torch's fused AdamW and other packages, on the parameters of LLaMA-60M and LLaMA-1B.

    python benchmarks device/steps [--dry-run] [--out FOLDER]

Each optimizer takes turns with ``torch.optim.AdamW(fused=True)`` on the same parameters and gradients. "device ms" is
the device's time with a host that is ahead, "ms" the time of an eager step from an idle device to an idle device, with
Python and launches. Ratios are to the AdamW of the same turns. "state" is relative to the bytes of the parameters.
Packages that are not installed have rows without times.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch
from events import Timer
from models import llama_parameters
from optimizer_steps import PEERS, Step, candidates, lanton, missing_peers
from stages import Cases, Row, Stage, describe, is_device_lost, release_memory, run_stage, stage_parser
from torch import Tensor

from leanstep.recipes.config.loader import load

PARSER = stage_parser(__doc__)
LISTS = (("llama-60m-adamw", "bfloat16"), ("llama-1b-adamw", "bfloat16"), ("llama-60m-adamw", "float32"))
FULL = {"lists": LISTS, "rounds": 11}
DRY = {"lists": (("llama-nano-adamw", "bfloat16"),), "rounds": 1}
BASE = "torch AdamW fused"


def main() -> int:
    """Measure, and print the table."""
    return run_stage("steps", PARSER, cases_of, FULL, DRY)


def cases_of(stage: Stage) -> Cases:
    """One case per list of parameters and dtype."""
    return {f"{recipe}, {dtype}": partial(measure, stage, recipe, dtype) for recipe, dtype in stage.sizes.lists}


def measure(stage: Stage, recipe: str, dtype: str) -> list[Row]:
    """Every optimizer in turns with AdamW: no more than two have state at a time."""
    warnings.simplefilter("ignore")
    sizes = {"vocab_size": 2048} | dict(load(recipe, []).model.config)
    hidden, others = llama_parameters(sizes, getattr(torch, dtype), stage.device)
    parameters, timer = {"parameters": recipe.removesuffix("-adamw"), "dtype": dtype}, Timer(stage.device)
    base, base_state = made(stage, candidates(hidden, others, True)[BASE][0])
    size = sum(param.nbytes for param in hidden + others)
    first = timings(timer, {BASE: base}, stage.sizes.rounds)[BASE]
    rows = [{**parameters, "optimizer": BASE, **first, "÷ AdamW, device": 1.0, "÷ AdamW": 1.0,
             "state": base_state / size}]  # fmt: skip
    makers = {name: make for name, (make, _) in candidates(hidden, others, True).items() if name != BASE}
    makers |= lanton_makers(hidden, others)
    for name, make in makers.items():
        row = {**parameters, "optimizer": name}
        try:
            step, state = made(stage, make)
            times = timings(timer, {name: step, BASE: base}, stage.sizes.rounds)
            ratios = {"÷ AdamW" + end: times[name][key] / times[BASE][key]
                      for end, key in ((", device", "device ms"), ("", "ms"))}  # fmt: skip
            rows.append(row | times[name] | ratios | {"state": state / size})
        except Exception as error:
            if is_device_lost(error):
                raise
            # an optimizer that does not run here says nothing about the others
            foreign = name in (label for label, _ in PEERS.values())
            rows.append(row | {"note": describe(error)} | ({} if foreign else {"ok": False}))
        step = None
        release_memory(stage.device)
    missing = [{**parameters, "optimizer": PEERS[module][0], "note": "not installed"} for module in missing_peers()]
    return rows + missing


def lanton_makers(hidden: list[Tensor], others: list[Tensor]) -> dict[str, partial]:
    """LANTON on the matrices and fused AdamW on the rest, as Muon has it; with and without estimates of the noise."""

    def make(name: str) -> Step:
        step, adamw = lanton(hidden, name), torch.optim.AdamW(others, lr=1e-6, fused=True)
        return lambda: (step(), adamw.step())

    return {
        f"leanstep {name} + AdamW fused": partial(make, name) for name in ("LANTON", "LANTON, noise_adaptive=False")
    }


def made(stage: Stage, make) -> tuple[Step, int]:
    """A step after its first call, and the bytes that the call has allocated and kept."""
    cuda = stage.device.type == "cuda"
    before = torch.cuda.memory_allocated(stage.device) if cuda else 0
    step = make()
    step()
    return step, (torch.cuda.memory_allocated(stage.device) - before) if cuda else 0


def timings(timer: Timer, runs: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of every run: the device's, and the wall clock's."""
    device, host = timer.medians(runs, rounds), timer.host_medians(runs, rounds)
    return {name: {"device ms": 1e3 * device[name], "ms": 1e3 * host[name]} for name in runs}
