"""Step times of optimizers on the parameter list of LLaMA-60M, side by side in one process.

    python benchmarks optimizers/step [--device cuda] [--dtype float32 bfloat16] [--threads 2] [--rounds 15] [--slow]

All optimizers step the same parameters with the same gradients, one step each per round, in shuffled order; medians
over the rounds. "bytes" is what the rule must read and write, divided by the bandwidth of a copy measured in the same
rounds: 1.0 is the floor that the copy sets. Peers are measured when they are installed (extra ``bench``). ``--slow``
adds those that take over a second a step. The first step of each optimizer, which may compile, is reported apart.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable

import torch
from common import command_line, interleaved_medians, print_table, start, timed
from models import llama_60m_parameters
from torch import Tensor

from leanstep.optimizers import Lion, SinkGD

PARSER = command_line(
    __doc__, device="cpu", dtype=["float32", "bfloat16"], threads=0, rounds=15,
    slow=(False, "also optimizers that take over a second a step"),
)  # fmt: skip


def candidates(hidden: list[Tensor], others: list[Tensor], slow: bool) -> dict[str, tuple[Callable[[], object], float]]:
    """name -> (step, parameter-sized reads and writes per parameter); 0 where bytes are not the measure."""
    params = hidden + others
    rate = {"lr": 1e-6}
    options = rate | {"weight_decay": 0.1}
    share = sum(p.numel() for p in hidden) / sum(p.numel() for p in params)
    # the published routing: matrices to SinkGD, embedding, head and norms to AdamW
    groups = [{"params": hidden, "algorithm": "sinkgd"}, {"params": others, "algorithm": "adamw"}]
    steps: dict[str, tuple[Callable[[], object], float]] = {
        "torch AdamW fused": (torch.optim.AdamW(params, fused=True, **options).step, 7),
        "torch SGD momentum fused": (torch.optim.SGD(params, momentum=0.9, fused=True, **rate).step, 5),
        "leanstep Lion": (Lion(params, **options).step, 5),
        "leanstep Lion int8 momentum": (Lion(params, momentum_dtype=torch.int8, **options).step, 0),
        'leanstep Lion nonfinite="pass"': (Lion(params, nonfinite="pass", **options).step, 5),
        # SinkGD's rule for embeddings, heads and norms, here for all
        "leanstep AdamW fallback": (SinkGD(params, algorithm="adamw", **options).step, 7),
        # five iterations read the gradient once each, the update reads it again
        "leanstep SinkGD + AdamW": (SinkGD(groups, **options).step, share * (5 + 3) + (1 - share) * 7),
    }
    if params[0].dtype == torch.bfloat16:
        steps["leanstep Lion stochastic rounding"] = (Lion(params, rounding="stochastic", **options).step, 5)
    if importlib.util.find_spec("bitsandbytes"):
        lion8 = importlib.import_module("bitsandbytes").optim.Lion8bit(params, **options)
        steps["bitsandbytes Lion8bit"] = (lion8.step, 0)
    for module in ("lion_pytorch", "pytorch_optimizer"):
        if importlib.util.find_spec(module):
            steps[f"{module} Lion"] = (importlib.import_module(module).Lion(params, **options).step, 5)
    if slow:
        muon, adamw = torch.optim.Muon(hidden, **rate), torch.optim.AdamW(others, fused=True, **rate)
        steps["torch Muon + AdamW fused"] = (lambda: (muon.step(), adamw.step()), 0)
    return steps


def measure(dtype: str, rounds: int, slow: bool, device: str) -> None:
    """Print one table."""
    hidden, others = llama_60m_parameters(getattr(torch, dtype), device)
    source = [param.detach().clone() for param in hidden + others]
    target = [torch.zeros_like(tensor) for tensor in source]
    steps = candidates(hidden, others, slow)
    first = {name: timed(step)[0] for name, (step, _) in steps.items()}
    runs: dict[str, Callable[[], object]] = {name: step for name, (step, _) in steps.items()}
    runs["copy"] = lambda: [a.copy_(b) for a, b in zip(target, source, strict=True)]
    medians = interleaved_medians(runs, rounds, warmup=0)
    copy, base = medians.pop("copy"), medians["torch AdamW fused"]
    moved = 2 * sum(tensor.nbytes for tensor in source)
    print(f"\ncopy of the parameters: {copy * 1e3:.1f} ms, {moved / copy / 1e9:.1f} GB/s\n")
    rows = []
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        streams = steps[name][1]
        floor = f"{seconds / (copy * streams / 2):.2f}" if streams else "—"
        rows.append([name, f"{seconds * 1e3:.1f}", f"{seconds / base:.2f}", floor, f"{first[name]:.1f}"])
    print_table([dtype, "median ms", "÷ AdamW fused", "x copy of its bytes", "first step s"], rows)


def main() -> None:
    """Measure, and print the table."""
    options = start(PARSER)
    warnings.simplefilter("ignore")
    for name in options.dtype:
        measure(name, options.rounds, options.slow, options.device)
