"""Step time of LANTON beside torch.optim.Muon on the hidden matrices of LLaMA-60M, one process, interleaved.

    python benchmarks/lanton_step.py [--device cuda] [--dtype float32 bfloat16] [--threads 2] [--rounds 10]

"every fifth" is the mean over five steps, of which one estimates the noise. dion's Muon is measured where it is
installed (it needs a GPU).
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
from collections.abc import Callable

import torch
from optimizer_step import machine, make_parameters, seconds

from leanstep.optimizers import LANTON


def candidates(params: list[torch.Tensor], device: str) -> dict[str, Callable[[], object]]:
    """name -> one step, or five where the name says so."""
    options = {"lr": 1e-6, "norm": "rms", "scaling": "muon"}
    fifth = LANTON(params, noise_every=5, **options)
    steps: dict[str, Callable[[], object]] = {
        "torch Muon": torch.optim.Muon(params, lr=1e-6).step,
        "LANTON": LANTON(params, **options).step,
        "LANTON, noise every fifth step": lambda: [fifth.step() for _ in range(5)],
        "LANTON, noise_adaptive=False": LANTON(params, noise_adaptive=False, **options).step,
        'LANTON, nuclear="frobenius"': LANTON(params, nuclear="frobenius", **options).step,
    }
    if device != "cpu" and importlib.util.find_spec("dion"):
        from dion import Muon

        steps["dion Muon"] = Muon(params, lr=1e-6).step
    return steps


def measure(dtype: torch.dtype, rounds: int, device: str) -> list[str]:
    """Lines of one markdown table."""
    params, roles = make_parameters(dtype, device)
    steps = candidates([p for p, role in zip(params, roles, strict=True) if role == "hidden"], device)
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(seconds(steps[name], device) / (5 if "fifth" in name else 1))
    median = {name: statistics.median(values) for name, values in times.items()}
    lines = [f"| {str(dtype).removeprefix('torch.')} | median ms | ÷ torch Muon |", "| --- | ---: | ---: |"]
    base = median["torch Muon"]
    for name, value in sorted(median.items(), key=lambda item: item[1]):
        lines.append(f"| {name} | {value * 1e3:.0f} | {value / base:.2f} |")
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.device))
    for name in options.dtype:
        print()
        print("\n".join(measure(getattr(torch, name), options.rounds, options.device)), flush=True)


if __name__ == "__main__":
    main()
